"""CRIU with a library in it: for where it cannot be held on a leash, as short a stop.

A process that has a seccomp filter can only be dumped by a CRIU that is under none, so there is no leash for it. A
small library (preload.c, made by `incdump.criu.preload_library`) is loaded into CRIU by LD_PRELOAD instead, and asks
here, over a socket, what the leash would have reported: no system call of CRIU's is trapped. CRIU's scans of other
processes find no pages and are through with all of the address space; the first of them waits until it may go on. In
the place of smaps it may be given a short text.

The library says that it is there before CRIU begins. One that says nothing (CRIU is linked statically, a wrapper drops
the environment or closes descriptors, the loader ignores LD_PRELOAD for a program with capabilities of its own) is
found out by the gate, before the tree is touched.

When this process ends, for whatever reason, its end of the socket is closed, CRIU's next scan fails, and CRIU gives up
and lets the tree run on.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from incdump._uapi.arch import ARCH
from incdump.criu.held import HeldCriu
from incdump.criu.preload_library import preload_library
from incdump.criu.program import UMASK, own_file, spare
from incdump.proc.limits import as_before, starting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_SOCKET = "INCDUMP_PRELOAD_SOCKET"
_PRELOAD = "LD_PRELOAD"
# As in preload.c.
_LOADED, _SCAN, _SMAPS = 1, 2, 3
_QUESTION = struct.Struct("=ii")
_ANSWER = struct.Struct("=iiQ")
_NO = 1


class PreloadedCriu(HeldCriu):
    """A CRIU that is running, what the library in it asks being answered by a thread of its own.

    :param command: the program and its arguments.
    :param mappings: what smaps would tell of a process's mappings; raises OSError in doubt. None: it reads smaps.
    :param on_load: called in that thread when the library is there; CRIU begins when it returns.
    :param on_scan: called there at the first scan of another process's memory, which ends after `go_on`.
    :param on_end: called there when CRIU has ended.
    :param stderr: a file that takes what it says there.
    :raises incdump.errors.LeashUnusable: there is no library, and none can be made.
    """

    def __init__(
        self,
        command: Sequence[str],
        mappings: Callable[[int], bytes] | None,
        on_load: Callable[[], None],
        on_scan: Callable[[], None],
        on_end: Callable[[], None],
        stderr: Path,
    ) -> None:
        super().__init__(mappings, on_scan)
        self._on_load = on_load
        self._on_end = on_end
        library = preload_library()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # From memory: whoever may write to a file of the library has no say, and nor has a mount without exec.
            with (
                theirs,
                open(os.memfd_create("incdump-preload", os.MFD_CLOEXEC), "wb", buffering=0) as memory,
                own_file(stderr) as said,
                starting(),
            ):
                memory.write(library)
                self._process = subprocess.Popen(
                    as_before(command),
                    stdin=subprocess.DEVNULL,
                    stdout=said,  # where it says what it lacks as another user
                    stderr=said,
                    env=_environment(theirs.fileno(), memory.fileno()),
                    umask=UMASK,
                    pass_fds=[theirs.fileno(), memory.fileno()],
                    start_new_session=True,  # a Ctrl-C is incdump's to handle
                )
        except BaseException:
            ours.close()
            raise
        self._channel = ours
        spare(self._process.pid)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._thread = threading.Thread(target=self._serve, name="criu-preload", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be made: nobody would answer it
            self._process.kill()
            self._process.wait()
            ours.close()
            os.close(self._pidfd)
            raise

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)  # a process that it leaves behind keeps the socket open
        try:
            while True:
                events = dict(poll.poll())
                if self._pidfd in events:
                    return
                try:
                    self._answer(self._channel.recv(_QUESTION.size + 1))
                except (OSError, struct.error):  # nobody is there: a program that does not pass descriptors on
                    poll.unregister(self._channel)
                    with suppress(OSError):
                        self._channel.shutdown(socket.SHUT_RDWR)  # nobody is to wait for an answer
        finally:
            os.close(self._pidfd)
            self._channel.close()  # from here on a scan fails, and CRIU gives up
            self._on_end()

    def _answer(self, question: bytes) -> None:
        """:raises OSError: nobody listens. struct.error: it is no question."""
        what, pid = _QUESTION.unpack(question)
        if what == _LOADED:
            self._on_load()
        elif what == _SCAN:
            self._hold(pid)
        else:
            self._tell_mappings(pid)
            return
        self._channel.sendall(_ANSWER.pack(0, 0, ARCH.task_size))

    def _tell_mappings(self, pid: int) -> None:
        try:
            if self._mappings is None:
                raise FileNotFoundError
            text = self._mappings(pid)
            with open(os.memfd_create("incdump-mappings", os.MFD_CLOEXEC), "wb", buffering=0) as file:
                if os.pwrite(file.fileno(), text, 0) != len(text):
                    raise BlockingIOError
                socket.send_fds(self._channel, [_ANSWER.pack(0, 0, 0)], [file.fileno()])
        except OSError:  # in doubt it reads smaps
            self._channel.sendall(_ANSWER.pack(_NO, 0, 0))
        else:
            self.told.add(pid)


def _environment(channel: int, library: int) -> dict[str, str]:
    """CRIU's, of which the library takes out what is its own."""
    before = os.environ.get(_PRELOAD)
    own = f"/proc/self/fd/{library}"
    return {**os.environ, _SOCKET: str(channel), _PRELOAD: f"{own}:{before}" if before else own}
