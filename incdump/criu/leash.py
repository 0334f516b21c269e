"""CRIU on a leash: ``criu dump`` runs, and finds no memory to dump.

It runs under a seccomp filter (`incdump.criu.leashed`) that reports its PAGEMAP_SCANs here. One that looks for the
pages of a process other than CRIU itself is answered with none at all, so that CRIU leaves the memory to incdump; the
first of them says that the whole tree is frozen. It is answered for all of the process's memory, which CRIU takes note
of: it scans once a process instead of once a mapping. Every other scan (guard regions, CRIU's own memory) is let
through.

When this process ends, for whatever reason, its end of the listener is closed, CRIU's next scan fails, and CRIU gives
up and lets the tree run on.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from incdump._uapi import seccomp
from incdump._uapi.arch import ARCH
from incdump._uapi.pagemap_scan import PAGEMAP_SCAN
from incdump.criu import leashed
from incdump.errors import LeashUnusable
from incdump.model.regions import PageIs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SCAN_ARGUMENT = struct.Struct("=12Q")  # struct pm_scan_arg, include/uapi/linux/fs.h
_WALK_END, _ANYOF, _MASK = 4, 10, 9
_EVERYTHING = struct.pack("=Q", ARCH.task_size)
_PAGEMAP = re.compile(r"/(\d+)/(?:task/\d+/)?pagemap$")
_POPULATED = int(PageIs.PRESENT | PageIs.SWAPPED)


class LeashedCriu:
    """A CRIU that is running, its scans being answered by a thread of its own.

    :param command: the program and its arguments.
    :param on_scan: called in that thread at the first scan of another process's memory.
    :param on_end: called there when nothing of CRIU runs any more.
    :ivar scanned: whether it has scanned another process's memory.
    :raises incdump.errors.LeashUnusable: there is no user notification to be had for it.
    """

    def __init__(self, command: Sequence[str], on_scan: Callable[[], None], on_end: Callable[[], None]) -> None:
        self._on_scan = on_scan
        self._on_end = on_end
        self.scanned = False
        ours, theirs = socket.socketpair()
        with ours, theirs:
            numbers = (theirs.fileno(), ARCH.sys_seccomp, ARCH.sys_ioctl, PAGEMAP_SCAN)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", leashed.__file__, *map(str, numbers), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is incdump's to handle
            )
            theirs.close()
            try:
                self._listener = self._take_listener(ours)
            except BaseException:
                self._process.kill()
                self._process.wait()
                raise
        self._thread = threading.Thread(target=self._serve, name="criu-leash", daemon=True)
        self._thread.start()

    def _take_listener(self, channel: socket.socket) -> int:
        data, fds, _, _ = socket.recv_fds(channel, 4, 1)
        for fd in fds:
            os.set_inheritable(fd, False)
        number = struct.unpack("=i", data)[0] if len(data) == 4 else None
        if number == 0 and fds:
            return int(fds[0])
        why = os.strerror(number) if number else "its launcher ended"
        raise LeashUnusable(f"CRIU cannot be held on a leash (seccomp user notification: {why})", errno=number)

    def wait(self) -> int:
        """Wait until it has ended. Blocks.

        :returns: its exit status; negative for a signal.
        """
        self._thread.join()
        return self._process.wait()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet, as far as is known."""
        return self._process.poll() is None

    def end(self) -> int:
        """Have it end: it is asked to with SIGTERM, which it does not heed while it dumps, and waited for. Blocks."""
        if self._process.poll() is None and not self.scanned:
            self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        try:
            while True:
                ((_, events),) = poll.poll()
                if not events & select.POLLIN:
                    return
                notification = seccomp.receive(self._listener)
                if notification is not None:
                    self._answer(notification)
        finally:
            os.close(self._listener)  # from here on a scan fails, and CRIU gives up
            self._on_end()

    def _answer(self, notification: seccomp.Notification) -> None:
        try:
            is_ours = self._is_left_to_us(notification)
        except OSError:  # it is being killed
            is_ours = False
        if not is_ours:
            seccomp.let_through(self._listener, notification)
            return
        if not self.scanned:
            self.scanned = True
            self._on_scan()
        with open(f"/proc/{notification.pid}/mem", "r+b", buffering=0) as memory:
            if not seccomp.is_waiting(self._listener, notification):
                return
            os.pwrite(memory.fileno(), _EVERYTHING, notification.arguments[2] + 8 * _WALK_END)
        seccomp.answer(self._listener, notification, 0)

    def _is_left_to_us(self, notification: seccomp.Notification) -> bool:
        """Whether a scan looks for pages of another process."""
        pid, (fd, _, address, *_) = notification.pid, notification.arguments
        found = _PAGEMAP.search(os.readlink(f"/proc/{pid}/fd/{fd}"))
        if found is None or int(found[1]) in (pid, self._process.pid):
            return False
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            argument = _SCAN_ARGUMENT.unpack(os.pread(memory.fileno(), _SCAN_ARGUMENT.size, address))
        return bool((argument[_ANYOF] | argument[_MASK]) & _POPULATED)
