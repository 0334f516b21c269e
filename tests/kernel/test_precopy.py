"""The pre-copy loop on real targets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
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

    from incdump.model.options import Afterwards
    from incdump.model.precopy import Decision, MappingWrites, PrecopyRound
    from incdump.model.stats import DumpResult
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
    assert any(text.startswith(f"Pre-copy of process {target.pid} (churn") for text in texts)
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
    assert "writes too fast" in report.read_text()
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
