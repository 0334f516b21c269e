"""The commands on real processes: what they print, how they end, what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from incdump import kerndat
from tests.command import ROOT, Done, incdump, is_untouched, read_until, start, states, wait
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


def predump(target: Target, images: Path, *options: object) -> Done:
    return incdump("predump", "-t", target.pid, "-D", images, *options)


def refused(done: Done, code: int, *words: str) -> str:
    """The command failed as it should: with one line that has these words."""
    assert done.code == code, done
    for word in words:
        assert word in done.error, done
    assert done.out == ""
    return done.error


def cont(target: Target) -> None:
    for pid in target.tree():
        os.kill(pid, signal.SIGCONT)


# -- the main job ----------------------------------------------------------------------------------------------------


def test_two_predumps_and_a_dump_of_a_busy_tree_are_right_page_by_page(churn: MakeTarget, images_root: Path) -> None:
    target = churn(seed=5, threads=3, processes=2, mib=16, free_run=True)
    first = predump(target, images_root / "1", "--json").json
    second = predump(target, images_root / "2", "--prev-images-dir", "../1", "--json").json
    args = ("-t", target.pid, "-D", images_root / "3", "--prev-images-dir", "../2", "--leave-stopped", "--json")
    last = incdump("dump", *args).json
    assert all(states(pid) == {"T"} for pid in last["pids"])
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


# -- targets that cannot be dumped -----------------------------------------------------------------------------------

NO_PID = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
KINDS = ("predump", "dump")


def kernel_thread() -> int:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if int(fields[6]) & 0x00200000:
                    return int(name)
    pytest.skip("needs a kernel thread that is visible in /proc")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pid_that_does_not_exist_is_refused(images_root: Path, kind: str) -> None:
    refused(incdump(kind, "-t", NO_PID, "-D", images_root / "1"), 3, str(NO_PID))
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_thread_is_refused(images_root: Path, kind: str) -> None:
    refused(incdump(kind, "-t", kernel_thread(), "-D", images_root / "1"), 3, "kernel thread")
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_zombie_is_refused(images_root: Path, kind: str) -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        refused(incdump(kind, "-t", process.pid, "-D", images_root / "1"), 3, "zombie")
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_incdump_itself_is_refused(images_root: Path, kind: str) -> None:
    script = f'exec {sys.executable} -m incdump {kind} -t $$ -D "$0"'
    done = subprocess.run(["sh", "-c", script, str(images_root / "1")], cwd=ROOT, capture_output=True, text=True)
    refused(Done(done.returncode, done.stdout, done.stderr), 3, "incdump itself")
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_that_incdump_runs_in_is_refused(images_root: Path, kind: str) -> None:
    refused(incdump(kind, "-t", os.getpid(), "-D", images_root / "1"), 3, "incdump")
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_is_traced_already_is_refused(target: Target, images_root: Path, kind: str) -> None:
    code = f"import sys; from incdump._uapi import ptrace; ptrace.seize({target.pid}); print('ok'); sys.stdin.read()"
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as tracer:
        read_until(tracer.stdout, b"ok")
        refused(incdump(kind, "-t", target.pid, "-D", images_root / "1"), 3, str(tracer.pid), "traced")
        tracer.communicate(b"")
    assert not (images_root / "1").exists()
    assert is_untouched(target.pid)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_exits_in_mid_dump_is_an_error_and_leaves_nothing(
    big: Target, images_root: Path, kind: str
) -> None:
    command = start(kind, "-t", big.pid, "-D", images_root / "1", "-v")
    read_until(command.stderr, b" dumping\n")
    command.send_signal(signal.SIGSTOP)
    big.process.kill()
    command.send_signal(signal.SIGCONT)
    done = wait(command)
    assert done.code == 3, done
    assert "exited" in done.err.splitlines()[-1]
    assert not (images_root / "1").exists()


# -- another user ----------------------------------------------------------------------------------------------------


def test_another_users_process_is_refused(target: Target, as_nobody: dict[str, Any]) -> None:
    for kind in KINDS:
        refused(incdump(kind, "-t", target.pid, "-D", "images", **as_nobody), 3, "permission")
        assert not Path(str(as_nobody["cwd"]), "images").exists()
    assert is_untouched(target.pid)


def test_a_directory_that_may_not_be_written_is_refused(as_nobody: dict[str, Any]) -> None:
    with _sleeper(as_nobody) as pid:
        done = incdump("predump", "-t", pid, "-D", "/var/images", **as_nobody)
        refused(done, 4, "/var/images")
        assert is_untouched(pid)


def test_an_ordinary_user_can_dump_processes_of_its_own(as_nobody: dict[str, Any]) -> None:
    with _sleeper(as_nobody) as pid:
        doctor = incdump("doctor", "--json", **as_nobody).json
        if not doctor["works"]:
            pytest.skip(f"needs a kernel that lets ordinary users trace: {doctor['limits']}")
        for kind in KINDS:
            done = incdump(kind, "-t", pid, "-D", kind, **as_nobody)
            assert done.code == 0, done
        assert is_untouched(pid)
        assert incdump("check", "dump", **as_nobody).code == 0
        assert incdump("untrack", "--all", **as_nobody).code == 0


@contextlib.contextmanager
def _sleeper(options: dict[str, Any]) -> Iterator[int]:
    """A process of that user that waits, and may be traced as far as Yama is concerned."""
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1)); print(1); sys.stdin.read()"
    command = [options["python"], "-u", "-c", code]
    plain = {key: value for key, value in options.items() if key not in ("env", "python")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **plain) as process:
        read_until(process.stdout, b"1")
        yield process.pid
        process.communicate(b"")


# -- directories that cannot be used ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_cannot_be_made_is_refused(target: Target, images_root: Path, kind: str) -> None:
    (images_root / "file").write_text("")
    refused(incdump(kind, "-t", target.pid, "-D", images_root / "file" / "1"), 4, "file/1")
    assert is_untouched(target.pid)


@pytest.fixture
def tiny_tmpfs(images_root: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = images_root / "tiny"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "incdump-test", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_an_error_that_leaves_nothing(target: Target, tiny_tmpfs: Path, kind: str) -> None:
    done = incdump(kind, "-t", target.pid, "-D", tiny_tmpfs / "1", "--json")
    assert done.code == 4, done
    assert done.json["errno"] == "ENOSPC"
    assert done.json["error"] == done.error
    assert list(tiny_tmpfs.iterdir()) == []
    assert is_untouched(target.pid)


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_holds_a_dump_is_refused_and_stays_as_it_is(
    target: Target, images_root: Path, kind: str
) -> None:
    assert predump(target, images_root / "1").code == 0
    before = {path: path.read_bytes() for path in (images_root / "1").iterdir()}
    refused(incdump(kind, "-t", target.pid, "-D", images_root / "1"), 4, "already holds a dump")
    assert before == {path: path.read_bytes() for path in (images_root / "1").iterdir()}
    assert is_untouched(target.pid)


# -- parents that cannot be used -------------------------------------------------------------------------------------


@pytest.fixture
def chain(target: Target, images_root: Path) -> Path:
    """Three pre-dumps of the target, by content: 1, 2 and 3."""
    for number in (1, 2, 3):
        parent = ("--prev-images-dir", f"../{number - 1}") if number > 1 else ()
        done = predump(target, images_root / str(number), "--tracker", "content", *parent)
        assert done.code == 0, done
    return images_root


def on_top_of(target: Target, root: Path, parent: str, kind: str) -> Done:
    return incdump(kind, "-t", target.pid, "-D", root / "new", "--prev-images-dir", parent)


def clean(target: Target, root: Path) -> bool:
    return is_untouched(target.pid) and not (root / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_that_does_not_exist_is_refused_with_what_may_be_meant(target: Target, chain: Path, kind: str) -> None:
    refused(on_top_of(target, chain, "../9", kind), 4, "../9", str(chain / "9"))
    mistaken = incdump(kind, "-t", target.pid, "-D", "new", "--prev-images-dir", "3", cwd=chain)
    refused(mistaken, 4, "../3")
    assert clean(target, chain)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_parent_is_refused(target: Target, chain: Path, kind: str) -> None:
    (chain / "3" / "inventory.img").unlink()
    refused(on_top_of(target, chain, "../3", kind), 4, str(chain / "3"), "no finished dump")
    assert clean(target, chain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_of_another_process_is_refused(target: Target, rewriter: MakeTarget, chain: Path, kind: str) -> None:
    other = rewriter(mib=1)
    refused(on_top_of(other, chain, "../3", kind), 4, str(other.pid), str(target.pid))
    assert clean(other, chain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_of_a_reused_pid_is_refused(target: Target, chain: Path, kind: str) -> None:
    path = chain / "3" / "incdump.json"
    meta = json.loads(path.read_text())
    meta["processes"][str(target.pid)]["start_time"] -= 1
    path.write_text(json.dumps(meta))
    refused(on_top_of(target, chain, "../3", kind), 4, str(target.pid), "earlier process")
    assert clean(target, chain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_deleted_in_the_middle_of_the_chain_is_refused(target: Target, chain: Path, kind: str) -> None:
    shutil.rmtree(chain / "2")
    refused(on_top_of(target, chain, "../3", kind), 4, str(chain / "2"))
    assert clean(target, chain)


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_tells_each_damage_with_the_code_for_it(target: Target, chain: Path) -> None:
    assert incdump("check", chain / "3").code == 0
    refused(incdump("check", chain / "9"), 4, str(chain / "9"))
    pages = max((chain / "1").glob("pages-*.img"), key=lambda path: path.stat().st_size)
    os.truncate(pages, pages.stat().st_size - 4096)
    refused(incdump("check", chain / "3"), 6, str(pages))
    assert incdump("check", chain / "3", "--json").json["kind"] == "BadImage"
    shutil.rmtree(chain / "1")
    refused(incdump("check", chain / "3"), 6, str(chain / "1"))
    (chain / "3" / "inventory.img").unlink()
    refused(incdump("check", chain / "3"), 6, "no finished dump")


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
