"""Pagemap entries (PMEs) to regions, and regions cut to what is wanted: arrays in, arrays out.

A PME is the u64 that /proc/PID/pagemap has for a page (Documentation/admin-guide/mm/pagemap.rst): bit 63 present,
62 swapped, 61 of a file, 58 guard page (Linux 6.15), 57 write-protected by userfaultfd, 56 mapped once, 55 soft-dirty;
below that the frame number, or swap type and offset, both zero to who lacks CAP_SYS_ADMIN. Here they become the
categories of PAGEMAP_SCAN, `PageIs`. WPALLOWED and HUGE cannot be told from a PME.

A PME in "swap" of type 31 is no swap but a marker. One that has only the uffd-wp bit stands for a page that was never
there, in a range that was write-protected, and is dropped where it can be recognised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from incdump.model.regions import PageIs
from incdump.model.runs import PAGE_SHIFT, Regions, Runs, empty_regions

if TYPE_CHECKING:
    from numpy.typing import NDArray

POPULATED = PageIs.PRESENT | PageIs.SWAPPED

MAPPED_ONCE = 1 << 56
"""Bit of a PME: nobody else maps the page. Not set for a page in swap."""

_MARKER = 31 | 1 << 5  # swap type 31 is "no swap, a marker"; bit 0 of its offset: write-protected by userfaultfd
_PME_UFFD_WP = 1 << 57
_PME_GUARD = 1 << 58
_PME_SWAP = 1 << 62
PME_PRESENT = 1 << 63
PME_SOFT_DIRTY = 1 << 55
PME_PLACE = PME_PRESENT | _PME_SWAP | (1 << 55) - 1
"""Where the page's contents are: the frame number, or swap type and offset."""

_PFN_MASK = (1 << 55) - 1
_LOWEST = np.zeros(1, np.uint64)
_HIGHEST = np.full(1, 2**64 - 1, np.uint64)


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
    top = (pmes >> np.uint64(48)).view(np.int64)  # take is slow with any other kind of index
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
        state = top[marker] & ((PME_PRESENT | _PME_SWAP | _PME_GUARD | _PME_UFFD_WP) >> 48)
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
    cut = np.empty(len(pmes) + 1, bool)
    np.not_equal(categories[1:], categories[:-1], out=cut[1:-1])
    cut[first_page] = True
    cut[-1] = True
    cuts = cut.nonzero()[0]
    kind = categories.take(cuts[:-1])
    populated = kind.nonzero()[0]
    if not len(populated):
        return empty_regions()
    begin = cuts.take(populated)
    base = segments[:, 0] - (first_page << PAGE_SHIFT).view(np.uint64)  # wraps around; the sum below wraps back
    base = base.take(first_page.searchsorted(begin, "right") - 1)
    regions = np.empty((len(begin), 3), np.uint64)
    np.add(base, (begin << PAGE_SHIFT).view(np.uint64), out=regions[:, 0])
    np.add(base, (cuts.take(populated + 1) << PAGE_SHIFT).view(np.uint64), out=regions[:, 1])
    regions[:, 2] = kind.take(populated)
    return regions


def clip_to(regions: Regions, spans: Runs) -> Regions:
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
    """`clip_to` for a table in which most regions are cut."""
    first = spans[:, 1].searchsorted(regions[:, 0], "right")
    count = np.maximum(spans[:, 0].searchsorted(regions[:, 1], "left") - first, 0)
    index = np.repeat(np.arange(len(regions)), count)
    nth = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    span = spans[first[index] + nth]
    out = regions[index]
    np.maximum(out[:, 0], span[:, 0], out=out[:, 0])
    np.minimum(out[:, 1], span[:, 1], out=out[:, 1])
    return out
