"""fallocate(2) itself.

The C library's posix_fallocate, which Python has, writes to every block where the file system cannot do it.
"""

from __future__ import annotations

import ctypes

from incdump._uapi.libc import libc, raise_errno

_fallocate = libc.fallocate
_fallocate.restype = ctypes.c_int
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, size: int) -> None:
    """Reserve a file's blocks from its beginning on, and make it at least that long; what was not written reads as 0.

    :param size: bytes, more than 0.
    :raises OSError: EOPNOTSUPP: the file system cannot. ENOSPC: not enough room; some of it may be reserved.
    """
    if _fallocate(fd, 0, 0, size) < 0:
        raise_errno()


_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # include/uapi/linux/falloc.h


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Give back a file's blocks in a range, which reads as 0 then; the file stays as long as it is.

    :raises OSError: EOPNOTSUPP: the file system cannot.
    """
    if _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, size) < 0:
        raise_errno()
