"""Since when threads sleep in waits that have an end: looked at before they are stopped, which would hide it.

The kernel tells when a thread ran last (``se.exec_start`` of /proc/PID/task/TID/sched, in a clock of the processor it
ran on; what that clock says now, a thread of ours tells that runs there for a moment), and how often it has gone to
sleep. A thread that has gone to sleep once more by the time it stands still, in that very stop, has slept since then;
of any other nothing is known (`Sleep.switches`). The processors' clocks leave out what went to interrupts and to
other guests of the machine, so a sleep counts for that much shorter than it was.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from incdump._uapi.arch import ARCH
from incdump._uapi.procfile import read_small
from incdump.freeze.stops import in_real_time
from incdump.proc.identity import read_proc

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PATIENCE = 0.01
"""Seconds for looking at the threads of a tree; of those not reached nothing is known."""
CLOCK_PATIENCE = 0.01
"""Seconds for asking the processors' clocks: one may be busy with what comes before us."""

_VISIT = 2e-3
"""Of these, for one; less than what makes Python hand on the GIL (sys.getswitchinterval)."""
_TO_SLEEP = 100e-6

_libc = ctypes.PyDLL(None)
_usleep = _libc.usleep
_write = _libc.write
_write.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
_write.restype = ctypes.c_ssize_t

_KEPT = re.compile(rb"/(libc|libc-[0-9.]+|libpthread-[0-9.]+|ld-musl-\w+|libc\.musl-\w+)\.so(\.\d+)?$")
"""C libraries' shared objects: their functions make a system call and return, its argument registers being free."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """A thread asleep.

    :ivar place: number of the call it sleeps in, its stack pointer, and the address behind the instruction.
    :ivar began: when it went to sleep, ms of `now_ms`.
    :ivar switches: how often it had gone to sleep by then.
    :ivar in_library: the call was made by a C library's function, after which nobody looks at the register of
        its timeout: the caller of a function does not expect it to be kept.
    """

    place: tuple[int, int, int]
    began: int
    switches: int
    in_library: bool


def now_ms() -> int:
    """The time in which the kernel counts timeouts, milliseconds; the same in every time namespace."""
    return time.monotonic_ns() // 1_000_000 - _offset_ms()


def _offset_ms() -> int:
    """What this process's time namespace adds to it; 0 where that is not known (`incdump.proc.identity`)."""
    with contextlib.suppress(OSError):
        if os.readlink("/proc/self/ns/time") == os.readlink("/proc/self/ns/time_for_children"):
            for line in read_proc("/proc/self/timens_offsets").splitlines():
                words = line.split()
                if words[0] == b"monotonic":
                    return int(words[1]) * 1000 + int(words[2]) // 1_000_000
    return 0


def sleeps_in(threads: Iterable[tuple[int, int]]) -> dict[int, Sleep]:
    """Those of some threads that sleep in a wait that may have an end, by thread id.

    :param threads: process and thread ids.
    """
    with in_real_time():  # lest others come between what is read and when
        return _sleeps_in(threads)


def _sleeps_in(threads: Iterable[tuple[int, int]]) -> dict[int, Sleep]:
    deadline = time.monotonic() + PATIENCE
    found = []
    for pid, tid in threads:
        with contextlib.suppress(OSError, ValueError, IndexError):
            if seen := _look_at(pid, tid):
                found.append(seen)
        if time.monotonic() > deadline:
            break
    if not found:
        return {}
    clocks = _clocks({cpu for *_, cpu in found})
    sleeps = {}
    libraries: dict[int, list[tuple[int, int]]] = {}
    for pid, tid, place, ran, switches, cpu in found:
        if cpu not in clocks:
            continue
        if pid not in libraries:
            libraries[pid] = _library_text(pid) if time.monotonic() < deadline + CLOCK_PATIENCE else []
        clock, at = clocks[cpu]
        in_library = any(start <= place[2] < end for start, end in libraries[pid])
        began = at - max(0, int(clock - ran))
        sleeps[tid] = Sleep(place, began, switches, in_library)
    return sleeps


def threads_below(root: int) -> Iterator[tuple[int, int]]:
    """Process and thread ids of a tree that runs on meanwhile."""
    pids = [root]
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/task"):
                yield pid, int(name)
                with contextlib.suppress(OSError):
                    pids += map(int, read_small(f"/proc/{pid}/task/{name}/children").split())


def switches_of(pid: int, tid: int) -> int:
    """How often a thread has gone to sleep; -1: it is gone, or the kernel does not tell.

    A stop by a tracer counts as one.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(_field(read_small(f"/proc/{pid}/task/{tid}/sched"), b"nr_voluntary_switches"))
    return -1


def _look_at(pid: int, tid: int) -> tuple[int, int, tuple[int, int, int], float, int, int] | None:
    """Process, thread, place, when it ran last (ms of the processor's clock), switches, processor."""
    words = read_small(f"/proc/{pid}/task/{tid}/syscall").split()
    if len(words) < 9:
        return None
    number = int(words[0])
    if number not in ARCH.waits_with_eintr and number not in ARCH.socket_waits:
        return None
    text = read_small(f"/proc/{pid}/task/{tid}/sched")
    ran, switches = float(_field(text, b"se.exec_start")), int(_field(text, b"nr_voluntary_switches"))
    # Read last: if it has run since, it has gone to sleep once more since.
    cpu = int(read_small(f"/proc/{pid}/task/{tid}/stat").rpartition(b")")[2].split()[36])
    return pid, tid, (number, int(words[7], 16), int(words[8], 16)), ran, switches, cpu


def _field(text: bytes, name: bytes) -> bytes:
    return text.partition(b"\n" + name)[2].partition(b":")[2].split(maxsplit=1)[0]


def _library_text(pid: int) -> list[tuple[int, int]]:
    """Where a process has C libraries' code mapped."""
    with contextlib.suppress(OSError):
        lines = [line.split(maxsplit=5) for line in read_proc(f"/proc/{pid}/maps").splitlines()]
        spans = [words[0].split(b"-") for words in lines if len(words) == 6 and _KEPT.search(words[5])]
        return [(int(start, 16), int(end, 16)) for start, end in spans]
    return []


def _clocks(cpus: set[int]) -> dict[int, tuple[float, int]]:
    """What processors' clocks say, ms, and when (`now_ms`); those that do not let us run at once are left out.

    A thread of ours is woken on each, and what it does there in Python waits until it may run anywhere again: on a
    processor that a real-time task keeps for itself it would never come to an end, and hold the GIL.
    """
    clocks: dict[int, tuple[float, int]] = {}
    allowed = os.sched_getaffinity(0)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        visitor = threading.Thread(target=_visit, args=(reader,), name="clocks", daemon=True)
        visitor.start()
        with contextlib.suppress(OSError):
            os.sched_setscheduler(visitor.native_id or 0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except RuntimeError:  # no thread can be made
        os.close(reader)
        os.close(writer)
        return {}
    try:
        deadline = time.monotonic() + CLOCK_PATIENCE
        for cpu in cpus & allowed:
            time.sleep(_TO_SLEEP)
            if time.monotonic() > deadline:
                break
            with contextlib.suppress(OSError, ValueError, IndexError):
                if clock := _clock(cpu, visitor.native_id or 0, writer, allowed):
                    clocks[cpu] = clock, now_ms()
    finally:
        os.close(writer)
        visitor.join()
        os.close(reader)
    return clocks


def _visit(reader: int) -> None:
    while os.read(reader, 1):
        pass


def _clock(cpu: int, visitor: int, writer: int, allowed: set[int]) -> float | None:
    """One processor's clock, where a thread of ours is woken; the GIL is held throughout."""
    where = f"/proc/self/task/{visitor}/"
    deadline = time.monotonic() + _VISIT
    os.sched_setaffinity(visitor, {cpu})
    try:
        before = ran = float(_field(read_small(where + "sched"), b"se.exec_start"))
        _write(writer, b"x", 1)
        while ran == before and time.monotonic() < deadline:
            _usleep(20)  # it may be our own processor
            ran = float(_field(read_small(where + "sched"), b"se.exec_start"))
        at = int(read_small(where + "stat").rpartition(b")")[2].split()[36])
        return ran if ran != before and at == cpu else None
    finally:
        os.sched_setaffinity(visitor, allowed)
