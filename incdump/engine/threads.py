"""Blocking work in worker threads, such that nothing is ever still running behind one's back.

`anyio.to_thread.run_sync` waits for its thread when an anyio cancel scope ends it, but not when the task is cancelled
by asyncio's own ``task.cancel()`` (``asyncio.wait_for``, ``asyncio.timeout``): the await ends, and the thread goes on,
with descriptors that are about to be closed and pages taken from a tracker that nobody has noted. `in_thread` closes
that gap.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

T = TypeVar("T")


class _Call:
    """The state of one call: not begun, begun, ended, or called off before it began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = False
        self._called_off = False
        self.ended = threading.Event()

    def begin(self) -> bool:
        with self._lock:
            self._begun = not self._called_off
            return self._begun

    def call_off(self) -> bool:
        """Whether it is certain that the call will not begin (any more)."""
        with self._lock:
            self._called_off = not self._begun
            return self._called_off


async def in_thread(
    function: Callable[..., T],
    *args: object,
    limiter: anyio.CapacityLimiter | None = None,
    break_off: Callable[[], None] | None = None,
) -> T:
    """Call a blocking function in a worker thread.

    However this returns, the function has ended, or never began.

    :param limiter: how many such calls may run at once; None for the loop's default.
    :param break_off: called when this is cancelled while the function runs, to have it end soon: by failing. Must not
        block.
    """
    call = _Call()

    def run() -> T:
        if not call.begin():
            raise RuntimeError("called off")  # nobody is there to see it
        try:
            return function(*args)
        finally:
            call.ended.set()

    try:
        # What can be broken off is not waited for over there, but here.
        return await anyio.to_thread.run_sync(run, limiter=limiter, abandon_on_cancel=break_off is not None)
    except BaseException:
        if not call.call_off():
            if break_off is not None and not call.ended.is_set():
                break_off()
            await _wait_ended(call)
        raise


async def unbroken(job: Callable[[], Coroutine[Any, Any, T]]) -> tuple[T, asyncio.CancelledError | None]:
    """Do something that must not end half way: neither a cancel scope nor ``task.cancel()`` gets at it.

    :returns: its result, and what ``task.cancel()`` would have raised meanwhile, for the caller to raise when it can.
    """
    task = asyncio.ensure_future(job())
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    return task.result(), cancelled


async def surely_in_thread(function: Callable[[], object]) -> None:
    """Call a blocking function in a worker thread, whoever is cancelled: for what must not be left undone.

    :raises asyncio.CancelledError: somebody was meanwhile, once it has ended.
    """
    _, cancelled = await unbroken(lambda: in_thread(function))
    if cancelled is not None:
        raise cancelled


async def _wait_ended(call: _Call) -> None:
    """Wait for a thread that was begun, through any number of cancellations; the caller raises its own."""
    while not call.ended.is_set():
        with anyio.CancelScope(shield=True):
            try:
                await asyncio.sleep(0.0005)
            except asyncio.CancelledError:
                continue
