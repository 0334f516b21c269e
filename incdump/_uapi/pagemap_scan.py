"""ioctl(PAGEMAP_SCAN) on /proc/PID/pagemap: pages by category, and atomic get-and-write-protect (Linux 6.7).

struct pm_scan_arg and struct page_region of include/uapi/linux/fs.h; what the call does is told in
Documentation/admin-guide/mm/pagemap.rst. The categories are `incdump.model.regions.PageIs`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from incdump._uapi.libc import ioctl

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAGEMAP_SCAN = 0xC0606610
PM_SCAN_WP_MATCHING = 1
"""Write-protect the matching pages, in one step with reporting them."""
PM_SCAN_CHECK_WPASYNC = 2
"""Fail with EPERM at the first mapping that is not registered for asynchronous write protection."""

_WALK_END = 4  # index of walk_end in struct pm_scan_arg
_PmScanArg = ctypes.c_uint64 * 12


def pagemap_scan(
    fd: int,
    start: int,
    end: int,
    vec: NDArray[np.uint64] | None,
    *,
    flags: int = 0,
    max_pages: int = 0,
    inverted: int = 0,
    mask: int = 0,
    anyof: int = 0,
    returned: int = 0,
) -> tuple[int, int]:
    """Scan ``[start, end)`` of the address space whose pagemap `fd` is.

    :param start: first address, page aligned.
    :param end: end; beyond the task size is EFAULT, the end of the last VMA is always safe.
    :param vec: shape (m, 3), C-contiguous: filled with start, end, categories of up to m regions. None stores nothing.
    :param flags: ``PM_SCAN_*``.
    :param max_pages: stop after so many matching pages; 0 for no limit.
    :param inverted: categories that count as present when they are absent, for `mask` and `anyof`.
    :param mask: categories that must all hold.
    :param anyof: categories of which one must hold, if any is given.
    :param returned: categories to report (and to cut regions by).
    :returns: how many regions were stored, and the address to go on from (`end` when done).
    :raises OSError: ESRCH: the address space is gone. EINVAL: an unknown flag or category. EPERM: see `flags`.
        After an error nothing is known of what was write-protected.
    """
    address, length = (0, 0) if vec is None else (vec.ctypes.data, len(vec))
    arg = _PmScanArg(96, flags, start, end, 0, address, length, max_pages, inverted, mask, anyof, returned)
    count = ioctl(fd, PAGEMAP_SCAN, ctypes.addressof(arg))
    walk_end: int = arg[_WALK_END]
    if vec is not None and count:
        walk_end = _true_walk_end(walk_end, end, vec, count, max_pages)
    return count, walk_end


def _true_walk_end(walk_end: int, end: int, vec: NDArray[np.uint64], count: int, max_pages: int) -> int:
    """Where to go on.

    The kernel collects regions 512 at a time, and when the last of these lots did not fill up, its walk_end still tells
    where the lot before had stopped (seen with Linux 6.18): going on from there would report regions twice. But a call
    that neither filled `vec` nor reached `max_pages` has seen everything, and none stops before its last region's end.
    """
    regions = vec[:count]
    if count < len(vec) and (not max_pages or int((regions[:, 1] - regions[:, 0]).sum()) >> 12 < max_pages):
        return end
    return max(walk_end, int(regions[-1, 1]))
