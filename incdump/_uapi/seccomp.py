"""The supervisor's side of seccomp user notification: seccomp_unotify(2).

A filtered process that makes a call which its filter answers with SECCOMP_RET_USER_NOTIF waits in it until whoever
holds the filter's listener has answered. The structures are those of include/uapi/linux/seccomp.h.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from dataclasses import dataclass

from incdump._uapi.libc import ioctl

_RECV = 0xC0502100
_SEND = 0xC0182101
_ID_VALID = 0x40082102
_ADDFD = 0x40182103
_ADDFD_FLAG_SETFD = 1
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE: make the call after all
_NOTIF = struct.Struct("=QIIiIQ6Q")
_ANSWER = struct.Struct("=QqiI")
_ADDED = struct.Struct("=QIIII")


@dataclass(frozen=True, slots=True)
class Notification:
    """A call that waits for its answer.

    :ivar id: of the notification.
    :ivar pid: the thread that makes it, in the listener's pid namespace.
    :ivar call: the call's number.
    :ivar arguments: its six arguments.
    """

    id: int
    pid: int
    call: int
    arguments: tuple[int, ...]


def receive(listener: int) -> Notification | None:
    """Take the next call. Blocks; poll(2) first.

    :returns: None when the caller was killed, or interrupted, meanwhile.
    """
    buffer = ctypes.create_string_buffer(_NOTIF.size)  # the kernel wants zeros
    try:
        ioctl(listener, _RECV, ctypes.addressof(buffer))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    number, pid, _flags, call, _arch, _ip, *arguments = _NOTIF.unpack(buffer.raw)
    return Notification(number, pid, call, tuple(arguments))


def is_waiting(listener: int, notification: Notification) -> bool:
    """Whether the caller still waits, so that its pid and its memory are still its own."""
    number = ctypes.c_uint64(notification.id)
    try:
        ioctl(listener, _ID_VALID, ctypes.addressof(number))
    except OSError:
        return False
    return True


def answer(listener: int, notification: Notification, result: int = 0) -> None:
    """Have the call return a result without being made."""
    _send(listener, _ANSWER.pack(notification.id, result, 0, 0))


def let_through(listener: int, notification: Notification) -> None:
    """Have the kernel make the call."""
    _send(listener, _ANSWER.pack(notification.id, 0, 0, _CONTINUE))


def replace_fd(listener: int, notification: Notification, fd: int, theirs: int) -> None:
    """Put a descriptor of this process in the place of one of the caller's, which is closed; the caller still waits.

    :param theirs: the caller's.
    :raises OSError: EINVAL: not in this kernel (Linux 5.9). ENOENT: the caller is gone.
    """
    data = _ADDED.pack(notification.id, _ADDFD_FLAG_SETFD, fd, theirs, 0)
    buffer = ctypes.create_string_buffer(data, len(data))
    ioctl(listener, _ADDFD, ctypes.addressof(buffer))


def _send(listener: int, data: bytes) -> None:
    buffer = ctypes.create_string_buffer(data, len(data))
    try:
        ioctl(listener, _SEND, ctypes.addressof(buffer))
    except OSError as error:
        if error.errno != errno.ENOENT:  # the caller is gone
            raise
