"""CRIU's lazy dump, for where it cannot be held on a leash: the second best way of keeping it from the memory.

With ``--lazy-pages`` CRIU dumps everything but the memory, gathers all pages in pipes, and then stands by, as a page
server, for somebody who asks for them; until it is told that nobody does. Gathering takes it 120 ms per GiB. Its action
script runs before it stands by, with all images written and the tree frozen: so the gate (`incdump.criu.gate`) works
here as it does on the leash.

CRIU is given its end of a connection on which that word already waits (`FORCE_CLOSE`, criu-page-server's protocol). So
once the gate is open it ends by itself, whatever has become of incdump; and it never listens on the network.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from typing import TYPE_CHECKING

from incdump.criu.program import UMASK, own_file, spare
from incdump.criu.running import RunningCriu
from incdump.proc.limits import as_before, starting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

FORCE_CLOSE = 0x1024
_LONG_HEADERS_SINCE = (4, 2)


class LazyCriu(RunningCriu):
    """A CRIU that is running a lazy dump, for which nobody will ask.

    :param command: the program and its arguments, for ``dump``.
    :param version: CRIU's.
    :param on_end: called in a thread of its own when it has ended.
    :param stderr: a file that takes what it says there.
    """

    def __init__(
        self, command: Sequence[str], version: tuple[int, ...], on_end: Callable[[], None], stderr: Path
    ) -> None:
        self._on_end = on_end
        near, far = socket.socketpair()
        with near, far, own_file(stderr) as said, starting():
            near.sendall(_force_close(version))
            self._process = subprocess.Popen(
                as_before([*command, "--lazy-pages", "--ps-socket", str(far.fileno())]),
                stdin=subprocess.DEVNULL,
                stdout=said,  # where it says what it lacks as another user
                stderr=said,
                umask=UMASK,
                pass_fds=[near.fileno(), far.fileno()],  # both ends: its answer has somewhere to go, whoever is gone
                start_new_session=True,  # a Ctrl-C is incdump's to handle
            )
        spare(self._process.pid)
        self._thread = threading.Thread(target=self._wait, name="criu-lazy", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be made: nobody would hear of its end
            self._process.kill()
            self._process.wait()
            raise

    def _wait(self) -> None:
        try:
            self._process.wait()
        finally:
            self._on_end()


def _force_close(version: tuple[int, ...]) -> bytes:
    """The header of a command; 32 bytes since CRIU 4.2, 24 before."""
    return struct.pack("=IIQQ", FORCE_CLOSE, 0, 0, 0) + bytes(8 if version >= _LONG_HEADERS_SINCE else 0)
