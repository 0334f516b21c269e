"""The readers of pagemap entries, `plain` and `cache`; see `incdump.proc.pagemap`."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import wait
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from incdump import kerndat
from incdump.model.regions import Window
from incdump.model.runs import PAGE_SHIFT, canonical, empty_regions, intersect, page_addresses
from incdump.proc.pagemap.pme import clip_to, regions_of_pmes
from incdump.proc.pagemap.reader import Spare, address_space_gone, helper, join_near, wanted_spans
from incdump.proc.pagemap.scan import ScanReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from incdump.model.runs import Runs
    from incdump.model.vmas import VmaTable

PIECE = 32 << 20
"""The most address space that one pread covers, bytes."""

_BATCH = 4 * PIECE >> PAGE_SHIFT  # PMEs that go through NumPy at once: 256 KiB of pagemap stay in the L2 cache
_WORTH_TWO_THREADS = 64 << 10  # bytes of pagemap: what the kernel needs a quarter of a millisecond for
_PARTS = 8  # in which two threads share the work
_VAST = 64 << 30  # bytes of address space: 128 MiB of pagemap
_TABLE = np.uint64((2 << 20) - 1)  # of what one page table maps, the bits below
_LONG = 8 << 10  # bytes of pagemap in one pread, on average: shorter ones have the threads fight for the GIL


def pieces(spans: Runs, most: int = PIECE) -> Runs:
    """Cut spans into pieces of at most `most` bytes, in order."""
    length = (spans[:, 1] - spans[:, 0]).view(np.int64)
    if not len(spans) or int(length.max()) <= most:
        return spans
    count = -(-length // most)
    cut = spans.repeat(count, axis=0)
    nth = np.arange(len(cut)) - (count.cumsum() - count).repeat(count)
    cut[:, 0] += (nth * most).view(np.uint64)
    np.minimum(cut[:, 0] + np.uint64(most), cut[:, 1], out=cut[:, 1])
    return cut


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

    Long segments are read by two threads, from both ends, until they meet: the kernel works all that time, and holds
    nothing that the other thread would wait for. So nobody waits for a thread that gets no processor.

    :raises TargetExited: the address space is gone.
    """
    view = buffer.data.cast("B")
    pages = int(((segments[:, 1] - segments[:, 0]) >> np.uint64(PAGE_SHIFT)).sum())
    two_threads = 8 * pages >= max(_WORTH_TWO_THREADS, len(segments) * _LONG)
    if two_threads:
        segments = pieces(segments, -(-pages // _PARTS) << PAGE_SHIFT)
    offsets = segments[:, 0] >> np.uint64(PAGE_SHIFT - 3)
    lengths = (segments[:, 1] - segments[:, 0]) >> np.uint64(PAGE_SHIFT - 3)
    positions = np.cumsum(lengths) - lengths
    work = deque(zip(positions.tolist(), offsets.tolist(), lengths.tolist(), strict=True))
    other = helper().submit(_read_each, fd, view, work.pop) if two_threads else None
    try:
        _read_each(fd, view, work.popleft)
    finally:
        work.clear()
        if other is not None and not other.cancel():
            wait([other])  # it writes to the buffer
    if other is not None and not other.cancelled():
        other.result()
    return buffer[:pages]


def _read_each(fd: int, view: memoryview, take: Callable[[], tuple[int, int, int]]) -> None:
    """Read pieces until there are no more.

    :param take: gives the next: where it goes, where it is, how many bytes; IndexError: none is left.
    """
    preadv = os.preadv
    with suppress(IndexError):
        while True:
            position, offset, length = take()
            end = position + length
            while position < end:
                n = preadv(fd, (view[position:end],), offset)
                if n <= 0:
                    raise address_space_gone()
                position += n
                offset += n


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


def _populated(pagemap_fd: int, vmas: VmaTable, spans: Runs) -> Runs | None:
    """Where there may be entries, in whole page tables, of mappings so large that not all can be read.

    8 TiB that are reserved, as databases and sanitizers do, have 16 GiB of pagemap. PAGEMAP_SCAN passes over what was
    never populated at no price.

    :returns: None: all is to be read, because it is not that much, or because the kernel has no PAGEMAP_SCAN.
    :raises TargetExited: the address space is gone.
    """
    if int((spans[:, 1] - spans[:, 0]).sum()) < _VAST or not kerndat.pagemap_scan().works:
        return None
    found = [window.regions[:, :2] for window in ScanReader().windows(pagemap_fd, vmas)]
    regions = np.concatenate(found) if found else spans[:0]
    tables = np.stack((regions[:, 0] & ~_TABLE, (regions[:, 1] + _TABLE) & ~_TABLE), axis=1)
    return intersect(canonical(tables), canonical(spans))


def _covering(spans: Runs, windows: Iterator[Window]) -> Iterator[Window]:
    """The same windows, stretched so that they cover all of the spans."""
    if not len(spans):
        return
    lo, end = int(spans[0, 0]), int(spans[-1, 1])
    for window in windows:
        yield Window(lo, window.hi, window.regions)
        lo = window.hi
    if lo < end:
        yield Window(lo, end, empty_regions())


class _PmeReader:
    """What the two readers of pagemap entries share: read segments, batch by batch, and translate them."""

    def __init__(self) -> None:
        self._spare = Spare()

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
        spans = wanted_spans(vmas)
        reached = _populated(pagemap_fd, vmas, spans)
        if reached is None:
            return self._read(pagemap_fd, pieces(spans), None)
        return _covering(spans, self._read(pagemap_fd, pieces(reached), None))


class CacheReader(_PmeReader):
    """A pread per window of address space that spans many VMAs."""

    name = "cache"

    def windows(self, pagemap_fd: int, vmas: VmaTable) -> Iterator[Window]:
        """See `PagemapReader.windows`."""
        spans = wanted_spans(vmas)
        wanted = join_near(spans, 0)
        reached = _populated(pagemap_fd, vmas, spans)
        if reached is None:
            return self._read(pagemap_fd, pieces(join_near(wanted)), wanted)
        return _covering(spans, self._read(pagemap_fd, pieces(reached), wanted))
