"""Freezing a process tree, for as long as a block of code runs.

    async with Freezer() as freezer:
        frozen = await freezer.freeze(pid)
        ...                                   # not one instruction of the tree runs
        await freezer.thaw()

The tree is stopped by ptrace (`incdump.freeze.walk`), in a thread of its own (`incdump.freeze.tracer`). Leaving the
block lets it go, on every way out, and so does `Freezer.abandon`, for whoever may have come to wait for the tree; with
a limit (`incdump.freeze.stall`) it does so by itself. If incdump is killed meanwhile the kernel lets it go: no
PTRACE_O_EXITKILL.

A program that freezes its own child must not have a thread blocked in waitpid(2) for that child at the time: the kernel
wakes it up with the child's ptrace-stop, as if that were the child's end. Popen.poll() is safe while the tree is
frozen, and asyncio's subprocesses are from Python 3.12 on; before, they take ``asyncio.PidfdChildWatcher``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from incdump.errors import AlreadyTraced, StopStalled
from incdump.freeze.stall import StallGuard
from incdump.freeze.tracer import TracerThread
from incdump.freeze.walk import Process, TreeWalk
from incdump.model.fields import check_choice
from incdump.model.options import AFTERWARDS
from incdump.proc.identity import check_own_proc, check_page_size
from incdump.proc.tree import TRACER_PATIENCE, tracer_leaves

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from incdump.model.options import Afterwards


@dataclass(frozen=True, slots=True)
class FrozenTask:
    """One frozen process.

    :ivar pid: process id.
    :ivar tids: ids of its threads, ascending; the pid is not among them if the leader has exited before the others.
    :ivar state_before: letter of /proc/PID/stat before the freeze; ``"T"``: stopped by SIGSTOP, and so it stays after a
        thaw.
    """

    pid: int
    tids: tuple[int, ...]
    state_before: str


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen tree.

    :ivar tasks: its processes, the root first, parents before children; zombies are not among them.
    :ivar exited: pids of processes that were in the tree and exited while it was being frozen.
    :ivar freezing_time: microseconds from the start until every thread was stopped.
    :ivar frozen_at: time.monotonic_ns() of that moment.
    """

    tasks: tuple[FrozenTask, ...]
    exited: tuple[int, ...]
    freezing_time: int
    frozen_at: int

    @property
    def pids(self) -> tuple[int, ...]:
        """The pids of `tasks`."""
        return tuple(task.pid for task in self.tasks)


class Freezer:
    """Async context manager that freezes one process tree at a time.

    Cancellation at any await leaves nothing frozen once the block is left; a cancelled `freeze` is undone at once.

    :param timeout: seconds to wait for every thread to stop.
    :param stall_timeout: seconds for which a tree stays frozen without a `report`; it is let go then, and what uses it
        fails with `incdump.errors.StopStalled`. None: any number.
    :ivar freezing_time: microseconds that the last `freeze` took until every thread was stopped.
    :ivar frozen_time: microseconds from there until the tree was let go.
    """

    def __init__(self, *, timeout: float = 10.0, stall_timeout: float | None = None) -> None:
        self.timeout = timeout
        self._guard = StallGuard(stall_timeout, self._stall)
        self._abandoned: StopStalled | None = None
        self._stalled = False
        self._stall_timeout = stall_timeout
        self._pid = 0
        self.freezing_time = 0
        self.frozen_time = 0
        self._walk = TreeWalk()
        self._tracer = TracerThread(on_stall=self._walk.reap_stalled)
        self._frozen_at = 0

    def __repr__(self) -> str:
        return f"<Freezer {self._walk!r}>"

    async def __aenter__(self) -> Freezer:
        self._tracer.start()
        self._guard.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._guard.stop()
        await self._tracer.finish(lambda: self._let_go("running"))
        if self._stalled and self._abandoned is not None and isinstance(exc, Exception):
            raise self._abandoned from exc

    @property
    def report(self) -> Callable[[], None]:
        """To be called, from any thread, whenever something was done while the tree is frozen."""
        return self._guard.report

    def abandon(self) -> None:
        """Let the tree run on at once, if it is frozen: what is being done to it is to fail. From any thread.

        `thaw` raises `incdump.errors.StopStalled` then.
        """
        self._tracer.post(self._abandon)

    async def freeze(self, pid: int) -> Frozen:
        """Stop every thread of process `pid` and of all its descendants.

        :raises ProcMismatch: /proc is another pid namespace's.
        :raises NoSuchTarget: there is no such process.
        :raises TargetExited: it exited meanwhile.
        :raises TargetUnsuitable: it is a kernel thread or a zombie, or this very process is in its tree.
        :raises TargetDenied: some process of the tree may not be traced.
        :raises AlreadyTraced: some process of the tree is traced by somebody else, who does not leave in a second.
        :raises FreezeTimeout: some thread did not stop in time. Whatever is raised, nothing stays frozen.
        """
        abandoned = threading.Event()
        try:
            return await self._tracer.run(self._freeze, pid, abandoned)
        except asyncio.CancelledError:
            abandoned.set()
            self._tracer.submit(lambda: self._let_go("running"))
            raise

    async def thaw(self, afterwards: Afterwards = "running") -> None:
        """Let the tree go.

        :raises InvalidOption: `afterwards` is none of these; the tree stays frozen until the block is left.
        :raises StopStalled: it was let go before, as nothing got done, or by `abandon`.

        :param afterwards: ``"running"``: as it was before, what was stopped by SIGSTOP stays stopped. ``"stopped"``: in
            group stop, without an instruction in between, until SIGCONT. ``"killed"``: dead by SIGKILL.
        """
        check_choice("afterwards", afterwards, AFTERWARDS)
        await self._tracer.run(self._thaw, afterwards)

    # -- in the tracer thread

    def _freeze(self, pid: int, abandoned: threading.Event) -> Frozen:
        if self._walk.processes:
            raise RuntimeError("this Freezer holds a frozen tree already: thaw it first")
        self._abandoned, self._stalled = None, False
        check_page_size()
        check_own_proc()
        self._walk.look(pid)
        began = time.monotonic_ns()
        try:
            self._freeze_without_tracer(pid, abandoned)
        finally:
            self._retire_with_leftovers()
        self._frozen_at = time.monotonic_ns()
        self._pid = pid
        self._guard.arm()
        self.freezing_time = (self._frozen_at - began) // 1000
        return Frozen(
            tasks=tuple(_frozen_task(process) for process in self._walk.processes.values()),
            exited=tuple(self._walk.exited),
            freezing_time=self.freezing_time,
            frozen_at=self._frozen_at,
        )

    def _freeze_without_tracer(self, pid: int, abandoned: threading.Event) -> None:
        """A profiler, or strace -p, that comes for a moment: the whole freeze is undone, and made again without it."""
        patience = time.monotonic() + min(TRACER_PATIENCE, self.timeout)
        while True:
            try:
                return self._walk.freeze(pid, self.timeout, abandoned)
            except AlreadyTraced as error:
                left = patience - time.monotonic()
                if error.pid is None or left <= 0 or abandoned.is_set() or self._walk.has_leftovers:
                    raise
                if not tracer_leaves(error.pid, left):
                    raise

    def _thaw(self, afterwards: Afterwards) -> None:
        if self._abandoned is not None:
            raise self._abandoned
        self._let_go(afterwards)

    def _stall(self) -> None:
        """In the guard's thread."""
        self._stalled = True
        self._tracer.post(self._abandon)

    def _abandon(self) -> None:
        if not self._walk.processes:
            return
        self._abandoned = StopStalled(
            f"nothing got done for {self._stall_timeout or 0:g} s while process {self._pid} stood still, so it was let "
            "run on: is it the images' file system, the page server or the terminal that does not answer, and does "
            "the target itself serve it?",
            pid=self._pid,
        )
        self._let_go("running")

    def _let_go(self, afterwards: Afterwards) -> None:
        self._guard.disarm()
        if not self._walk.processes:
            return
        try:
            self.frozen_time = (self._walk.thaw(afterwards) - self._frozen_at) // 1000
        finally:
            self._retire_with_leftovers()

    def _retire_with_leftovers(self) -> None:
        if self._walk.has_leftovers:
            self._walk.has_leftovers = False
            self._tracer.retire()


def _frozen_task(process: Process) -> FrozenTask:
    stopped = any(thread.in_group_stop for thread in process.threads.values())
    return FrozenTask(process.pid, tuple(sorted(process.threads)), "T" if stopped else process.state)
