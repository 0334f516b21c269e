"""The pre-copy loop on real targets."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import incdump
from incdump import DidNotConverge, DumpOptions, ImagesDir, PrecopyPolicy
from incdump.engine.dump import DumpRun
from incdump.engine.pages_image import PagesImage
from incdump.engine.throttle import Throttle
from incdump.errors import HolderError, ImagesIOError
from incdump.model.precopy import Freeze
from incdump.model.runs import page_count
from tests import command, oracle
from tests.command import refused
from tests.kernel.support import (
    WAYS,
    Chain,
    assert_untouched,
    carry_on,
    of_forced_tracker,
    require_tracker,
    watched_vmas,
)

if TYPE_CHECKING:
    import random
    from collections import Counter
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from incdump.model.options import Afterwards, PagemapName, TrackerName
    from incdump.model.precopy import Decision, MappingWrites, PrecopyRound, Rule, Verdict
    from incdump.model.stats import DumpResult
    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]


def directories(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


AT_ONCE = Freeze(seconds=0.0, scan_seconds=0.0, write_seconds=0.0)
"""With it any downtime is in reach, as far as the rule knows."""


@pytest.mark.asyncio
async def test_a_busy_tree_is_dumped_within_the_budget_and_exactly(
    churn: Callable[..., Target], images_root: Path
) -> None:
    target = churn(seed=91, threads=2, processes=2, mib=8, free_run=True, dirty_rate=2000)
    told: list[tuple[PrecopyRound, Decision]] = []
    result = await incdump.precopy(
        target.pid,
        images_root / "chain",
        policy=PrecopyPolicy(downtime=2.0, timeout=60),
        options=of_forced_tracker(DumpOptions(afterwards="stopped")),
        on_round=lambda done, decision: told.append((done, decision)),
    )
    pids = oracle.tree(target.pid)
    try:
        assert result.final is not None
        report = oracle.compare(result.final.images_dir, pids)
    finally:
        carry_on(pids.values())
    assert report.ok, report
    assert report.from_parents
    assert [done.number for done, _ in told] == list(range(1, len(told) + 1))
    assert [decision.verdict for _, decision in told[:-1]] == ["go on"] * (len(told) - 1)
    assert told[-1][1].verdict == "stop"
    names = [str(n + 1) for n in range(len(told) + 1)]
    assert directories(images_root / "chain") == sorted([*names, "latest"])
    assert (images_root / "chain" / "latest").resolve() == images_root / "chain" / names[-1]
    assert result.downtime is not None
    assert result.downtime > 0
    target.check()
    target.quit()


@pytest.mark.asyncio
async def test_a_tree_at_rest_needs_two_rounds(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=16)
    result = await incdump.precopy(target.pid, images_root / "chain", policy=PrecopyPolicy(final="none"))
    assert len(result.rounds) <= 3
    assert result.final is None
    assert_untouched(target)


@pytest.mark.asyncio
async def test_a_tree_that_writes_too_fast_is_left_as_it_is(churn: Callable[..., Target], images_root: Path) -> None:
    target = churn(seed=92, threads=2, mib=8, free_run=True)
    policy = PrecopyPolicy(downtime=1e-6, timeout=1.5, on_timeout="cancel")
    with pytest.raises(DidNotConverge, match="writes too fast") as caught:
        await incdump.precopy(target.pid, images_root / "chain", policy=policy, freezes=[AT_ONCE])
    assert caught.value.pid == target.pid
    assert_untouched(target)
    incdump.check((images_root / "chain" / "latest").resolve())
    target.check()
    target.quit()


@pytest.mark.asyncio
async def test_a_downtime_that_no_stop_keeps_to_is_said_so_after_two_rounds(
    churn: Callable[..., Target], images_root: Path
) -> None:
    target = churn(seed=94, threads=2, mib=8, free_run=True)
    told: list[PrecopyRound] = []
    with pytest.raises(
        DidNotConverge, match=r"cannot stand still for only 1e-06 s: a stop takes about .*: allow --down"
    ):
        await incdump.precopy(
            target.pid,
            images_root / "chain",
            policy=PrecopyPolicy(downtime=1e-6, timeout=60),
            on_round=lambda done, _: told.append(done),
        )
    assert [done.number for done in told] == [1, 2]
    assert_untouched(target)
    target.check()
    target.quit()


@pytest.mark.asyncio
async def test_it_is_stopped_all_the_same_where_that_was_asked_for(
    churn: Callable[..., Target], images_root: Path
) -> None:
    target = churn(seed=93, threads=2, mib=8, free_run=True)
    policy = PrecopyPolicy(downtime=1e-6, timeout=1.0, on_timeout="force")
    result = await incdump.precopy(
        target.pid, images_root / "chain", policy=policy, options=DumpOptions(afterwards="stopped")
    )
    pids = oracle.tree(target.pid)
    try:
        assert result.final is not None
        report = oracle.compare(result.final.images_dir, pids)
    finally:
        carry_on(pids.values())
    assert report.ok, report
    target.check()


@pytest.mark.asyncio
async def test_a_tree_that_writes_too_fast_is_slowed_down_and_then_runs_as_before(
    churn: Callable[..., Target], images_root: Path
) -> None:
    target = churn(seed=95, threads=2, mib=8, free_run=True)
    before = await speed(target)
    told: list[PrecopyRound] = []
    result = await incdump.precopy(
        target.pid,
        images_root / "chain",
        policy=PrecopyPolicy(downtime=1e-6, timeout=0.5, on_timeout="throttle"),
        on_round=lambda done, _: told.append(done),
    )
    assert max(done.throttled for done in told) > 0.5
    assert result.final is not None
    assert_untouched(target)
    assert await speed(target) > before / 3


async def speed(target: Target) -> float:
    """What it does in a second."""
    began, first = time.monotonic(), done_by(target)
    await anyio.sleep(0.5)
    return (done_by(target) - first) / (time.monotonic() - began)


def done_by(target: Target) -> int:
    """What it has done so far, operations."""
    return sum(int(part.partition("=")[2]) for part in target.command("stats").split() if "=" in part)


@pytest.mark.asyncio
async def test_a_rule_of_ones_own_decides(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=4)
    seen: list[int] = []

    def rule(history: list[PrecopyRound], policy: PrecopyPolicy, freezes: object, throttled: float) -> Decision:
        seen.append(len(history))
        decision = incdump.should_stop(history, policy)
        return type(decision)(
            verdict="stop" if len(history) == 5 else "go on", why="so it is", estimate=decision.estimate
        )

    result = await incdump.precopy(target.pid, images_root / "chain", rule=rule)  # type: ignore[arg-type]
    assert seen == [1, 2, 3, 4, 5]
    assert len(result.rounds) == 5


@pytest.mark.asyncio
@pytest.mark.parametrize("own", [False, True])
async def test_a_round_reads_the_round_before_it_and_no_older_ones(
    rewriter: Callable[..., Target], images_root: Path, pagemap_reads: Counter[str], own: bool
) -> None:
    """However many there are: the last dump, too."""
    target = rewriter(mib=4)
    options = DumpOptions(afterwards="stopped")
    if own:
        async with incdump.Session(target.pid) as session:
            rounds = session.precopy(images_root / "chain", rule=rounds_of(12), options=options)
            async for done, _ in rounds:
                target.dirty(5, seed=done.number)
            final = rounds.result.final
    else:
        final = (await incdump.precopy(target.pid, images_root / "chain", rule=rounds_of(12), options=options)).final
    pids = oracle.tree(target.pid)
    try:
        assert final is not None
        *older, last = [pagemap_reads[str(images_root / "chain" / str(number))] for number in range(1, 13)]
        assert older == [1] * 11
        assert 1 <= last <= 2  # once more to find what was written most, where the rounds do not shrink
        report = oracle.compare(final.images_dir, pids)
    finally:
        carry_on(pids.values())
    assert report.ok, report
    assert len(incdump.check(final.images_dir).levels) == 13


@pytest.mark.asyncio
async def test_cancelled_at_any_moment_the_tree_runs_on(churn: Callable[..., Target], images_root: Path) -> None:
    target = churn(seed=94, threads=2, mib=4, free_run=True)
    for n in range(12):
        with anyio.move_on_after(0.02 * n * n):
            policy = PrecopyPolicy(downtime=1e-6, timeout=0.3, on_timeout="throttle")
            await incdump.precopy(target.pid, images_root / str(n), policy=policy)
        assert_untouched(target)
    target.check()
    target.quit()


# --- pages that are written in every round ----------------------------------------------------------------------------

HOT = 512
"""Pages that `heat` writes, of 16 MiB."""
FEW = HOT // 8
"""More than a process at rest writes to its stack and such."""


def heat(target: Target, number: int) -> None:
    """Write every eighth page of a rewriter of 16 MiB."""
    assert target.stripe(8, number) == HOT


def rounds_of(number: int, verdict: Verdict = "go on") -> Rule:
    """A rule that makes so many rounds, with this verdict after all but the last."""

    def rule(
        history: Sequence[PrecopyRound], policy: PrecopyPolicy, freezes: Sequence[Freeze], throttled: float
    ) -> Decision:
        decision = incdump.should_stop(history, policy, freezes, throttled)
        return replace(decision, verdict="stop" if len(history) == number else verdict)

    return rule


def covered(path: Path, target: Target) -> int:
    """Pages that an images dir has of a target's process, itself or by its parents."""
    return page_count(ImagesDir(path).covered(target.pid))


@pytest.mark.asyncio
@pytest.mark.parametrize("pagemap", ["scan", "cache", "plain"])
@pytest.mark.parametrize("tracker", ["uffd-wp", "soft-dirty"])
async def test_what_is_written_in_every_round_is_copied_by_the_last_dump_only(
    rewriter: Callable[..., Target], images_root: Path, tracker: TrackerName, pagemap: PagemapName
) -> None:
    require_tracker(tracker)
    target = rewriter(mib=16)
    result = await incdump.precopy(
        target.pid,
        images_root / "chain",
        rule=rounds_of(6),
        options=DumpOptions(tracker=tracker, pagemap=pagemap, afterwards="stopped"),
        on_round=lambda done, _: heat(target, done.number),
    )
    pids = oracle.tree(target.pid)
    try:
        assert result.final is not None
        report = oracle.compare(result.final.images_dir, pids)
        incdump.check(result.final.images_dir)
    finally:
        carry_on(pids.values())
    assert report.ok, report
    copied = [done.bytes_written >> 12 for done in result.rounds]
    deferred = [done.bytes_deferred >> 12 for done in result.rounds]
    assert all(HOT <= pages <= HOT + FEW for pages in copied[1:3])
    assert max(copied[3:]) < FEW
    assert deferred[:3] == [0, 0, 0]
    assert all(HOT <= pages <= HOT + FEW for pages in deferred[3:])
    assert result.decision is not None
    assert result.decision.estimate.dirty_bytes is not None
    assert result.decision.estimate.dirty_bytes >= HOT << 12
    assert result.final.stats.pages_written >= HOT
    assert result.final.stats.pages_deferred == 0
    whole = covered(images_root / "chain" / "3", target)
    assert whole - HOT - FEW <= covered(images_root / "chain" / "4", target) <= whole - HOT
    assert covered(images_root / "chain" / "7", target) >= whole


@pytest.mark.asyncio
@pytest.mark.parametrize("pagemap", ["scan", "cache", "plain"])
@pytest.mark.parametrize("tracker", ["uffd-wp", "soft-dirty"])
async def test_what_is_written_no_more_is_copied_by_the_next_round_or_dump(
    rewriter: Callable[..., Target], images_root: Path, tracker: TrackerName, pagemap: PagemapName
) -> None:
    """Nothing tells of these pages any more but that the parent images lack them."""
    require_tracker(tracker)
    target = rewriter(mib=16)
    options = DumpOptions(tracker=tracker, pagemap=pagemap, afterwards="stopped")
    for number, hot_for in (("a", 4), ("b", 5)):
        result = await incdump.precopy(
            target.pid,
            images_root / number,
            rule=rounds_of(6),
            options=options,
            on_round=lambda done, _, hot_for=hot_for: heat(target, done.number) if done.number < hot_for else None,
        )
        pids = oracle.tree(target.pid)
        try:
            assert result.final is not None
            report = oracle.compare(result.final.images_dir, pids)
        finally:
            carry_on(pids.values())
        assert report.ok, report
        deferred = [done.bytes_deferred >> 12 for done in result.rounds]
        copied = [done.bytes_written >> 12 for done in result.rounds]
        assert [pages >= HOT for pages in deferred] == [False, False, False, *(n < hot_for for n in (3, 4, 5))]
        assert copied[hot_for] >= HOT  # the round after the last one in which they were written
        assert result.final.stats.pages_written < FEW


@pytest.mark.asyncio
async def test_there_is_room_for_what_was_left_for_the_last_dump_before_the_tree_is_stopped(
    rewriter: Callable[..., Target], images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for what was not written again."""
    require_tracker("uffd-wp")
    target = rewriter(mib=16)
    rooms: list[int] = []
    make_room = PagesImage.make_room

    def note(self: PagesImage, pages: int) -> None:
        rooms.append(pages)
        make_room(self, pages)

    monkeypatch.setattr(PagesImage, "make_room", note)

    def at(done: PrecopyRound, _: Decision) -> None:
        if done.number < 6:
            heat(target, done.number)
        else:
            rooms.clear()

    for number, own in enumerate((False, True)):
        images = images_root / str(number)
        if own:
            async with incdump.Session(target.pid) as session:
                async for done, decision in session.precopy(images, rule=rounds_of(6)):
                    at(done, decision)
        else:
            result = await incdump.precopy(target.pid, images, rule=rounds_of(6), on_round=at)
            assert result.rounds[-1].bytes_deferred >= HOT << 12
        assert max(rooms) >= HOT
        rooms.clear()


@pytest.mark.asyncio
async def test_what_no_tracker_follows_is_never_deferred(churn: Callable[..., Target], images_root: Path) -> None:
    target = churn(seed=96, threads=2, mib=4, free_run=True)
    result = await incdump.precopy(
        target.pid, images_root / "chain", rule=rounds_of(5), options=DumpOptions(tracker="content")
    )
    assert all(done.bytes_written > 0 and not done.bytes_deferred for done in result.rounds)


@pytest.mark.asyncio
async def test_a_churning_tree_whose_hot_pages_were_deferred_is_dumped_exactly(
    churn: Callable[..., Target], images_root: Path
) -> None:
    require_tracker("uffd-wp")
    target = churn(seed=97, threads=2, processes=3, mib=8, free_run=True)
    async with incdump.Session(target.pid) as session:
        chain = Chain(target, images_root / "after", session=session)
        for n in range(2):
            rounds = session.precopy(images_root / str(n), policy=PrecopyPolicy(final="none"), rule=rounds_of(4 + n))
            deferred = [done.bytes_deferred async for done, _ in rounds]
            assert any(deferred)
            chain.rounds.append(session.rounds[-1])
            await chain.prove()
    target.quit()


@pytest.mark.asyncio
async def test_the_hottest_mapping_is_named_though_nothing_of_it_was_copied(
    rewriter: Callable[..., Target], images_root: Path
) -> None:
    target = rewriter(mib=16)
    five = rounds_of(5)

    def rule(history: Sequence[PrecopyRound], *rest: Any) -> Decision:
        verdict: Verdict = "cancel" if len(history) == 5 else "go on"
        return replace(five(history, *rest), verdict=verdict, converges=False)

    told: list[PrecopyRound] = []

    def on_round(done: PrecopyRound, _: Decision) -> None:
        told.append(done)
        heat(target, done.number)

    with pytest.raises(DidNotConverge, match=r"most is written to .* \(51\d pages\)"):
        await incdump.precopy(target.pid, images_root / "chain", rule=rule, on_round=on_round)
    assert told[-1].bytes_written < FEW << 12


# --- in a session -----------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_sessions_rounds_one_by_one(rewriter: Callable[..., Target], images_root: Path) -> None:
    require_tracker("uffd-wp")
    target = rewriter(mib=16)
    async with incdump.Session(target.pid) as session:
        before = await session.predump(images_root / "before")
        rounds = session.precopy(images_root / "chain", rule=rounds_of(4), options=DumpOptions(afterwards="stopped"))
        told: list[tuple[int, str]] = []
        async for done, decision in rounds:
            assert rounds.result.rounds[-1] is done
            assert rounds.result.decision is decision
            assert session.rounds[-1].images_dir == str(images_root / "chain" / str(done.number))
            told.append((done.number, decision.verdict))
            heat(target, done.number)
        pids = oracle.tree(target.pid)
        try:
            final = rounds.result.final
            assert final is not None
            report = oracle.compare(final.images_dir, pids)
        finally:
            carry_on(pids.values())
        assert report.ok, report
        assert told == [(1, "go on"), (2, "go on"), (3, "go on"), (4, "stop")]
        assert rounds.result.rounds[3].bytes_deferred >= HOT << 12
        assert rounds.result.downtime == pytest.approx((final.stats.freezing_time + final.stats.frozen_time) / 1e6)
        assert session.rounds[-1] is final
        assert session.rounds[1].parent == before.images_dir
        assert all(r.incremental and not r.warnings for r in session.rounds[1:])
        assert directories(images_root / "chain") == ["1", "2", "3", "4", "5", "latest"]
        assert (images_root / "chain" / "latest").resolve() == images_root / "chain" / "5"
        with pytest.raises(StopAsyncIteration):
            await anext(rounds)
        chain = Chain(target, images_root / "after", session=session)
        await chain.predump(parent="../../chain/5")
        await chain.prove(check=False)
    assert watched_vmas(target.pid) == []


async def hot_rounds(session: incdump.Session, target: Target, path: Path, number: int) -> incdump.PrecopyRounds:
    """A loop that stands after so many rounds, pages deferred."""
    rounds = session.precopy(path, rule=rounds_of(9))
    async for done, _ in rounds:
        if done.number == number:
            break
        heat(target, done.number)
    assert rounds.result.rounds[-1].bytes_deferred >= HOT << 12
    return rounds


async def fail_in_round(rounds: incdump.PrecopyRounds, target: Target, number: int) -> None:
    """A loop whose body divides by zero after that round."""
    async for done, _ in rounds:
        heat(target, done.number)
        assert 1 // (number - done.number) >= 0


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["break", "aclose", "exception", "forgotten"])
async def test_a_loop_that_is_left(rewriter: Callable[..., Target], images_root: Path, way: str) -> None:
    """Its rounds stay, and the session's next dump is right: also of pages that the loop deferred."""
    require_tracker("uffd-wp")
    target = rewriter(mib=16)
    async with incdump.Session(target.pid) as session:
        chain = Chain(target, images_root / "after", session=session)
        if way == "exception":
            with pytest.raises(ZeroDivisionError):
                await fail_in_round(session.precopy(images_root / "chain", rule=rounds_of(9)), target, 4)
        else:
            rounds = await hot_rounds(session, target, images_root / "chain", 4)
            if way == "aclose":
                await rounds.aclose()
                with pytest.raises(StopAsyncIteration):
                    await anext(rounds)
            elif way == "forgotten":
                del rounds
                gc.collect()
        assert_untouched(target)
        assert directories(images_root / "chain") == ["1", "2", "3", "4", "latest"]
        chain.rounds.append(session.rounds[-1])
        await chain.prove(check=False)
        assert chain.last.incremental
        assert chain.last.stats.pages_written >= HOT
        if way == "break":  # and may be gone on with
            done, _ = await anext(rounds)
            assert done.number == 5
            assert session.rounds[-1].incremental


@pytest.mark.asyncio
@pytest.mark.parametrize("quiet", [False, True], ids=["hot", "quiet"])
async def test_a_round_that_fails_after_pages_were_deferred(
    rewriter: Callable[..., Target], images_root: Path, monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    require_tracker("uffd-wp")
    target = rewriter(mib=16)

    def fail(*_: object) -> None:
        raise ImagesIOError("the disk is full")

    async with incdump.Session(target.pid) as session:
        rounds = await hot_rounds(session, target, images_root / "chain", 4)
        if not quiet:
            heat(target, 99)
        with monkeypatch.context() as patch:
            patch.setattr(DumpRun, "_finish", fail)
            with pytest.raises(ImagesIOError):
                await anext(rounds)
        with pytest.raises(StopAsyncIteration):
            await anext(rounds)
        assert_untouched(target)
        assert directories(images_root / "chain") == ["1", "2", "3", "4", "latest"]
        chain = Chain(target, images_root / "after", session=session)
        chain.rounds.append(session.rounds[-1])
        await chain.prove(check=False)
        assert chain.last.incremental
        assert HOT <= chain.last.stats.pages_written <= HOT + FEW


async def follow(rounds: incdump.PrecopyRounds) -> None:
    """All of them."""
    async for _ in rounds:
        pass


@pytest.mark.asyncio
async def test_cancelled_at_any_moment_a_session_goes_on(
    churn: Callable[..., Target], images_root: Path, rng: random.Random, times: Callable[[int], int]
) -> None:
    require_tracker("uffd-wp")
    target = churn(seed=98, threads=2, mib=4, free_run=True, dirty_rate=3000)
    policy, rule = PrecopyPolicy(final="none"), rounds_of(5, "throttle")
    async with incdump.Session(target.pid) as session:
        chain = Chain(target, images_root / "after", session=session)
        await follow(session.precopy(images_root / "0", policy=policy, rule=rule))
        again = session.precopy(images_root / "1", policy=policy, rule=rule)
        await follow(again)
        assert any(done.bytes_deferred for done in again.result.rounds)
        assert again.result.rounds[-1].throttled > 0.5
        for n in range(2, 2 + times(6)):
            await rng.choice(WAYS)(
                follow(session.precopy(images_root / str(n), policy=policy, rule=rule)),
                again.result.seconds * rng.uniform(0, 1.1),
            )
            assert_untouched(target)
            if n % 3 == 1:
                chain.rounds.append(session.rounds[-1])
                await chain.prove()
        assert all(r.incremental for r in session.rounds[1:]), [r.warnings for r in session.rounds]
    target.quit()


@pytest.mark.asyncio
async def test_a_target_is_not_slowed_down_between_two_rounds(
    churn: Callable[..., Target], images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tracker("uffd-wp")
    target = churn(seed=99, threads=2, mib=8, free_run=True)
    before = await speed(target)
    policy = PrecopyPolicy(downtime=1e-6, timeout=0.1, on_timeout="throttle")
    stops: list[float] = []
    stop_for = Throttle._stop_for

    async def stop(self: Throttle, freezer: object, seconds: float) -> None:
        stops.append(seconds)
        await stop_for(self, freezer, seconds)  # type: ignore[arg-type]

    monkeypatch.setattr(Throttle, "_stop_for", stop)
    async with incdump.Session(target.pid) as session:
        async for done, _ in session.precopy(images_root / "chain", policy=policy):
            if done.throttled > 0.5:
                break
        assert stops
        stops.clear()
        assert_untouched(target)
        assert await speed(target) > before / 3
        assert not stops
        await session.dump(images_root / "last")
    target.quit()


@pytest.mark.asyncio
async def test_a_session_looks_for_criu_before_its_rounds(rewriter: Callable[..., Target], images_root: Path) -> None:
    require_tracker("uffd-wp")
    target = rewriter(mib=1)
    async with incdump.Session(target.pid) as session:
        rounds = session.precopy(
            images_root / "1", policy=PrecopyPolicy(final="checkpoint"), criu=str(images_root / "none")
        )
        with pytest.raises(incdump.CriuError, match="there is no program"):
            await follow(rounds)
        assert rounds.result.rounds == session.rounds == []
        assert not (images_root / "1").exists()
    assert_untouched(target)


@pytest.mark.asyncio
async def test_a_session_that_cannot_make_rounds(rewriter: Callable[..., Target], images_root: Path) -> None:
    require_tracker("uffd-wp")
    target = rewriter(mib=1)
    policy = PrecopyPolicy(downtime=1e-9, timeout=0.5)
    async with incdump.Session(target.pid) as session:
        with pytest.raises(incdump.XferError, match="directories"):
            session.precopy(images_root / "1", options=DumpOptions(page_server=("localhost", 1)))
        target.command("rate 1000")
        with pytest.raises(DidNotConverge):
            await follow(session.precopy(images_root / "1", policy=policy))
        rounds = session.precopy(images_root / "1", policy=policy)
        with pytest.raises(incdump.ImagesError):  # there are rounds in it
            await anext(rounds)
        left = session.precopy(images_root / "2", policy=policy)
        await anext(left)
    with pytest.raises(HolderError, match="closed"):
        await anext(left)
    assert_untouched(target)


def test_the_command(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=16)
    done = command.incdump("precopy", "-t", target.pid, "-D", images_root / "1", "--downtime", "5s", "--json")
    assert done.code == 0, done
    told = [json.loads(line) for line in done.out.splitlines()]
    assert [line["event"] for line in told] == ["round"] * (len(told) - 1) + ["end"]
    assert told[-1]["final"]["incremental"]
    assert told[-1]["downtime"] == pytest.approx(
        (told[-1]["final"]["freezing_time"] + told[-1]["final"]["frozen_time"]) / 1e6
    )
    assert [part["part"] for part in told[-1]["freeze"]] == ["freezing", "scan", "copy", "rest"]
    assert sum(part["seconds"] for part in told[-1]["freeze"]) == pytest.approx(told[-1]["downtime"])
    assert min(part["seconds"] for part in told[-1]["freeze"]) >= 0
    last_round = told[-2]
    assert last_round["started"] + last_round["seconds"] < told[-1]["frozen_at"] < told[-1]["seconds"]
    assert told[-1]["report"] is None
    done = command.incdump("precopy", "-t", target.pid, "-D", images_root / "2", "--final", "none")
    assert done.code == 0, done
    assert "round" in done.out.splitlines()[0]
    assert_untouched(target)


def test_the_text_has_what_was_left_for_the_last_dump(rewriter: Callable[..., Target], images_root: Path) -> None:
    require_tracker("uffd-wp")
    target = rewriter(mib=1, rate=20_000)
    options = ("--downtime", "1ms", "--max-rounds", 6)
    done = command.incdump("precopy", "-t", target.pid, "-D", images_root / "chain", *options)
    assert done.code == 0, done
    rounds, _, end = done.out.partition("pre-copy into")
    assert " left for the last dump" in rounds
    assert ("left for last" in end) == (" left for the last dump" in rounds.splitlines()[-1])
    quiet = rewriter(mib=1)
    done = command.incdump("precopy", "-t", quiet.pid, "-D", images_root / "quiet", *options)
    assert done.code == 0, done
    assert "left for" not in done.out


def test_the_text_has_how_the_downtime_divides(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=16)
    done = command.incdump("precopy", "-t", target.pid, "-D", images_root / "1", "--downtime", "5s", "-v")
    assert done.code == 0, done
    shown = done.out[done.out.index("how the downtime divides") :].splitlines()
    assert [line.split("  ")[1] for line in shown[1:]] == ["part", "freezing", "scan", "copying", "the rest", "in all"]
    assert "freezing" in done.err


def test_on_a_terminal_one_table_is_live_and_stays(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=32, rate=2000)
    leader, follower = os.openpty()
    arguments = ("precopy", "-t", str(target.pid), "-D", str(images_root / "1"), "--downtime", "5s")
    process = subprocess.Popen(
        [sys.executable, "-m", "incdump", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
        cwd=command.ROOT,
        env={**command.environment(), "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )
    os.close(follower)
    shown = b""
    with open(leader, "rb", 0) as terminal, contextlib.suppress(OSError):  # EIO is a terminal's end of file
        while part := terminal.read(65536):
            shown += part
    assert process.wait() == 0
    text = shown.decode()
    assert "the last dump: freezing" in text
    assert "\x1b[2K" in text  # lines that were drawn again
    frames = re.findall("╭─ ([a-z -]+[a-z])", text)
    assert frames[-3:] == ["pre-copy of process", "pre-copy into", "how the downtime divides"]
    left = text[text.rindex("╭─ pre-copy of process") :]
    assert "of 5 s" in left
    assert "downtime" in left
    assert_untouched(target)


@pytest.mark.parametrize("name", ["a.svg", "a.png", "a.html"])
def test_the_command_leaves_a_report(churn: Callable[..., Target], images_root: Path, name: str) -> None:
    target = churn(seed=96, threads=2, processes=2, mib=8, free_run=True, dirty_rate=2000)
    arguments = ("precopy", "-t", target.pid, "-D", images_root / "1", "--downtime", "5s", "--report", name, "--json")
    done = command.incdump(*arguments, cwd=images_root)
    assert done.code == 0, done
    assert done.err == ""
    assert json.loads(done.out.splitlines()[-1])["report"] == str(images_root / name)
    data = (images_root / name).read_bytes()
    if name == "a.png":
        assert data.startswith(b"\x89PNG")
        return
    texts = list(ET.fromstring(data[data.index(b"<svg") : data.index(b"</svg>") + 6]).itertext())
    shown = data.decode() if name == "a.html" else "\n".join(texts)  # a page has its title above the picture
    assert shown.count(f"Pre-copy of process {target.pid} (churn") == 1
    assert f"incdump precopy -t {target.pid} " in shown
    rows = [text for text in texts if re.match(r"\d+ churn\S*\s+[0-9a-f]+-[0-9a-f]+\s+", text)]
    assert any(row.startswith(f"{target.pid} ") for row in rows)
    assert any("[stack]" in row or "(anonymous)" in row or "[heap]" in row for row in rows)
    assert any(text.startswith("true: ") for text in texts)
    target.check()
    target.quit()


def test_there_is_a_report_too_of_a_tree_that_writes_too_fast(churn: Callable[..., Target], images_root: Path) -> None:
    target = churn(seed=97, threads=2, mib=8, free_run=True)
    limits = ("--downtime", "1ms", "--timeout", "2s")
    report = images_root / "report.html"
    done = command.incdump("precopy", "-t", target.pid, "-D", images_root / "1", *limits, "--report", report)
    assert done.code == 9, done
    assert "It runs on as before" in report.read_text()
    assert_untouched(target)


@pytest.mark.asyncio
@pytest.mark.parametrize("afterwards", ["running", "killed"])
async def test_it_is_told_which_mappings_were_written(
    rewriter: Callable[..., Target], images_root: Path, afterwards: Afterwards
) -> None:
    target = rewriter(mib=16, rate=1000)
    told: list[list[MappingWrites]] = []
    dumps: list[DumpResult] = []

    def on_written(result: DumpResult, mappings: list[MappingWrites]) -> None:
        dumps.append(result)
        told.append(mappings)

    result = await incdump.precopy(
        target.pid,
        images_root / "chain",
        policy=PrecopyPolicy(downtime=5.0),
        options=of_forced_tracker(DumpOptions(afterwards=afterwards)),
        on_written=on_written,
    )
    assert len(told) == len(result.rounds) + 1
    big = told[0][0]
    assert big.pid == target.pid
    assert big.pages == 16 << 8
    assert big.end - big.start >= 16 << 20
    for dump, mappings in zip(dumps, told, strict=True):
        assert sum(mapping.pages for mapping in mappings) == dump.stats.pages_written + dump.stats.shpages_written
        assert mappings == sorted(mappings, key=lambda mapping: -mapping.pages)


@pytest.mark.parametrize("downtime", ["0", "-1s", "fast", "3 weeks", "nan", "1e9s"])
def test_times_that_are_none_are_refused(images_root: Path, downtime: str) -> None:
    done = command.incdump("precopy", "-t", 1, "-D", images_root / "1", "--downtime", downtime)
    assert done.code == 2
    assert "downtime" in done.err


def test_a_directory_that_holds_rounds_is_refused(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=1)
    arguments = ("precopy", "-t", target.pid, "-D", images_root / "1")
    assert command.incdump(*arguments).code == 0
    refused(command.incdump(*arguments), 4, "already holds a dump")
