"""Mappings of this very process, by address: what the kernel probes and the tests try things out on.

mmap(2), mprotect(2), madvise(2), mremap(2), munmap(2) through the C library; Python's own `mmap` hides the address and
cannot move a mapping to a given place.
"""

from __future__ import annotations

import contextlib
import ctypes

from incdump._uapi.libc import libc, raise_errno

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
PROT_EXEC = 4
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS = 1, 2, 0x20
MAP_DROPPABLE = 8
"""In place of MAP_PRIVATE (Linux 6.11)."""
MAP_GROWSDOWN, MAP_NORESERVE, MAP_HUGETLB = 0x100, 0x4000, 0x40000
MADV_RANDOM, MADV_SEQUENTIAL, MADV_DONTNEED = 1, 2, 4
MADV_DONTFORK, MADV_MERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP = 10, 12, 14, 15, 16
MADV_WIPEONFORK = 18
MADV_GUARD_INSTALL = 102
"""Linux 6.13."""

_MREMAP_MAYMOVE_FIXED = 3
_MREMAP_DONTUNMAP = 4
_MAP_FAILED = ctypes.c_void_p(-1).value

_mmap = libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mremap = libc.mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_munmap = libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_mprotect = libc.mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_madvise = libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mlock = libc.mlock
_mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_anonymous(length: int, prot: int = PROT_READ | PROT_WRITE, *, droppable: bool = False) -> int:
    """Map private anonymous memory.

    :param length: bytes, page aligned.
    :param droppable: memory that the kernel may take away at any moment.
    :returns: its address.
    :raises OSError: EINVAL, EOPNOTSUPP: the kernel has no droppable memory.
    """
    return map_pages(length, prot, MAP_ANONYMOUS | (MAP_DROPPABLE if droppable else MAP_PRIVATE))


def map_pages(length: int, prot: int, flags: int) -> int:
    """Map memory, with these flags of mmap(2).

    :returns: its address.
    :raises OSError: there is no such memory here.
    """
    address = _mmap(None, length, prot, flags, -1, 0)
    if address == _MAP_FAILED:
        raise_errno()
    return int(address)


def unmap(address: int, length: int) -> None:
    """Remove the mappings of a range."""
    if _munmap(address, length):
        raise_errno()


def protect(address: int, length: int, prot: int) -> None:
    """Change the protection of a range."""
    if _mprotect(address, length, prot):
        raise_errno()


def advise(address: int, length: int, advice: int) -> None:
    """Call madvise(2).

    :raises OSError: EINVAL: the kernel does not know the advice, or it does not fit the mapping.
    """
    if _madvise(address, length, advice):
        raise_errno()


def lock(address: int, length: int) -> None:
    """Call mlock(2), which also makes the pages be there.

    :raises OSError: ENOMEM, EPERM: more than may be locked (RLIMIT_MEMLOCK).
    """
    if _mlock(address, length):
        raise_errno()


def advise_no_huge_pages(address: int, length: int) -> None:
    """Keep transparent huge pages out of a range; a kernel without any is fine."""
    with contextlib.suppress(OSError):
        advise(address, length, MADV_NOHUGEPAGE)


def move(address: int, length: int, to: int, *, leave_empty: bool = False) -> None:
    """Move a mapping to another address, in place of what is mapped there.

    :param leave_empty: keep the old place mapped, without its pages (Linux 5.7).
    """
    flags = _MREMAP_MAYMOVE_FIXED | (_MREMAP_DONTUNMAP if leave_empty else 0)
    if _mremap(address, length, length, flags, to) == _MAP_FAILED:
        raise_errno()


def write_byte(address: int, value: int) -> None:
    """Store one byte."""
    ctypes.memset(address, value, 1)


def read_byte(address: int) -> int:
    """Load one byte."""
    return ctypes.string_at(address, 1)[0]
