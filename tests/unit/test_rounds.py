"""What is told of a pre-copy loop as it runs: lines, JSON objects, and the live table."""

from __future__ import annotations

import json
import re
import time
from functools import partial

import anyio
import pytest

from incdump.cli import rounds as rounds_module
from incdump.cli.invocation import Invocation
from incdump.cli.rounds import Rounds, show_freeze
from incdump.cli.signals import run
from incdump.model.precopy import PrecopyPolicy, PrecopyRound, should_stop
from incdump.model.stats import DumpStats, FreezePart

Capture = pytest.CaptureFixture[str]

POLICY = PrecopyPolicy(downtime=0.05)


def history(count: int, deferred: int = 0) -> list[PrecopyRound]:
    return [
        PrecopyRound(
            number=n + 1,
            started=0.5 * n,
            seconds=0.45,
            scan_seconds=0.01,
            write_seconds=0.3,
            pages_scanned=100_000,
            bytes_written=100 << 20,
            throttled=0.25 if n == 2 else 0.0,
            bytes_deferred=deferred if n > 2 else 0,
        )
        for n in range(count)
    ]


def tell(rounds: Rounds, count: int, deferred: int = 0) -> None:
    known = history(count, deferred)
    for n in range(count):
        rounds.round(known[n], should_stop(known[: n + 1], POLICY))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Standard output passes for a terminal of 80 columns and 20 lines."""
    monkeypatch.setattr(rounds_module, "is_terminal", lambda: True)
    for name, value in {"TERM": "xterm", "FORCE_COLOR": "1", "COLUMNS": "80", "LINES": "20"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def live(invocation: Invocation, job: object) -> None:
    async def main() -> None:
        rounds = Rounds(invocation, POLICY, "pre-copy of process 7 (a\x1b[31mb)")
        with rounds.shown():
            await job(rounds)  # type: ignore[operator]

    run(main)


def test_without_a_terminal_there_is_a_line_for_each_round(capsys: Capture) -> None:
    rounds = Rounds(Invocation(), POLICY, "title")
    with rounds.shown():
        rounds.progress("dumping", DumpStats())
        tell(rounds, 3)
        rounds.step("something else")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["round", "pages", "bytes", "time", "written/s", "copied/s", "downtime"]
    assert lines[1].split()[:5] == ["1", "25,600", "100.0", "MiB", "450.0"]
    assert lines[3].endswith(", slowed down by 25%")


def test_what_was_deferred_is_told_where_something_was(terminal: pytest.MonkeyPatch, capsys: Capture) -> None:
    rounds = Rounds(Invocation(verbosity=1), POLICY, "title")
    tell(rounds, 5, 5 << 20)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(", 5.0 MiB left for the last dump") for line in lines] == [False] * 4 + [True] * 2

    async def job(rounds: Rounds, count: int) -> None:
        tell(rounds, count, 5 << 20)

    for count, times in ((3, 0), (5, 2)):
        live(Invocation(), partial(job, count=count))
        out = capsys.readouterr().out
        left = re.sub("\x1b\\[[0-9;]*m", "", out[out.rindex("╭") :])
        assert ("left for" in left) == bool(times)
        assert left.count(" 5.0 MiB") == times
        assert max(map(len, left.splitlines())) <= 80


def test_with_json_there_is_an_object_for_each_round_and_nothing_else(
    terminal: pytest.MonkeyPatch, capsys: Capture
) -> None:
    async def job(rounds: Rounds) -> None:
        rounds.progress("dumping", DumpStats())
        tell(rounds, 2)

    live(Invocation(json=True), job)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in told] == ["round", "round"]
    assert told[1]["dirty_rate"] == pytest.approx((100 << 20) / 0.5)


def test_on_a_terminal_there_is_one_table_and_the_step_under_way(terminal: pytest.MonkeyPatch, capsys: Capture) -> None:
    async def job(rounds: Rounds) -> None:
        tell(rounds, 2)
        rounds.progress("dumping", DumpStats(pages_scanned=12_345))
        await anyio.sleep(0.3)

    live(Invocation(), job)
    out = capsys.readouterr().out
    assert re.search(r"round 3: dumping, \d\.\d s: 12,345 pages scanned", out)
    left = out[out.rindex("╭") :]
    assert "of 50 ms" in left
    assert "a\\x1b[31mb" in left
    assert left.count("100.0 MiB") == 2
    assert max(map(len, left.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines())) < 90


def test_of_many_rounds_the_last_ones_are_shown_and_all_are_left(terminal: pytest.MonkeyPatch, capsys: Capture) -> None:
    shown: list[str] = []

    async def job(rounds: Rounds) -> None:
        tell(rounds, 60)
        capsys.readouterr()
        rounds.step("restoring there")
        shown.append(capsys.readouterr().out)

    live(Invocation(), job)
    assert "restoring there" in shown[0]
    assert "…" in shown[0]
    assert shown[0].count("100.0 MiB") == 12
    out = capsys.readouterr().out
    left = out[out.rindex("╭") :]
    assert left.count("100.0 MiB") == 60
    assert left.count("\n") == 60 + 4  # two lines of headings, and the frame


def test_nothing_is_drawn_while_the_target_stands_still(terminal: pytest.MonkeyPatch, capsys: Capture) -> None:
    async def job(rounds: Rounds) -> None:
        done = history(1)
        stop = should_stop(done, PrecopyPolicy(max_rounds=1))
        assert stop.verdict == "stop"
        rounds.round(done[0], stop)
        rounds.progress("freezing", DumpStats())
        assert "the last dump: freezing" in capsys.readouterr().out
        rounds.progress("dumping", DumpStats())
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            await anyio.sleep(0.05)
        assert capsys.readouterr().out == ""
        rounds.step("restoring there")
        assert "restoring there" in capsys.readouterr().out

    live(Invocation(), job)


def test_the_table_is_left_when_the_loop_fails(terminal: pytest.MonkeyPatch, capsys: Capture) -> None:
    async def job(rounds: Rounds) -> None:
        tell(rounds, 2)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        live(Invocation(), job)
    out = capsys.readouterr().out
    assert out[out.rindex("╭") :].count("100.0 MiB") == 2


def test_the_parts_of_a_freeze_are_told_with_their_shares(capsys: Capture) -> None:
    show_freeze("divided", [FreezePart("freezing", 1000), FreezePart("copy", 2000), FreezePart("over there", 5000)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2][:4] == ["freezing", "1.0", "ms", "12.5%"]
    assert lines[4] == ["over", "there", "5.0", "ms", "62.5%"]
    assert lines[5] == ["in", "all", "8.0", "ms"]
