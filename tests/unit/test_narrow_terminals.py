"""On a narrow terminal nothing that decides is cut: every command's tables at 60 and 80 columns."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from incdump.cli import check, doctor, dumping, loop, text
from incdump.cli import rounds as rounds_module
from incdump.cli.invocation import Invocation
from incdump.cli.main import COMMANDS, main
from incdump.cli.rounds import Rounds, show_freeze
from incdump.cli.signals import run
from incdump.kerndat import Feature
from incdump.model.precopy import PrecopyPolicy, PrecopyRound, should_stop
from incdump.model.stats import CheckpointTimes, DumpResult, DumpStats, FreezePart

Capture = pytest.CaptureFixture[str]

FAR = "/var/lib/somebody/with/a/long/path/to/the/images/of/this/process"
POLICY = PrecopyPolicy(downtime=0.05)


@pytest.fixture(params=[60, 80])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Standard output passes for a terminal of so many columns."""
    for module in (text, rounds_module):
        monkeypatch.setattr(module, "is_terminal", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("LINES", "40")
    return int(request.param)


def whole(out: str, width: int) -> str:
    """What was printed, without its frame and its line breaks, once it is sure that nothing was cut."""
    lines = re.sub("\x1b\\[[0-9;]*m", "", out).splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out
    return "".join(line.strip("│╭╮╰╯─ ") for line in lines).replace(" ", "")


def has(shown: str, *words: str) -> None:
    for word in words:
        assert word.replace(" ", "") in shown, word


def dump_result() -> DumpResult:
    counters = {
        "pages_scanned": 123_456_789,
        "pages_written": 12_345_678,
        "pages_skipped_parent": 111_111_111,
        "bytes_written": 12_345_678 << 12,
        "pages_compared": 1234,
        "pages_untracked": 12,
        "pages_vanished": 3,
        "freezing_time": 1234,
        "frozen_time": 123_456,
        "stopped_time": 124_690,
        "total_time": 1_234_567_890,
    }
    return DumpResult(
        f"{FAR}/2",
        7,
        parent=f"{FAR}/1",
        pids=[7, 8],
        exited=[9],
        tracker="soft-dirty",
        tracker_reason="uffd-wp: process 7 runs in 32-bit mode, in which no system call can be injected",
        pagemap="cache",
        stats=DumpStats(**counters),
    )


@pytest.mark.parametrize("kind", ["pre-dump", "dump", "checkpoint"])
def test_a_dump_is_told_whole(width: int, capsys: Capture, kind: Any) -> None:
    result = dump_result()
    if kind == "checkpoint":
        result.criu = "CRIU 4.1.1"
        why = "process 1234567 has a seccomp filter, under which no tracer can be on the leash"
        result.checkpoint = CheckpointTimes("lazy-pages", why, "read by CRIU: there are few", 1, 2, 3, 4)
    text.show_facts(dumping._title(kind, result), dumping.facts(kind, result, "killed"))
    shown = whole(capsys.readouterr().out, width)
    has(shown, f"{kind} of process 7 into {FAR}/2", "123,456,789", "12,345,678", "111,111,111", "124.7 ms", "1234.57 s")
    has(shown, "frozen 123.5 ms; then killed")
    if kind == "checkpoint":
        has(shown, "lazy-pages", "CRIU 4.1.1")


def told_rounds() -> list[PrecopyRound]:
    return [
        PrecopyRound(
            number=n + 1,
            started=0.5 * n,
            seconds=0.45,
            scan_seconds=0.01,
            write_seconds=0.3,
            pages_scanned=100_000_000,
            bytes_written=(1020 << 20) // (n + 1),
            throttled=0.25 if n > 2 else 0.0,
            bytes_deferred=(n << 20) + (77 << 19),
        )
        for n in range(6)
    ]


def test_the_estimated_downtime_of_each_round_is_told_whole(width: int, capsys: Capture) -> None:
    history = told_rounds()
    decisions = [should_stop(history[: n + 1], POLICY) for n in range(len(history))]

    async def tell() -> None:
        rounds = Rounds(Invocation(), POLICY, f"pre-copy of process 7 (somebody) into {FAR}")
        with rounds.shown():
            for done, decision in zip(history, decisions, strict=True):
                rounds.round(done, decision)

    run(tell)
    out = capsys.readouterr().out
    shown = whole(out[out.rindex("pre-copy of process 7") :], width)
    has(shown, f"into {FAR}")
    for done, decision in zip(history[1:], decisions[1:], strict=True):
        downtime = decision.estimate.downtime
        assert downtime is not None
        has(shown, text.time_text(int(downtime * 1e6)) + f"{downtime / POLICY.downtime:,.0%}")
        has(shown, text.bytes_text(done.bytes_deferred))
    assert shown.count("25%") == 3


def test_the_end_of_a_loop_is_told_whole(width: int, capsys: Capture) -> None:
    result: Any = SimpleNamespace(
        rounds=told_rounds(),
        why="a stop takes about 1.2s even with nothing left to copy: allow --downtime 1.5s",
        downtime=0.0148,
        seconds=12.3,
        hottest=["7 worker 7f0000000000-7f0010000000 /usr/lib/x86_64-linux-gnu/libsomething.so.6: 12,345 pages"],
    )
    report: Any = SimpleNamespace(path=f"{FAR}/precopy.html")
    own = [text.Fact("last dump", "checkpoint", f"{FAR}/13"), text.Fact("pages written", "123,456,789")]
    loop.show_end(f"pre-copy into {FAR}", POLICY, result, [], report, own)
    show_freeze("divided", [FreezePart(name, 1_234_567) for name in ("freezing", "waited", "in_place", "restore")])
    shown = whole(capsys.readouterr().out, width)
    has(shown, "14.8 ms", "of 50 ms allowed", "123,456,789", "12.30 s", f"{FAR}/13", f"{FAR}/precopy.html")
    has(shown, "putting together 1.23 s 25.0%", "4.94 s")


def test_a_chain_and_a_comparison_are_told_whole(width: int, capsys: Capture) -> None:
    levels = [
        SimpleNamespace(
            path=f"{FAR}/{n}", pids=[1] * 1234, pages_present=n * 12_345_678, pages_in_parent=123_456_789, bytes=n << 39
        )
        for n in (3, 2, 1)
    ]
    compared: Any = SimpleNamespace(
        processes=3, pages_compared=123_456_789, pages_wrong=1, pages_missing=2, pages_stray=3, ok=False,
        first=[f"process 7: the page at 7f0000000000 of {FAR}/libc.so.6 has other bytes"],
    )  # fmt: skip
    chain: Any = SimpleNamespace(levels=levels, warnings=[])
    check._show(chain, compared, 1_234_567)
    shown = whole(capsys.readouterr().out, width)
    has(shown, "1.5 TiB", "123,456,789", "37,037,034", "1,234", "NOT the same")


def test_what_doctor_finds_is_told_whole(width: int, capsys: Capture) -> None:
    seen = "categories known: <WPALLOWED|WRITTEN|FILE|PRESENT|SWAPPED|PFNZERO|HUGE|SOFT_DIRTY|GUARD: 511>"
    features = (Feature("userfaultfd_user_mode", "userfaultfd for user-mode faults", False, seen, "what follows"),)
    verdicts = [doctor.Verdict("soft-dirty", False, "this kernel has none"), doctor.Verdict("uffd-wp", True, FAR)]
    criu = {
        "version": None,
        "why": f"{FAR}/criu is no program",
        "advice": ["install it"],
        "path": FAR,
        "named_by": "PATH",
    }
    doctor._show({"auto": "uffd-wp", "limits": [], "tracked": [], "holder": None, "criu": criu}, features, verdicts)
    shown = whole(capsys.readouterr().out, width)
    has(shown, "userfaultfd_user_mode no", "soft-dirty no", "uffd-wp works", FAR)
    for word in ("WPALLOWED", "SOFT_DIRTY", "511"):
        has(shown, word)


@pytest.mark.parametrize("columns", ["40", "60", "80"])
def test_no_commands_summary_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: Capture, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    listed = out[out.index("Commands:") :]
    assert "..." not in listed
    assert "…" not in listed
    shown = " ".join(listed.split())
    assert "precopy Pre-dump a process tree again and again, until it need be stopped for a moment only; " in shown
    assert all(f"\n  {name} " in out for name in COMMANDS)
