"""The thread that traces.

ptrace(2) belongs to threads: only the one that has seized a task may do anything with it, and when that thread ends the
kernel lets the task go. So one thread, and no pool, makes every ptrace and wait call for a `incdump.freeze.Freezer`;
the event loop hands it jobs, one after the other.

A job that has been handed over runs to its end, whatever becomes of the task that awaits it. A task that is cancelled
leaves at once; what the job did is in the state of the object whose method it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import anyio

from incdump.freeze.stops import sleep_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")

SWITCH_INTERVAL = 20e-6
"""Seconds for which other Python threads may keep the GIL while a job runs."""
STALL = 0.05
"""Seconds after which a job that is not done is looked after (`on_stall`)."""


_switching = threading.Lock()
_in_turn: list[float] = []


@contextlib.contextmanager
def _gil_in_turn() -> Iterator[None]:
    """Have other Python threads, that compute, give the GIL back at once.

    They would keep it for 5 ms each time that the tracing thread lets it go in a system call, thousands of times.
    """
    with _switching:
        _in_turn.append(sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        with _switching:
            usual = _in_turn.pop(0)
            if _in_turn:
                _in_turn[0] = usual
            else:
                sys.setswitchinterval(usual)


@dataclass(slots=True)
class _Job:
    """Something to do in the thread, and the future that wants to know."""

    call: Callable[[], Any]
    loop: asyncio.AbstractEventLoop | None
    future: asyncio.Future[Any] | None
    result: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        """In the thread."""
        try:
            with _gil_in_turn():
                self.result = self.call()
        except BaseException as e:
            self.error = e

    def resolve(self) -> None:
        """In the thread: tell the event loop, if there still is one."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._resolve)

    def _resolve(self) -> None:
        if self.future is None or self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)
            self.future.exception()  # seen: nobody may be waiting for it any more


class TracerThread:
    """One OS thread that runs jobs in order.

    :ivar on_stall: called on the event loop every `STALL` seconds while a job is being waited for.
    """

    def __init__(self, on_stall: Callable[[], None] | None = None) -> None:
        self.on_stall = on_stall
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._retiring = False

    def __repr__(self) -> str:
        return f"<TracerThread {self._thread.native_id if self._thread else 'not running'}>"

    def start(self) -> None:
        """Start the thread."""
        self._start(None, None)

    def submit(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Hand over a job. To be called on the event loop; the job runs even if nobody awaits the future."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._jobs.put(_Job(call, loop, future))
        return future

    def post(self, call: Callable[[], object]) -> None:
        """Hand over a job that nobody waits for. From any thread."""
        self._jobs.put(_Job(call, None, None))

    async def run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``fn(*args)`` in the thread and wait for it. Cancelled, it goes on there; only the result is lost."""
        return await self._wait(self.submit(lambda: fn(*args, **kwargs)))

    async def finish(self, last: Callable[[], object]) -> None:
        """Run `last` after all other jobs, then end the thread; both are done on return, even on a cancelled one.

        :raises asyncio.CancelledError: this task was cancelled meanwhile.
        """
        future = self.submit(last)
        self._jobs.put(None)
        cancelled: asyncio.CancelledError | None = None
        with anyio.CancelScope(shield=True):
            while not future.done():
                try:
                    await self._wait(future)
                except asyncio.CancelledError as e:  # of asyncio's own kind, which no scope holds off
                    cancelled = e
                except BaseException:
                    break
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if cancelled is not None:
            raise cancelled
        future.result()

    def retire(self) -> None:
        """For a job: end the OS thread after this job, so that the kernel lets go of whatever it traces.

        Another thread takes its place; the job counts as done when the old one is gone for good.
        """
        self._retiring = True

    async def _wait(self, future: asyncio.Future[T]) -> T:
        while not future.done():
            await asyncio.wait((future,), timeout=STALL)
            if self.on_stall is not None and not future.done():
                self.on_stall()
        return future.result()

    def _start(self, predecessor: int | None, unresolved: _Job | None) -> None:
        thread = threading.Thread(target=self._main, args=(predecessor, unresolved), name="tracer", daemon=True)
        thread.start()
        self._thread = thread

    def _main(self, predecessor: int | None, unresolved: _Job | None) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        sleep_exactly()
        if predecessor is not None and unresolved is not None:
            _await_end(predecessor)
            unresolved.resolve()
        while (job := self._jobs.get()) is not None:
            job.run()
            if self._retiring:
                self._retiring = False
                # Where no thread can be made this one goes on: what it traces is let go of when it ends.
                with contextlib.suppress(RuntimeError):
                    self._start(threading.get_native_id(), job)
                    return
            job.resolve()
            del job  # and what its result refers to


def _await_end(tid: int) -> None:
    """Wait for a thread of this process to be gone from the kernel's view: Python's own is that of a moment before."""
    deadline = time.monotonic() + 1
    while os.path.exists(f"/proc/self/task/{tid}") and time.monotonic() < deadline:
        time.sleep(50e-6)
