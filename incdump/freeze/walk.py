"""Stopping a process tree that moves: every thread of every process, until nothing new turns up.

The steps, all in the one thread that traces:

1. Threads: list /proc/PID/task, PTRACE_SEIZE and PTRACE_INTERRUPT each that is new, wait for them all. A listing made
   with all known threads stopped that shows no other settles the process: only a running thread makes threads.
2. Children: the children of each settled process's threads; each is a process for step 1. Once more for all when there
   is more than one process, since a process can be made a child of its maker's parent (CLONE_PARENT).
3. Proof: each thread is asked whether it is stopped now. One that was killed, or changed hands by an exec of
   a thread not yet stopped, sends its process back to step 1.

A thread in vfork(2) cannot stop before its child execs or exits. It counts as stopped once that child, with
which it shares its memory, is.

A signal that the stop holds up, on its way to a handler, takes effect before the thread counts as stopped
(`incdump.freeze.pending`); what is held up when a freeze is given up is passed on when the thread is let go.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from incdump._uapi import ptrace
from incdump._uapi.arch import ARCH
from incdump._uapi.kcmp import KCMP_VM, shares
from incdump._uapi.procfile import read_small
from incdump.errors import FreezeTimeout, TargetExited, TargetUnsuitable
from incdump.freeze.asleep import Sleep, sleeps_in, threads_below
from incdump.freeze.attach import interrupt, is_ours, seize
from incdump.freeze.choice import has_exited, is_gone, read_thread_stat
from incdump.freeze.interrupted import Call, Spared, fail_after_all, has_handler, look, spare_eintr, take_off_stop
from incdump.freeze.pending import MOST_DELIVERIES, comes_before_stop, send_stop, take_next
from incdump.freeze.stops import (
    SLOW,
    Backoff,
    held_signal,
    in_real_time,
    is_group_stop,
    is_syscall_stop,
    wait_for_stop,
)
from incdump.proc.identity import PF_KTHREAD, is_own_helper, read_proc, read_stat
from incdump.proc.tree import is_hidden, missing

if TYPE_CHECKING:
    from incdump.model.options import Afterwards

LET_GO_TIMEOUT = 0.05
"""Seconds to wait for a thread to leave vfork(2) after its child was let go."""
WAIT_TIMEOUT = 5.0
"""Seconds for a thread to get from its stop to the entry of the wait that it makes again."""
DEATH_TIMEOUT = 5.0
"""Seconds to wait for a killed tree to be dead, and for a stopped one to be seen stopped."""

_WHY_NOT_STOPPED = {"D": "is in uninterruptible sleep (state D)", "R": "gets no processor time (state R)"}
_WALL = 0x40000000


class Abandoned(Exception):
    """Nobody waits for the freeze any more; it was undone."""


@dataclass(slots=True)
class Thread:
    """A thread that we trace.

    :ivar is_stopped: it was seen in a ptrace-stop.
    :ivar in_vfork: it waits for its vfork child and cannot stop.
    :ivar held: signal to pass on.
    :ivar deliveries: signals that took effect while it was being stopped.
    :ivar seen_in: the call that it slept in before.
    :ivar spared: what was done lest a wait of it fails.
    """

    pid: int
    tid: int
    is_stopped: bool = False
    in_vfork: bool = False
    in_group_stop: bool = False
    held: int = 0
    deliveries: int = 0
    seen_in: Call | None = None
    spared: Spared | None = None

    @property
    def is_spared(self) -> bool:
        """Whether it makes a wait again that the stop made fail."""
        return self.spared is not None and self.spared.is_again


@dataclass(slots=True)
class Process:
    """A process of the tree.

    :ivar state: letter of /proc/PID/stat before anything was done to it.
    :ivar is_ours: it is a child of this very process, whose death nobody else may reap.
    :ivar is_settled: all of its threads are known and stopped.
    """

    pid: int
    ppid: int
    state: str
    is_ours: bool
    threads: dict[int, Thread] = field(default_factory=dict)
    is_settled: bool = False
    has_children_read: bool = False


class TreeWalk:
    """The processes of a tree being frozen, or frozen. Methods are for the tracing thread, but for `reap_stalled`.

    :ivar processes: by pid, parents before children.
    :ivar exited: pids of processes that were in the tree and exited meanwhile.
    :ivar has_leftovers: threads are traced that were not let go: only the end of the tracing thread does that.
    """

    def __init__(self) -> None:
        self.processes: dict[int, Process] = {}
        self.exited: list[int] = []
        self.has_leftovers = False
        self._root = 0
        self._deadline = 0.0
        self._abandoned = threading.Event()
        self._info = ptrace.SigInfo()
        self._registers = ARCH.registers()
        self._sleeps: dict[int, Sleep] = {}

    def __repr__(self) -> str:
        threads = sum(len(process.threads) for process in self.processes.values())
        return f"<TreeWalk {len(self.processes)} processes, {threads} threads>"

    # -- freezing

    def look(self, root: int) -> None:
        """Before `freeze`, which is not to take longer by that: see since when threads of the tree sleep."""
        self._sleeps = sleeps_in(threads_below(root))

    def freeze(self, root: int, timeout: float, abandoned: threading.Event) -> None:
        """Stop the whole tree, or nothing of it.

        :param timeout: seconds.
        :param abandoned: set when the freeze is to be given up.
        """
        self.exited = []
        self._root = root
        self._deadline = time.monotonic() + timeout
        self._abandoned = abandoned
        try:
            self._add(root)
            self._to_fixed_point()
        except BaseException:
            self.thaw("running")
            raise

    def _to_fixed_point(self) -> None:
        while True:
            self._settle_all()
            if self._find_children(again=False):
                continue
            if len(self.processes) > 1 and self._find_children(again=True):
                continue
            if self._prove():
                return

    def _add(self, pid: int) -> bool:
        """Take a process into the tree.

        :returns: whether there is something to freeze: False for a zombie and for one that is gone.
        """
        if pid == os.getpid():
            raise TargetUnsuitable(
                f"the tree of process {self._root} holds incdump itself: run incdump outside of the target", pid=pid
            )
        try:
            stat = read_stat(pid)
        except (ProcessLookupError, PermissionError) as e:
            if pid == self._root or is_hidden(pid):
                raise missing(pid, e.errno) from None
            return False
        if pid != self._root and is_own_helper(stat):
            return False
        if pid == self._root and stat.flags & PF_KTHREAD:
            raise TargetUnsuitable(f"process {pid} ({stat.comm}) is a kernel thread: it has no memory", pid=pid)
        if stat.is_dead and has_exited(pid):
            if pid == self._root:
                raise TargetUnsuitable(f"process {pid} is a zombie: its parent {stat.ppid} has yet to reap it", pid=pid)
            return False
        self.processes[pid] = Process(pid, stat.ppid, stat.state, stat.ppid == os.getpid())
        return True

    def _settle_all(self) -> None:
        """Step 1, for all processes that are not settled."""
        while unsettled := [process for process in self.processes.values() if not process.is_settled]:
            self._check_patience([])
            for process in unsettled:
                self._seize_new(process)
            threads = (thread for process in unsettled for thread in process.threads.values())
            self._await_stops([thread for thread in threads if not thread.is_stopped and not thread.in_vfork])

    def _seize_new(self, process: Process) -> None:
        """Seize and interrupt the threads that a new listing shows; the process is settled if it shows none."""
        try:
            tids = {int(name) for name in os.listdir(f"/proc/{process.pid}/task")}
        except (FileNotFoundError, ProcessLookupError):
            tids = set()
        was_stopped = all(thread.is_stopped or thread.in_vfork for thread in process.threads.values())
        for tid in process.threads.keys() - tids:
            del process.threads[tid]
        found_new, is_first = False, not process.threads
        for tid in sorted(tids - process.threads.keys()):
            if not seize(process.pid, tid):
                continue
            seen_in = look(process.pid, tid) if is_first else None  # those that turn up later have just begun
            if interrupt(tid):
                # At once: `reap_stalled` and `thaw` have to know.
                process.threads[tid] = Thread(process.pid, tid, seen_in=seen_in)
                found_new = True
        process.is_settled = was_stopped and not found_new
        if not process.threads:
            process.is_settled = False
            if has_exited(process.pid):
                self._drop(process)

    def _drop(self, process: Process) -> None:
        """A process that has exited is no longer in the tree."""
        del self.processes[process.pid]
        self.exited.append(process.pid)
        if process.pid == self._root:
            raise TargetExited(f"process {process.pid} exited while it was being frozen", pid=process.pid)

    # -- waiting

    def _await_stops(self, pending: list[Thread]) -> None:
        """Wait until each thread is stopped, is found to be gone, or to be in vfork."""
        backoff = Backoff()
        while pending := [thread for thread in pending if not self._see(thread) or self._takes_signal(thread)]:
            self._check_patience(pending)
            if backoff.pause() > SLOW:
                pending = [thread for thread in pending if self._is_to_come(thread)]

    def _see(self, thread: Thread) -> bool:
        """Whether a thread is stopped now; how is remembered."""
        if not ptrace.is_stopped(thread.tid, self._info):
            return False
        if not thread.is_stopped:
            self._spare_eintr(thread)
            if not held_signal(self._info) or self.processes[thread.pid].is_ours:
                ptrace.take_notification(thread.tid)
        thread.is_stopped = True
        thread.in_vfork = False
        thread.held = held_signal(self._info)
        thread.in_group_stop = is_group_stop(self._info)
        return True

    def _takes_signal(self, thread: Thread) -> bool:
        """Whether a stopped thread has to take a signal first: it does, and will stop once more."""
        if thread.in_group_stop or thread.deliveries == MOST_DELIVERIES:
            return False
        try:
            if not thread.held and not comes_before_stop(thread.pid, thread.tid):
                return False
            if thread.is_spared and ARCH.orig < 0 and thread.held and has_handler(thread.pid, thread.tid, thread.held):
                fail_after_all(thread.tid, self._registers)
                thread.spared = None
            thread.deliveries += 1
            thread.is_stopped = False
            take_next(thread.tid, thread.held, self._info)
        except ProcessLookupError:
            thread.is_stopped = False
        return True

    def _spare_eintr(self, thread: Thread) -> None:
        """See to it that a wait goes on afterwards which the stop made fail, and does so even if we are killed."""
        registers = self._registers
        with contextlib.suppress(ProcessLookupError):  # killed since: it will be found out
            if ptrace.getregset(thread.tid, registers) != ctypes.sizeof(registers):
                return
            sleep = self._sleeps.get(thread.tid)
            if spared := spare_eintr(thread.pid, thread.tid, registers, thread.seen_in, sleep):
                ptrace.setregset(thread.tid, registers)
                thread.spared = spared

    def _is_to_come(self, thread: Thread) -> bool:
        """Whether a thread that has not stopped so far still may."""
        process = self.processes[thread.pid]
        try:
            state = read_thread_stat(thread.pid, thread.tid).state
            if state == "D" and self._in_vfork(thread):
                thread.in_vfork = True
                return False
            if gone := state in "ZXx":
                self._reap(process, thread.tid)
            else:
                gone = not is_ours(thread.pid, thread.tid)
        except ProcessLookupError:
            gone = True
        if gone:
            del process.threads[thread.tid]
        return not gone

    def _in_vfork(self, thread: Thread) -> bool:
        """Whether a thread in uninterruptible sleep is in a call that may be vfork."""
        words = read_proc(f"/proc/{thread.pid}/task/{thread.tid}/syscall").split()
        return bool(words) and words[0].isdigit() and int(words[0]) in ARCH.vforks

    def _reap(self, process: Process, tid: int) -> bool:
        """Take note of a traced thread's death, without which it stays a zombie; never of our own child's.

        :returns: whether it is dead, or not traced by us any more.
        """
        if process.is_ours and tid == process.pid:
            return False
        try:
            return os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | _WALL) is not None
        except ChildProcessError:
            return True

    def reap_stalled(self) -> None:
        """From another thread, now and then: unblock a PTRACE_SEIZE.

        It waits for an exec in the target to end, which waits for the death of other threads, which, once seized,
        takes somebody to reap them. Any thread of the tracer's process will do.
        """
        for process in list(self.processes.values()):
            for tid in list(process.threads):
                self._reap(process, tid)

    def _check_patience(self, pending: list[Thread]) -> None:
        """Give up when nobody waits any more, or time is over."""
        if self._abandoned.is_set():
            raise Abandoned
        if time.monotonic() <= self._deadline:
            return
        who, why, pid = "some thread of the tree", "is never the last one", self._root
        if pending:
            pid, state = pending[0].pid, "X"
            with contextlib.suppress(ProcessLookupError):
                state = read_thread_stat(pid, pending[0].tid).state
            who = f"thread {pending[0].tid} of process {pid}"
            why = _WHY_NOT_STOPPED.get(state, f"is in state {state}")
        raise FreezeTimeout(f"{who} did not stop in time: it {why}; allow more time or try later", pid=pid)

    # -- children, proof

    def _find_children(self, *, again: bool) -> bool:
        """Step 2: read the children of processes.

        :param again: of all, not only of those whose have not been read yet.
        :returns: whether one was found that was not known.
        """
        found = False
        for process in list(self.processes.values()):
            if process.has_children_read and not again:
                continue
            for pid in children_of(process):
                if pid not in self.processes and self._add(pid):
                    found = True
            process.has_children_read = True
        return found

    def _prove(self) -> bool:
        """Step 3: ask each thread once more."""
        proven = True
        for process in self.processes.values():
            for thread in process.threads.values():
                if self._see(thread) or (thread.in_vfork and self._has_stopped_child(thread)):
                    continue
                thread.is_stopped = thread.in_vfork = False
                proven = process.is_settled = False
        return proven

    def _has_stopped_child(self, thread: Thread) -> bool:
        """Whether a stopped process of the tree is the vfork child of a thread."""
        return any(
            child.ppid == thread.pid
            and all(t.is_stopped for t in child.threads.values())
            and _share_memory(thread.pid, child.pid)
            for child in self.processes.values()
        )

    # -- thawing

    def thaw(self, afterwards: Afterwards) -> int:
        """Let everything go.

        :returns: time.monotonic_ns() at which the last thread was let go.
        """
        processes = list(self.processes.values())
        gone_ahead: list[Thread] = []
        if afterwards == "stopped":
            gone_ahead = self._stop(processes)
        elif afterwards == "killed":
            self._kill(processes)
        if afterwards != "killed":
            with in_real_time():  # the threads let go first are not to keep us from letting go of the others
                threads = [thread for process in reversed(processes) for thread in process.threads.values()]
                self._let_go([thread for thread in threads if thread not in gone_ahead])
        done = time.monotonic_ns()
        if afterwards == "killed":
            self._await_death(processes)
        elif afterwards == "stopped":
            self._await_group_stop(processes)
        self.processes = {}
        return done

    def _kill(self, processes: list[Process]) -> None:
        """Kill every process; one that we trace is dead at worst, its pid not yet another's."""
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def _stop(self, processes: list[Process]) -> list[Thread]:
        """Have every process be in group stop when it is let go, before it takes any signal.

        :returns: threads that were let go here, one of each process: the others stop when that one has.
        """
        first: list[Thread] = []
        for process in processes:
            if any(thread.in_group_stop for thread in process.threads.values()):
                continue
            stopped = [tid for tid, thread in process.threads.items() if thread.is_stopped]
            with contextlib.suppress(ProcessLookupError):
                if tid := send_stop(process.pid, stopped):
                    first.append(process.threads[tid])
        with in_real_time():
            for thread in first:
                self._detach(thread)
        backoff = Backoff()
        while any(_state(thread) not in "TZX" for thread in first) and backoff.pause() < DEATH_TIMEOUT:
            pass
        for thread in first:  # one that has died is the number's owner no more, unless others of its process are held
            held = any(
                other.is_stopped and other is not thread for other in self.processes[thread.pid].threads.values()
            )
            if held and _state(thread) in "ZX":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(thread.pid, signal.SIGSTOP)
        return first

    def _let_go(self, threads: list[Thread]) -> None:
        for thread in threads:
            if not thread.in_vfork:
                self._detach(thread)
        in_vfork = [thread for thread in threads if thread.in_vfork]
        backoff = Backoff()
        while in_vfork := [thread for thread in in_vfork if not self._see(thread)]:
            if backoff.pause() > LET_GO_TIMEOUT:
                self.has_leftovers = True
                break
        for thread in threads:
            if thread.is_stopped:
                self._detach(thread)

    def _detach(self, thread: Thread) -> None:
        """Detach one thread; what cannot be detached is dead, or is left to the end of our own thread."""
        try:
            if not thread.is_stopped and not self._see(thread):
                raise ProcessLookupError
            if thread.spared is not None:
                take_off_stop(thread.tid, self._registers, thread.spared)
            if thread.is_spared and ARCH.orig < 0 and self._waits_again(thread):
                return
            ptrace.detach(thread.tid, thread.held)
            thread.is_stopped = False
        except ProcessLookupError:
            thread.is_stopped = False
            if not self._reap(self.processes[thread.pid], thread.tid):
                self.has_leftovers = True

    def _waits_again(self, thread: Thread) -> bool:
        """aarch64: have a thread make its wait again, where signals find it in the call.

        It is let run from a stop at the entry. To detach it there would interrupt it once more, so that is left to the
        end of our own thread. A handler that is to run before sees the wait fail with EINTR, as it would have without
        us. If we are killed here the wait goes on all the same, or fails with EINTR.

        :returns: False: it is stopped, and to be detached.
        :raises ProcessLookupError: it is gone, or does not get there.
        """
        ptrace.setoptions(thread.tid, ptrace.PTRACE_O_TRACESYSGOOD)
        while not thread.in_group_stop:
            if thread.held and has_handler(thread.pid, thread.tid, thread.held):
                fail_after_all(thread.tid, self._registers)
                break
            ptrace.cont_to_syscall(thread.tid, thread.held)
            thread.is_stopped = False
            if not wait_for_stop(thread.tid, self._info, WAIT_TIMEOUT, lambda: is_gone(thread.pid, thread.tid)):
                raise ProcessLookupError
            if is_syscall_stop(self._info):
                ptrace.cont(thread.tid)
                self.has_leftovers = True
                return True
            thread.is_stopped = True
            thread.held = held_signal(self._info)
            thread.in_group_stop = is_group_stop(self._info)
        return False

    def _await_death(self, processes: list[Process]) -> None:
        """Wait until every process is dead. Its parent may yet have to reap it."""
        backoff = Backoff()
        alive = processes
        while alive := [process for process in alive if not self._is_dead(process)]:
            if backoff.pause() > DEATH_TIMEOUT:
                self.has_leftovers = True
                return

    def _is_dead(self, process: Process) -> bool:
        for tid in list(process.threads):
            if self._reap(process, tid):
                del process.threads[tid]
        try:
            return read_stat(process.pid).is_dead
        except ProcessLookupError:
            return True

    def _await_group_stop(self, processes: list[Process]) -> None:
        """Wait until every process is seen stopped; a thread in vfork(2) goes on sleeping."""
        backoff = Backoff()
        running = [process for process in processes if not any(t.in_vfork for t in process.threads.values())]
        while running := [process for process in running if not _is_group_stopped(process)]:
            if backoff.pause() > DEATH_TIMEOUT:
                return


def children_of(process: Process) -> list[int]:
    """The children of all threads of a process, which is stopped; others than threads of ours may still add some."""
    children: list[int] = []
    for tid in process.threads:
        try:
            text = read_small(f"/proc/{process.pid}/task/{tid}/children")
        except (FileNotFoundError, ProcessLookupError):
            if not os.path.exists(f"/proc/self/task/{threading.get_native_id()}/children"):
                return _children_by_scan(process.pid)  # a kernel without CONFIG_PROC_CHILDREN
            continue
        if text:
            children.extend(map(int, text.split()))
    return children


def _children_by_scan(pid: int) -> list[int]:
    """The children of a process, from a pass over all of /proc."""
    children = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if read_stat(int(name)).ppid == pid:
                    children.append(int(name))
    return children


def _share_memory(pid: int, other: int) -> bool:
    """Whether two processes share one address space."""
    return shares(pid, other, KCMP_VM)


def _state(thread: Thread) -> str:
    """The letter of a thread's state; X: it is gone."""
    try:
        return read_thread_stat(thread.pid, thread.tid).state
    except ProcessLookupError:
        return "X"


def _is_group_stopped(process: Process) -> bool:
    """Whether no thread of a process is anything but stopped or dead."""
    try:
        return all(read_thread_stat(process.pid, tid).state in "TZXx" for tid in process.threads)
    except ProcessLookupError:
        return True
