"""Whether CRIU gets on.

CRIU has the processes that it dumps run system calls, and waits for each without a limit (its ``--timeout`` bounds only
the stopping). A process that cannot run, in a frozen cgroup that is not seen from here or was frozen just now, has it
wait for ever. Ending it then would end the process: its code and registers are altered in that moment, and nobody else
can put them back. So it is left alone: it gives up by itself once the process runs again, since its gate is shut.
"""

from __future__ import annotations

import time
from pathlib import Path


class Progress:
    """Of a process that has been started.

    :param pid: its number; it must not have been waited for.
    """

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")
        self._seen = b""
        self._since = time.monotonic()

    def idle(self) -> float:
        """Seconds, up to now, for which it was seen neither to run nor to have a child that works for it."""
        now = time.monotonic()
        try:
            seen = (self._proc / "stat").read_bytes() + (self._proc / "schedstat").read_bytes()
            works = bool((self._proc / f"task/{self._proc.name}/children").read_bytes())
        except OSError:  # it has ended, or the kernel does not tell
            works = True
        if works or seen != self._seen:
            self._since = now
            self._seen = b"" if works else seen
        return now - self._since
