"""The categories of a page, as PAGEMAP_SCAN names them.

They are the common word for what any pagemap reader saw: the readers that go through pagemap entries translate those
into the same bits. Numbers are the kernel's UAPI (include/uapi/linux/fs.h, PAGE_IS_*).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING

import numpy as np

from incdump.model.runs import ascending, canonical, empty_regions, member

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump.model.runs import Regions, Runs


class PageIs(IntFlag):
    """What a page of a region is.

    ``WPALLOWED`` means that the page's mapping is watched by the tracker, and only then ``WRITTEN`` says something:
    written since the tracker last looked. Without ``WPALLOWED``, nobody knows.
    """

    WPALLOWED = 1
    WRITTEN = 2
    FILE = 4
    PRESENT = 8
    SWAPPED = 16
    PFNZERO = 32
    HUGE = 64
    SOFT_DIRTY = 128
    GUARD = 256


@dataclass(frozen=True, slots=True)
class Window:
    """A span of address space that was read in one go.

    :ivar lo: first address, bytes, page aligned.
    :ivar hi: end; nothing in ``[lo, hi)`` beyond the regions is populated.
    :ivar regions: the populated pages in it, shape (n, 3): start, end, `PageIs` bits.
    """

    lo: int
    hi: int
    regions: Regions


def split_at(regions: Regions, cuts: NDArray[np.uint64]) -> Regions:
    """Cut regions at addresses, so that no region reaches across one.

    :param cuts: addresses in any order, repetitions allowed, shape (m,).
    :returns: the same pages with the same categories, in more rows where need be.
    """
    if not len(regions) or not len(cuts):
        return regions
    at = np.searchsorted(regions[:, 0], cuts, "right").astype(np.int64) - 1
    inner = (at >= 0) & (cuts > regions[at, 0]) & (cuts < regions[at, 1])
    cuts = ascending(cuts[inner])
    if not len(cuts):
        return regions
    starts = np.concatenate((regions[:, 0], cuts))
    starts.sort()
    of = np.searchsorted(regions[:, 0], starts, "right") - 1
    ends = regions[of, 1]
    same = of[1:] == of[:-1]
    ends[:-1][same] = starts[1:][same]
    return np.stack((starts, ends, regions[of, 2]), axis=1)


def mark(regions: Regions, runs: Runs, bits: int, *, clear: int = 0) -> Regions:
    """Change the categories of the pages of a run set, cutting regions where it begins and ends.

    :param bits: `PageIs` bits to set; pages outside `runs` keep theirs.
    :param clear: `PageIs` bits to clear.
    """
    if not len(regions) or not len(runs):
        return regions
    cut = split_at(regions, runs.ravel())
    inside = member(runs, cut[:, 0])
    changed = (cut[:, 2] & ~np.uint64(clear)) | np.uint64(bits)
    return np.stack((cut[:, 0], cut[:, 1], np.where(inside, changed, cut[:, 2])), axis=1)


def where(regions: Regions, *, having: int = 0, lacking: int = 0) -> Runs:
    """The pages that have all bits of `having` and none of `lacking`, as a run set."""
    chosen = (regions[:, 2] & np.uint64(having | lacking)) == np.uint64(having)
    return canonical(regions[chosen, :2])


def merge(a: Regions, b: Regions) -> Regions:
    """One region table of two that share no page."""
    if not len(a):
        return b
    if not len(b):
        return a
    both = np.concatenate((a, b))
    return both[np.argsort(both[:, 0], kind="stable")]


def clip_regions(regions: Regions, lo: int, hi: int) -> Regions:
    """The part of a region table within ``[lo, hi)``."""
    if lo >= hi:
        return empty_regions()
    first = int(np.searchsorted(regions[:, 1], np.uint64(lo), "right"))
    last = int(np.searchsorted(regions[:, 0], np.uint64(hi), "left"))
    part = regions[first:last].copy()
    if len(part):
        part[0, 0] = max(int(part[0, 0]), lo)
        part[-1, 1] = min(int(part[-1, 1]), hi)
    return part


def merge_into(windows: Iterator[Window], extra: Regions) -> Iterator[Window]:
    """Add regions that are known already to windows as they come, in ascending order throughout.

    :param extra: sorted, none of its pages in any window.
    :returns: windows without gaps between them from address 0 on; a last one holds what lies behind all others.
    """
    done = 0
    for window in windows:
        yield Window(done, window.hi, merge(window.regions, clip_regions(extra, done, window.hi)))
        done = window.hi
    end = max(done, int(extra[-1, 1])) if len(extra) else done
    if end > done:
        yield Window(done, end, clip_regions(extra, done, end))
