"""userfaultfd in its asynchronous write-protect mode: dirty tracking by the kernel, no fault ever delivered.

Structures and numbers of include/uapi/linux/userfaultfd.h. A userfaultfd belongs to the address space of the process
that *created* it, whoever holds the descriptor: every call here acts on that one. Closing the last copy takes all
protection off again.

This module imports neither NumPy nor anyio: the small holder process uses it.
"""

from __future__ import annotations

import ctypes

from incdump._uapi.arch import ARCH
from incdump._uapi.libc import ioctl, syscall

UFFD_USER_MODE_ONLY = 1
"""Flag of userfaultfd(2): no privilege needed; asynchronous protection sees the kernel's own writes all the same."""
UFFD_API = 0xAA
FEATURE_WP_UNPOPULATED = 1 << 13
"""Protection holds for pages that are not there yet, too."""
FEATURE_WP_ASYNC = 1 << 15
"""A write to a protected page is let through and the protection dropped; nobody is told."""

UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_WRITEPROTECT = 0xC018AA06
_REGISTER_MODE_WP = 2
_WRITEPROTECT_MODE_WP = 1


def open_userfaultfd(flags: int) -> int:
    """Create a userfaultfd for this process's own address space.

    :param flags: ``O_CLOEXEC``, ``O_NONBLOCK``, `UFFD_USER_MODE_ONLY`.
    :raises OSError: EPERM: not allowed without `UFFD_USER_MODE_ONLY`. ENOSYS: not in this kernel.
    """
    return syscall(ARCH.sys_userfaultfd, flags)


def _call(fd: int, request: int, *words: int) -> list[int]:
    """Make an ioctl whose argument is a structure of u64 fields, and return these fields afterwards."""
    argument = (ctypes.c_uint64 * len(words))(*words)
    ioctl(fd, request, ctypes.addressof(argument))
    return list(argument)


def api(fd: int, features: int) -> int:
    """Agree on the features: once, before anything else.

    :returns: all the features that the kernel has.
    :raises OSError: EINVAL: the kernel lacks one of them, or this was done before.
    """
    return _call(fd, UFFDIO_API, UFFD_API, features, 0)[1]


def register_wp(fd: int, start: int, length: int) -> None:
    """Watch the mappings in a range for writes; nothing is protected yet.

    :param start: bytes, page aligned, as is `length`; gaps between mappings are allowed.
    :raises OSError: EINVAL: nothing mapped there, or a mapping that cannot be watched ([vdso], [vvar]).
        EBUSY: another userfaultfd watches it. ESRCH: the address space is gone.
    """
    _call(fd, UFFDIO_REGISTER, start, length, _REGISTER_MODE_WP, 0)


def unregister(fd: int, start: int, length: int) -> None:
    """Stop watching a range, and take its protection off.

    :raises OSError: EINVAL: nothing mapped there, or a mapping that cannot be watched.
    """
    _call(fd, UFFDIO_UNREGISTER, start, length)


def writeprotect(fd: int, start: int, length: int, protect: bool) -> None:
    """Put write protection on a range of watched mappings, or take it off (which makes its pages written again).

    :raises OSError: ENOENT: a part is not watched. EAGAIN: the mappings are being changed, try again.
    """
    _call(fd, UFFDIO_WRITEPROTECT, start, length, _WRITEPROTECT_MODE_WP if protect else 0)
