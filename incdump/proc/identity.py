"""Which process is this, beyond its pid: start time and boot.

A pid is used again after its process is gone. The start time in field 22 of /proc/PID/stat, in clock ticks since boot,
tells the two apart; the boot id tells boots apart. exec(2) keeps both: the address space is new all the same.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from incdump.errors import NoSuchTarget, TargetDenied, TargetUnsuitable

if TYPE_CHECKING:
    from collections.abc import Iterator

PF_KTHREAD = 0x00200000
"""Bit of field 9 of /proc/PID/stat: a kernel thread (include/linux/sched.h)."""
PF_EXITING = 0x00000004
"""Another one: its memory is going, or gone."""
PF_FORKNOEXEC = 0x00000040
"""Another one: it was forked, and has not called exec since."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, told apart from all others that have had its pid.

    :ivar pid: the process id.
    :ivar start_time: clock ticks from boot to the start of the process.
    :ivar boot_id: /proc/sys/kernel/random/boot_id.
    """

    pid: int
    start_time: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/PID/stat that matter here (proc(5)).

    :ivar state: one letter: R, S, D, T (stopped), t (traced), Z (zombie), X (dead), I, P.
    :ivar flags: PF_* bits of the kernel.
    :ivar num_threads: threads that are left; 1 for a zombie.
    :ivar start_time: clock ticks since boot.
    :ivar start_code: address of the program's code; 1 or 0 for who may not trace it.
    :ivar start_stack: address of the bottom of its stack; 0 for who may not trace it.
    """

    pid: int
    comm: str
    state: str
    ppid: int
    pgid: int
    sid: int
    flags: int
    num_threads: int
    start_time: int
    start_code: int
    start_stack: int

    @property
    def is_dead(self) -> bool:
        """Whether no thread is left to run. A leader that exited before its threads is a "Z" too, but not dead."""
        return self.state in "ZXx" and self.num_threads <= 1

    @property
    def is_leaderless(self) -> bool:
        """Whether the main thread has exited and others run on: /proc/PID then shows no memory, and neither do we."""
        return self.state in "ZXx" and self.num_threads > 1


def parse_stat(text: bytes) -> Stat:
    """Parse /proc/PID/stat; comm may hold blanks and parentheses, so it ends at the *last* parenthesis."""
    head, _, tail = text.rpartition(b")")
    pid, _, comm = head.partition(b" (")
    field = tail.split()  # field[0] is field 3 of proc(5)
    return Stat(
        pid=int(pid),
        comm=os.fsdecode(comm),
        state=field[0].decode(),
        ppid=int(field[1]),
        pgid=int(field[2]),
        sid=int(field[3]),
        flags=int(field[6]),
        num_threads=int(field[17]),
        start_time=int(field[19]),
        start_code=int(field[23]),
        start_stack=int(field[25]),
    )


def read_proc(path: str) -> bytes:
    """The whole of a small /proc file.

    :raises ProcessLookupError: the process is gone (a vanished /proc/PID counts as that, too).
    :raises OSError: anything else, EACCES for example.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall() or b""
    except FileNotFoundError as e:
        raise ProcessLookupError(e.errno, e.strerror, path) from None


def read_stat(pid: int) -> Stat:
    """Read /proc/PID/stat; `pid` may be any thread's.

    :raises ProcessLookupError: it is gone.
    """
    return parse_stat(read_proc(f"/proc/{pid}/stat"))


@cache
def boot_id() -> str:
    """The id of this boot, a UUID."""
    return read_proc("/proc/sys/kernel/random/boot_id").decode().strip()


def identify(pid: int) -> Identity:
    """The identity of a process that exists.

    :raises NoSuchTarget: it does not.
    """
    try:
        return Identity(pid, read_stat(pid).start_time, boot_id())
    except ProcessLookupError as e:
        raise no_such_target(pid, e.errno) from None


def is_same(identity: Identity) -> bool:
    """Whether that very process is still alive; a zombie is not."""
    try:
        stat = read_stat(identity.pid)
    except ProcessLookupError:
        return False
    return not stat.is_dead and stat.start_time == identity.start_time and boot_id() == identity.boot_id


def is_exiting(pid: int) -> bool:
    """Whether a process is gone, a zombie, or on its way there."""
    try:
        stat = read_stat(pid)
    except ProcessLookupError:
        return True
    return stat.is_dead or bool(stat.flags & PF_EXITING)


def open_pidfd(pid: int) -> int:
    """A descriptor that goes on meaning this process: readable (poll) when it has exited. The caller closes it.

    :raises NoSuchTarget: there is no such process, or `pid` is a thread that does not lead its process.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as e:
        # A thread that leads no process is EINVAL, or ENOENT on newer kernels; so is a pid below 1.
        if e.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
            raise no_such_target(pid, e.errno) from None
        raise


def stays_leaderless(pid: int) -> bool:
    """Whether a process goes on without its main thread.

    For a moment every process with threads looks like that while it exits, or calls execve(2) from another thread: so
    this waits for up to a quarter of a second. Blocks.
    """
    for _ in range(50):
        try:
            if not read_stat(pid).is_leaderless:
                return False
        except ProcessLookupError:
            return False
        time.sleep(0.005)
    return True


def leaderless(pid: int) -> TargetUnsuitable:
    """The error for a process whose main thread has exited before the others."""
    message = f"the main thread of process {pid} has exited while others run: such a process cannot be dumped"
    return TargetUnsuitable(message, pid=pid)


@contextmanager
def reading(pid: int) -> Iterator[None]:
    """Files of /proc/PID are read in here: what that fails with is told of the process.

    :raises NoSuchTarget: there is no such process.
    :raises TargetDenied: its files may not be read.
    """
    try:
        yield
    except PermissionError as error:
        message = f"no permission to read process {pid}: run as its user or as root (CAP_SYS_PTRACE)"
        raise TargetDenied(message, pid=pid, errno=error.errno) from None
    except (ProcessLookupError, FileNotFoundError) as error:
        raise no_such_target(pid, error.errno) from None


def no_such_target(pid: int, number: int | None = None) -> NoSuchTarget:
    """The error for a pid that nobody has."""
    return NoSuchTarget(f"there is no process {pid}: check the pid (ps -p {pid})", pid=pid, errno=number)
