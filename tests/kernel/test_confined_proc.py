"""A /proc that hides things, a runtime directory that cannot be used: it works, or why not is said, by doctor too."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from incdump.errors import HolderError, TargetDenied, TargetError
from tests.command import Done, environment
from tests.kernel.support import Odd, assert_untouched, require_root, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.kernel]

AS_NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups "


@pytest.fixture(autouse=True)
def _needs() -> None:
    require_root()
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "x", "/mnt"], check=False).returncode:
        pytest.skip("needs the right to mount")


def within(
    setting: str, *words: object, by: str = "", python: str = sys.executable, env: dict[str, str] | None = None,
    cwd: str | Path = "/",
) -> Done:  # fmt: skip
    """Run a command where a shell's mounts have made things different.

    :param by: what runs it, `AS_NOBODY`.
    """
    script = f'{setting} && exec {by}"$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", python, "-m", "incdump", *map(str, words)]
    done = subprocess.run(
        command, env=environment(env), cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def refused(done: Done, code: int, *texts: str) -> None:
    """One line that says what to do."""
    assert done.code == code, done
    assert done.err.count("\n") == 1
    assert "report" not in done.err
    for text in texts:
        assert text in done.err


PIDS_ALONE = "mount -t proc -o subset=pid proc /proc"
COMMANDS = {
    "predump": ("predump", "-t", "PID", "-D", "DIR"),
    "dump": ("dump", "-t", "PID", "-D", "DIR", "--kill"),
    "checkpoint": ("checkpoint", "-t", "PID", "-D", "DIR"),
    "precopy": ("precopy", "-t", "PID", "-D", "DIR", "--downtime", "1s"),
    "restore": ("restore", "-D", "DIR"),
    "receive": ("receive", "-D", "DIR", "--listen", "127.0.0.1:0", "--restore"),
    "untrack": ("untrack", "PID"),
    "untrack all": ("untrack", "--all"),
    "holder": ("holder",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_proc_that_shows_processes_alone_is_refused_by_name(odd: Odd, images_root: Path, command: str) -> None:
    given = {"PID": odd.pid, "DIR": images_root / "1"}
    done = within(PIDS_ALONE, *[given.get(word, word) for word in COMMANDS[command]])
    refused(done, TargetError.exit_code, "subset=pid", "mount -t proc")
    assert not (images_root / "1").exists()
    assert_untouched(odd)


def test_doctor_says_that_proc_shows_processes_alone() -> None:
    report = json.loads(within(PIDS_ALONE, "doctor", "--json").out)
    assert not report["works"]
    for tracker in report["trackers"]:
        assert "subset=pid" in tracker["why"]


@pytest.mark.parametrize("hidden", ["1", "2", "ptraceable"])
def test_root_is_shown_what_is_hidden_from_others(odd: Odd, images_root: Path, hidden: str) -> None:
    done = within(f"mount -t proc -o hidepid={hidden} proc /proc", "dump", "-t", odd.pid, "-D", images_root / "1")
    assert done.code == 0, done
    within("true", "untrack", "--all")


@contextlib.contextmanager
def sleeper(options: dict[str, Any]) -> Iterator[int]:
    """A process of nobody's."""
    with subprocess.Popen(["sleep", "1000"], user=65534, group=65534, extra_groups=[], cwd="/") as process:
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize("hidden", ["1", "2", "ptraceable"])
def test_a_user_from_whom_others_are_hidden_dumps_his_own(odd: Odd, as_nobody: dict[str, Any], hidden: str) -> None:
    options = {"by": AS_NOBODY, "python": as_nobody["python"], "env": as_nobody["env"], "cwd": as_nobody["cwd"]}
    hide = f"mount -t proc -o hidepid={hidden} proc /proc"
    refused(within(hide, "predump", "-t", odd.pid, "-D", "1", **options), 3, "run as its user or as root")
    refused(within(hide, "predump", "-t", 4194000, "-D", "1", **options), 3, "4194000")
    with sleeper(as_nobody) as pid:
        report = json.loads(within(hide, "doctor", "--json", **options).out)
        assert report["works"]
        assert any("hidepid" in limit for limit in report["limits"])
        done = within(hide, "dump", "-t", pid, "-D", "2", **options)
        assert done.code == 0, done
        assert within(hide, "untrack", "--all", **options).code == 0


@pytest.mark.parametrize("hidden", ["1", "2"])
def test_a_hidden_process_of_a_tree_is_never_left_out(as_nobody: dict[str, Any], hidden: str) -> None:
    """As a child that runs a program of another user's, setuid."""
    options = {"by": AS_NOBODY, "python": as_nobody["python"], "env": as_nobody["env"], "cwd": as_nobody["cwd"]}
    hide = f"mount -t proc -o hidepid={hidden} proc /proc"
    command = f"sleep 1000 & echo $!; exec {AS_NOBODY} sleep 1000"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, start_new_session=True, cwd="/") as root:
        assert root.stdout is not None
        child = int(root.stdout.readline())
        until(lambda: os.stat(f"/proc/{root.pid}").st_uid == 65534)
        try:
            for kind in ("predump", "dump"):
                done = within(hide, kind, "-t", root.pid, "-D", "1", **options)
                refused(done, TargetDenied.exit_code, f"process {child} is hidden", "as root")
        finally:
            os.killpg(root.pid, 9)


def test_doctor_says_which_limit_keeps_it_from_trying(as_nobody: dict[str, Any]) -> None:
    options = {"python": as_nobody["python"], "env": as_nobody["env"], "cwd": as_nobody["cwd"]}
    done = within("true", "doctor", by=f"{AS_NOBODY} prlimit --nproc=1:1 ", **options)
    refused(done, 1, "RLIMIT_NPROC is 1 for user 65534")


def test_doctor_says_how_many_processes_there_is_room_for() -> None:
    report = json.loads(within("true", "doctor", "--json", by="prlimit --nofile=200:200 ").out)
    assert report["works"]
    assert any("RLIMIT_NOFILE is 200" in limit for limit in report["limits"])


UNUSABLE = {
    "a read-only /run": "mount -t tmpfs -o ro x /run",
    "a read-only one": "D=/run/incdump; mount -t tmpfs x /run && mkdir $D && mount -t tmpfs -o ro,mode=700 y $D",
    "a file in its place": "mount -t tmpfs x /run && touch /run/incdump",
    "somebody else's": "mount -t tmpfs x /run && mkdir /run/incdump && chown 65534 /run/incdump",
    "a full one": "mount -t tmpfs -o size=4k,nr_inodes=1 x /run",
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_a_runtime_directory_that_cannot_be_used_is_said(odd: Odd, images_root: Path, how: str) -> None:
    env = {"INCDUMP_RUNTIME_DIR": ""}
    done = within(UNUSABLE[how], "predump", "-t", odd.pid, "-D", images_root / "1", env=env)
    refused(done, HolderError.exit_code, "/run/incdump", "INCDUMP_RUNTIME_DIR")
    assert not (images_root / "1").exists()
    untracked = within(UNUSABLE[how], "untrack", "--all", env=env)
    if how == "a read-only one":  # no holder can be in there
        assert untracked.code == 0
    else:
        refused(untracked, HolderError.exit_code, "INCDUMP_RUNTIME_DIR")
    refused(within(UNUSABLE[how], "holder", env=env), HolderError.exit_code, "INCDUMP_RUNTIME_DIR")
    report = json.loads(within(UNUSABLE[how], "doctor", "--json", env=env).out)
    assert any("INCDUMP_RUNTIME_DIR" in limit for limit in report["limits"])
    other = {"INCDUMP_RUNTIME_DIR": str(images_root / "runtime")}
    assert within(UNUSABLE[how], "predump", "-t", odd.pid, "-D", images_root / "1", env=other).code == 0
    assert within(UNUSABLE[how], "untrack", "--all", env=other).code == 0
    assert os.listdir(images_root / "runtime") == []


def test_no_holder_is_needed_where_nothing_is_to_be_kept(odd: Odd, images_root: Path) -> None:
    done = within(
        UNUSABLE["a read-only /run"], "dump", "-t", odd.pid, "-D", images_root / "1", "--tracker", "content",
        env={"INCDUMP_RUNTIME_DIR": ""},
    )  # fmt: skip
    assert done.code == 0, done
