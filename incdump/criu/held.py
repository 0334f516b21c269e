"""A CRIU that is kept from the memory while it dumps: its first scan of another process waits until it may go on.

What the two ways of answering its scans have in common: by a seccomp filter (`incdump.criu.leash`), and by a library
that is loaded into it (`incdump.criu.preloaded`).
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

from incdump.criu.running import RunningCriu

if TYPE_CHECKING:
    from collections.abc import Callable


class HeldCriu(RunningCriu):
    """A CRIU that is running, its scans being answered by a thread of its own.

    :ivar scanned: the other processes whose memory it has scanned; it has looked at their mappings before.
    :ivar told: the processes of which it was told the mappings.
    """

    def __init__(self, mappings: Callable[[int], bytes] | None, on_scan: Callable[[], None]) -> None:
        self._mappings = mappings
        self._on_scan = on_scan
        self._may_go_on = threading.Event()
        self.scanned: set[int] = set()
        self.told: set[int] = set()

    def _hold(self, pid: int) -> None:
        """In its thread: it scans a process. Returns when it may go on."""
        self.scanned.add(pid)
        if not self._may_go_on.is_set():
            self._on_scan()
            self._may_go_on.wait()

    def go_on(self) -> None:
        """Its first scan may end, or end at once when it comes."""
        self._may_go_on.set()

    def ask_to_end(self) -> None:
        """Send it SIGTERM. Only before it has touched the tree: a process that it works on does not survive its end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
