"""pidfd_open(2) and pidfd_getfd(2): descriptors that stand for a process, and copies of its descriptors.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import ctypes
import errno
import os

from incdump._uapi.arch import ARCH
from incdump._uapi.libc import raise_errno

PIDFD_THREAD = os.O_EXCL
"""Flag of pidfd_open(2), Linux 6.9: the descriptor stands for one thread."""

# With the GIL held, as in ptrace.py: a copy is made while a thread of the target stands still.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_uint)


def open_for_thread(pid: int, tid: int) -> int:
    """A descriptor that stands for a thread, or for its whole process where the kernel knows no better.

    :raises OSError: ESRCH: it is gone.
    """
    try:
        return os.pidfd_open(tid, PIDFD_THREAD)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
    return os.pidfd_open(pid)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A copy of descriptor `fd` of the process (or thread) behind `pidfd`; it is close-on-exec.

    :raises OSError: EBADF: it has no such descriptor. EPERM: not allowed. ESRCH: it has exited.
    """
    result: int = _syscall(ARCH.sys_pidfd_getfd, pidfd, fd, 0)
    if result < 0:
        raise_errno()
    return result
