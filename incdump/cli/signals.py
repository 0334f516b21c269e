"""Running the asynchronous part of a command such that signals end it cleanly.

SIGINT, SIGTERM and SIGHUP cancel what is running; the engine then gives back what it took from the tracker, removes the
unfinished images and lets the target go. If something keeps it from that (a file system that does not answer), the
third signal ends the process as it is: the kernel lets the target go then. A signal that was ignored when incdump was
started (nohup) stays ignored.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from incdump.errors import HolderError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Iterator

    import anyio

T = TypeVar("T")

_AT_ONCE = 3
"""How many signals end the process without more ado."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal ended the command."""

    def __init__(self, number: int, outcome: str = "the target runs on, nothing half done is left behind") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: {outcome}")
        self.number = number
        self.exit_code = 128 + number


def run(job: Callable[[], Awaitable[T]]) -> T:
    """Run a job in an event loop of its own.

    :raises Stopped: a signal came, and the job has cleaned up.
    """
    import anyio

    return anyio.run(_until_signal, job, backend_options={"use_uvloop": True})


async def _until_signal(job: Callable[[], Awaitable[T]]) -> T:
    import asyncio

    import anyio

    from incdump.holder import waiting

    waiting.begin()
    received: list[int] = []
    with anyio.CancelScope() as scope, _handlers(asyncio.get_running_loop(), partial(_stop, scope, received)):
        try:
            return await job()
        except HolderError as error:
            if not received or error.errno != errno.ETIMEDOUT:
                raise
            # Nobody wanted to wait any more, that is all: see `give_up`.
    raise Stopped(received[0])


def _stop(scope: anyio.CancelScope, received: list[int], number: int) -> None:
    from incdump.holder import waiting

    received.append(number)
    waiting.give_up()  # a worker thread that waits for a stopped holder is waited for
    scope.cancel()
    if len(received) == _AT_ONCE - 1:
        print("incdump: cleaning up; once more to leave it undone, and unfinished images behind", file=sys.stderr)
    elif len(received) == _AT_ONCE:
        os._exit(128 + number)


@contextmanager
def _handlers(loop: asyncio.AbstractEventLoop, handler: Callable[[int], None]) -> Iterator[None]:
    """Handle the signals for a while; a job that ends all the same is not disturbed."""
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in handled:
        loop.add_signal_handler(number, handler, number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
