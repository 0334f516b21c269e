"""The calling thread's credentials, those that file systems go by. The C library would change all threads'."""

from __future__ import annotations

import ctypes
from contextlib import suppress

from incdump._uapi.arch import ARCH
from incdump._uapi.libc import libc, raise_errno, syscall

_VERSION_3 = 0x20080522  # include/uapi/linux/capability.h
_ASK = 0xFFFFFFFF


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def become(uid: int, gid: int) -> None:
    """Look at files as a user without any rights but its own does: no other groups, no capabilities.

    For good: it is meant for a thread that ends then. A thread of a user namespace that may not set its groups keeps
    them.

    :raises OSError: the kernel refused.
    """
    with suppress(PermissionError):
        syscall(ARCH.sys_setgroups, 0, 0)
    for change, number in ((libc.setfsgid, gid), (libc.setfsuid, uid)):
        change(ctypes.c_uint32(number))
        if change(ctypes.c_uint32(_ASK)) & _ASK != number:
            raise PermissionError(1, "Operation not permitted")
    none = (ctypes.c_uint32 * 6)()  # of the effective, permitted and inheritable ones, twice
    if libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), none):
        raise_errno()
