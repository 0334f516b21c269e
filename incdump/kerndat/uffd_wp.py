"""Probes of userfaultfd and of asynchronous write protection."""

from __future__ import annotations

import os
from functools import cache

from incdump._uapi import mapping, userfaultfd
from incdump._uapi.pagemap_scan import PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING
from incdump.kerndat.pagemap import pagemap_scan
from incdump.kerndat.trying import FailedError, Feature, own_scan, pages_for_a_while, try_feature
from incdump.model.regions import PageIs
from incdump.model.runs import PAGE_SHIFT, PAGE_SIZE


@cache
def userfaultfd_user_mode() -> Feature:
    """userfaultfd(UFFD_USER_MODE_ONLY), which takes no privilege."""

    def attempt() -> str:
        os.close(_open_userfaultfd())
        return "created one"

    return try_feature(
        "userfaultfd_user_mode",
        "userfaultfd for user-mode faults, which needs no privilege (Linux 5.11)",
        attempt,
        then="the uffd-wp tracker has what it injects",
        otherwise="no uffd-wp tracker",
    )


def _open_userfaultfd() -> int:
    return userfaultfd.open_userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | userfaultfd.UFFD_USER_MODE_ONLY)


@cache
def uffd_wp_async() -> Feature:
    """Asynchronous write protection tells exactly what was written."""
    return try_feature(
        "uffd_wp_async",
        "dirty tracking by asynchronous write protection: userfaultfd and PAGEMAP_SCAN (Linux 6.7)",
        _attempt_uffd_wp,
        then="tracker `uffd-wp` works: pre-dumps do not stop the target",
        otherwise="no tracker `uffd-wp`",
    )


def _attempt_uffd_wp() -> str:
    """Arm 8 pages of our own, write, read back, drop, move; see that every page is reported as it must be."""
    if not pagemap_scan():
        raise FailedError("needs PAGEMAP_SCAN")
    uffd = _open_userfaultfd()
    try:
        userfaultfd.api(uffd, userfaultfd.FEATURE_WP_ASYNC | userfaultfd.FEATURE_WP_UNPOPULATED)
        with pages_for_a_while(8) as elsewhere:
            _exercise_uffd_wp(uffd, elsewhere)
            _exercise_exceptions(uffd)
            found = own_scan(elsewhere, 8, mask=PageIs.WRITTEN, returned=PageIs.WRITTEN)
    finally:
        os.close(uffd)
    if found != [(0, 8)]:
        raise FailedError(
            f"a moved mapping kept its protection though nobody tracks it: only pages {found} count as written"
        )
    return "armed, written, read back, dropped and moved: every page was reported right"


def _exercise_uffd_wp(uffd: int, elsewhere: int) -> None:
    """The steps of `_attempt_uffd_wp`, on 8 pages that move `elsewhere` in the end."""
    flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
    length = 8 << PAGE_SHIFT

    def take(expected: list[tuple[int, int]], when: str) -> None:
        found = own_scan(pages, 8, flags=flags, mask=PageIs.WRITTEN | PageIs.PRESENT, returned=PageIs.WRITTEN)
        if found != expected:
            raise FailedError(f"{when}, pages {found} were reported as written instead of {expected}")

    pages = mapping.map_anonymous(length)
    try:
        mapping.advise_no_huge_pages(pages, length)
        for page in range(8):
            mapping.write_byte(pages + page * PAGE_SIZE, 1)
        userfaultfd.register_wp(uffd, pages, length)
        take([(0, 8)], "before any protection")
        take([], "right after protection")
        mapping.write_byte(pages + 2 * PAGE_SIZE, 2)
        mapping.write_byte(pages + 5 * PAGE_SIZE, 2)
        take([(2, 3), (5, 6)], "after writes to pages 2 and 5")
        mapping.advise(pages + 3 * PAGE_SIZE, PAGE_SIZE, mapping.MADV_DONTNEED)
        take([], "after page 3 was dropped")
        mapping.write_byte(pages + 3 * PAGE_SIZE, 3)
        take([(3, 4)], "after the dropped page 3 was written")
        mapping.move(pages, length, elsewhere)
    except BaseException:
        mapping.unmap(pages, length)
        raise


def _exercise_exceptions(uffd: int) -> None:
    """See that a scan for what is absent, not watched or written keeps silent about clean pages, and these alone."""
    odd = PageIs.PRESENT | PageIs.WPALLOWED
    most = 8 << 20 >> PAGE_SHIFT  # of these, whole page tables are not there

    def see(expected: list[tuple[int, int]], when: str) -> None:
        found = own_scan(pages, most, inverted=odd, anyof=odd | PageIs.WRITTEN, returned=PageIs.PRESENT)
        if found != expected:
            raise FailedError(f"{when}, pages {found} were reported as absent or written instead of {expected}")

    with pages_for_a_while(most) as pages:
        for page in (0, 1, 2, 1500):
            mapping.write_byte(pages + page * PAGE_SIZE, 1)
        see([(0, 3), (3, 1500), (1500, 1501), (1501, most)], "while nobody watched")
        userfaultfd.register_wp(uffd, pages, most << PAGE_SHIFT)
        populated = PageIs.WRITTEN | PageIs.PRESENT
        own_scan(pages, most, flags=PM_SCAN_WP_MATCHING, mask=populated, returned=PageIs.WRITTEN)
        see([(3, 1500), (1501, most)], "after protection")
        mapping.write_byte(pages + PAGE_SIZE, 2)
        mapping.advise(pages + 1024 * PAGE_SIZE, 1024 * PAGE_SIZE, mapping.MADV_DONTNEED)
        see([(1, 2), (3, most)], "after page 1 was written and pages 1024 to 2047 were dropped")


@cache
def watches_droppable() -> bool:
    """Whether a userfaultfd may watch droppable memory: Linux 6.12 for one looks for it in the wrong place.

    Where it may not, that such a mapping cannot be registered tells it from others; only smaps does so everywhere.
    """
    try:
        pages = mapping.map_anonymous(PAGE_SIZE, droppable=True)
    except OSError:
        return False  # there is none
    try:
        uffd = _open_userfaultfd()
        try:
            userfaultfd.api(uffd, userfaultfd.FEATURE_WP_ASYNC | userfaultfd.FEATURE_WP_UNPOPULATED)
            userfaultfd.register_wp(uffd, pages, PAGE_SIZE)
        finally:
            os.close(uffd)
    except OSError:
        return False
    finally:
        mapping.unmap(pages, PAGE_SIZE)
    return True
