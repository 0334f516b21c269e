"""What the holder and its clients say to each other.

A number means a process only in one pid namespace, so each has a holder of its own: its socket's name has the
namespace's inode, and both ends make sure that they are in the same one. A target is handed over as a pidfd.

One message is one datagram of a SOCK_SEQPACKET unix socket: a JSON object, at most 64 KiB, with file descriptors beside
it (SCM_RIGHTS). A client sends ``{"do": NAME, ...}`` and gets one answer; an answer that holds ``"error"`` is a
refusal. Only the standard library is used: the holder is to stay small.

=========  ==========================================  ===============================================================
do         with                                        answer
=========  ==========================================  ===============================================================
hello                                                  ``pid`` of the holder, ``version`` of this protocol
acquire    ``pid``, ``start_time``, ``root`` (number   ``generation`` (or null), ``started`` (tracking began now),
           of its tree's, or null); its pidfd as       ``ended`` (why it did before, or null), ``stopped_us``; the
           descriptor                                  userfaultfd as descriptor
renew      the same                                    the same, after a new userfaultfd took the old one's place
commit     ``pid``, ``start_time``, ``generation``,    nothing; the target is free for the next client, and tracked
           ``lasts`` (seconds, or null)                for so long from now on (null: as long as was said before)
forget     ``pids`` (or null for all), ``root``        ``forgotten``: list of pids; ``ends``: whether the holder does
           (number, start time; or null): all of its   when this connection has ended
           tree as well
list                                                   ``targets``: list of objects; ``idle``: it is about to end
end                                                    ``forgotten``; it ends at once, and all of its tracking
=========  ==========================================  ===============================================================

From ``acquire`` until ``commit`` the target belongs to that connection, and its generation counts as lost: a client
that dies in between (SIGKILL included) has taken pages from the tracker that no images dir holds.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import struct
import time
from typing import Any

from incdump.holder.waiting import Patience
from incdump.proc.identity import check_own_proc, has_ended, pid_of

VERSION = 3
MAX_MESSAGE = 65536
MAX_FDS = 4
LOCK_TIMEOUT = 30.0
"""Seconds to wait for whoever looks for a holder, or starts one: longer than any of that takes."""
_LOCK_POLL = 0.01
_SO_PEERPIDFD = 77
"""include/uapi/asm-generic/socket.h, which x86 and aarch64 use."""


def pid_namespace() -> int:
    """The inode of this process's pid namespace.

    :raises incdump.errors.ProcMismatch: /proc is not this namespace's.
    """
    check_own_proc()
    return os.stat("/proc/self/ns/pid").st_ino


def _name(ending: str) -> str:
    return f"holder-{pid_namespace()}.{ending}"


def log_path(directory: str) -> str:
    """Beside the socket: what a holder has to say before it dies."""
    return os.path.join(directory, _name("log"))


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
    """Where the holder of this user, in this pid namespace, listens."""
    return os.path.join(runtime_dir(), _name("sock"))


def lock_socket(directory: str, *, wait: bool = True, seconds: float | None = None) -> int:
    """Lock the socket, as a client does that looks for a holder or starts one, and a holder that ends.

    :param seconds: to wait for it at most; None: `LOCK_TIMEOUT`.
    :returns: a descriptor; the lock lasts until it is closed.
    :raises BlockingIOError: somebody else has it, and `wait` is false.
    :raises TimeoutError: somebody else had it for all that time, or somebody gave up waiting.
    """
    path = os.path.join(directory, _name("lock"))
    patience = Patience(LOCK_TIMEOUT if seconds is None else seconds) if wait else None
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _flock(lock, path, patience)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(lock)):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # a holder that ended has removed it meanwhile


def _flock(lock: int, path: str, patience: Patience | None) -> None:
    """Lock a file, waiting as long as there is patience.

    flock(2) has no limit of its own, and a holder of the lock may have been stopped.
    """
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if patience is None:
                raise
            if not patience.left:
                raise TimeoutError(errno.ETIMEDOUT, "another incdump keeps it locked; is it stopped?", path) from None
        time.sleep(_LOCK_POLL)


def remove_traces(directory: str, listener: os.stat_result | None = None) -> None:
    """Remove socket, log (unless there is something in it) and lock; the caller has the lock, and keeps it.

    :param listener: of the holder that ends: where the socket is another one's by now, nothing is removed.
    """
    log, socket_file = log_path(directory), os.path.join(directory, _name("sock"))
    if listener is not None:
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.lstat(socket_file), listener):
                return
    for path in (socket_file, log, os.path.join(directory, _name("lock"))):
        with contextlib.suppress(OSError):
            if path != log or not os.stat(log).st_size:
                os.unlink(path)


def peer(sock: socket.socket) -> tuple[int, int]:
    """Who is at the other end of a connection: process and user, as they were when it listened or connected."""
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


def peer_pidfd(sock: socket.socket) -> int:
    """A pidfd of the process at the other end, as it was when it listened or connected. The caller closes it.

    :raises OSError: ENOPROTOOPT: a kernel before 6.5, which does not tell; ESRCH and others: it has been reaped.
    """
    packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, struct.calcsize("i"))
    return int(struct.unpack("i", packed)[0])


def is_neighbour(sock: socket.socket) -> bool:
    """Whether the peer is in this process's pid namespace: then both mean the same by a number.

    By a pidfd where the kernel gives one, so that the number that is looked at is the peer's; by SO_PEERCRED's number
    else.

    :raises OSError: that cannot be found out: EMFILE.
    """
    try:
        pidfd = peer_pidfd(sock)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return error.errno == errno.ENOPROTOOPT and _is_in_this_namespace(peer(sock)[0])
    try:
        return _is_in_this_namespace(pid_of(pidfd)) and not has_ended(pidfd)
    finally:
        os.close(pidfd)


def _is_in_this_namespace(pid: int) -> bool:
    """Whether a process, by its number here (0 or less: it has none), is in this process's pid namespace."""
    try:
        return pid > 0 and os.stat(f"/proc/{pid}/ns/pid").st_ino == pid_namespace()
    except FileNotFoundError:
        return False


def send(sock: socket.socket, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
    """Send one message, descriptors beside it."""
    data = json.dumps(message).encode()
    if len(data) > MAX_MESSAGE:
        raise OSError(90, "message too long")
    socket.send_fds(sock, [data], fds)


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """Receive one message.

    :returns: the message, or None at end of file; descriptors that came with it (close-on-exec).
    :raises OSError: EMFILE: there was no room for descriptors that came with it.
    :raises ValueError: not a JSON object, or cut short; descriptors that came with it are closed.
    """
    # Not socket.recv_fds(): it does not pass on its flags (Python 3.9 to 3.13), and programs that are run would
    # inherit.
    data, fds, flags = _receive_raw(sock)
    try:
        if flags & socket.MSG_CTRUNC and len(fds) < MAX_FDS:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("a message that was cut short")
        message = json.loads(data) if data else None
        if data and not isinstance(message, dict):
            raise ValueError("not an object")
    except OSError:
        _close(fds)
        raise
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
