"""Victims of the tests of freezing and injection: small C programs (victims/freeze_*.c) that check themselves.

Each writes into a page of shared memory, `Board`, which the test reads while the victim is frozen.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from incdump._uapi import ptrace
from incdump._uapi.arch import ARCH
from incdump.freeze import asleep
from tests.targets import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCES = Path(__file__).parent / "victims"
ERRORS, EINTR, QUIT, BEATS = range(4)
MAY_FAIL = ARCH.orig < 0
"""Whether a wait that begins in the very moment of a stop may fail with EINTR (`incdump.freeze.interrupted`)."""
SLOWER = float(os.environ.get("INCDUMP_TEST_SLOWER", "1"))
SLEEP = int(400 * min(SLOWER, 10))
"""Milliseconds: long enough for several stops, also where all is emulated."""
HANDLER_ENDS = [
    *("read", "poll", "ppoll", "select", "pselect", "epoll_wait", "epoll_pwait", "futex", "sigwait"),
    *("nanosleep", "clock_nanosleep", "futex with a timeout", "poll with a timeout", "select with a timeout"),
]
"""The waits of victims/freeze_waits.c that a signal handler ends with EINTR."""

IN_A_REGISTER = ["epoll_wait", "epoll_pwait"]
TIMED = [
    *("recv", "recvmsg", "recvmmsg", "read", "send", "sendmsg", "write", "accept", "connect"),
    *(*IN_A_REGISTER, "epoll_pwait by itself", "epoll_pwait2", "sigtimedwait", "semtimedop", "io_getevents"),
    *("io_uring_enter", "io_uring_enter for ever"),
]
"""The waits with an end of victims/freeze_timed.c."""
ENDING = [
    call
    for call in TIMED
    if not call.endswith("for ever") and not (MAY_FAIL and call in ("sigtimedwait", "io_getevents"))
]
"""Those that end at the first stop after their time: when they began can be noted."""
FOR_EVER = 600_000
"""Milliseconds: such a wait does not end by itself while a test looks on."""


def in_time(call: str) -> int:
    """What a wait of victims/freeze_timed.c returns when what it waits for happens."""
    return (
        signal.SIGUSR1
        if call == "sigtimedwait"
        else int(call not in ("connect", "semtimedop") and not call.startswith("io_uring"))
    )


def timed_out(call: str) -> set[tuple[int, int]]:
    """Result and errno of such a wait at the end of its time; of connect(2) made again EALREADY as well."""
    if call.startswith("epoll") or call == "io_getevents":
        return {(0, 0)}
    errors = {"connect": (errno.EINPROGRESS, errno.EALREADY), "io_uring_enter": (errno.ETIME,)}
    return {(-1, number) for number in errors.get(call, (errno.EAGAIN,))}


class Victim:
    """A running victim.

    :ivar pid: its pid.
    """

    def __init__(self, binary: Path, board: Path, *arguments: str) -> None:
        board.write_bytes(bytes(4096))
        with board.open("r+b") as file:
            self._board = mmap.mmap(file.fileno(), 4096)
        self.popen = subprocess.Popen(
            [binary, board, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
        )
        self.pid = self.popen.pid
        assert self.popen.stdout is not None
        if not self.popen.stdout.readline():
            self.kill()
            if self.popen.returncode == 77:
                pytest.skip(f"{binary.name}: not on this machine")
            raise AssertionError(f"the victim did not start: {self.popen.returncode}")

    def slot(self, index: int) -> int:
        """A word of the board: `ERRORS`, `EINTR`, `QUIT`, `BEATS`, then the victim's own from 4."""
        return int(struct.unpack_from("<Q", self._board, 8 * index)[0])

    def value(self, index: int) -> int:
        """One of the victim's own words."""
        return self.slot(4 + index)

    def result(self) -> int:
        """What the call has returned, of freeze_waits.c."""
        return ctypes.c_int64(self.value(1)).value

    def set(self, index: int, value: int) -> None:
        """Write a word of the board."""
        struct.pack_into("<Q", self._board, 8 * index, value)

    @property
    def beats(self) -> int:
        """What grows while anything of the victim runs."""
        return self.slot(BEATS)

    def wait_for_beats(self, more: int = 1) -> None:
        """Return when it has run on; fail when it does not."""
        self.wait_until(lambda start=self.beats: self.beats >= start + more)

    def wait_until(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        """Return when something holds; fail when it does not come to hold."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"it did not happen; the victim is {self.state()}"
            time.sleep(0.0005)

    def state(self, tid: int | None = None) -> str:
        """The letter of /proc/PID/stat; "" for one that is gone."""
        return state(self.pid, tid)

    def fds(self) -> list[tuple[str, str]]:
        """Its descriptors and what they are."""
        where = f"/proc/{self.pid}/fd"
        return sorted((name, os.readlink(f"{where}/{name}")) for name in os.listdir(where))

    def finish(self) -> None:
        """Ask it to end, and see that it found nothing wrong."""
        self.set(QUIT, 1)
        assert self.popen.wait(30) == 0
        assert self.slot(ERRORS) == 0

    def kill(self) -> None:
        """End it and what it has started."""
        for kill in (lambda: os.killpg(self.pid, signal.SIGKILL), self.popen.kill):
            with contextlib.suppress(ProcessLookupError):
                kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                stream.close()
        self._board.close()


def state(pid: int, tid: int | None = None) -> str:
    """The letter of a thread's stat file; "" for one that is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{tid or pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rpartition(")")[2].split()[0]


def tracer_of(pid: int) -> int:
    """Who traces a process; 0: nobody."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("TracerPid:")[2].split()[0])


class Victims:
    """Compiles and starts victims, and ends them all.

    They are compiled once a session: beside the directory of the test.
    """

    def __init__(self, where: Path) -> None:
        self._where = where
        self._binaries = where.parent / "victims"
        self._binaries.mkdir(exist_ok=True)
        self._started: list[Victim] = []

    def __call__(self, name: str, *arguments: object) -> Victim:
        """Start victims/freeze_NAME.c."""
        binary = self._binaries / name
        if not binary.exists():
            try:
                compiler = build.compiler()
            except build.NoCompilerError as error:
                pytest.skip(str(error))
            subprocess.run([compiler, "-O1", "-pthread", "-o", binary, SOURCES / f"freeze_{name}.c"], check=True)
        board = self._where / f"board-{len(self._started)}"
        self._started.append(Victim(binary, board, *map(str, arguments)))
        return self._started[-1]

    def end(self) -> None:
        """Kill them."""
        for victim in self._started:
            victim.kill()


def timed(victim: Callable[..., Victim], call: str, ms: int) -> Victim:
    """A victim that sleeps in a wait with an end."""
    target = victim("timed", call, ms)
    target.wait_until(lambda: target.value(0) == 1 and target.state() == "S")
    return target


def as_slow_as_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the looks at sleeping threads the time that they take where all is emulated."""
    for name in ("PATIENCE", "CLOCK_PATIENCE", "_VISIT"):
        monkeypatch.setattr(asleep, name, getattr(asleep, name) * SLOWER)


def sleeps_again(target: Victim, ms: float = 0) -> None:
    """Return when a victim waits again, and has waited for so long."""
    target.wait_until(lambda: target.state() in "SZ")
    time.sleep(ms / 1000)


def queue(pid: int, value: int) -> None:
    """sigqueue(3) of the first realtime signal."""
    assert ctypes.CDLL(None).sigqueue(pid, signal.SIGRTMIN, ctypes.c_void_p(value)) == 0


@contextlib.contextmanager
def signals_one_by_one(target: Victim) -> Iterator[None]:
    """Send SIGUSR2 to freeze_signalled.c for as long as the context lasts, the next when one has ended a wait.

    No signal is without its effect, and nothing but signals ends a wait (unless `MAY_FAIL`).
    """
    stop = threading.Event()
    seen: list[tuple[int, int, int]] = []

    def send() -> None:
        sent = 0
        while not stop.is_set():
            os.kill(target.pid, signal.SIGUSR2)
            sent += 1
            deadline = time.monotonic() + 30
            while min(target.value(0), target.value(1)) < sent and time.monotonic() < deadline:
                time.sleep(0.0005)
            ended = target.value(1)
            seen.append((sent, target.value(0), min(ended, sent) if MAY_FAIL else ended))
            if seen[-1] != (sent, sent, sent):
                return

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        stop.set()
        sender.join()
    sent = len(seen)
    assert seen[-1] == (sent, sent, sent), "signals, runs of the handler, waits ended"
    target.set(QUIT, 1)
    os.kill(target.pid, signal.SIGUSR2)
    target.finish()


def signal_before_interrupt(target: Victim, monkeypatch: pytest.MonkeyPatch, when: Callable[[], bool]) -> list[int]:
    """Have each PTRACE_INTERRUPT meet a target that a signal, queued just before it, is being delivered to.

    :param when: asked each time whether to send one.
    :returns: how many were sent so far, which is also the last one's value; one number.
    """
    interrupt = ptrace.interrupt
    sent = [0]

    def signal_first(tid: int) -> None:
        if when():
            sent[0] += 1
            queue(target.pid, sent[0])
            target.wait_until(lambda: target.state() == "t")  # in signal-delivery-stop
        interrupt(tid)

    monkeypatch.setattr(ptrace, "interrupt", signal_first)
    return sent
