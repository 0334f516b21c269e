"""The `scan` reader; see `incdump.proc.pagemap`."""

from __future__ import annotations

import errno
import os
from concurrent.futures import wait
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from incdump import kerndat
from incdump._uapi.pagemap_scan import PM_SCAN_WP_MATCHING, pagemap_scan
from incdump.model.regions import PageIs, Window
from incdump.model.runs import PAGE_SHIFT, page_count
from incdump.model.vmas import VmaKind
from incdump.proc.pagemap.pme import POPULATED, clip_to
from incdump.proc.pagemap.reader import Spare, address_space_gone, helper, join_near, wanted_spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from incdump.model.runs import Regions, Runs
    from incdump.model.vmas import VmaTable

_SCAN_REGIONS = 32768
_SCAN_PAGES = 512 << 20 >> PAGE_SHIFT
_FIRST_SCAN_PAGES = 8 << 20 >> PAGE_SHIFT  # the writers wait for the first window
_ALL_PAGES = 1 << 52
_FEW_PAGES = 64 << 20 >> PAGE_SHIFT  # are scanned before it is worth beginning to write
_WORTH_TWO_THREADS = 256 << 20 >> PAGE_SHIFT
_MOST_FILE_STRETCHES = 64
_WORTH_A_CALL = 32 << 20 >> PAGE_SHIFT


def _check_there(pagemap_fd: int, address: int) -> None:
    """Raise if an address space is gone: Linux 6.12, for one, scans it as if it were empty, but has no entry of it."""
    if not os.pread(pagemap_fd, 8, address >> PAGE_SHIFT - 3):
        raise address_space_gone()


class _Masks(NamedTuple):
    """Which pages PAGEMAP_SCAN reports, and what of them; see `pagemap_scan`."""

    mask: int
    inverted: int
    anyof: int
    returned: int

    def without_file(self) -> _Masks:
        """The same for pages that are known not to be of a file: "must not be FILE" holds, "may be FILE" never does,
        and FILE is not reported."""
        file = int(PageIs.FILE)
        not_file = self.mask & self.inverted & ~self.anyof & file
        if_file = self.anyof & ~self.inverted & ~self.mask & file
        return _Masks(
            mask=self.mask & ~not_file,
            inverted=self.inverted & ~not_file,
            anyof=self.anyof & ~if_file,
            returned=self.returned & ~file,
        )


class _Pages:
    """The pages of some spans, counted.

    :param spans: canonical, not empty.
    :ivar count: how many there are.
    """

    def __init__(self, spans: Runs) -> None:
        self._spans = spans
        self._until = np.cumsum((spans[:, 1] - spans[:, 0]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        self.count = int(self._until[-1])

    def halves(self, start: int, end: int, most: int) -> tuple[int | None, int]:
        """Where two threads would part and end that scan the next pages, at most `most`; None: not worth it."""
        first = self._below(start)
        left = self._below(end) - first
        pages = min(left, most)
        if pages < _WORTH_TWO_THREADS:
            return None, end
        return self._end_of(first + pages // 2), end if pages == left else self._end_of(first + pages)

    def _below(self, address: int) -> int:
        """How many pages lie below an address."""
        span = int(self._spans[:, 1].searchsorted(np.uint64(address), "right"))
        whole = int(self._until[span - 1]) if span else 0
        part = address - int(self._spans[span, 0]) if span < len(self._spans) else 0
        return whole + (max(part, 0) >> PAGE_SHIFT)

    def _end_of(self, count: int) -> int:
        """The end of the first `count` pages."""
        span = int(self._until.searchsorted(count))
        return int(self._spans[span, 1]) - (int(self._until[span]) - count << PAGE_SHIFT)


class ScanReader:
    """PAGEMAP_SCAN over the whole address space.

    A tracker that write-protects while it scans passes `flags` and the callbacks: then nothing that was taken from the
    kernel's memory of writes can get lost between here and the tracker's ledger.

    :param flags: ``PM_SCAN_*``.
    :param mask: categories that must all hold.
    :param inverted: categories whose absence counts, in `mask` and `anyof`.
    :param anyof: categories of which one must hold; 0 for none. Those that this kernel does not know never hold.
    :param returned: categories to report; those that this kernel does not know are left out.
    :param in_steps: begin with few pages, for which somebody waits. Otherwise a call's regions alone are limited, not
        their pages: for what most of a huge mapping may match.
    :param on_regions: called with each call's regions, a copy, before anything else is done: before the next call to
        the kernel, before they are clipped, before they are yielded. Shape (n, 3).
    :param on_failure: with PM_SCAN_WP_MATCHING only: called with ``lo, hi`` when a call failed, which may have
        write-protected any page in there without telling. The error is raised next.
    """

    name = "scan"

    def __init__(
        self,
        *,
        flags: int = 0,
        mask: int = 0,
        inverted: int = 0,
        anyof: int = POPULATED,
        returned: int | None = None,
        in_steps: bool = True,
        on_regions: Callable[[Regions], None] | None = None,
        on_failure: Callable[[int, int], None] | None = None,
    ) -> None:
        known = kerndat.scan_categories()
        never = mask & inverted & ~known
        self.flags = flags
        self.mask = mask & ~never
        self.inverted = inverted & ~never
        self.anyof = anyof & (known | inverted)
        self.returned = known if returned is None else returned & known
        self.in_steps = in_steps
        self.on_regions = on_regions
        self.on_failure = on_failure
        self._spare = Spare()

    def windows(self, pagemap_fd: int, vmas: VmaTable) -> Iterator[Window]:
        """See `PagemapReader.windows`.

        A window holds at most 65,536 regions and, read in steps, 1.5 GiB of matching pages; the first ones hold less.
        """
        wanted = join_near(wanted_spans(vmas), 0)
        if not len(wanted):
            return
        lowest = lo = int(wanted[0, 0])
        hi = int(wanted[-1, 1])
        found: list[Regions] = []
        pages_wanted = _Pages(wanted)
        count, pages, most = 0, 0, self._first_step(pages_wanted)
        with self._spare.borrow((2, _SCAN_REGIONS, 3)) as buffers:
            for start, end, masks in self._stretches(vmas, wanted, pages_wanted):
                for regions, at in self._steps(pagemap_fd, start, end, masks, pages_wanted, buffers):
                    found.append(regions)
                    count += len(regions)
                    pages += page_count(regions)
                    if count >= _SCAN_REGIONS or pages >= most:
                        _check_there(pagemap_fd, lowest)
                        yield Window(lo, at, clip_to(np.concatenate(found), wanted))
                        lo, found, count, pages, most = at, [], 0, 0, self._next_step(most)
        _check_there(pagemap_fd, lowest)
        if lo < hi:
            yield Window(lo, hi, clip_to(np.concatenate(found), wanted))

    def _first_step(self, wanted: _Pages) -> int:
        """How many pages to scan at first."""
        if not self.in_steps:
            return _ALL_PAGES
        return _FIRST_SCAN_PAGES if wanted.count > _FEW_PAGES else _FEW_PAGES

    def _next_step(self, pages: int) -> int:
        """How many pages to scan after a step of so many."""
        return min(4 * pages, _SCAN_PAGES) if self.in_steps else _ALL_PAGES

    def _steps(
        self, fd: int, start: int, end: int, masks: _Masks, pages: _Pages, buffers: NDArray[np.uint64]
    ) -> Iterator[tuple[Regions, int]]:
        """Scan a stretch in steps, long ones in two threads, half the pages each.

        :param buffers: shape (2, m, 3): for the regions of the two.
        :returns: the regions of each step, and where it ended.
        """
        most, wide = self._first_step(pages), 1
        while start < end:
            middle, stop = pages.halves(start, end, wide * most)
            if middle is None:
                regions, start = self._scan(fd, start, end, buffers[0], most, masks)
                yield regions.copy(), start
            else:
                other = helper().submit(self._scan, fd, middle, stop, buffers[1], most, masks)
                try:
                    regions, walked = self._scan(fd, start, middle, buffers[0], most, masks)
                finally:
                    if not other.cancel():  # that thread has got a processor by now
                        wait([other])
                if other.cancelled():
                    more, start = self._scan(fd, middle, stop, buffers[1], most, masks)
                else:
                    more, start = other.result()
                # Where hardly anything is populated, a step goes eight times as far as the last.
                wide = 8 * wide if 8 * (page_count(regions) + page_count(more)) < wide * most else 1
                more = more.copy()
                yield regions.copy(), walked
                if walked < middle:
                    yield from self._steps(fd, walked, middle, masks, pages, buffers)
                yield more, start
            most = self._next_step(most)

    def _stretches(self, vmas: VmaTable, wanted: Runs, pages: _Pages) -> list[tuple[int, int, _Masks]]:
        """Cut the address space, from the first to the last wanted VMA, into what is scanned in one go.

        To tell FILE the kernel has to look at every page's struct page, which takes as long as all the rest of a scan.
        So it is asked about only near mappings of files, and of the vDSO, whose pages count as such; unless those are
        strewn all over, or there are so few pages that one call more takes longer.

        :returns: start, end and masks of each stretch.
        """
        lo, hi = int(wanted[0, 0]), int(wanted[-1, 1])
        masks = _Masks(self.mask, self.inverted, self.anyof, self.returned)
        if pages.count < _WORTH_A_CALL:
            return [(lo, hi, masks)]
        files = join_near(wanted_spans(vmas.select((vmas.inode != 0) | vmas.of_kind(VmaKind.VDSO))))
        if len(files) > _MOST_FILE_STRETCHES:
            return [(lo, hi, masks)]
        stretches: list[tuple[int, int, _Masks]] = []
        for start, end in files.tolist():
            if lo < start:
                stretches.append((lo, start, masks.without_file()))
            stretches.append((start, end, masks))
            lo = end
        if lo < hi:
            stretches.append((lo, hi, masks.without_file()))
        return stretches

    def _scan(
        self, fd: int, start: int, end: int, vec: NDArray[np.uint64], most: int, masks: _Masks
    ) -> tuple[Regions, int]:
        """One call to the kernel, its result told to `on_regions`; or, whatever interrupts that, to `on_failure`.

        :param most: pages.
        :returns: the regions, a part of `vec`, and where to go on.
        """
        told = False
        try:
            count, walk_end = self._call(fd, start, end, vec, most, masks)
            regions = vec[:count]
            if self.on_regions is not None:
                self.on_regions(regions.copy())
            told = True
            return regions, walk_end
        finally:
            if not told and self.on_failure is not None and self.flags & PM_SCAN_WP_MATCHING:
                self.on_failure(start, end)

    def _call(
        self, fd: int, start: int, end: int, vec: NDArray[np.uint64], most: int, masks: _Masks
    ) -> tuple[int, int]:
        """The ioctl; tried again when it was interrupted, unless it may have write-protected something by then."""
        while True:
            try:
                limit = most if self.in_steps else 0
                return pagemap_scan(fd, start, end, vec, flags=self.flags, max_pages=limit, **masks._asdict())
            except OSError as e:
                if e.errno == errno.ESRCH:
                    raise address_space_gone() from None
                if e.errno != errno.EINTR or self.flags & PM_SCAN_WP_MATCHING:
                    raise
