"""Reading a small /proc file with the GIL held.

Such a read takes a few microseconds. Done a thousand times while a target is being stopped, in a program whose other
threads compute, it is not to hand over the GIL each time.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import ctypes
import os

from incdump._uapi.libc import raise_errno

_libc = ctypes.PyDLL(None, use_errno=True)
_open = _libc.open
_open.argtypes = (ctypes.c_char_p, ctypes.c_int)
_read = _libc.read
_read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_read.restype = ctypes.c_ssize_t
_close = _libc.close
_close.argtypes = (ctypes.c_int,)


def read_small(path: str) -> bytes:
    """The whole of a file.

    :raises OSError: ENOENT, or ESRCH: the process is gone.
    """
    fd: int = _open(os.fsencode(path), os.O_RDONLY | os.O_CLOEXEC)
    if fd < 0:
        raise_errno(path)
    try:
        buffer = ctypes.create_string_buffer(2048)
        text = b""
        while (count := _read(fd, buffer, len(buffer))) > 0:
            text += buffer.raw[:count]
        if count < 0:
            raise_errno(path)
        return text
    finally:
        _close(fd)
