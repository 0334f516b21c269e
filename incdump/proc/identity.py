"""Which process is this, beyond its pid: start time and boot.

A pid is used again after its process is gone. The start time in field 22 of /proc/PID/stat, in clock ticks since boot,
tells the two apart; the boot id tells boots apart. exec(2) keeps both: the address space is new all the same.

The kernel shows that time shifted by the offset of the *reader's* time namespace (`boot_offset`): `read_stat` takes the
offset off, so that two readers, and images that the one wrote and the other reads, mean the same.

A number means a process only together with a pid namespace. /proc shows those of the namespace that it was mounted
for, which need not be the caller's (``unshare -fp`` without ``--mount-proc``): system calls would act on another
process than the one that was looked at. `check_own_proc` refuses that before a number is used. From there on a pidfd
stands for the process, and `open_identified` binds the two: as long as the process of a pidfd has not been reaped, its
number is nobody else's.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from incdump.errors import (
    NoSuchTarget,
    ProcIncomplete,
    ProcMismatch,
    TargetDenied,
    TargetExited,
    TargetUnsuitable,
    UnsupportedPageSize,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_PAGE_SIZE = 4096  # incdump.model.runs has it for those that may import NumPy
HOLDER_COMM = "incdump-holder"
"""The name of a holder process."""
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
    :ivar start_time: clock ticks from boot to the start of the process, by the machine's own count.
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
    :raises OSError: anything else, EACCES for example; ENOENT of a file that is no process's.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall() or b""
    except FileNotFoundError as e:
        if path[6:7].isdigit() or path.startswith("/proc/self/"):
            raise ProcessLookupError(e.errno, e.strerror, path) from None
        raise


def read_stat(pid: int) -> Stat:
    """Read /proc/PID/stat; `pid` may be any thread's.

    :returns: it, the start time being that of the machine, whatever time namespace this process is in.
    :raises ProcessLookupError: it is gone.
    """
    stat = parse_stat(read_proc(f"/proc/{pid}/stat"))
    offset = boot_offset()
    return replace(stat, start_time=stat.start_time - offset) if offset else stat


def boot_offset() -> int:
    """What this process's time namespace adds to times since boot, clock ticks (time_namespaces(7))."""
    return _boot_offset(os.getpid())


@cache
def _boot_offset(_pid: int) -> int:
    """That of one process: a child that is forked may be in another namespace.

    /proc/PID/timens_offsets has the offsets of the namespace for its children, which is its own but between
    unshare(CLONE_NEWTIME) and the next exec: then 0 is all that is known.
    """
    try:
        if os.readlink("/proc/self/ns/time") != os.readlink("/proc/self/ns/time_for_children"):
            return 0
        lines = [line.split() for line in read_proc("/proc/self/timens_offsets").splitlines()]
    except (ProcessLookupError, FileNotFoundError):  # a kernel without time namespaces
        return 0
    offsets = {words[0]: int(words[1]) + int(words[2]) / 1e9 for words in lines if len(words) == 3}
    return round(offsets.get(b"boottime", 0.0) * os.sysconf("SC_CLK_TCK"))


@cache
def boot_id() -> str:
    """The id of this boot, a UUID."""
    return read_proc(_BOOT_ID).decode().strip()


def check_own_proc() -> None:
    """Make sure that /proc is that of this process's own pid namespace.

    The NSpid line of /proc/self/status (Linux 4.1) has one number for each namespace from the mount's inwards.

    :raises ProcMismatch: it is not, or there is no /proc.
    :raises ProcIncomplete: it shows processes alone.
    """
    try:
        status = read_proc("/proc/self/status")
    except OSError as error:  # of a namespace that this process is not in at all, /proc/self leads nowhere
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        status = b""
    fields = dict(line.split(b":", 1) for line in status.splitlines() if b":" in line)
    numbers = fields.get(b"NSpid", fields.get(b"Pid", b"")).split()
    if numbers != [b"%d" % os.getpid()]:
        raise ProcMismatch(
            "/proc does not show this pid namespace, so a number means one process there and another here: "
            "mount its own (mount -t proc proc /proc; unshare --mount-proc, nsenter -m)",
            path="/proc",
        )
    if not os.path.exists(_BOOT_ID):
        raise ProcIncomplete(
            f"/proc shows processes alone ({_BOOT_ID} is missing; it is mounted with subset=pid): mount a whole one "
            "where incdump runs (mount -t proc proc /proc)",
            path=_BOOT_ID,
        )


def check_page_size() -> None:
    """Make sure that this kernel has pages of 4 KiB: images, pagemaps and the page server's protocol are made of these.

    Kernels of aarch64 and powerpc come with 16 and 64 KiB, too.

    :raises UnsupportedPageSize: they are of another size.
    """
    size = os.sysconf("SC_PAGE_SIZE")
    if size != _PAGE_SIZE:
        raise UnsupportedPageSize(
            f"this kernel has pages of {size >> 10} KiB, and incdump knows 4 KiB alone: boot a kernel with those"
        )


def open_identified(pid: int, start_time: int) -> int:
    """A pidfd of a process that is known by number and start time. The caller closes it.

    :raises TargetExited: that process is gone; the number may be another's by now.
    """
    try:
        pidfd = open_pidfd(pid)
    except NoSuchTarget as error:
        raise TargetExited(f"process {pid} exited", pid=pid, errno=error.errno) from None
    try:
        stat = read_stat(pid)
        if stat.start_time == start_time and not has_ended(pidfd):
            return pidfd
    except ProcessLookupError:
        pass
    except BaseException:
        os.close(pidfd)
        raise
    os.close(pidfd)
    raise TargetExited(f"process {pid} exited, and its number is another's by now", pid=pid)


def has_ended(pidfd: int) -> bool:
    """Whether the process behind a pidfd has exited; a zombie has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def pid_of(pidfd: int) -> int:
    """The number of the process behind a pidfd: -1 if it was reaped, 0 if it is in no namespace of ours.

    :raises OSError: the descriptor is no pidfd.
    """
    for line in read_proc(f"/proc/self/fdinfo/{pidfd}").splitlines():
        if line.startswith(b"Pid:"):
            return int(line[4:])
    raise OSError(errno.EBADF, "not a pidfd")


def signal_same(identity: Identity, number: int) -> bool:
    """Send a signal to that very process, never to another that has its number by now.

    :returns: False: it is gone.
    """
    try:
        pidfd = open_identified(identity.pid, identity.start_time)
    except TargetExited:
        return False
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
            return True
        return False
    finally:
        os.close(pidfd)


_own_helpers: set[tuple[int, int]] = set()


def keep_out_of_trees(pid: int) -> None:
    """Remember a process as incdump's own: it belongs to no target's tree, whoever has adopted it."""
    with contextlib.suppress(ProcessLookupError):
        _own_helpers.add((pid, read_stat(pid).start_time))


def descends_from(pid: int, root: int) -> bool:
    """Whether a process is `root`, or has it among its ancestors by now."""
    seen: set[int] = set()
    while pid > 0 and pid not in seen:
        if pid == root:
            return True
        seen.add(pid)
        try:
            pid = read_stat(pid).ppid
        except ProcessLookupError:
            return False
    return False


def is_own_helper(stat: Stat) -> bool:
    """Whether a process is one of `keep_out_of_trees`, or a holder of whatever runtime directory."""
    if (stat.pid, stat.start_time) in _own_helpers:
        return True
    if stat.comm != HOLDER_COMM or not listens_as_holder(stat.pid):
        return False
    _own_helpers.add((stat.pid, stat.start_time))
    return True


def listens_as_holder(pid: int) -> bool:
    """Whether a process has bound a holder's socket: its name has the pid namespace's inode and its number there.

    So a program of the target's that happens to have the holder's name is not left out of a dump.
    """
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        lines = read_proc(f"/proc/{pid}/net/unix").splitlines()
        namespace = os.stat(f"/proc/{pid}/ns/pid").st_ino
        status = read_proc(f"/proc/{pid}/status").splitlines()
    except OSError:
        return False
    numbers = [line.split()[-1] for line in status if line.startswith(b"NSpid:")]  # the last is its own of itself
    own = {link[8:-1].encode() for link in links if link.startswith("socket:[")}
    name = b"/holder-%d.sock.%s" % (namespace, numbers[0] if numbers else b"%d" % pid)
    return any(line.endswith(name) and line.split()[6] in own for line in lines)


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
