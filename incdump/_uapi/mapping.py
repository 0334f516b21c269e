"""Mappings of this very process, by address: what the kernel probes and the tests try things out on.

mmap(2), mprotect(2), madvise(2), mremap(2), munmap(2) through the C library; Python's own `mmap` hides the address and
cannot move a mapping to a given place.
"""

from __future__ import annotations

import contextlib
import ctypes

from incdump._uapi.libc import libc, raise_errno

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MADV_DONTNEED = 4
MADV_NOHUGEPAGE = 15
MADV_GUARD_INSTALL = 102
"""Linux 6.13."""

_MAP_PRIVATE_ANONYMOUS = 0x22
_MAP_DROPPABLE_ANONYMOUS = 0x28  # Linux 6.11
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


def map_anonymous(length: int, prot: int = PROT_READ | PROT_WRITE, *, droppable: bool = False) -> int:
    """Map private anonymous memory.

    :param length: bytes, page aligned.
    :param droppable: memory that the kernel may take away at any moment.
    :returns: its address.
    :raises OSError: EINVAL, EOPNOTSUPP: the kernel has no droppable memory.
    """
    flags = _MAP_DROPPABLE_ANONYMOUS if droppable else _MAP_PRIVATE_ANONYMOUS
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
