"""A limit to the time for which a tree stands still while nothing gets done.

Whoever has frozen a tree may come to wait for it: the images go to a file system that it serves, a message to a
terminal or a pipe that it reads. Such a call does not return, and signals do not end it, before the tree runs again. So
a thread that makes no such calls looks at whether the work gets on, and has the tree let go if it does not.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class StallGuard:
    """Calls for help when nothing has been reported for too long.

    :param limit: seconds without a report; None: any number.
    :param on_stall: called in the guard's own thread; it must not block.
    """

    def __init__(self, limit: float | None, on_stall: Callable[[], None]) -> None:
        self._limit = limit
        self._on_stall = on_stall
        self._reported = 0.0
        self._armed = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        if self._limit is not None:
            self._thread = threading.Thread(target=self._watch, args=(self._limit,), name="stall-guard", daemon=True)
            self._thread.start()

    def arm(self) -> None:
        """From now on work is done."""
        self._reported = time.monotonic()
        self._armed = True

    def disarm(self) -> None:
        """None is being done any more."""
        self._armed = False

    def report(self) -> None:
        """Something has been done. From any thread."""
        self._reported = time.monotonic()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, limit: float) -> None:
        while not self._ended.wait(limit / 4):
            if self._armed and time.monotonic() - self._reported > limit:
                self._armed = False
                self._on_stall()
