"""A CRIU that is running beside us, whichever way it is kept from the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess
    import threading


class RunningCriu:
    """Its process, and the thread of ours that sees it to its end."""

    _process: subprocess.Popen[bytes]
    _thread: threading.Thread

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet, as far as is known."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def has_ended_within(self, seconds: float) -> bool:
        """Wait for its end for some time. Blocks."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def wait(self) -> int:
        """Wait until it has ended. Blocks.

        :returns: its exit status; negative for a signal.
        """
        self._thread.join()
        return self._process.wait()
