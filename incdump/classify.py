"""Deciding, for every populated page, whether it is written, left to the parent images, or nothing at all.

Pure and vectorised: VMA table × regions × tracker's answer × parent's pagemap → rows of an image's pagemap. The rules
are CRIU's (which pages belong to a process) and the invariants (when a page may be a hole):

- A page belongs in the images if it is present or swapped out, in private memory, and neither the zero page, nor a
  file's own page, nor a guard page. In mappings that are dumped whole (the vDSO, AIO rings) every page does.
- It is a hole only if its mapping is watched, it was not written since the parent dump, and the parent's pagemap has
  it.
- A swapped-out page in a private *file* mapping is never a hole: what looks like one can be the marker that write
  protection leaves behind when such a page is discarded (MADV_DONTNEED), and then the page is the file's again.

Only in the rounds of a pre-copy loop there is a third way: a page that is written in every round is deferred, and gets
no entry (`incdump.model.hot`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING

import numpy as np

from incdump.model.regions import PageIs, Window, split_at
from incdump.model.runs import PAGE_SHIFT, PE_LAZY, PE_PARENT, PE_PRESENT, canonical, empty_regions, empty_runs, member
from incdump.model.vmas import Prot, VmaFlag, VmaKind, VmaTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from incdump.model.runs import Entries, Runs


class Rule(IntFlag):
    """What may be done with the pages of a mapping."""

    DUMP = 1
    """Its populated pages belong in the images."""
    WHOLE = 2
    """So do pages of a file, and zero pages."""
    HOLE = 4
    """A page may be left to the parent images."""
    SWAP_HOLE = 8
    """Also one that is swapped out."""
    LAZY = 16
    """CRIU may restore it lazily."""
    UNREADABLE = 32
    """It has no PROT_READ: process_vm_readv(2) does not get at it."""


def rules(vmas: VmaTable) -> NDArray[np.uint8]:
    """The `Rule` bits of each VMA, shape (n,), uint8."""
    out = np.zeros(len(vmas), np.uint8)
    anon = vmas.kind == VmaKind.ANON
    out[anon] = Rule.DUMP | Rule.HOLE | Rule.SWAP_HOLE
    out[vmas.kind == VmaKind.FILE_PRIVATE] = Rule.DUMP | Rule.HOLE
    out[vmas.kind == VmaKind.HUGETLB] = Rule.DUMP
    out[vmas.of_kind(VmaKind.AIO_RING, VmaKind.VDSO)] = Rule.DUMP | Rule.WHOLE
    locked = (vmas.flags & np.uint64(VmaFlag.LOCKED)) != 0
    out[anon & ~locked] |= np.uint8(Rule.LAZY)
    out[(vmas.prot & Prot.READ) == 0] |= np.uint8(Rule.UNREADABLE)
    out[(vmas.flags & np.uint64(VmaFlag.DROPPABLE)) != 0] = 0
    return out


@dataclass(frozen=True, slots=True)
class Classified:
    """What a window came to.

    :ivar entries: rows of the image's pagemap, ascending: vaddr, nr_pages, PE_* flags.
    :ivar scanned: pages that belong to the process.
    :ivar holes: of these, left to the parent.
    :ivar pages: of these, to be written.
    :ivar unwatched: of these, not watched by any tracker.
    :ivar deferred: of those that belong to the process, neither written nor left to the parent: without an entry.
    :ivar written: the pages that the tracker called written, if that was asked for.
    """

    entries: Entries
    scanned: int
    holes: int
    pages: int
    unwatched: int
    deferred: int = 0
    written: Runs = field(default_factory=empty_runs)


_NOTHING = Classified(empty_regions(), 0, 0, 0, 0)


def classify(
    window: Window,
    vmas: VmaTable,
    rule: NDArray[np.uint8],
    parent: Runs | None,
    hot: Runs | None = None,
) -> Classified:
    """Classify the pages of a window.

    :param window: from a pagemap reader by way of a tracker.
    :param vmas: all mappings that the window was read for.
    :param rule: what `rules` said of them.
    :param parent: the pages that the parent's pagemap has, if the tracker's answer is about the time since the parent
        dump; None if it is not, or there is no parent: then there are no holes.
    :param hot: pages to defer if they were written once more, canonical; None: no page is deferred, and what was
        written is not told.
    """
    lo, hi, at, category = _pieces(window, vmas, parent, hot)
    of = rule[at]
    payload = _payload(category, of)
    if not payload.any():
        return _NOTHING
    lo, hi, category, of = lo[payload], hi[payload], category[payload], of[payload]
    size = (hi - lo) >> np.uint64(PAGE_SHIFT)
    hole = np.zeros(len(lo), bool)
    if parent is not None and len(parent):
        hole = _clean(category, of) & member(parent, lo)
    flags = np.where((of & Rule.LAZY) != 0, np.uint64(PE_PRESENT | PE_LAZY), np.uint64(PE_PRESENT))
    flags[hole] = PE_PARENT
    unwatched = (category & np.uint64(PageIs.WPALLOWED)) == 0
    scanned, holes, not_watched = int(size.sum()), int(size[hole].sum()), int(size[unwatched].sum())
    if hot is None:
        return Classified(_joined(lo, hi, flags), scanned, holes, scanned - holes, not_watched)
    written = _written(category, of)
    deferred = written & member(hot, lo)
    left_out = int(size[deferred].sum())
    return Classified(
        _joined(lo[~deferred], hi[~deferred], flags[~deferred]),
        scanned,
        holes,
        scanned - holes - left_out,
        not_watched,
        left_out,
        canonical(np.stack((lo[written], hi[written]), axis=1)),
    )


def _pieces(
    window: Window, vmas: VmaTable, *cutting: Runs | None
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint64]]:
    """The regions that lie in VMAs, cut wherever a VMA, or a run of some sets, begins or ends: start, end, VMA index,
    categories."""
    first = int(np.searchsorted(vmas.end, np.uint64(window.lo), "right"))
    last = int(np.searchsorted(vmas.start, np.uint64(window.hi), "left"))
    cuts = [vmas.start[first:last], vmas.end[first:last]]
    for runs in cutting:
        if runs is not None and len(runs):
            a = int(np.searchsorted(runs[:, 1], np.uint64(window.lo), "right"))
            b = int(np.searchsorted(runs[:, 0], np.uint64(window.hi), "left"))
            cuts.append(runs[a:b].ravel())
    pieces = split_at(window.regions, np.concatenate(cuts))
    at = vmas.at(pieces[:, 0])
    if (at < 0).any():
        pieces, at = pieces[at >= 0], at[at >= 0]
    return pieces[:, 0], pieces[:, 1], at, pieces[:, 2]


def _payload(category: NDArray[np.uint64], rule: NDArray[np.uint8]) -> NDArray[np.bool_]:
    populated = (category & np.uint64(PageIs.PRESENT | PageIs.SWAPPED)) != 0
    guard = (category & np.uint64(PageIs.GUARD)) != 0
    own = (category & np.uint64(PageIs.FILE | PageIs.PFNZERO)) == 0
    wanted: NDArray[np.bool_] = ((rule & Rule.DUMP) != 0) & (own | ((rule & Rule.WHOLE) != 0))
    wanted &= populated & ~guard
    return wanted


def _clean(category: NDArray[np.uint64], rule: NDArray[np.uint8]) -> NDArray[np.bool_]:
    watched_and_unwritten = (category & np.uint64(PageIs.WPALLOWED | PageIs.WRITTEN)) == PageIs.WPALLOWED
    present = (category & np.uint64(PageIs.PRESENT)) != 0
    allowed: NDArray[np.bool_] = ((rule & Rule.HOLE) != 0) & (present | ((rule & Rule.SWAP_HOLE) != 0))
    allowed &= watched_and_unwritten
    return allowed


def _written(category: NDArray[np.uint64], rule: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Of which pages a tracker says so: of these, and no others, it will tell again."""
    told: NDArray[np.bool_] = (category & np.uint64(PageIs.WPALLOWED | PageIs.WRITTEN)) == (
        PageIs.WPALLOWED | PageIs.WRITTEN
    )
    told &= (rule & Rule.HOLE) != 0
    return told


def _joined(lo: NDArray[np.uint64], hi: NDArray[np.uint64], flags: NDArray[np.uint64]) -> Entries:
    """Neighbours that touch and have the same flags become one entry."""
    if not len(lo):
        return empty_regions()
    new = np.empty(len(lo), bool)
    new[0] = True
    np.logical_or(lo[1:] != hi[:-1], flags[1:] != flags[:-1], out=new[1:])
    starts = np.flatnonzero(new)
    ends = hi[np.append(starts[1:], len(lo)) - 1]
    return np.stack((lo[starts], (ends - lo[starts]) >> np.uint64(PAGE_SHIFT), flags[starts]), axis=1)


def payload_runs(window: Window, vmas: VmaTable, rule: NDArray[np.uint8], wanted: Rule) -> Runs:
    """The pages of a window that belong in the images, are not watched, and lie in mappings with all of some rules.

    These are what the content tracker is asked about.
    """
    lo, hi, at, category = _pieces(window, vmas)
    of = rule[at]
    unwatched = (category & np.uint64(PageIs.WPALLOWED)) == 0
    chosen = _payload(category, of) & unwatched & ((of & wanted) == wanted)
    return canonical(np.stack((lo[chosen], hi[chosen]), axis=1))
