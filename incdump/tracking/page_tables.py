"""Whether page tables are still where they were: what soft-dirty bits keep silent about.

mremap(2) moves a page table as a whole when both addresses allow it (move_page_tables() in mm/mremap.c), 2 MiB of
address space at once, and many kernels leave the soft-dirty bits in it as they are. What lies at the new address then
is other memory than before, and looks unwritten.

Two tables do not hold the same page frame. So the frames of a few pages of each table are noted before the bits are
cleared (of pages in swap, their slots). A noted page that is not soft-dirty and has its frame still shows that the
table has not moved. Where there is none such, or one that is not soft-dirty and has another frame, nothing is known,
and all pages of that table count as written: it has moved, or all noted pages were written, or the kernel has given one
of them another frame (compaction, swap).

What would deceive this: every noted page of the old table that is not soft-dirty has lost its frame, and the page at
the same place of the new one was given that very frame, by compaction or from swap, between two dumps. Pages that KSM
merges do share frames: mergeable mappings are not watched (`soft_dirty.watchable`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from incdump.model.regions import PageIs, Window, where
from incdump.model.runs import PAGE_SHIFT, PAGE_SIZE, canonical, empty_runs, member, page_addresses, runs_of_pages
from incdump.proc.pagemap import pmes_at
from incdump.proc.pagemap.pme import PME_PLACE, PME_SOFT_DIRTY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from numpy.typing import NDArray

    from incdump.model.runs import Runs

    Notes: TypeAlias = NDArray[np.uint64]
    """What `read_notes` returns."""

TABLE_SHIFT = 21
"""A page table of x86_64 spans 2 MiB."""
SAMPLE = 8
"""Pages whose frames are noted, at either end of what a table has."""
_READ_AT_ONCE = 2048  # pages
_SHARED = PageIs.FILE | PageIs.PFNZERO  # such a frame can be in many places


def read_notes(pagemap_fd: int, runs: Runs) -> Notes:
    """Where the contents of some pages are. Frame numbers are shown to who has CAP_SYS_ADMIN.

    :returns: addresses, ascending, and `PME_PLACE` of each one's pagemap entry, shape (n, 2), uint64.
    """
    pages, pmes = _pmes(pagemap_fd, runs)
    return np.stack((pages, pmes & np.uint64(PME_PLACE)), axis=1)


def in_place(pagemap_fd: int, notes: Notes) -> Runs:
    """The address ranges of all page tables that are where they were when notes were taken."""
    pages, pmes = _pmes(pagemap_fd, runs_of_pages(notes[:, 0]))
    clean = (pmes & np.uint64(PME_SOFT_DIRTY)) == 0
    same = (pmes & np.uint64(PME_PLACE)) == notes[:, 1]
    gone = (pmes & np.uint64(PME_PLACE)) == 0
    tables = pages >> np.uint64(TABLE_SHIFT)
    starts = np.setdiff1d(tables[clean & same], tables[clean & ~same & ~gone]) << np.uint64(TABLE_SHIFT)
    return canonical(np.stack((starts, starts + np.uint64(1 << TABLE_SHIFT)), axis=1))


class PageTableWatch:
    """The page tables of one process in one dump.

    :param before: the notes of the parent's dump; None: page tables are taken to be in place.
    """

    def __init__(self, pagemap_fd: int, before: Notes | None) -> None:
        self._pagemap_fd = pagemap_fd
        self._in_place = None if before is None else in_place(pagemap_fd, before)
        self._samples: list[Runs] = []

    def told(self, windows: Iterator[Window]) -> Iterator[Window]:
        """Windows as they come, watched pages of tables that may have moved turned into written ones."""
        for window in windows:
            self._samples.append(samples(where(window.regions, having=PageIs.WPALLOWED, lacking=_SHARED)))
            yield window if self._in_place is None else _doubted(window, self._in_place)

    def notes(self) -> Notes:
        """What is to be known at the next dump, of all windows that came. To be called before the bits are cleared."""
        return read_notes(self._pagemap_fd, canonical(np.concatenate((empty_runs(), *self._samples))))


def _doubted(window: Window, in_place: Runs) -> Window:
    """A window in which every watched page counts as written whose page table is not known to be in place."""
    regions = split_by_table(window.regions)
    doubted = ~member(in_place, regions[:, 0]) & ((regions[:, 2] & np.uint64(PageIs.WPALLOWED)) != 0)
    regions[doubted, 2] |= np.uint64(PageIs.WRITTEN)
    return Window(window.lo, window.hi, regions)


def split_by_table(spans: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Cut rows that begin with start and end address, so that none reaches from one page table to the next."""
    first = spans[:, 0] >> np.uint64(TABLE_SHIFT)
    count = (((spans[:, 1] - np.uint64(1)) >> np.uint64(TABLE_SHIFT)) - first + np.uint64(1)).astype(np.int64)
    cut = spans.repeat(count, axis=0)
    if len(cut) == len(spans):
        return cut
    nth = np.arange(len(cut)) - (count.cumsum() - count).repeat(count)
    table = first.repeat(count) + nth.astype(np.uint64)
    np.maximum(cut[:, 0], table << np.uint64(TABLE_SHIFT), out=cut[:, 0])
    np.minimum(cut[:, 1], (table + np.uint64(1)) << np.uint64(TABLE_SHIFT), out=cut[:, 1])
    return cut


def samples(runs: Runs) -> Runs:
    """The first and the last few pages of each page table among those given."""
    if not len(runs):
        return empty_runs()
    cut = split_by_table(runs)
    table = cut[:, 0] >> np.uint64(TABLE_SHIFT)
    change = np.flatnonzero(table[1:] != table[:-1])
    first, last = cut[np.append(0, change + 1)], cut[np.append(change, len(cut) - 1)]
    most = np.uint64(SAMPLE * PAGE_SIZE)
    first[:, 1] = np.minimum(first[:, 1], first[:, 0] + most)
    last[:, 0] = np.maximum(last[:, 0], last[:, 1] - most)
    return canonical(np.concatenate((first, last)))


def _pmes(pagemap_fd: int, runs: Runs) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The addresses and pagemap entries of some pages, in order."""
    pages, pmes = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    reach = np.cumsum((runs[:, 1] - runs[:, 0]) >> np.uint64(PAGE_SHIFT))
    begin = 0
    while begin < len(runs):
        done = int(reach[begin - 1]) if begin else 0
        end = max(begin + 1, int(reach.searchsorted(done + _READ_AT_ONCE, "right")))
        pages.append(page_addresses(runs[begin:end]))
        pmes.append(pmes_at(pagemap_fd, runs[begin:end]))
        begin = end
    return np.concatenate(pages), np.concatenate(pmes)
