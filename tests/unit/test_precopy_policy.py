"""When the pre-copy loop stops: a table of histories."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.model.precopy import Freeze, PrecopyPolicy, PrecopyRound, converges, estimate, should_stop

MIB = 1 << 20


def rounds(*sizes: int, speed: float = 1000.0, pause: float = 0.0, scan: float = 0.001) -> list[PrecopyRound]:
    """Rounds of so many MiB each, copied at so many MiB a second.

    :param pause: seconds between two of them.
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


@pytest.mark.parametrize("case", TABLE)
def test_the_rule(case: str) -> None:
    history, policy, verdict = TABLE[case]
    assert should_stop(history, policy).verdict == verdict


def test_a_target_that_cannot_be_slowed_down_any_further_is_stopped() -> None:
    policy = replace(POLICY, on_timeout="throttle")
    assert should_stop(rounds(6000, 6000), policy, throttled=1.0).verdict == "stop"


def test_the_estimate_is_fixed_cost_scan_and_the_rest_by_the_bandwidth() -> None:
    history = rounds(1000, 100, speed=1000.0, pause=1.0, scan=0.004)
    freeze = Freeze(seconds=0.1, scan_seconds=0.02, write_seconds=0.05)
    found = estimate(history, POLICY, [freeze])
    assert found.bandwidth == pytest.approx(1000 * MIB)
    assert found.dirty_rate == pytest.approx(100 * MIB / 2.004)
    assert found.dirty_bytes == pytest.approx(100 * MIB / 2.004 * 0.104, rel=1e-6)
    assert found.downtime == pytest.approx(0.03 + 0.004 + found.dirty_bytes / found.bandwidth, rel=1e-6)


def test_a_round_that_is_longer_ago_counts_less() -> None:
    old, new = rounds(1000, 800, 100), rounds(1000, 100, 800)
    assert (estimate(new, POLICY).dirty_rate or 0) > (estimate(old, POLICY).dirty_rate or 0)


def test_no_more_is_expected_than_there_is() -> None:
    history = [replace(r, pages_scanned=256) for r in rounds(1000, 900)]
    assert estimate(history, POLICY).dirty_bytes == MIB


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
)
def test_whatever_was_measured_there_is_a_decision(
    sizes: list[int], speed: float, pause: float, on_timeout: str
) -> None:
    policy = replace(POLICY, on_timeout=on_timeout)  # type: ignore[arg-type]
    decision = should_stop(rounds(*sizes, speed=speed, pause=pause), policy)
    now = decision.estimate
    assert now.downtime is None or now.downtime >= 0
    if decision.verdict == "cancel":
        assert on_timeout == "cancel"
    if now.downtime is not None and now.downtime <= policy.downtime:
        assert decision.verdict == "stop"
