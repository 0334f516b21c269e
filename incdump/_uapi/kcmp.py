"""kcmp(2): whether two processes, or threads, share something.

This module is stdlib only: the small holder process may use it.
"""

from __future__ import annotations

from incdump._uapi.arch import ARCH
from incdump._uapi.libc import syscall

KCMP_FILE = 0
KCMP_VM = 1
KCMP_FILES = 2


def shares(pid: int, other: int, what: int, index: int = 0, other_index: int = 0) -> bool:
    """Whether two tasks share what `what` says; False where it cannot be told (another user's, no kcmp(2), gone).

    :param index: the descriptor, if it is about files; `other_index` is the other's.
    """
    try:
        return syscall(ARCH.sys_kcmp, pid, other, what, index, other_index) == 0
    except OSError:
        return False


def order(pid: int, other: int, what: int) -> int:
    """A total order of what tasks have, as for `functools.cmp_to_key`: 0 if they share it.

    :raises OSError: it cannot be told.
    """
    return (0, -1, 1)[syscall(ARCH.sys_kcmp, pid, other, what, 0, 0)]


def same_file(pid: int, fd: int, other: int, other_fd: int) -> bool:
    """Whether descriptors of two tasks mean the same open file; False where it cannot be told."""
    return shares(pid, other, KCMP_FILE, fd, other_fd)
