"""Reading another process's memory, and asking for one of its mappings.

process_vm_readv(2) takes arrays of ``struct iovec``; the target's is a NumPy array here, shape (k, 2), uint64: address
and length, so that no Python object is made per iovec. PROCMAP_QUERY (Linux 6.11, include/uapi/linux/fs.h) answers for
one address what /proc/PID/maps tells of all.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from typing import TYPE_CHECKING

from incdump._uapi.libc import ioctl, libc, raise_errno

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IOV_MAX = 1024
"""The most iovecs that one call takes, a side."""

PROCMAP_QUERY = 0xC0686611
PROCMAP_QUERY_COVERING_OR_NEXT_VMA = 0x10

_process_vm_readv = libc.process_vm_readv
_process_vm_readv.restype = ctypes.c_ssize_t
_process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)


_IOVEC = struct.Struct("=QQ")


def process_vm_readv(pid: int, address: int, length: int, remote: NDArray[np.uint64]) -> int:
    """Copy memory of process `pid` into this process; the GIL is released.

    :param address: of the destination, in this process.
    :param length: of the destination, bytes.
    :param remote: shape (m, 2): address and length of each source, in the target; m at most `IOV_MAX`.
    :returns: bytes copied. Fewer than asked for: the copy ended at the first unreadable page, even inside an iovec.
    :raises OSError: EFAULT: the very first page is unreadable. ESRCH: no such process, or it has no memory any more.
    """
    local = _IOVEC.pack(address, length)
    copied: int = _process_vm_readv(pid, local, 1, remote.tobytes(), len(remote), 0)  # quicker than remote.ctypes
    if copied < 0:
        raise_errno()
    return copied


_QUERY = struct.Struct("=9Q4I2Q")  # struct procmap_query; vma_start and vma_end are fields 3 and 4


def query_vma(maps_fd: int, address: int) -> tuple[int, int] | None:
    """Find the mapping that holds an address, or else the next one above it.

    :param maps_fd: /proc/PID/maps, open.
    :returns: start and end, or None when nothing is mapped at or above the address.
    :raises OSError: ENOTTY: kernel before 6.11. ESRCH: the address space is gone.
    """
    query = ctypes.create_string_buffer(_QUERY.size)
    _QUERY.pack_into(query, 0, _QUERY.size, PROCMAP_QUERY_COVERING_OR_NEXT_VMA, address, *[0] * 12)
    try:
        ioctl(maps_fd, PROCMAP_QUERY, ctypes.addressof(query))
    except OSError as e:
        if e.errno == errno.ENOENT:
            return None
        raise
    found = _QUERY.unpack_from(query)
    return found[3], found[4]
