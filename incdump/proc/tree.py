"""The process tree: who belongs to the target, and whether a target can be dumped at all.

/proc/PID/task/TID/children (CONFIG_PROC_CHILDREN) names the children of each thread; without that file one pass over
/proc gives everybody's parent. Both are snapshots of something that moves: a process that exits during the walk is left
out, one that is forked during it may be missed. Only a frozen tree is exact; `incdump.freeze` walks until nothing new
turns up.

Pids are the reader's own, as /proc shows them. The images want them as the root task's pid namespace has them: those
are the ``v...`` fields, from the NSpid, NSpgid and NSsid lines of /proc/PID/status.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from incdump.errors import AlreadyTraced, NoSuchTarget, TargetDenied, TargetUnsuitable
from incdump.proc.identity import (
    PF_FORKNOEXEC,
    PF_KTHREAD,
    Identity,
    Stat,
    boot_id,
    check_own_proc,
    check_page_size,
    is_own_helper,
    leaderless,
    no_such_target,
    read_proc,
    read_stat,
    stays_leaderless,
)

if TYPE_CHECKING:
    from collections.abc import Callable


TRACER_PATIENCE = 1.0
"""Seconds for which another tracer is waited for to leave."""
_TRACER_POLL = 0.02


@dataclass(frozen=True, slots=True)
class Task:
    """One process of a tree.

    :ivar pid: process id in the reader's pid namespace.
    :ivar ppid: its parent, there too.
    :ivar vpid: process id in the root task's pid namespace.
    :ivar pgid: process group in the root task's pid namespace; 0 when the group is from outside of it.
    :ivar sid: session, likewise.
    :ivar state: letter of /proc/PID/stat; "Z" for a process that is dead, never for one whose leader alone has exited.
    :ivar comm: command name.
    :ivar start_time: clock ticks since boot.
    :ivar threads: thread ids in the reader's pid namespace, ascending.
    :ivar vtids: the same threads in the root task's pid namespace, in the same order.
    :ivar forked: whether it has not called exec since it was forked: it may share memory with its parent, and with
        others that its parent forked.
    """

    pid: int
    ppid: int
    vpid: int
    pgid: int
    sid: int
    state: str
    comm: str
    start_time: int
    threads: tuple[int, ...]
    vtids: tuple[int, ...]
    forked: bool

    @property
    def identity(self) -> Identity:
        """What tells it apart from others that have its number before or afterwards."""
        return Identity(self.pid, self.start_time, boot_id())


def process_tree(root: int) -> tuple[Task, ...]:
    """All processes from `root` down: the root first, parents before children, zombies included.

    incdump's own helpers, which a target may have adopted, are left out.

    :raises NoSuchTarget: the root does not exist. (Others that vanish meanwhile are left out.)
    :raises TargetDenied: some process of it is hidden from this user (hidepid).
    """
    try:
        depth = len(_ns_ids(_status(root), b"NSpid")) - 1
    except (ProcessLookupError, PermissionError) as e:
        raise missing(root, e.errno) from None
    children_of = _by_file if os.path.exists(f"/proc/{root}/task/{root}/children") else _by_scan()
    tasks: list[Task] = []
    seen: set[int] = set()
    to_visit = [root]
    while to_visit:
        pid = to_visit.pop()
        if pid in seen:
            continue
        seen.add(pid)
        try:
            if pid != root and is_own_helper(read_stat(pid)):
                continue
            task = _read_task(pid, depth)
        except (ProcessLookupError, PermissionError) as e:
            if pid == root or is_hidden(pid):
                raise missing(pid, e.errno) from None
            continue
        tasks.append(task)
        to_visit.extend(reversed(children_of(task)))
    return tuple(tasks)


def check_target(pid: int) -> Task:
    """Make sure that the tree of process `pid` can be dumped by this process.

    :returns: the root task.
    :raises ProcMismatch: /proc is another pid namespace's.
    :raises NoSuchTarget: no such process; or `pid` is a thread, not a process.
    :raises TargetUnsuitable: a kernel thread, a zombie, a process whose main thread has exited before the others, or a
        tree that incdump itself belongs to.
    :raises TargetDenied: its memory may not be read.
    :raises AlreadyTraced: a debugger is attached.
    """
    if pid <= 0:
        raise no_such_target(pid)
    check_page_size()
    check_own_proc()
    try:
        stat = read_stat(pid)
        status = _status(pid)
        task = _read_task(pid, len(_ns_ids(status, b"NSpid")) - 1)
    except (ProcessLookupError, PermissionError) as e:
        raise missing(pid, e.errno) from None
    tgid = int(status[b"Tgid"])
    if tgid != pid:
        raise NoSuchTarget(f"{pid} is a thread of process {tgid}: name the process, {tgid}", pid=pid)
    _check_suitable(pid, stat)
    _check_access(pid)
    if tracer := _tracer_that_stays(pid, status):
        raise AlreadyTraced(f"process {pid} is traced by process {tracer}: detach that first", pid=pid)
    return task


def _tracer_that_stays(pid: int, status: dict[bytes, bytes]) -> int:
    """Who traces a process and goes on doing so: a profiler, or strace -p, may come for a moment only; 0 for nobody."""
    deadline = time.monotonic() + TRACER_PATIENCE
    while (tracer := _foreign_tracer(pid, status)) and time.monotonic() < deadline:
        time.sleep(_TRACER_POLL)
        try:
            status = _status(pid)
        except ProcessLookupError as e:
            raise missing(pid, e.errno) from None
    return tracer


def _foreign_tracer(pid: int, status: dict[bytes, bytes]) -> int:
    """Who traces a process, if not a thread of this very process: we know what we do; 0 for nobody."""
    tracer = 0
    while (found := int(status.get(b"TracerPid", b"0"))) != tracer:
        if not found or os.path.exists(f"/proc/self/task/{found}"):
            return 0
        tracer = found  # or a thread of ours that has ended meanwhile: then it is not its tracer any more
        try:
            status = _status(pid)
        except ProcessLookupError as e:
            raise missing(pid, e.errno) from None
    return tracer


def tracer_leaves(pid: int, seconds: float) -> bool:
    """Wait for whoever traces a thread of process `pid` to leave. Blocks.

    :returns: whether nobody does any more; the process may be gone. False at once if a thread of ours does.
    """
    deadline = time.monotonic() + seconds
    while True:
        time.sleep(_TRACER_POLL)
        tracers = _tracers(pid)
        if not tracers:
            return True
        if time.monotonic() > deadline or any(os.path.exists(f"/proc/self/task/{tracer}") for tracer in tracers):
            return False


def _tracers(pid: int) -> set[int]:
    """The threads that trace one of a process's."""
    try:
        tids = os.listdir(f"/proc/{pid}/task")
        return {int(_status(pid, int(tid)).get(b"TracerPid", b"0")) for tid in tids} - {0}
    except (FileNotFoundError, ProcessLookupError):  # it, or a thread of it, is gone: whoever asks finds out
        return set()


def is_traced(pid: int) -> bool:
    """Whether somebody traces a process."""
    try:
        return int(_status(pid).get(b"TracerPid", b"0")) != 0
    except OSError:
        return False


def _check_suitable(pid: int, stat: Stat) -> None:
    """Refuse what has no memory to dump, and the trees that hold this very process."""
    if stat.flags & PF_KTHREAD:
        raise TargetUnsuitable(
            f"process {pid} ({stat.comm}) is a kernel thread, which has no memory: choose another", pid=pid
        )
    if stat.is_dead:
        raise TargetUnsuitable(f"process {pid} is a zombie, all its memory is gone: dump one that runs", pid=pid)
    if stat.is_leaderless and stays_leaderless(pid):
        raise leaderless(pid)
    if pid == os.getpid():
        raise TargetUnsuitable(f"process {pid} is incdump itself: run incdump outside of the target", pid=pid)
    if pid in _ancestors():
        raise TargetUnsuitable(
            f"process {pid} ({stat.comm}) is an ancestor of incdump, so its tree contains incdump itself: "
            "run incdump from elsewhere (setsid, another terminal)",
            pid=pid,
        )


def _ancestors() -> set[int]:
    """The pids of all ancestors of this process."""
    found: set[int] = set()
    pid = os.getppid()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            pid = read_stat(pid).ppid
        except OSError:  # hidden (hidepid) or just gone
            break
    return found


def _check_access(pid: int) -> None:
    """Make sure that memory and pagemap can be opened, which takes ptrace rights."""
    for name in ("mem", "pagemap"):
        path = f"/proc/{pid}/{name}"
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except PermissionError as e:
            raise TargetDenied(
                f"no permission to read the memory of process {pid}: run as its user or as root (CAP_SYS_PTRACE)",
                pid=pid,
                path=path,
                errno=e.errno,
            ) from None
        except (FileNotFoundError, ProcessLookupError) as e:
            raise no_such_target(pid, e.errno) from None


def missing(pid: int, number: int | None) -> NoSuchTarget | TargetDenied:
    """The error for a process that /proc does not show: absent, or hidden by the hidepid mount option."""
    if is_hidden(pid):
        return TargetDenied(
            f"process {pid} is hidden from this user: run as its user or as root", pid=pid, errno=number
        )
    return no_such_target(pid, number)


def is_hidden(pid: int) -> bool:
    """Whether a process that /proc does not show is there all the same, another user's."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        pass
    return False


def _status(pid: int, tid: int | None = None) -> dict[bytes, bytes]:
    """/proc/PID/status (or a thread's) as a mapping of field name to text."""
    text = read_proc(f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status")
    return {key: value.strip() for key, _, value in (line.partition(b":") for line in text.splitlines())}


def _ns_ids(status: dict[bytes, bytes], field: bytes) -> list[int]:
    """The ids of an NS... line, from the reader's pid namespace inwards; a single 0 when the kernel has none."""
    return [int(number) for number in status.get(field, b"").split()] or [0]


def _read_task(pid: int, depth: int) -> Task:
    """Read one process, with the ids of the pid namespace that is `depth` levels inside the reader's.

    :raises ProcessLookupError: it is gone.
    """
    stat = read_stat(pid)
    try:
        threads = tuple(sorted(int(tid) for tid in os.listdir(f"/proc/{pid}/task")))
    except FileNotFoundError as e:
        raise ProcessLookupError(e.errno, e.strerror) from None
    state = stat.state
    if stat.is_leaderless:
        state = "S"
    vpid, pgid, sid, vtids = pid, stat.pgid, stat.sid, threads
    if depth > 0:
        status = _status(pid)
        vpid, pgid, sid = (_ns_ids(status, name)[depth] for name in (b"NSpid", b"NSpgid", b"NSsid"))
        threads, vtids = _inner_tids(pid, threads, depth)
    forked = bool(stat.flags & PF_FORKNOEXEC)
    return Task(pid, stat.ppid, vpid, pgid, sid, state, stat.comm, stat.start_time, threads, vtids, forked)


def _inner_tids(pid: int, threads: tuple[int, ...], depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The threads that still exist, and their ids `depth` levels inside the reader's pid namespace."""
    found: list[tuple[int, int]] = []
    for tid in threads:
        try:
            found.append((tid, _ns_ids(_status(pid, tid), b"NSpid")[depth]))
        except ProcessLookupError:
            continue
    return tuple(tid for tid, _ in found), tuple(vtid for _, vtid in found)


def _by_file(task: Task) -> list[int]:
    """The children of all threads of a process, from the children files."""
    children: list[int] = []
    for tid in task.threads:
        try:
            children.extend(int(pid) for pid in read_proc(f"/proc/{task.pid}/task/{tid}/children").split())
        except ProcessLookupError:
            continue
    return children


def _by_scan() -> Callable[[Task], list[int]]:
    """A function that gives the children of a process, from one pass over /proc made now."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                children.setdefault(read_stat(int(name)).ppid, []).append(int(name))
            except ProcessLookupError:
                continue
    return lambda task: sorted(children.get(task.pid, []))
