"""Probes of /proc/PID/pagemap and its scan."""

from __future__ import annotations

import errno
from functools import cache

from incdump._uapi import mapping
from incdump.kerndat.trying import FailedError, Feature, own_scan, pages_for_a_while, pme, try_feature
from incdump.model.regions import PageIs
from incdump.model.runs import PAGE_SIZE

_PFN_MASK = (1 << 55) - 1

_ALL_CATEGORIES = int(sum(PageIs))


@cache
def scan_categories() -> int:
    """The `PageIs` bits that this kernel's PAGEMAP_SCAN knows; 0 without PAGEMAP_SCAN."""
    without_guard = _ALL_CATEGORIES & ~PageIs.GUARD
    for categories in (_ALL_CATEGORIES, without_guard, without_guard & ~PageIs.SOFT_DIRTY):
        try:
            with pages_for_a_while(1) as address:
                own_scan(address, 1, mask=PageIs.PRESENT, returned=categories)
        except OSError as e:
            if e.errno == errno.EINVAL:
                continue
            return 0
        return int(categories)
    return 0


@cache
def pagemap_scan() -> Feature:
    """ioctl(PAGEMAP_SCAN): the whole pagemap in one call."""

    def attempt() -> str:
        with pages_for_a_while(3) as address:
            mapping.write_byte(address + PAGE_SIZE, 1)
            found = own_scan(address, 3, mask=PageIs.PRESENT, returned=PageIs.PRESENT)
        if found != [(1, 2)]:
            raise FailedError(f"page 1 of 3 was touched, the scan found {found}")
        return f"categories known: {PageIs(scan_categories())!r}".replace("PageIs.", "")

    return try_feature(
        "pagemap_scan",
        "PAGEMAP_SCAN, the whole pagemap in one call (Linux 6.7)",
        attempt,
        then="the pagemap is read with `scan`",
        otherwise="the pagemap is read with `cache`; no uffd-wp tracker",
    )


@cache
def pagemap_scan_guard() -> Feature:
    """PAGEMAP_SCAN knows guard regions."""

    def attempt() -> str:
        if not scan_categories() & PageIs.GUARD:
            raise FailedError("this kernel's PAGEMAP_SCAN has no category for them")
        with pages_for_a_while(3) as address:
            mapping.advise(address + PAGE_SIZE, PAGE_SIZE, mapping.MADV_GUARD_INSTALL)
            found = own_scan(address, 3, mask=PageIs.GUARD, returned=PageIs.GUARD)
        if found != [(1, 2)]:
            raise FailedError(f"page 1 of 3 is a guard page, the scan found {found}")
        return "a guard page was told from a swapped one"

    return try_feature(
        "pagemap_scan_guard",
        "guard regions (MADV_GUARD_INSTALL) are told apart in the pagemap (Linux 6.15)",
        attempt,
        then="guard pages are left out",
        otherwise="if the kernel has guard regions (6.13), their pages are found out by trying to read them",
    )


@cache
def zero_page_pfn() -> int | None:
    """The frame number of the shared zero page, or None when frame numbers are hidden (no CAP_SYS_ADMIN)."""
    try:
        with pages_for_a_while(1) as address:
            mapping.read_byte(address)
            return pme(address) & _PFN_MASK or None
    except OSError:
        return None


@cache
def page_frame_numbers() -> Feature:
    """Page frame numbers are visible in the pagemap."""

    def attempt() -> str:
        pfn = zero_page_pfn()
        if pfn is None:
            raise FailedError("the kernel shows them as 0 (CAP_SYS_ADMIN is needed)")
        return f"the zero page is frame {pfn:#x}"

    return try_feature(
        "page_frame_numbers",
        "page frame numbers in /proc/PID/pagemap",
        attempt,
        then="readers `plain` and `cache` leave out zero pages",
        otherwise="readers `plain` and `cache` take zero pages for pages with contents: they are dumped",
    )
