"""Waits for the holder, or for whoever keeps its lock: each has an end, and a signal that ends a command ends them.

Commands wait in worker threads, and those are not left behind (`incdump.engine.threads`). So the signal says it here
(`give_up`), and whoever waits for somebody who does not answer, stopped by SIGSTOP for example, gives up at once. What
is answered at once goes on as before: what was taken from a tracker can still be given back.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import errno
import select
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

GRACE = 0.25
"""Seconds that an answer may take when nobody wants to wait any more: one that does work takes milliseconds."""
_SLICE = 0.05

_given_up = threading.Event()


def begin() -> None:
    """Forget that somebody gave up before."""
    _given_up.clear()


def give_up() -> None:
    """Have all waits end soon, those to come included. May be called from any thread."""
    _given_up.set()


class Patience:
    """How long to wait for something.

    :param seconds: at most.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._given_up: float | None = None

    @property
    def left(self) -> float:
        """Seconds, 0 if it is over."""
        now = time.monotonic()
        if _given_up.is_set() and self._given_up is None:
            self._given_up = now + GRACE
        end = self._end if self._given_up is None else min(self._end, self._given_up)
        return max(0.0, end - now)


def await_readable(sock: socket.socket, seconds: float) -> None:
    """Wait until something can be read.

    :raises TimeoutError: nothing came in time, or somebody gave up.
    """
    patience = Patience(seconds)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while not poll.poll(min(patience.left, _SLICE) * 1000):
        if not patience.left:
            raise TimeoutError(errno.ETIMEDOUT, "no answer")
