"""The command line itself: options, help, errors, texts. What commands do to processes is in tests/kernel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

import incdump
from incdump.cli import main as main_module
from incdump.cli import progress as progress_module
from incdump.cli import text
from incdump.cli.check import command as check_command
from incdump.cli.dumping import facts
from incdump.cli.durations import Duration
from incdump.cli.invocation import Command, Invocation, one_line, verbose_option
from incdump.cli.log import Log
from incdump.cli.main import ALIASES, COMMANDS, Commands, command_line, main
from incdump.cli.progress import Progress, Waiting
from incdump.cli.signals import Stopped, run
from incdump.errors import BadImage, ImagesIOError, NoSuchTarget
from incdump.model.stats import DumpResult, DumpStats
from tests.command import NO_PID, ROOT, environment

Capture = pytest.CaptureFixture[str]


def usage_error(capsys: Capture, *args: str) -> str:
    """The command line is refused: code 2, one line, nothing on stdout."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("incdump: error: ")
    assert err.count("\n") == 1
    return err


# -- usage -----------------------------------------------------------------------------------------------------------


def test_the_version_is_the_packages(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"incdump {incdump.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_has_an_example_that_its_own_parser_takes(capsys: Capture, name: str) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    examples = [line.strip() for line in out.splitlines() if line.startswith(f"    incdump {name}")]
    examples = examples or [line.strip() for line in out.splitlines() if line.strip().startswith(f"incdump {name}")]
    assert examples
    command = Commands("incdump").get_command(click.Context(command_line), name)
    assert command is not None
    for example in examples:
        command.make_context(name, example.split("&&")[0].split()[2:], obj=Invocation())


def test_the_overall_help_names_every_command(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


def test_no_command_at_all_shows_the_help_and_fails(capsys: Capture) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: incdump" in err


def test_crius_name_of_a_predump_is_understood(capsys: Capture) -> None:
    assert ALIASES["pre-dump"] == "predump"
    assert main(["pre-dump", "--help"]) == 0
    assert "--prev-images-dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["dumb"], "no such command: dumb"),
        (["dump"], "missing option '-t' / '--tree'"),
        (["dump", "-t", "x/y"], "'x/y' is not a process number; ps -e lists processes"),
        (["predump", "24987"], "name the target by -t: -t 24987"),
        (["migrate", "24987", "host:1"], "name the target by -t: -t 24987"),
        (["dump", "-t", "0"], "0 is not in the range x>=1"),
        (["dump", "-t", "-1"], "-1 is not in the range x>=1"),
        (["dump", "-t", "1", "--foo"], "no such option"),
        (["dump", "-t", "1", "extra"], "extra"),
        (["dump", "-t", "1", "--tracker", "magic"], "'magic' is not one of 'auto', 'uffd-wp'"),
        (["dump", "-t", "1", "--pagemap", "magic"], "'magic' is not one of 'auto', 'plain'"),
        (["dump", "-t", "1", "--writers", "0"], "0 is not in the range 1<=x<=64"),
        (["dump", "-t", "1", "--timeout", "0"], "'0' is no time that can be waited for"),
        (["dump", "-t", "1", "--timeout", "fast"], "give a number and its unit, as in 50ms"),
        (["precopy", "-t", "1", "--downtime", "50"], "50 has no unit: write 50ms or 50s"),
        (["migrate", "-t", "1", "a:1", "--downtime", "1"], "1 has no unit: write 1ms or 1s"),
        (["dump", "-t", "1", "-D", ""], "-D: an empty name"),
        (["dump", "-t", "1", "--prev-images-dir", ""], "--prev-images-dir: an empty name"),
        (["dump", "-t", "1", "--kill", "-s"], "only one of --leave-running, --leave-stopped and --kill"),
        (["dump", "-t", "1", "-R", "-s"], "only one of --leave-running, --leave-stopped and --kill"),
        (["dump", "-t", "1", "--require-incremental"], "--require-incremental needs --prev-images-dir"),
        (["predump", "-t", "1", "--kill"], "no such option"),
        (["check"], "missing argument 'DIR'"),
        (["check", ""], "DIR: an empty name"),
        (["untrack"], "name a PID, or --all"),
        (["untrack", "1", "--all"], "either a PID or --all, not both"),
        (["doctor", "1"], "unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(capsys: Capture, args: list[str], words: str) -> None:
    error = usage_error(capsys, *args)
    assert words.lower() in error.lower()
    assert "--help`)" in error


def test_a_target_that_is_named_is_answered_by_the_numbers_of_that_name(capsys: Capture) -> None:
    named = subprocess.Popen(
        ["/bin/sh", "-c", "printf incdump-named > /proc/$$/comm; echo ready; read _"], stdin=-1, stdout=-1
    )
    try:
        assert named.stdout is not None
        assert named.stdout.readline() == b"ready\n"
        assert f"the processes of that name are {named.pid} " in usage_error(capsys, "dump", "-t", "incdump-named")
    finally:
        named.communicate(b"\n")


def test_every_time_of_every_command_is_read_by_the_same_parser() -> None:
    named = {}
    for name in COMMANDS:
        for option in import_module(f"incdump.cli.{name.replace('-', '_')}").command.params:
            if option.name in ("timeout", "freeze_timeout", "hook_timeout", "downtime", "asking"):
                named[name, option.name] = option.type
    assert {type(kind) for kind in named.values()} == {Duration}
    assert {name for name, kind in named.items() if not kind.bare} == {("precopy", "downtime"), ("migrate", "downtime")}
    assert ("dump", "timeout") in named
    assert ("receive", "timeout") in named


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("1.5s", 1.5), ("2m", 120.0), ("1h", 3600.0), ("10", 10.0), (".5", 0.5)]
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == pytest.approx(seconds)


def test_precopy_is_understood_as_the_field_writes_it(capsys: Capture) -> None:
    assert main(["pre-copy", "--help"]) == 0
    assert "incdump pre-copy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "verbosity"),
    [([], 0), (["-v"], 1), (["-vv"], 2), (["-v0"], 0), (["-v1"], 1), (["-v4"], 4), (["-v", "-v2", "--verbose"], 4)],
)
def test_verbosity_is_counted_and_crius_spelling_is_the_same(args: list[str], verbosity: int) -> None:
    command = Command("command", params=[])
    verbose_option(command)
    invocation = Invocation()
    command.make_context("command", list(args), obj=invocation)
    assert invocation.verbosity == verbosity


def test_who_wants_quiet_gets_what_json_has_and_nothing_else(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert main(["untrack", str(NO_PID), "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["untrack", str(NO_PID), "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"untracked": []}
    assert main(["check", str(tmp_path / "images"), "--quiet"]) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("incdump: error: ")


# -- errors ----------------------------------------------------------------------------------------------------------


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("incdump.engine.check.check", fail)


def test_an_error_is_one_line_and_its_code(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fail_with(monkeypatch, ImagesIOError("cannot read images/1", path="images/1", errno=13))
    assert main(["check", "images/1"]) == 4
    assert capsys.readouterr() == ("", "incdump: error: cannot read images/1\n")


def test_damage_that_check_finds_has_the_code_of_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fail_with(monkeypatch, BadImage("images/1/pages-1.img is short", path="images/1/pages-1.img", pid=7))
    assert main(["check", "images/1", "--json"]) == 6
    out, err = capsys.readouterr()
    assert err == "incdump: error: images/1/pages-1.img is short\n"
    assert json.loads(out) == {
        "error": "images/1/pages-1.img is short",
        "kind": "BadImage",
        "pid": 7,
        "vaddr": None,
        "path": "images/1/pages-1.img",
        "errno": None,
    }


def test_an_error_number_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fail_with(monkeypatch, ImagesIOError("full", errno=28))
    main(["check", "x", "--json"])
    assert json.loads(capsys.readouterr().out)["errno"] == "ENOSPC"


def test_an_error_shows_no_control_characters() -> None:
    assert one_line("a\nb\x1b[31mc\udc80") == "a\\nb\\x1b[31mc\\udc80"
    assert one_line("übersät 日本") == "übersät 日本"


def test_what_nobody_expected_is_one_line_too_and_a_traceback_with_v(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("of all things"))
    assert main(["check", "x"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "unexpected ZeroDivisionError: of all things; please report this, with" in err
    assert main(["check", "x", "-v"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_keyboard_interrupt_outside_of_the_loop_is_code_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["check", "x"]) == 130
    assert capsys.readouterr().err.strip().startswith("incdump: error: stopped by SIGINT")


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143), (1, 129)])
def test_a_signal_is_code_128_and_its_number(number: int, code: int) -> None:
    assert Stopped(number).exit_code == code


def test_a_job_that_no_signal_ends_returns_what_it_returns() -> None:
    async def job() -> int:
        return 7

    assert run(job) == 7


UNTRACK = (
    "import sys; from incdump.cli.main import main; sys.stdin.read(); sys.exit(main(['untrack', '--all', '--json']))"
)


def python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment(), cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)


def test_output_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = python(UNTRACK, stdout=full, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr == "incdump: error: cannot write the output: No space left on device\n"


def test_a_reader_who_has_left_is_no_error() -> None:
    command = [sys.executable, "-c", UNTRACK]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_closed_standard_streams_are_filled_so_that_no_file_takes_their_place() -> None:
    code = (
        "import os; os.close(0); os.close(2); from incdump.cli.main import _prepare_process; _prepare_process();"
        "print(os.readlink('/proc/self/fd/0'), os.readlink('/proc/self/fd/2'))"
    )
    assert python(code, stdout=subprocess.PIPE).stdout == "/dev/null /dev/null\n"


def test_a_name_that_the_output_encoding_lacks_is_shown_in_escapes() -> None:
    code = "from incdump.cli import text, main; main._prepare_process(); text.show_table('ü 日本', ['a'], [['b']])"
    environ = {**environment(), "PYTHONIOENCODING": "latin-1:strict"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True)
    assert done.stdout == b"\xfc \\u65e5\\u672c\n  a\n  b\n"


# -- the log ---------------------------------------------------------------------------------------------------------


def test_a_log_in_a_directory_that_the_dump_makes_waits_for_it(tmp_path: Path) -> None:
    images = tmp_path / "images"
    with Log(0, "log", str(images)) as log:
        log.line("begin")
        log.progress("checking", DumpStats())
        assert not images.exists()
        images.mkdir()
        log.progress("dumping", DumpStats())
        assert [line.split(" ", 1)[1] for line in (images / "log").read_text().splitlines()] == [
            "begin",
            "checking",
            "dumping",
        ]


def test_a_log_is_added_to_and_ends_with_the_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("from before\n")

    def fail() -> None:
        with Log(0, "log", str(tmp_path)) as log:
            log.warning("something\nodd")
            raise NoSuchTarget("no process 7", pid=7)

    with pytest.raises(NoSuchTarget):
        fail()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "from before"
    assert lines[1].endswith("warning: something\\nodd")
    assert lines[2].endswith("error: no process 7")


def test_a_log_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ImagesIOError), Log(0, "nowhere/log", str(tmp_path)):
        pass


def test_the_counters_are_said_for_vv_only(tmp_path: Path, capsys: Capture) -> None:
    for verbosity, expected in ((1, 0), (2, 1)):
        with Log(verbosity, None, str(tmp_path)) as log:
            for _ in range(5):
                log.progress("dumping", DumpStats(pages_scanned=3))
        assert capsys.readouterr().err.count("pages_scanned 3") == expected


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 10, "1.5 MiB"),
        (3 << 30, "3.0 GiB"),
        (2 << 40, "2.0 TiB"),
    ],
)
def test_bytes_are_written_in_binary_units(size: int, expected: str) -> None:
    assert text.bytes_text(size) == expected


@pytest.mark.parametrize(
    ("microseconds", "expected"), [(0, "0.0 ms"), (640, "0.6 ms"), (999_900, "999.9 ms"), (1_240_000, "1.24 s")]
)
def test_times_are_written_in_milliseconds_or_seconds(microseconds: int, expected: str) -> None:
    assert text.time_text(microseconds) == expected


def test_a_number_of_things_has_its_plural() -> None:
    assert text.count_text(1, "page", "pages") == "1 page"
    assert text.count_text(1024, "page", "pages") == "1,024 pages"


def result(**stats: int) -> DumpResult:
    return DumpResult(
        images_dir="/images/2",
        pid=7,
        parent="/images/1",
        pids=[7, 8],
        exited=[9],
        tracker="uffd-wp",
        tracker_reason="as asked for",
        pagemap="scan",
        incremental=True,
        stats=DumpStats(**stats),
    )


def by_name(lines: list[text.Fact]) -> dict[str, tuple[str, str]]:
    return {name: (value, note) for name, value, note in lines}


def test_the_report_adds_private_and_shared_pages_and_says_how_many_are_shared() -> None:
    told = by_name(facts("pre-dump", result(pages_scanned=1000, shpages_scanned=24, shpages_written=4), "running"))
    assert told["pages scanned"] == ("1,024", "populated pages that were looked at, 24 of them shared")
    assert told["pages written"][0] == "4"
    assert told["processes"] == ("2", "exited meanwhile: 9")
    assert told["pages skipped"][1] == "not written since the parent dump, /images/1"
    assert told["time stopped"] == ("0.0 ms", "never")


def test_the_report_speaks_of_fallbacks_only_where_there_were_some() -> None:
    names = ("pages compared", "pages untracked", "pages vanished")
    told = by_name(facts("dump", result(), "running"))
    assert not set(names) & set(told)
    told = by_name(facts("dump", result(pages_compared=1, pages_untracked=2, pages_vanished=3), "running"))
    assert [told[name][0] for name in names] == ["1", "2", "3"]


def test_the_report_says_that_a_dump_was_whole_in_spite_of_its_parent() -> None:
    whole = result()
    whole.incremental = False
    assert "in spite of" in by_name(facts("dump", whole, "running"))["pages skipped"][1]
    whole.parent = None
    assert by_name(facts("dump", whole, "running"))["pages skipped"][1] == "there is no parent dump"


def test_the_report_says_how_the_tree_was_left() -> None:
    stats = {"freezing_time": 400, "frozen_time": 2000, "stopped_time": 2400}
    told = by_name(facts("dump", result(**stats), "stopped"))
    assert told["time stopped"] == ("2.4 ms", "freezing 0.4 ms, frozen 2.0 ms; left stopped, until SIGCONT")


def test_plain_tables_are_aligned_and_print_nothing_that_is_not_text(capsys: Capture) -> None:
    text.show_facts("title\x1b", [text.Fact("a", "1"), text.Fact("long name", "1,000", "a\nnote")])
    assert capsys.readouterr().out == "title\\x1b\n  a              1\n  long name  1,000  a\\nnote\n"
    text.show_table("t", ("name", " number"), [("x", "5"), ("longer name", "12")])
    assert capsys.readouterr().out == "t\n  name         number\n  x                 5\n  longer name      12\n"


def test_tables_on_a_terminal_show_what_would_be_markup(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(text, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    text.show_facts("[bold]title", [text.Fact("a", "1", "[red]note")])
    text.show_table("t", ("name", " number"), [("[red]x", "5")])
    text.show_verdicts("v", [("one", True, ["it [b]works"]), ("two", False, ["it does not"])])
    out = capsys.readouterr().out
    for words in ("[bold]title", "[red]note", "[red]x", "it [b]works", "it does not"):
        assert words in out


@pytest.mark.asyncio
async def test_progress_is_shown_when_it_takes_long_and_gone_afterwards(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(progress_module, "PATIENCE", 0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    import asyncio

    progress = Progress()
    with progress.shown():
        progress.update("dumping", DumpStats(pages_scanned=5000, pages_written=256, pages_skipped_parent=3))
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert progress._live is not None
        shown = str(progress._renderable().text)
        assert re.fullmatch(r"dumping, 0\.\d s: 5,000 pages scanned, 256 written \(1\.0 MiB\), 3 left to .*", shown)
    assert not progress._live.is_started
    assert capsys.readouterr().out == ""


@pytest.mark.asyncio
async def test_progress_is_not_shown_for_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    with progress.shown():
        progress.update("dumping", DumpStats())
    assert progress._live is None


@pytest.mark.asyncio
async def test_a_check_that_takes_long_says_what_it_is_at(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(progress_module, "PATIENCE", 0)
    import asyncio

    waiting = Waiting("comparing every page")
    with waiting.shown():
        await asyncio.sleep(0.01)
        assert str(waiting._renderable().text).startswith("comparing every page, 0.")
    assert capsys.readouterr().out == ""


def test_every_command_is_a_module_with_a_command() -> None:
    names = sorted(path.stem for path in Path(main_module.__file__).parent.glob("*.py"))
    assert {name.replace("-", "_") for name in COMMANDS} <= set(names)
    assert isinstance(check_command, Command)
    assert NO_PID > 1
