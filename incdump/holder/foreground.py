"""A holder that somebody else looks after: a unit of systemd, a side-car, a terminal.

A holder that starts on demand is in the cgroup of the command that needed it, and ends with it where that is a
container that runs once, or a unit. One that was started before, as ``incdump holder``, serves all commands of its
user, its pid namespace and its runtime directory, ends by SIGTERM, SIGINT or SIGHUP, and not with its last target.

This module is stdlib only: the holder process is to stay small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from typing import TYPE_CHECKING

from incdump import errors
from incdump.holder import wire
from incdump.holder.client import ask, connect_locked, unusable
from incdump.holder.server import PR_SET_NAME, Holder
from incdump.proc.identity import HOLDER_COMM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(on_ready: Callable[[str], None]) -> None:
    """Be the holder, until a signal comes, or a checkpoint needs it to end.

    To be called in the main thread. Where ``$NOTIFY_SOCKET`` is set, systemd is told when it is ready, and when it
    ends (sd_notify(3)).

    :param on_ready: called with the socket's path when commands can connect.
    :raises incdump.errors.HolderError: another one runs; or the runtime directory cannot be used.
    """
    listener, path = _listen()
    holder = Holder(listener)
    holder.inode, holder.stays = os.lstat(path), True
    ctypes.CDLL(None).prctl(PR_SET_NAME, HOLDER_COMM.encode(), 0, 0, 0)
    with _ended_by_signals(holder):
        on_ready(path)
        tell_systemd("READY=1")
        try:
            holder.run()
        finally:
            tell_systemd("STOPPING=1")
            holder.release()


def _listen() -> tuple[socket.socket, str]:
    """Listen at the holder's place, if nobody does; returns the socket, and its path."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    umask = os.umask(0o077)
    try:
        lock = wire.lock_socket(wire.runtime_dir())
        try:
            _replace(connect_locked())
            path = wire.socket_path()
            mine = f"{path}.{os.getpid()}"
            listener.bind(mine)
            listener.listen(16)
            os.rename(mine, path)
            return listener, path
        finally:
            os.close(lock)
    except OSError as error:
        listener.close()
        raise unusable(error) from error
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(umask)


def _replace(other: socket.socket | None) -> None:
    """Have a holder end that holds nothing; the caller has the lock.

    :raises incdump.errors.HolderError: it does hold something, or is in the foreground as well.
    """
    if other is None:
        return
    with other:
        pid, _ = wire.peer(other)
        answer, _ = ask(other, {"do": "list"})
        if answer.get("idle"):
            ask(other, {"do": "end"})
            return
    raise errors.HolderError(
        f"a holder runs already, process {pid}: end it before (kill {pid}); what it tracks is dumped whole then",
        pid=pid,
    )


@contextlib.contextmanager
def _ended_by_signals(holder: Holder) -> Iterator[None]:
    """Signals have the holder's loop end; one that comes while a target stands still waits."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    holder.end_when_readable(reader)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def tell_systemd(state: str) -> None:
    """Send a word to whoever started this as a service of ``Type=notify``; nobody is there, mostly."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)  # it is not waited for
        sock.sendto(state.encode(), address)
