"""Pagemap readers: which pages of a process are populated, and what they are.

Three ways to the same answer, behind one interface, `PagemapReader`:

``plain``
    A pread of /proc/PID/pagemap per VMA, big VMAs in pieces of 32 MiB (64 KiB of pagemap).

``cache``
    The pagemap cache: a pread per *window* of address space that spans many small VMAs. What is mapped in between is
    read along and thrown away, because that costs less than another system call::

        address space   |--A--|   |--B--| |-----C-----|                          |--D--|
        plain           [read ]   [read ] [   read    ]                          [read ]
        cache           [            one window       ]                          [read ]

    CRIU's windows are 2 MiB on a fixed plan. Here a window goes on as long as the next VMA begins within 1 MiB of the
    end of the last one, up to 32 MiB: a system call from Python costs as much as reading and dropping some 500
    entries of unmapped memory.

``scan``
    One PAGEMAP_SCAN over the whole address space (`incdump._uapi.pagemap_scan`), gone on with where it stopped when
    the buffer was full. Alone in telling zero pages without privilege, and in skipping what was never populated
    without reading an entry of it: a sparse mapping of terabytes costs the other two gigabytes of pagemap.

What `plain` and `cache` read are pagemap entries, which `incdump.proc.pme` translates to the categories of
PAGEMAP_SCAN. They tell neither WPALLOWED nor HUGE; PFNZERO, and whether a page in "swap" is but a uffd-wp marker, they
tell only to who may see page frame numbers (CAP_SYS_ADMIN). PAGEMAP_SCAN takes markers for swapped pages, always.

Every reader yields `Window` s, ascending, whose regions lie in the given VMAs only. [vsyscall] is above the end of the
address space as far as pagemap goes, and is left out.
"""

from __future__ import annotations

import errno
import math
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from incdump import kerndat
from incdump._uapi.pagemap_scan import PM_SCAN_WP_MATCHING, pagemap_scan
from incdump.errors import TargetExited
from incdump.model.regions import PageIs, Window
from incdump.model.runs import PAGE_SHIFT, Regions, Runs, page_addresses, page_count
from incdump.model.vmas import VmaKind, VmaTable
from incdump.proc.pme import POPULATED, clip_to, regions_of_pmes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from incdump.model.options import PagemapName

PIECE = 32 << 20
"""The most address space that one pread covers, bytes."""
GAP = 1 << 20
"""The most address space between two VMAs that the cache reads rather than skips, bytes."""

_BATCH = 4 * PIECE >> PAGE_SHIFT  # PMEs that go through NumPy at once: 256 KiB of pagemap stay in the L2 cache
_SCAN_REGIONS = 65536
_SCAN_PAGES = 128 << 20 >> PAGE_SHIFT
_FIRST_SCAN_PAGES = 8 << 20 >> PAGE_SHIFT  # the writers wait for the first window
_MOST_FILE_STRETCHES = 64


class PagemapReader(Protocol):
    """A way to find out which pages are populated."""

    name: str
    """``"plain"``, ``"cache"`` or ``"scan"``."""

    def windows(self, pagemap_fd: int, vmas: VmaTable) -> Iterator[Window]:
        """Read the pagemap of these VMAs.

        :param pagemap_fd: /proc/PID/pagemap, open; only pread and ioctl are used.
        :param vmas: the VMAs that are wanted; what lies between them is not reported.
        :returns: windows, ascending, that together cover every VMA.
        :raises TargetExited: the address space is gone (exit or exec).
        """
        ...


def make_reader(name: PagemapName = "auto") -> PagemapReader:
    """The reader of this name; ``"auto"``: ``scan`` if the kernel has it, else ``cache``."""
    if name == "auto":
        name = "scan" if kerndat.pagemap_scan().works else "cache"
    if name == "scan":
        return ScanReader()
    return CacheReader() if name == "cache" else PlainReader()


def _wanted(vmas: VmaTable) -> Runs:
    """Start and end of the VMAs that pagemap knows of; [vsyscall] can only be the last."""
    spans = vmas.spans()
    return spans[:-1] if len(spans) and vmas.kind[-1] == VmaKind.VSYSCALL else spans


def pieces(spans: Runs, most: int = PIECE) -> Runs:
    """Cut spans into pieces of at most `most` bytes, in order."""
    length = spans[:, 1] - spans[:, 0]
    if not len(spans) or int(length.max()) <= most:
        return spans
    count = (length + np.uint64(most - 1)) // np.uint64(most)
    index = np.repeat(np.arange(len(spans)), count.astype(np.int64))
    nth = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count.astype(np.int64)).astype(np.int64)
    start = spans[index, 0] + nth.astype(np.uint64) * np.uint64(most)
    return np.stack((start, np.minimum(start + np.uint64(most), spans[index, 1])), axis=1)


def join_near(spans: Runs, gap: int = GAP) -> Runs:
    """Join spans (ascending, disjoint) that are at most `gap` bytes apart."""
    if len(spans) < 2:
        return spans
    apart = np.flatnonzero(spans[1:, 0] - spans[:-1, 1] > gap)
    if len(apart) == len(spans) - 1:
        return spans
    joined = np.empty((len(apart) + 1, 2), np.uint64)
    joined[0, 0], joined[-1, 1] = spans[0, 0], spans[-1, 1]
    joined[1:, 0] = spans[apart + 1, 0]
    joined[:-1, 1] = spans[apart, 1]
    return joined


def _batches(segments: Runs) -> Iterator[Runs]:
    """Group consecutive segments (none longer than `PIECE`) into lots of at most `_BATCH` pages."""
    reach = np.cumsum((segments[:, 1] - segments[:, 0]) >> np.uint64(PAGE_SHIFT))
    begin, base = 0, 0
    while begin < len(segments):
        end = int(np.searchsorted(reach, base + _BATCH, "right"))
        yield segments[begin:end]
        begin, base = end, int(reach[end - 1])


def _read_pmes(fd: int, segments: Runs, buffer: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Read the PMEs of all segments into the buffer, a pread each, back to back.

    :raises TargetExited: the address space is gone.
    """
    view = buffer.data.cast("B")
    preadv = os.preadv
    position = 0
    offsets = (segments[:, 0] >> np.uint64(PAGE_SHIFT - 3)).tolist()
    lengths = ((segments[:, 1] - segments[:, 0]) >> np.uint64(PAGE_SHIFT - 3)).tolist()
    for offset, length in zip(offsets, lengths, strict=True):
        end = position + length
        while position < end:
            n = preadv(fd, (view[position:end],), offset)
            if n <= 0:
                raise _gone()
            position += n
            offset += n
    return buffer[: position >> 3]


def pmes_at(pagemap_fd: int, runs: Runs) -> NDArray[np.uint64]:
    """The PMEs of some pages, read in windows as `CacheReader` does.

    :param runs: canonical, of no more than some thousand pages; all else in between is read along.
    :returns: an entry for each page, shape (pages,).
    :raises TargetExited: the address space is gone.
    """
    windows = pieces(join_near(runs))
    sizes = ((windows[:, 1] - windows[:, 0]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    pmes = _read_pmes(pagemap_fd, windows, np.empty(int(sizes.sum()), np.uint64))
    pages = page_addresses(runs)
    if len(pages) == len(pmes):
        return pmes
    window = windows[:, 0].searchsorted(pages, "right") - 1
    first = np.cumsum(sizes) - sizes
    at: NDArray[np.int64] = first[window] + ((pages - windows[window, 0]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    return pmes.take(at)


def _gone() -> TargetExited:
    return TargetExited("the target's address space is gone: it exited, or replaced itself by exec", errno=errno.ESRCH)


class _Spare:
    """One buffer that is used again by the next caller, or made anew while another caller has it.

    Fresh memory costs more than what is read into it.
    """

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint64]] = []

    @contextmanager
    def borrow(self, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint64]]:
        """An array of this shape, contents undefined. (list.pop and append are atomic: threads may share this.)"""
        size = math.prod(shape)
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = np.empty(size, np.uint64)
        if len(buffer) < size:
            buffer = np.empty(size, np.uint64)
        try:
            yield buffer[:size].reshape(shape)
        finally:
            self._buffers = [buffer]


class _PmeReader:
    """What the two readers of pagemap entries share: read segments, batch by batch, and translate them."""

    def __init__(self) -> None:
        self._spare = _Spare()

    def _read(self, pagemap_fd: int, segments: Runs, wanted: Runs | None) -> Iterator[Window]:
        """Yield a window per batch of segments.

        :param wanted: what to clip to, canonical; None when the segments are just what is wanted.
        """
        pages = int(((segments[:, 1] - segments[:, 0]) >> np.uint64(PAGE_SHIFT)).sum()) if len(segments) else 0
        zero_pfn = kerndat.zero_page_pfn()
        with self._spare.borrow((min(pages, _BATCH),)) as buffer:
            for batch in _batches(segments):
                regions = regions_of_pmes(batch, _read_pmes(pagemap_fd, batch, buffer), zero_pfn)
                if wanted is not None:
                    regions = clip_to(regions, wanted)
                yield Window(int(batch[0, 0]), int(batch[-1, 1]), regions)


class PlainReader(_PmeReader):
    """A pread per VMA."""

    name = "plain"

    def windows(self, pagemap_fd: int, vmas: VmaTable) -> Iterator[Window]:
        """See `PagemapReader.windows`."""
        return self._read(pagemap_fd, pieces(_wanted(vmas)), None)


class CacheReader(_PmeReader):
    """A pread per window of address space that spans many VMAs."""

    name = "cache"

    def windows(self, pagemap_fd: int, vmas: VmaTable) -> Iterator[Window]:
        """See `PagemapReader.windows`."""
        wanted = join_near(_wanted(vmas), 0)
        return self._read(pagemap_fd, pieces(join_near(wanted)), wanted)


class _Masks(NamedTuple):
    """Which pages PAGEMAP_SCAN reports, and what of them; see `pagemap_scan`."""

    mask: int
    inverted: int
    anyof: int
    returned: int

    def without_file(self) -> _Masks:
        """The same for pages that are known not to be of a file: "must not be FILE" holds, and FILE is not reported."""
        file = int(PageIs.FILE)
        not_file = self.mask & self.inverted & ~self.anyof & file
        return self._replace(
            mask=self.mask & ~not_file, inverted=self.inverted & ~not_file, returned=self.returned & ~file
        )


class ScanReader:
    """PAGEMAP_SCAN over the whole address space.

    A tracker that write-protects while it scans passes `flags` and the callbacks: then nothing that was taken from the
    kernel's memory of writes can get lost between here and the tracker's ledger.

    :param flags: ``PM_SCAN_*``.
    :param mask: categories that must all hold.
    :param inverted: categories whose absence counts, in `mask` and `anyof`.
    :param anyof: categories of which one must hold; 0 for none.
    :param returned: categories to report; those that this kernel does not know are left out.
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
        on_regions: Callable[[Regions], None] | None = None,
        on_failure: Callable[[int, int], None] | None = None,
    ) -> None:
        known = kerndat.scan_categories()
        never = mask & inverted & ~known
        self.flags = flags
        self.mask = mask & ~never
        self.inverted = inverted & ~never
        self.anyof = anyof
        self.returned = known if returned is None else returned & known
        self.on_regions = on_regions
        self.on_failure = on_failure
        self._spare = _Spare()

    def windows(self, pagemap_fd: int, vmas: VmaTable) -> Iterator[Window]:
        """See `PagemapReader.windows`.

        A window holds at most 65,536 regions and 128 MiB of matching pages; the first ones hold less.
        """
        wanted = join_near(_wanted(vmas), 0)
        if not len(wanted):
            return
        lo, filled, pages, most = int(wanted[0, 0]), 0, 0, _FIRST_SCAN_PAGES
        with self._spare.borrow((_SCAN_REGIONS, 3)) as vec:
            for start, end, masks in self._stretches(vmas, wanted):
                while start < end:
                    regions, start = self._scan(pagemap_fd, start, end, vec[filled:], most - pages, masks)
                    filled += len(regions)
                    pages += page_count(regions)
                    if filled == _SCAN_REGIONS or pages >= most:
                        yield Window(lo, start, clip_to(vec[:filled].copy(), wanted))
                        lo, filled, pages, most = start, 0, 0, min(2 * most, _SCAN_PAGES)
            hi = int(wanted[-1, 1])
            if lo < hi:
                yield Window(lo, hi, clip_to(vec[:filled].copy(), wanted))

    def _stretches(self, vmas: VmaTable, wanted: Runs) -> list[tuple[int, int, _Masks]]:
        """Cut the address space, from the first to the last wanted VMA, into what is scanned in one go.

        To tell FILE the kernel has to look at every page's struct page, which takes as long as all the rest of a scan.
        So it is asked about only near mappings of files; unless those are strewn all over.

        :returns: start, end and masks of each stretch.
        """
        lo, hi = int(wanted[0, 0]), int(wanted[-1, 1])
        masks = _Masks(self.mask, self.inverted, self.anyof, self.returned)
        files = join_near(_wanted(vmas.select(vmas.inode != 0)))
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
                return pagemap_scan(fd, start, end, vec, flags=self.flags, max_pages=most, **masks._asdict())
            except OSError as e:
                if e.errno == errno.ESRCH:
                    raise _gone() from None
                if e.errno != errno.EINTR or self.flags & PM_SCAN_WP_MATCHING:
                    raise
