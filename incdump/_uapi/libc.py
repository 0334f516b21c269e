"""The C library, loaded once, and the one way to call into it.

Every wrapper in this package is a thin function over one system call: it takes and returns plain integers, bytes or
NumPy arrays, and raises `OSError` with the kernel's errno. ctypes releases the GIL around each call.
"""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)

_syscall = libc.syscall
_syscall.restype = ctypes.c_long


def raise_errno(what: str | None = None) -> None:
    """Raise the `OSError` (subclass) of the calling thread's errno.

    :param what: the file or object concerned, for the message.
    """
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)


def syscall(number: int, *args: int) -> int:
    """Make a system call by its number.

    :param number: from `incdump._uapi.arch`, the running machine's.
    :param args: up to six integers (addresses included).
    :returns: the result, never negative.
    :raises OSError: the kernel refused.
    """
    result: int = _syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in args))
    if result < 0:
        raise_errno()
    return result


_ioctl = libc.ioctl
_ioctl.restype = ctypes.c_int
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


def ioctl(fd: int, request: int, argument: int) -> int:
    """Make an ioctl whose argument is an address; the GIL is released.

    :param argument: the address of the structure, which the caller keeps alive.
    :raises OSError: the kernel refused.
    """
    result: int = _ioctl(fd, request, argument)
    if result < 0:
        raise_errno()
    return result
