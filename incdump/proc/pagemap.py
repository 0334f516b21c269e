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

Pagemap entries (PMEs: u64, Documentation/admin-guide/mm/pagemap.rst) are translated to the categories of PAGEMAP_SCAN,
`PageIs`. They do not tell WPALLOWED and HUGE; PFNZERO they tell only to who may see page frame numbers (CAP_SYS_ADMIN).
A PME in "swap" that is a mere uffd-wp marker (of a page that was never there) can be told from a swapped page with
that privilege only; PAGEMAP_SCAN never tells: both count as SWAPPED then.

Every reader yields `Window` s, ascending, whose regions lie in the given VMAs only. [vsyscall] is above the end of the
address space as far as pagemap goes, and is left out.
"""

from __future__ import annotations

import errno
import math
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from incdump import kerndat
from incdump._uapi.pagemap_scan import PM_SCAN_WP_MATCHING, pagemap_scan
from incdump.errors import TargetExited
from incdump.model.regions import PageIs, Window
from incdump.model.runs import PAGE_SHIFT, Regions, Runs, empty_regions, page_count
from incdump.model.vmas import VmaKind, VmaTable

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
_SCAN_PAGES = 1 << 30 >> PAGE_SHIFT
_MOST_FILE_STRETCHES = 64

_LOWEST = np.zeros(1, np.uint64)
_HIGHEST = np.full(1, 2**64 - 1, np.uint64)

POPULATED = PageIs.PRESENT | PageIs.SWAPPED

_PFN_MASK = (1 << 55) - 1
_MARKER = 31 | 1 << 5  # swap type 31 is "no swap, a marker"; bit 0 of its offset: write-protected by userfaultfd
_PME_UFFD_WP = 1 << 57
_PME_GUARD = 1 << 58
_PME_SWAP = 1 << 62
_PME_PRESENT = 1 << 63


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


# --- pagemap entries ---


def _categories_of_top_bits() -> NDArray[np.uint16]:
    """For every value of a PME's top 16 bits (48 to 63): its categories, 0 when it is neither present nor swapped."""
    top = np.arange(1 << 16, dtype=np.uint32)

    def bit(number: int) -> NDArray[np.uint32]:
        return top >> np.uint32(number - 48) & np.uint32(1)

    categories = (
        bit(63) * np.uint32(PageIs.PRESENT)
        | bit(62) * np.uint32(PageIs.SWAPPED)
        | bit(61) * np.uint32(PageIs.FILE)
        | bit(58) * np.uint32(PageIs.GUARD)
        | (1 - bit(57)) * np.uint32(PageIs.WRITTEN)
        | bit(55) * np.uint32(PageIs.SOFT_DIRTY)
    )
    return np.where(categories & np.uint32(POPULATED), categories, 0).astype(np.uint16)


_CATEGORIES = _categories_of_top_bits()


def categories_of_pmes(pmes: NDArray[np.uint64], zero_pfn: int | None = None) -> NDArray[np.uint16]:
    """Translate pagemap entries to `PageIs` bits.

    :param pmes: shape (n,), uint64, contiguous.
    :param zero_pfn: the frame number of the shared zero page, if frame numbers are visible.
    :returns: shape (n,), uint16; 0 for pages that are neither present nor swapped, markers included.
    """
    top = pmes.view(np.uint16)[3::4]  # both architectures are little-endian
    categories: NDArray[np.uint16] = _CATEGORIES.take(top)
    if zero_pfn is None:
        return categories
    low = pmes & np.uint64(_PFN_MASK)
    zero = (low == zero_pfn).nonzero()[0]
    if len(zero):
        zero = zero[categories[zero] & np.uint16(PageIs.PRESENT) != 0]
        categories[zero] |= np.uint16(PageIs.PFNZERO)
    marker = (low == _MARKER).nonzero()[0]
    if len(marker):
        state = top[marker] & np.uint16((_PME_PRESENT | _PME_SWAP | _PME_GUARD | _PME_UFFD_WP) >> 48)
        categories[marker[state == (_PME_SWAP | _PME_UFFD_WP) >> 48]] = 0
    return categories


def regions_of_pmes(segments: Runs, pmes: NDArray[np.uint64], zero_pfn: int | None = None) -> Regions:
    """Make regions of pagemap entries.

    :param segments: shape (m, 2), uint64: start and end of address ranges, ascending and disjoint.
    :param pmes: the entries of all pages of all segments, back to back, shape (pages,).
    :param zero_pfn: as for `categories_of_pmes`.
    :returns: populated pages only, cut where categories differ and between segments.
    """
    categories = categories_of_pmes(pmes, zero_pfn)
    first_page = np.zeros(len(segments), np.int64)  # the index of each segment's first page
    np.cumsum(((segments[:, 1] - segments[:, 0]) >> np.uint64(PAGE_SHIFT))[:-1].view(np.int64), out=first_page[1:])
    cut = np.empty(len(pmes), bool)
    np.not_equal(categories[1:], categories[:-1], out=cut[1:])
    cut[first_page] = True
    begin = cut.nonzero()[0]
    kind = categories[begin]
    populated = kind.nonzero()[0]
    if not len(populated):
        return empty_regions()
    length = np.diff(begin, append=len(pmes))[populated]
    begin, kind = begin[populated], kind[populated]
    segment = first_page.searchsorted(begin, "right") - 1
    base = segments[:, 0] - (first_page << PAGE_SHIFT).view(np.uint64)  # wraps around; the sum below wraps back
    regions = np.empty((len(begin), 3), np.uint64)
    np.add(base[segment], (begin << PAGE_SHIFT).view(np.uint64), out=regions[:, 0])
    np.add(regions[:, 0], (length << PAGE_SHIFT).view(np.uint64), out=regions[:, 1])
    regions[:, 2] = kind
    return regions


# --- clipping ---


def clip_regions(regions: Regions, spans: Runs) -> Regions:
    """The parts of regions that lie in the spans.

    :param spans: canonical, shape (m, 2).
    :returns: `regions` itself if nothing is cut off.
    """
    if not len(regions):
        return regions
    first, last = _sticking_out(regions, spans)
    if first == last:
        return regions
    return np.concatenate((regions[:first], _clip_each(regions[first:last], spans), regions[last:]))


def _sticking_out(regions: Regions, spans: Runs) -> tuple[int, int]:
    """The range of regions in which all are that reach out of the spans: found by looking at the gaps between spans."""
    gap_start = np.concatenate((_LOWEST, spans[:, 1]))
    gap_end = np.concatenate((spans[:, 0], _HIGHEST))
    first = int(gap_end.searchsorted(regions[0, 0], "right"))
    last = int(gap_start.searchsorted(regions[-1, 1], "left"))
    gap_start, gap_end = gap_start[first:last], gap_end[first:last]
    after = regions[:, 1].searchsorted(gap_start, "right")  # the first region that ends beyond the gap's start
    hit = (regions[np.minimum(after, len(regions) - 1), 0] < gap_end).nonzero()[0]
    if not len(hit):
        return 0, 0
    return int(after[hit[0]]), int(regions[:, 0].searchsorted(gap_end[hit[-1]], "left"))


def _clip_each(regions: Regions, spans: Runs) -> Regions:
    """`clip_regions` for a table in which most regions are cut."""
    first = spans[:, 1].searchsorted(regions[:, 0], "right")
    count = np.maximum(spans[:, 0].searchsorted(regions[:, 1], "left") - first, 0)
    index = np.repeat(np.arange(len(regions)), count)
    nth = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    span = spans[first[index] + nth]
    out = regions[index]
    np.maximum(out[:, 0], span[:, 0], out=out[:, 0])
    np.minimum(out[:, 1], span[:, 1], out=out[:, 1])
    return out


# --- readers ---


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
                    regions = clip_regions(regions, wanted)
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
        self.flags = flags
        self.mask = mask
        self.inverted = inverted
        self.anyof = anyof
        known = kerndat.scan_categories()
        self.returned = known if returned is None else returned & known
        self.on_regions = on_regions
        self.on_failure = on_failure
        self._spare = _Spare()

    def windows(self, pagemap_fd: int, vmas: VmaTable) -> Iterator[Window]:
        """See `PagemapReader.windows`. A window holds at most 65,536 regions and 1 GiB of matching pages."""
        wanted = join_near(_wanted(vmas), 0)
        if not len(wanted):
            return
        lo, filled, pages = int(wanted[0, 0]), 0, 0
        with self._spare.borrow((_SCAN_REGIONS, 3)) as vec:
            for start, end, returned in self._stretches(vmas, wanted):
                while start < end:
                    regions, start = self._scan(pagemap_fd, start, end, vec[filled:], _SCAN_PAGES - pages, returned)
                    filled += len(regions)
                    pages += page_count(regions)
                    if filled == _SCAN_REGIONS or pages >= _SCAN_PAGES:
                        yield Window(lo, start, clip_regions(vec[:filled].copy(), wanted))
                        lo, filled, pages = start, 0, 0
            hi = int(wanted[-1, 1])
            if lo < hi:
                yield Window(lo, hi, clip_regions(vec[:filled].copy(), wanted))

    def _stretches(self, vmas: VmaTable, wanted: Runs) -> list[tuple[int, int, int]]:
        """Cut the address space, from the first to the last wanted VMA, into what is scanned in one go.

        To tell FILE the kernel has to look at every page's struct page, which takes as long as all the rest of a scan.
        So it is asked for only where files are mapped privately; unless those are strewn all over.

        :returns: start, end and categories to return of each stretch.
        """
        lo, hi = int(wanted[0, 0]), int(wanted[-1, 1])
        files = join_near(vmas.spans(vmas.kind == VmaKind.FILE_PRIVATE))
        if len(files) > _MOST_FILE_STRETCHES or not self.returned & PageIs.FILE:
            return [(lo, hi, self.returned)]
        stretches: list[tuple[int, int, int]] = []
        for start, end in files.tolist():
            if lo < start:
                stretches.append((lo, start, self.returned & ~PageIs.FILE))
            stretches.append((start, end, self.returned))
            lo = end
        if lo < hi:
            stretches.append((lo, hi, self.returned & ~PageIs.FILE))
        return stretches

    def _scan(
        self, fd: int, start: int, end: int, vec: NDArray[np.uint64], most: int, returned: int
    ) -> tuple[Regions, int]:
        """One call to the kernel, its result told to `on_regions`; or, whatever interrupts that, to `on_failure`.

        :param most: pages.
        :returns: the regions, a part of `vec`, and where to go on.
        """
        told = False
        try:
            count, walk_end = self._call(fd, start, end, vec, most, returned)
            regions = vec[:count]
            if self.on_regions is not None:
                self.on_regions(regions.copy())
            told = True
            return regions, walk_end
        finally:
            if not told and self.on_failure is not None and self.flags & PM_SCAN_WP_MATCHING:
                self.on_failure(start, end)

    def _call(
        self, fd: int, start: int, end: int, vec: NDArray[np.uint64], most: int, returned: int
    ) -> tuple[int, int]:
        """The ioctl; tried again when it was interrupted, unless it may have write-protected something by then."""
        masks = {"mask": self.mask, "inverted": self.inverted, "anyof": self.anyof, "returned": returned}
        while True:
            try:
                return pagemap_scan(fd, start, end, vec, flags=self.flags, max_pages=most, **masks)
            except OSError as e:
                if e.errno == errno.ESRCH:
                    raise _gone() from None
                if e.errno != errno.EINTR or self.flags & PM_SCAN_WP_MATCHING:
                    raise
