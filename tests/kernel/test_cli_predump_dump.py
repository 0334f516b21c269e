"""The commands on real processes: what they print, how they end, what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from incdump import kerndat
from incdump._uapi.arch import ARCH
from tests.command import (
    KINDS,
    NO_PID,
    ROOT,
    incdump,
    is_untouched,
    predump,
    read_until,
    refused,
    run_python,
    start,
    states,
    wait,
)
from tests.kernel.freeze_kit import Victims
from tests.kernel.support import until
from tests.targets.build import Target

pytestmark = pytest.mark.kernel

MakeTarget = Callable[..., Target]


@pytest.fixture
def target(rewriter: MakeTarget) -> Target:
    """A quiet process of a few MiB."""
    return rewriter(mib=4)


@pytest.fixture
def big(rewriter: MakeTarget) -> Target:
    """A process that takes a while to dump."""
    return rewriter(mib=384, rate=1000)


def cont(target: Target) -> None:
    for pid in target.tree():
        with contextlib.suppress(ProcessLookupError):  # a child that ended as soon as it could
            os.kill(pid, signal.SIGCONT)


# -- the main job ----------------------------------------------------------------------------------------------------


def test_two_predumps_and_a_dump_of_a_busy_tree_are_right_page_by_page(churn: MakeTarget, images_root: Path) -> None:
    target = churn(seed=5, threads=3, processes=2, mib=16, free_run=True)
    first = predump(target, images_root / "1", "--json").json
    second = predump(target, images_root / "2", "--prev-images-dir", "../1", "--json").json
    args = ("-t", target.pid, "-D", images_root / "3", "--prev-images-dir", "../2", "--leave-stopped", "--json")
    last = incdump("dump", *args).json
    until(lambda: all(states(pid) == {"T"} for pid in last["pids"]))  # a busy machine takes its time
    done = incdump("check", images_root / "3", "--against", target.pid, "--json")
    assert done.code == 0, done
    assert done.json["against"]["pages_compared"] > 1000
    assert done.json["against"]["ok"] is True
    assert [level["path"] for level in done.json["levels"]] == [str(images_root / name) for name in "321"]
    cont(target)
    target.stop()
    target.check()
    for result, directory in ((first, "1"), (second, "2"), (last, "3")):
        size = sum(path.stat().st_size for path in (images_root / directory).glob("pages-*.img"))
        assert result["bytes_written"] == size == 4096 * (result["pages_written"] + result["shpages_written"])
    assert first["pages_skipped_parent"] == 0
    assert second["incremental"]
    assert second["pages_skipped_parent"] > 0


def test_a_dump_goes_on_by_default_and_with_leave_running(target: Target, images_root: Path) -> None:
    for number, option in enumerate(((), ("-R",), ("--leave-running",))):
        done = incdump("dump", "-t", target.pid, "-D", images_root / str(number), *option)
        assert done.code == 0, done
        assert is_untouched(target.pid)


def test_a_dump_with_kill_leaves_nobody(churn: MakeTarget, images_root: Path) -> None:
    target = churn(processes=2, mib=8)
    pids = target.tree()
    done = incdump("dump", "-t", target.pid, "-D", images_root / "1", "--kill")
    assert done.code == 0, done
    assert target.process.wait(10) == -signal.SIGKILL
    assert "then killed" in done.out
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists() or states(pid) <= set("ZX")


def test_the_report_of_a_predump_is_plain_text_without_a_terminal(target: Target, images_root: Path) -> None:
    done = predump(target, images_root / "1")
    assert done.code == 0, done
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == f"pre-dump of process {target.pid} into {images_root}/1"
    for name in ("pages scanned", "pages written", "pages skipped", "time stopped", "time in all", "tracker"):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    assert done.out.replace("\n", "").isprintable()


def test_the_report_on_a_terminal_says_the_same(target: Target, images_root: Path) -> None:
    leader, follower = os.openpty()
    with open(leader, "rb", 0) as shown:
        command = start("predump", "-t", target.pid, "-D", images_root / "1")
        command.communicate()
        again = subprocess.Popen(
            [sys.executable, "-m", "incdump", "check", str(images_root / "1")],
            stdout=follower,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        )
        os.close(follower)
        with contextlib.suppress(OSError):  # EIO is a terminal's end of file
            text = read_until(shown, b"\xe2\x95\xaf")
        assert again.wait() == 0
    assert b"\x1b[" in text
    assert b"finished directory" in text


def test_a_directory_that_does_not_exist_is_made_for_its_owner_alone(target: Target, images_root: Path) -> None:
    done = predump(target, images_root / "a" / "b" / "c")
    assert done.code == 0, done
    assert stat.S_IMODE((images_root / "a" / "b" / "c").stat().st_mode) == 0o700
    for path in (images_root / "a" / "b" / "c").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_images_dir_is_by_default_the_working_directory(target: Target, images_root: Path) -> None:
    done = incdump("pre-dump", "-t", target.pid, "--track-mem", cwd=images_root)
    assert done.code == 0, done
    assert (images_root / "inventory.img").exists()


# -- the log ---------------------------------------------------------------------------------------------------------


def test_a_relative_log_file_is_in_the_images_dir(target: Target, images_root: Path) -> None:
    assert predump(target, images_root / "1", "-o", "dump.log").code == 0
    log = images_root / "1" / "dump.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text()
    assert f"pre-dump of process {target.pid}" in text
    assert "pages_written" in text.splitlines()[-1]


def test_a_log_file_tells_why_there_is_no_dump(images_root: Path) -> None:
    done = incdump("dump", "-t", NO_PID, "-D", images_root / "1", "-o", "dump.log")
    refused(done, 3)
    assert "error: " in (images_root / "1" / "dump.log").read_text().splitlines()[-1]
    assert [path.name for path in (images_root / "1").iterdir()] == ["dump.log"]


def test_a_log_file_that_cannot_be_written_is_an_error_before_the_dump(target: Target, images_root: Path) -> None:
    done = predump(target, images_root / "1", "-o", images_root / "nowhere" / "log")
    refused(done, 4, "log file")
    assert not (images_root / "1").exists()


def test_verbosity_says_the_steps_on_stderr_and_warnings_stay_apart(target: Target, images_root: Path) -> None:
    for option in ("-v", "-v1", "-vvvv", "-v4"):
        done = predump(target, images_root / option.strip("-"), option)
        assert done.code == 0, done
        assert " dumping\n" in done.err
    assert predump(target, images_root / "0", "-v0").err == ""


# -- tracking --------------------------------------------------------------------------------------------------------


def test_untrack_gives_up_what_a_predump_began(target: Target, images_root: Path) -> None:
    if not kerndat.uffd_wp_async():
        pytest.skip("needs the uffd-wp tracker")
    assert predump(target, images_root / "1").code == 0
    doctor = incdump("doctor", "--json")
    assert target.pid in doctor.json["tracked"]
    assert incdump("untrack", target.pid, "--json").json == {"untracked": [target.pid]}
    assert incdump("untrack", target.pid).out == f"process {target.pid} was not tracked\n"
    assert incdump("untrack", "--all", "--json").json == {"untracked": []}


def test_a_parent_of_another_generation_is_a_whole_dump_with_a_warning(target: Target, images_root: Path) -> None:
    if not kerndat.uffd_wp_async():
        pytest.skip("needs the uffd-wp tracker")
    assert predump(target, images_root / "1").code == 0
    assert incdump("untrack", target.pid).code == 0
    strict = predump(target, images_root / "2", "--prev-images-dir", "../1", "--require-incremental", "--json")
    assert strict.code == 5
    assert strict.json["kind"] == "TrackerLost"
    assert not (images_root / "2").exists()
    done = predump(target, images_root / "2", "--prev-images-dir", "../1", "--json")
    assert done.code == 0, done
    assert not done.json["incremental"]
    assert done.json["pages_skipped_parent"] == 0
    assert done.err.splitlines() == [f"warning: {line}" for line in done.json["warnings"]]
    assert len(done.json["warnings"]) == 1


def test_a_tracker_that_does_not_work_here_is_refused_by_name(target: Target, images_root: Path) -> None:
    if kerndat.soft_dirty():
        pytest.skip("soft-dirty works on this kernel")
    refused(predump(target, images_root / "1", "--tracker", "soft-dirty"), 5, "soft-dirty", "incdump doctor")
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("pagemap", ["plain", "cache", "scan"])
@pytest.mark.parametrize("tracker", ["content", "uffd-wp"])
def test_every_tracker_and_reader_can_be_asked_for(
    target: Target, images_root: Path, tracker: str, pagemap: str
) -> None:
    if tracker == "uffd-wp" and not kerndat.uffd_wp_async():
        pytest.skip("needs the uffd-wp tracker")
    if pagemap == "scan" and not kerndat.pagemap_scan():
        pytest.skip("needs PAGEMAP_SCAN")
    chosen = ("--tracker", tracker, "--pagemap", pagemap, "--writers", 3, "--json")
    first = predump(target, images_root / "1", *chosen).json
    assert (first["tracker"], first["pagemap"]) == (tracker, pagemap)
    target.dirty(10, 3)
    second = predump(target, images_root / "2", "--prev-images-dir", "../1", *chosen).json
    assert 102 <= second["pages_written"] < 300
    assert second["pages_skipped_parent"] > 800


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_against_finds_a_page_that_was_written_since(target: Target, images_root: Path) -> None:
    images = images_root / "1"
    assert incdump("dump", "-t", target.pid, "-D", images, "--leave-stopped").code == 0
    done = incdump("check", images, "--against", target.pid)
    assert done.code == 0, done
    assert states(target.pid) == {"T"}
    assert "every page is right" in done.out
    cont(target)
    target.dirty(1, 5)
    done = incdump("check", images, "--against", target.pid, "--json")
    assert done.code == 6, done
    assert done.json["against"]["pages_wrong"] >= 10
    assert done.json["error"] == done.error
    assert done.json["ok"] is False
    assert is_untouched(target.pid)


def test_check_against_finds_a_tree_as_it_was_dumped_whose_signals_are_pending(
    tmp_path: Path, images_root: Path
) -> None:
    victims = Victims(tmp_path)
    try:
        target = victims("frames", 2, 1000)  # a timer, and SIGCHLD of the children that are stopped
        for name in "123":
            assert incdump("dump", "-t", target.pid, "-D", images_root / name, "--leave-stopped").code == 0
            done = incdump("check", images_root / name, "--against", target.pid)
            assert done.code == 0, done
            assert states(target.pid) == {"T"}
            os.killpg(target.pid, signal.SIGCONT)
            target.wait_for_beats()
    finally:
        victims.end()


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_ends_a_dump_cleanly(big: Target, images_root: Path, kind: str, number: signal.Signals) -> None:
    command = start(kind, "-t", big.pid, "-D", images_root / "1", "-v", "--json")
    read_until(command.stderr, b" dumping\n")
    command.send_signal(number)
    done = wait(command)
    assert done.code == 128 + number, done
    assert done.err.splitlines()[-1].startswith(f"incdump: error: stopped by {number.name}")
    assert "Traceback" not in done.err
    assert done.json["kind"] == "Stopped"
    assert not (images_root / "1").exists()
    assert is_untouched(big.pid)


def test_what_a_cancelled_predump_took_is_in_the_next_one(big: Target, images_root: Path) -> None:
    assert predump(big, images_root / "1").code == 0
    command = start("predump", "-t", big.pid, "-D", images_root / "2", "--prev-images-dir", "../1", "-v")
    read_until(command.stderr, b" dumping\n")
    command.send_signal(signal.SIGTERM)
    assert wait(command).code in (128 + signal.SIGTERM, 0)
    parent = "../2" if (images_root / "2").exists() else "../1"
    args = ("-t", big.pid, "-D", images_root / "3", "--prev-images-dir", parent, "--leave-stopped")
    assert incdump("dump", *args).code == 0
    done = incdump("check", images_root / "3", "--against", big.pid)
    assert done.code == 0, done


def test_a_signal_that_is_ignored_stays_ignored(big: Target, images_root: Path) -> None:
    command = start(
        "predump",
        "-t",
        big.pid,
        "-D",
        images_root / "1",
        "-v",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    read_until(command.stderr, b" dumping\n")
    command.send_signal(signal.SIGHUP)
    assert wait(command).code == 0
    assert (images_root / "1" / "inventory.img").exists()


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_tells_of_every_feature_and_tracker_what_works_and_why() -> None:
    done = incdump("doctor", "--json")
    report = done.json
    assert done.code == (0 if report["works"] else 1)
    assert [tracker["name"] for tracker in report["trackers"]] == ["uffd-wp", "soft-dirty", "content"]
    assert {feature["name"] for feature in report["features"]} >= {"pagemap_scan", "uffd_wp_async", "soft_dirty"}
    for feature in report["features"]:
        assert feature["works"] in (True, False)
        assert feature["why"]
        assert feature["follows"]
    plain = incdump("doctor")
    for entry in (*report["features"], *report["trackers"]):
        assert any(
            line.split()[:2] == [entry["name"], "works" if entry["works"] else "no"] for line in plain.out.splitlines()
        )


WITHOUT_PTRACE = """
import ctypes, os, struct, sys

deny = 0x00050000 | 1  # SECCOMP_RET_ERRNO, EPERM
steps = (0x20, 0, 0, 0), (0x15, 0, 1, int(sys.argv[1])), (0x06, 0, 0, deny), (0x06, 0, 0, 0x7FFF0000)
program = b"".join(struct.pack("=HBBI", *step) for step in steps)
buffer = ctypes.create_string_buffer(program)
header = struct.pack("=HxxxxxxQ", 4, ctypes.addressof(buffer))
assert ctypes.CDLL(None).prctl(22, 2, header, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
os.execv(sys.executable, [sys.executable, "-m", "incdump", "doctor", *sys.argv[2:]])
"""


@pytest.mark.parametrize("options", [("--json",), ()])
def test_doctor_fails_where_nothing_works(options: tuple[str, ...]) -> None:
    """In a container whose seccomp profile allows no ptrace(2)."""
    if os.geteuid():
        pytest.skip("needs root, to take a system call away")
    done = run_python("-c", WITHOUT_PTRACE, ARCH.sys_ptrace, *options)
    assert done.code == 1
    if options:
        assert not done.json["works"]
        assert done.json["auto"] is None
        assert not any(tracker["works"] for tracker in done.json["trackers"])
        assert all(tracker["why"] for tracker in done.json["trackers"])
    else:
        assert "nothing works" in done.out
