"""When the pre-copy loop stops: a table of histories."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.model.precopy import (
    Final,
    Freeze,
    PrecopyPolicy,
    PrecopyRound,
    converges,
    estimate,
    has_stalled,
    seconds_text,
    should_stop,
)
from incdump.model.stats import DumpStats

MIB = 1 << 20


def rounds(
    *sizes: int, speed: float = 1000.0, pause: float = 0.0, scan: float = 0.001, deferred: int = 0
) -> list[PrecopyRound]:
    """Rounds of so many MiB each, copied at so many MiB a second.

    :param pause: seconds between two of them.
    :param deferred: MiB of each from the third on that are written in every round, and are not copied.
    """
    found, now = [], 0.0
    for number, size in enumerate(sizes, 1):
        seconds = scan + size / speed
        found.append(
            PrecopyRound(
                number=number,
                started=now,
                seconds=seconds,
                scan_seconds=scan,
                write_seconds=size / speed,
                pages_scanned=2048 * 256,
                bytes_written=size * MIB,
                bytes_deferred=deferred * MIB if number > 2 else 0,
            )
        )
        now += seconds + pause
    return found


POLICY = PrecopyPolicy(downtime=0.05, timeout=10.0)
TABLE = {
    "one round says nothing of the rate": (rounds(1000), POLICY, "go on"),
    "nothing was written": (rounds(1000, 0), POLICY, "stop"),
    "little is written": (rounds(1000, 10), POLICY, "stop"),
    "much is written": (rounds(1000, 800), POLICY, "go on"),
    "the rounds shrink": (rounds(1000, 500, 250, 120), POLICY, "go on"),
    "the rounds have shrunk": (rounds(1000, 400, 160, 64, 25, 10), POLICY, "stop"),
    "the budget is large": (rounds(1000, 800), replace(POLICY, downtime=2.0), "stop"),
    "the rounds that are allowed are over": (rounds(1000, 900, 900), replace(POLICY, max_rounds=3), "stop"),
    "the time is over, cancel": (rounds(6000, 6000), POLICY, "cancel"),
    "the time is over, force": (rounds(6000, 6000), replace(POLICY, on_timeout="force"), "stop"),
    "the time is over, throttle": (rounds(6000, 6000), replace(POLICY, on_timeout="throttle"), "throttle"),
    "the time is over, but little is left": (rounds(6000, 6000, 3), POLICY, "stop"),
    "it does not converge": (rounds(900, 900, 900, 900, 900), POLICY, "go on"),
    "it does not converge, throttle": (
        rounds(900, 900, 900, 900, 900),
        replace(POLICY, on_timeout="throttle"),
        "throttle",
    ),
}


TABLE |= {
    "all that is written is written in every round": (rounds(1000, 300, 0, 0, deferred=300), POLICY, "go on"),
    "which does not converge": (
        rounds(1000, 300, 0, 0, 0, deferred=300),
        replace(POLICY, on_timeout="throttle"),
        "throttle",
    ),
    "which the budget allows for": (rounds(1000, 300, 0, deferred=300), replace(POLICY, downtime=0.4), "stop"),
    "the rest shrinks, what is hot does not": (rounds(1000, 600, 300, 150, deferred=20), POLICY, "go on"),
    "what is hot is little": (rounds(1000, 60, 1, 0, deferred=20), POLICY, "stop"),
    "what is hot is too much": (rounds(1000, 60, 1, 0, deferred=60), POLICY, "go on"),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_rule(case: str) -> None:
    history, policy, verdict = TABLE[case]
    assert should_stop(history, policy).verdict == verdict


def test_a_target_that_cannot_be_slowed_down_any_further_is_stopped() -> None:
    policy = replace(POLICY, on_timeout="throttle")
    assert should_stop(rounds(6000, 6000), policy, throttled=1.0).verdict == "stop"


def test_the_estimate_is_fixed_cost_and_the_rest_by_the_bandwidth() -> None:
    history = rounds(1000, 100, speed=1000.0, pause=1.0, scan=0.004)
    freeze = Freeze(seconds=0.1, scan_seconds=0.02, write_seconds=0.05)
    found = estimate(history, POLICY, [freeze])
    assert found.bandwidth == pytest.approx(1000 * MIB)
    assert found.dirty_rate == pytest.approx(100 * MIB / 2.004)
    # Written since the last scan: during the round, and until the last dump scans.
    assert found.dirty_bytes == pytest.approx(100 * MIB / 2.004 * (0.104 + 0.004), rel=1e-6)
    assert found.downtime == pytest.approx(0.05 + found.dirty_bytes / found.bandwidth, rel=1e-6)


def test_scan_and_copy_go_on_side_by_side_and_the_longer_counts() -> None:
    freeze = Freeze(seconds=0.03, scan_seconds=0.0, write_seconds=0.0)
    quiet = estimate(rounds(1000, 0, scan=0.008), POLICY, [freeze])
    assert quiet.downtime == pytest.approx(0.03 + 0.008)
    little = estimate(rounds(1000, 2, speed=1e6, scan=0.5), POLICY, [freeze])
    assert 0.03 < (little.downtime or 0) < 0.03 + 0.5 * 1.01


def test_the_first_round_says_nothing_of_scans_if_there_is_another() -> None:
    first, second = rounds(1000, 100)
    freeze = Freeze(seconds=0.03, scan_seconds=0.0, write_seconds=0.0)
    found = [
        estimate([replace(first, scan_seconds=scan, write_seconds=write), second], POLICY, [freeze])
        for scan, write in ((0.001, 1.0), (0.3, 2.9))
    ]
    assert found[0] == found[1]


def test_the_bandwidth_is_between_the_latest_and_the_best() -> None:
    first, *later = rounds(1000, 100, 100, 100, 100)
    slower = [replace(r, write_seconds=4 * r.write_seconds) for r in later]
    found = estimate([first, *slower], POLICY).bandwidth
    assert found == pytest.approx((1000 + 250) / 2 * MIB)


def test_what_a_round_takes_beside_the_memory_is_the_least_that_was_seen() -> None:
    first, *later = rounds(1000, 0, 0, scan=0.0)
    slow, quick = (replace(r, seconds=seconds) for r, seconds in zip(later, (0.3, 0.1), strict=True))
    found = [estimate([first, *rest], POLICY).downtime for rest in ([quick], [slow, quick], [quick, slow])]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("final", ["dump", "checkpoint", "none"])
def test_the_fixed_cost_is_learned_from_what_rounds_take_beside_the_memory(final: Final) -> None:
    policy = replace(POLICY, final=final)

    def quiet(seconds: float) -> float:
        history = [replace(r, seconds=seconds, memory_seconds=0.0) for r in rounds(1000, 0, scan=0.0)]
        return estimate(history, policy).downtime or 0.0

    assert quiet(0.0) == 0.0
    assert quiet(0.4) == pytest.approx(2 * quiet(0.2))
    assert 0.1 < quiet(0.2) < 0.5


def test_a_checkpoint_stops_the_tree_for_longer_than_a_dump() -> None:
    history = [replace(r, seconds=r.seconds + 0.05) for r in rounds(1000, 10)]
    of_dump, of_checkpoint = (estimate(history, replace(POLICY, final=final)) for final in ("dump", "checkpoint"))
    assert (of_checkpoint.dirty_bytes or 0) > (of_dump.dirty_bytes or 0)
    assert (of_checkpoint.downtime or 0) > 1.2 * (of_dump.downtime or 0)


def test_what_is_prepared_before_the_freeze_is_no_part_of_a_dumps_but_of_a_checkpoints() -> None:
    bare = [replace(r, seconds=r.seconds + 0.05) for r in rounds(1000, 0)]
    prepared = [replace(r, memory_seconds=r.seconds - 0.01) for r in bare]
    of_dumps = [estimate(h, POLICY).downtime or 0 for h in (bare, prepared)]
    assert of_dumps[1] < of_dumps[0]
    policy = replace(POLICY, final="checkpoint")
    assert estimate(bare, policy).downtime == estimate(prepared, policy).downtime


def test_the_fixed_cost_of_earlier_freezes_takes_its_place() -> None:
    history = [replace(r, seconds=9.0) for r in rounds(1000, 0, scan=0.0)]
    freezes = [Freeze(seconds=s, scan_seconds=0.01, write_seconds=0.02) for s in (0.05, 0.09)]
    assert estimate(history, POLICY, freezes).downtime == pytest.approx((0.03 + 0.07) / 2)
    assert Freeze(seconds=0.01, scan_seconds=0.02, write_seconds=0.0).fixed == 0.0


def test_what_is_restored_elsewhere_is_waited_for_all_of_it() -> None:
    history = rounds(1000, 10)
    here = estimate(history, replace(POLICY, final="checkpoint")).downtime
    there = estimate(history, replace(POLICY, final="checkpoint", restore_rate=1024.0 * MIB)).downtime
    assert here is not None
    assert there == pytest.approx(here + 2.0)  # 2 GiB at 1 GiB a second
    freeze = Freeze(seconds=0.5, scan_seconds=0.0, write_seconds=0.0)  # which had its own restore in it
    with_it = replace(POLICY, final="checkpoint", restore_rate=1024.0 * MIB)
    assert estimate(history, with_it, [freeze]) == estimate(history, replace(POLICY, final="checkpoint"), [freeze])


def test_a_freeze_is_made_of_the_counters_of_its_dump() -> None:
    stats = DumpStats(freezing_time=2_000, frozen_time=40_000, scan_time=5_000, memwrite_time=12_000)
    assert Freeze.of(stats) == Freeze(seconds=0.042, scan_seconds=0.005, write_seconds=0.012)
    assert Freeze.of(stats).fixed == pytest.approx(0.03)


def test_few_pages_take_as_long_as_they_did_the_last_time() -> None:
    freeze = Freeze(seconds=0.0, scan_seconds=0.0, write_seconds=0.0)
    first, second = rounds(1000, 100, scan=0.0)
    second = replace(second, bytes_written=40 * 4096, write_seconds=0.15)  # of many processes, one by one
    assert estimate([first, second], POLICY, [freeze]).downtime == pytest.approx(0.15)


def test_what_was_deferred_has_to_be_copied_whether_or_not_it_is_written_again() -> None:
    history = rounds(1000, 100, 100, pause=1.0, scan=0.004)
    hot = [*history[:2], replace(history[2], bytes_deferred=50 * MIB)]
    without, found = estimate(history, POLICY), estimate(hot, POLICY)
    assert found.dirty_bytes == pytest.approx((without.dirty_bytes or 0) + 50 * MIB, abs=1)
    assert found.downtime == pytest.approx((without.downtime or 0) + 0.05)
    assert (found.dirty_rate or 0) > (without.dirty_rate or 0)
    assert found.bandwidth == without.bandwidth


def test_a_round_that_is_longer_ago_counts_less() -> None:
    old, new = rounds(1000, 800, 100), rounds(1000, 100, 800)
    assert (estimate(new, POLICY).dirty_rate or 0) > (estimate(old, POLICY).dirty_rate or 0)


def test_no_more_is_expected_than_there_is() -> None:
    history = [replace(r, pages_scanned=256) for r in rounds(1000, 900)]
    assert estimate(history, POLICY).dirty_bytes == MIB


MIGRATION = PrecopyPolicy(downtime=0.3, timeout=600.0, final="checkpoint", restore_rate=1024.0 * MIB)  # of 2 GiB: 2 s


def test_a_downtime_that_the_restore_alone_exceeds_is_said_to_be_out_of_reach_after_round_two() -> None:
    assert should_stop(rounds(1000), MIGRATION).verdict == "go on"
    decision = should_stop(rounds(1000, 400), MIGRATION)
    assert decision.verdict == "cancel"
    assert "even with nothing left to copy, 2s of it to fill the memory over there" in decision.why
    assert decision.allow is not None
    assert decision.allow > 2.0
    assert f"--downtime {seconds_text(decision.allow)}" in decision.why
    allowed = replace(MIGRATION, downtime=decision.allow)
    assert should_stop(rounds(1000, 400), allowed).verdict == "stop"


def test_whoever_wants_it_stopped_all_the_same_gets_that_once_the_rounds_no_longer_shrink() -> None:
    for on_timeout in ("force", "throttle"):
        policy = replace(MIGRATION, on_timeout=on_timeout)  # type: ignore[arg-type]
        assert should_stop(rounds(1000, 500, 250), policy).verdict == "go on"
        assert should_stop(rounds(1000, *[300] * 12), policy).verdict == "stop"


def test_who_has_said_how_many_rounds_there_are_to_be_gets_them() -> None:
    policy = replace(MIGRATION, max_rounds=4)
    assert [should_stop(rounds(*[900] * n), policy).verdict for n in (2, 3, 4)] == ["go on", "go on", "stop"]


def test_a_floor_that_the_estimate_may_have_wrong_ends_nothing() -> None:
    freeze = Freeze(seconds=POLICY.downtime * 1.9, scan_seconds=0.0, write_seconds=0.0)
    assert should_stop(rounds(1000, 400), POLICY, [freeze]).verdict == "go on"


@pytest.mark.parametrize(("on_timeout", "verdict"), [("cancel", "cancel"), ("force", "stop"), ("throttle", "throttle")])
def test_rounds_that_no_longer_shrink_end_the_loop_before_the_time_is_over(on_timeout: str, verdict: str) -> None:
    policy = replace(POLICY, timeout=600.0, on_timeout=on_timeout)  # type: ignore[arg-type]
    assert not has_stalled(rounds(*[900] * 9))
    assert has_stalled(rounds(*[900] * 10))
    assert not has_stalled(rounds(*[1] * 100))  # a tenth of a second: no more than a burst of writes
    assert not has_stalled(rounds(*[900] * 9, 500, 500))
    decision = should_stop(rounds(*[900] * 10), policy)
    assert (decision.verdict, decision.why) == (verdict, "the rounds no longer shrink")


def test_there_are_no_more_directories_than_a_person_wants_to_see() -> None:
    policy = replace(POLICY, timeout=600.0, downtime=0.001)
    many = rounds(*[5] * 200, pause=0.0)
    assert should_stop(many, policy, [Freeze(seconds=0.0, scan_seconds=0.0, write_seconds=0.0)]).verdict == "cancel"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.5, "1.5s"), (0.0853, "85ms"), (0.9999, "1s"), (12.34, "12s"), (1e-5, "1ms"), (0.123, "120ms")],
)
def test_times_are_written_as_they_can_be_given(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1000,), True),
        ((1000, 900), True),
        ((1000, 900, 900), True),
        ((1000, 900, 900, 900), False),
        ((1000, 900, 800, 880), True),
        ((1000, 900, 800, 700, 600), True),
        ((1000, 500, 600, 550), False),
        ((1000, 500, 600, 300), True),
    ],
)
def test_rounds_that_no_longer_shrink_are_noticed(sizes: tuple[int, ...], expected: bool) -> None:
    assert converges(rounds(*sizes)) is expected


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=8),
    st.floats(1, 1e5),
    st.floats(0, 5),
    st.sampled_from(["cancel", "force", "throttle"]),
    st.integers(0, 5000),
)
def test_whatever_was_measured_there_is_a_decision(
    sizes: list[int], speed: float, pause: float, on_timeout: str, deferred: int
) -> None:
    policy = replace(POLICY, on_timeout=on_timeout)  # type: ignore[arg-type]
    decision = should_stop(rounds(*sizes, speed=speed, pause=pause, deferred=deferred), policy)
    now = decision.estimate
    assert now.downtime is None or now.downtime >= 0
    if decision.verdict == "cancel":
        assert on_timeout == "cancel"
    if now.downtime is not None and now.downtime <= policy.downtime:
        assert decision.verdict == "stop"
