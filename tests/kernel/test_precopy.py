"""The pre-copy loop on real targets."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump import DidNotConverge, DumpOptions, PrecopyPolicy
from tests import command, oracle
from tests.command import refused
from tests.kernel.support import assert_untouched, carry_on, of_forced_tracker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from incdump.model.precopy import Decision, PrecopyRound
    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]


def directories(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


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
        await incdump.precopy(target.pid, images_root / "chain", policy=policy)
    assert caught.value.pid == target.pid
    assert_untouched(target)
    incdump.check((images_root / "chain" / "latest").resolve())
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
async def test_cancelled_at_any_moment_the_tree_runs_on(churn: Callable[..., Target], images_root: Path) -> None:
    target = churn(seed=94, threads=2, mib=4, free_run=True)
    for n in range(12):
        with anyio.move_on_after(0.02 * n * n):
            policy = PrecopyPolicy(downtime=1e-6, timeout=0.3, on_timeout="throttle")
            await incdump.precopy(target.pid, images_root / str(n), policy=policy)
        assert_untouched(target)
    target.check()
    target.quit()


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
    done = command.incdump("precopy", "-t", target.pid, "-D", images_root / "2", "--final", "none")
    assert done.code == 0, done
    assert "round" in done.out.splitlines()[0]
    assert_untouched(target)


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
