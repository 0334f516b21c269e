"""CRIU on a leash: ``criu dump`` runs, and finds no memory to dump.

It runs under a seccomp filter (`incdump.criu.leashed`) that reports its PAGEMAP_SCANs here. One that looks for the
pages of a process other than CRIU itself is answered with none at all, so that CRIU leaves the memory to incdump; the
first of them says that the whole tree is frozen, and CRIU waits there until it may go on (`LeashedCriu.go_on`). It is
answered for all of the process's memory, which CRIU takes note of: it scans once a process instead of once a mapping.
Every other scan (guard regions, CRIU's own memory) is let through.

When this process ends, for whatever reason, its end of the listener is closed, CRIU's next scan fails, and CRIU gives
up and lets the tree run on.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from incdump._uapi import seccomp
from incdump._uapi.arch import ARCH
from incdump._uapi.pagemap_scan import PAGEMAP_SCAN
from incdump.criu import leashed
from incdump.criu.held import HeldCriu
from incdump.criu.program import UMASK, own_file, spare
from incdump.errors import LeashUnusable
from incdump.model.regions import PageIs
from incdump.proc.limits import as_before, starting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_SCAN_ARGUMENT = struct.Struct("=12Q")  # struct pm_scan_arg, include/uapi/linux/fs.h
_WALK_END, _ANYOF, _MASK = 4, 10, 9
_EVERYTHING = struct.pack("=Q", ARCH.task_size)
_PAGEMAP = re.compile(r"/(\d+)/(?:task/\d+/)?pagemap$")
_POPULATED = int(PageIs.PRESENT | PageIs.SWAPPED)
_MAP_FILES = re.compile(r"(.*/(\d+)/)map_files$")
_LAST_KNOWN = (4, 2)
"""Later versions may use other lines of smaps."""


class LeashedCriu(HeldCriu):
    """A CRIU that is running, its scans being answered by a thread of its own.

    :param command: the program and its arguments.
    :param mappings: what smaps would tell of a process's mappings; raises OSError in doubt. None: it reads smaps.
    :param on_scan: called in that thread at the first scan of another process's memory, which ends after `go_on`.
    :param on_end: called there when nothing of CRIU runs any more.
    :param stderr: a file that takes what it says there.
    :raises incdump.errors.LeashUnusable: there is no user notification to be had for it.
    """

    def __init__(
        self,
        command: Sequence[str],
        mappings: Callable[[int], bytes] | None,
        on_scan: Callable[[], None],
        on_end: Callable[[], None],
        stderr: Path,
    ) -> None:
        super().__init__(mappings, on_scan)
        self._on_end = on_end
        calls = [(ARCH.sys_ioctl, PAGEMAP_SCAN)] + ([] if mappings is None else [(ARCH.sys_fcntl, fcntl.F_SETFD)])
        ours, theirs = socket.socketpair()
        with ours, theirs, own_file(stderr) as said, starting():
            numbers = (theirs.fileno(), ARCH.sys_seccomp, ",".join(f"{call}:{argument}" for call, argument in calls))
            self._process = subprocess.Popen(
                as_before([sys.executable, "-I", "-S", leashed.__file__, *map(str, numbers), *command]),
                stdin=subprocess.DEVNULL,
                stdout=said,  # where it says what it lacks as another user
                stderr=said,
                umask=UMASK,
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
        spare(self._process.pid)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._thread = threading.Thread(target=self._serve, name="criu-leash", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be made: nobody would answer it
            self._process.kill()
            self._process.wait()
            os.close(self._listener)
            os.close(self._pidfd)
            raise

    def _take_listener(self, channel: socket.socket) -> int:
        data, fds, _, _ = socket.recv_fds(channel, 4, 1)
        for fd in fds:
            os.set_inheritable(fd, False)
        number = struct.unpack("=i", data)[0] if len(data) == 4 else None
        if number == 0 and fds:
            return int(fds[0])
        why = os.strerror(number) if number else "its launcher ended"
        raise LeashUnusable(f"CRIU cannot be held on a leash (seccomp user notification: {why})", errno=number)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)  # a process that it leaves behind, stopped, keeps the filter in use
        try:
            while True:
                events = dict(poll.poll())
                if self._pidfd in events or not events[self._listener] & select.POLLIN:
                    return
                notification = seccomp.receive(self._listener)
                if notification is not None:
                    self._answer(notification)
        finally:
            os.close(self._pidfd)
            os.close(self._listener)  # from here on a scan fails, and CRIU gives up
            self._on_end()

    def _answer(self, notification: seccomp.Notification) -> None:
        if notification.call == ARCH.sys_fcntl:
            with suppress(OSError):  # it reads smaps, then, if it is not being killed
                self._tell_mappings(notification)
            seccomp.let_through(self._listener, notification)
            return
        try:
            pid = self._left_to_us(notification)
        except OSError:  # it is being killed
            pid = None
        if pid is None:
            seccomp.let_through(self._listener, notification)
            return
        self._hold(pid)
        try:
            with open(f"/proc/{notification.pid}/mem", "r+b", buffering=0) as memory:
                if not seccomp.is_waiting(self._listener, notification):
                    return
                os.pwrite(memory.fileno(), _EVERYTHING, notification.arguments[2] + 8 * _WALK_END)
        except OSError:  # likewise
            seccomp.let_through(self._listener, notification)
        else:
            seccomp.answer(self._listener, notification, 0)

    def _tell_mappings(self, notification: seccomp.Notification) -> None:
        """If it is about to read smaps of a process, put a short text in its place."""
        crius = f"/proc/{notification.pid}"
        found = _MAP_FILES.fullmatch(os.readlink(f"{crius}/fd/{notification.arguments[0]}"))
        if found is None or self._mappings is None or (pid := int(found[2])) in (notification.pid, self._process.pid):
            return
        smaps = [fd for fd in os.listdir(f"{crius}/fd") if os.readlink(f"{crius}/fd/{fd}") == f"{found[1]}smaps"]
        if len(smaps) != 1 or not _is_at_its_begin(f"{crius}/fdinfo/{smaps[0]}"):
            return
        text = self._mappings(pid)
        memory = os.memfd_create("incdump-mappings", os.MFD_CLOEXEC)
        with open(memory, "wb", buffering=0) as file:
            if os.pwrite(memory, text, 0) == len(text):
                seccomp.replace_fd(self._listener, notification, file.fileno(), int(smaps[0]))
                self.told.add(pid)

    def _left_to_us(self, notification: seccomp.Notification) -> int | None:
        """The other process whose pages a scan looks for, if it does."""
        crius, (fd, _, address, *_) = notification.pid, notification.arguments
        found = _PAGEMAP.search(os.readlink(f"/proc/{crius}/fd/{fd}"))
        if found is None or (pid := int(found[1])) in (crius, self._process.pid):
            return None
        with open(f"/proc/{crius}/mem", "rb", buffering=0) as memory:
            argument = _SCAN_ARGUMENT.unpack(os.pread(memory.fileno(), _SCAN_ARGUMENT.size, address))
        return pid if (argument[_ANYOF] | argument[_MASK]) & _POPULATED else None


def _is_at_its_begin(path: str) -> bool:
    with open(path, "rb", buffering=0) as file:
        return file.read(64).split(b"\n", 1)[0] == b"pos:\t0"


def uses_short_smaps(version: tuple[int, ...]) -> bool:
    """Whether a CRIU is known to do with the short text that `LeashedCriu` may give it."""
    return version[:2] <= _LAST_KNOWN
