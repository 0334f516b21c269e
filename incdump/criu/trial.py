"""Whether CRIU works here, found out by trying: a small child is dumped, and brought back.

It is CRIU alone that is tried, without configuration files, so that nobody's action scripts run. Nothing stays: while
it is tried, this process adopts the orphans among its descendants, so that whatever CRIU restores or leaves is a child
of this process, and is ended; the child itself ends after a minute where even this process is killed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from incdump.criu.program import UMASK, brief_failure
from incdump.errors import ProcMismatch
from incdump.proc.identity import check_own_proc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from incdump.criu.program import Criu

SECONDS = 30.0
"""For all of it; a machine at rest takes a third of one."""
TCP_SINCE = (4, 2, 1)
"""Earlier versions ask TCP sockets for SO_PASSCRED, which Linux refuses from 6.18 on ("Can't get 1:16 opt")."""
_LIFETIME = "60"
_SET_CHILD_SUBREAPER, _GET_CHILD_SUBREAPER = 36, 37  # include/uapi/linux/prctl.h
_POLL = 0.005
_PATIENCE = 0.1
_KILLED = 5.0
"""Seconds that a process may take to end after SIGKILL."""


def try_out(criu: Criu, seconds: float = SECONDS, give_up: threading.Event | None = None) -> str | None:
    """Dump a child of this process, and restore it. Blocks. Not for a program that starts others meanwhile.

    :param seconds: the time that it may take.
    :param give_up: ends it at once when it is set.
    :returns: None where it works; else why it does not, in CRIU's own words where there are any.
    """
    give_up = give_up or threading.Event()
    deadline = time.monotonic() + seconds
    try:
        check_own_proc()  # children are found there
        with (
            tempfile.TemporaryDirectory(prefix="incdump-criu-trial-", ignore_cleanup_errors=True) as name,
            _none_left(),
        ):
            return _dump_and_restore(_Trial(criu, Path(name), deadline, give_up))
    except ProcMismatch as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"{criu} had not dumped and restored a child process after {seconds:g} s"
    except OSError as error:
        return f"{criu} could not be tried: {error}"


def tells_of_tcp_sockets(criu: Criu) -> bool:
    """Whether it can dump TCP sockets on this kernel, as far as what it asks them is answered."""
    if criu.version >= TCP_SINCE:
        return True
    with socket.socket() as sock, suppress(OSError):
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        return True
    return False


class _Trial(NamedTuple):
    criu: Criu
    place: Path
    deadline: float
    give_up: threading.Event

    def run(self, action: str, *options: str) -> str | None:
        """Run CRIU; what failed.

        :raises subprocess.TimeoutExpired: it took too long, or is given up, and was killed.
        """
        environment = {name: value for name, value in os.environ.items() if name != "CRIU_CONFIG_FILE"}
        log, stderr = self.place / f"{action}.log", self.place / f"{action}.stderr"
        words = ("--images-dir", str(self.place), "--log-file", log.name, "--manage-cgroups=ignore")
        with stderr.open("wb") as said:
            process = subprocess.Popen(
                [self.criu.path, action, *words, "--no-default-config", *options],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=environment,
                umask=UMASK,
                start_new_session=True,
            )
        try:
            status = self.wait(process)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_KILLED)
            raise
        return brief_failure(self.criu, status, f"on a child process ({action})", log, stderr) if status else None

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for a process's end.

        :raises subprocess.TimeoutExpired: that took too long, or is given up.
        """
        while not self.give_up.is_set() and time.monotonic() < self.deadline:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_PATIENCE)
        raise subprocess.TimeoutExpired(process.args, _PATIENCE)


def _dump_and_restore(trial: _Trial) -> str | None:
    sleep = shutil.which("sleep")
    command = [sleep, _LIFETIME] if sleep else [sys.executable, "-IS", "-c", f"import time; time.sleep({_LIFETIME})"]
    null = subprocess.DEVNULL
    child = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, cwd="/", start_new_session=True)
    try:
        if failed := trial.run("dump", "--tree", str(child.pid)):
            return failed
        trial.wait(child)  # its number is free then
    finally:
        child.kill()
        child.wait(_KILLED)
    pidfile = trial.place / "pid"
    if failed := trial.run("restore", "--restore-detached", "--pidfile", str(pidfile)):
        return failed
    pid = int(pidfile.read_text())
    if pid not in _children() or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
        return f"a child process that {trial.criu} has restored did not live"
    return None


@contextmanager
def _none_left() -> Iterator[None]:
    """Whatever is a child of this process at the end, and was none before, is ended, orphans included."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    others = _children()
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _end(others)
        libc.prctl(_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def _end(others: set[int]) -> None:
    """End all children but some, and theirs, which become ours when they lose their parent. A number of a child that
    nobody has waited for is nobody else's."""
    deadline = time.monotonic() + _KILLED
    while (left := _children() - others) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(_POLL)


def _children() -> set[int]:
    """The children of this process, zombies too."""
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):
            found.update(map(int, (thread / "children").read_text().split()))
    return found
