"""What the holder and its clients say to each other.

One message is one datagram of a SOCK_SEQPACKET unix socket: a JSON object, at most 64 KiB, with file descriptors beside
it (SCM_RIGHTS). A client sends ``{"do": NAME, ...}`` and gets one answer; an answer that holds ``"error"`` is a
refusal. Only the standard library is used: the holder is to stay small.

=========  ==========================================  ===============================================================
do         with                                        answer
=========  ==========================================  ===============================================================
hello                                                  ``pid`` of the holder, ``version`` of this protocol
acquire    ``pid``, ``start_time``                     ``generation`` (or null), ``started`` (tracking began now),
                                                       ``stopped_us``; the userfaultfd as descriptor
renew      ``pid``, ``start_time``                     the same, after a new userfaultfd took the old one's place
commit     ``pid``, ``start_time``, ``generation``     nothing; the target is free for the next client
forget     ``pid`` (or null for all)                   ``forgotten``: list of pids; ``ends``: whether the holder does
                                                       when this connection has ended
list                                                   ``targets``: list of objects
=========  ==========================================  ===============================================================

From ``acquire`` until ``commit`` the target belongs to that connection, and its generation counts as lost: a client
that dies in between (SIGKILL included) has taken pages from the tracker that no images dir holds.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import socket
import stat
import struct
from typing import Any

VERSION = 1
MAX_MESSAGE = 65536
LOG = "holder.log"
"""Beside the socket: what a holder has to say before it dies."""
_LOCK = "holder.lock"
_SOCKET = "holder.sock"
MAX_FDS = 4


def runtime_dir() -> str:
    """The directory of the holder's socket and of soft-dirty generations: this user's alone, gone at the next boot.

    ``$INCDUMP_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/incdump``, else ``/run/incdump`` for root and
    ``/tmp/incdump-UID`` for others. It is made when it is missing.

    :raises OSError: it cannot be made.
    :raises PermissionError: it belongs to somebody else, or others may write to it.
    """
    uid = os.geteuid()
    path = os.environ.get("INCDUMP_RUNTIME_DIR")
    if not path:
        base = os.environ.get("XDG_RUNTIME_DIR")
        if uid == 0:
            path = "/run/incdump"
        elif base:
            path = os.path.join(base, "incdump")
        else:
            path = f"/tmp/incdump-{uid}"
    os.makedirs(path, 0o700, exist_ok=True)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o022:
        raise PermissionError(1, "not a directory of this user alone", path)
    return path


def socket_path() -> str:
    """Where the holder of this user listens."""
    return os.path.join(runtime_dir(), _SOCKET)


def lock_socket(directory: str, *, wait: bool = True) -> int:
    """Lock the socket, as a client does that looks for a holder or starts one, and a holder that ends.

    :returns: a descriptor; the lock lasts until it is closed.
    :raises BlockingIOError: somebody else has it, and `wait` is false.
    """
    path = os.path.join(directory, _LOCK)
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(lock)):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # a holder that ended has removed it meanwhile


def remove_traces(directory: str) -> None:
    """Remove socket, log (unless there is something in it) and lock; the caller has the lock, and keeps it."""
    log = os.path.join(directory, LOG)
    for path in (os.path.join(directory, _SOCKET), log, os.path.join(directory, _LOCK)):
        with contextlib.suppress(OSError):
            if path != log or not os.stat(log).st_size:
                os.unlink(path)


def peer(sock: socket.socket) -> tuple[int, int]:
    """Who is at the other end of a connection: process and user, as they were when it listened or connected."""
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send one message, descriptors beside it."""
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE:
        raise OSError(90, "message too long")
    socket.send_fds(sock, [data], fds)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message.

    :returns: the message, or None at end of file; descriptors that came with it (close-on-exec).
    :raises ValueError: not a JSON object, or cut short; descriptors that came with it are closed.
    """
    # Not socket.recv_fds(): it does not pass on its flags (Python 3.9 to 3.13), and programs that are run would
    # inherit.
    data, fds, flags = _receive_raw(sock)
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("a message that was cut short")
        message = json.loads(data) if data else None
        if data and not isinstance(message, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        _close(fds)
        raise ValueError(f"no message: {error}") from error
    if message is None:
        _close(fds)
        return None, []
    return message, fds


def _receive_raw(sock: socket.socket) -> tuple[bytes, list[int], int]:
    fds = array.array("i")
    space = socket.CMSG_LEN(MAX_FDS * fds.itemsize)
    data, ancillary, flags, _address = sock.recvmsg(MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) // fds.itemsize * fds.itemsize])
    return data, fds.tolist(), flags


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
