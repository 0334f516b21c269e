"""Tracking writes by asynchronous userfaultfd write protection (kernel 6.7 and later).

The kernel write-protects a page and lets the first write through on its own, clearing the mark; PAGEMAP_SCAN tells
which pages lost it, and sets it again in the same step (Documentation/admin-guide/mm/userfaultfd.rst, pagemap.rst).
The target need not be stopped.

One round on one process, in this order:

1. `register`: every private mapping joins the userfaultfd. A mapping that is new since the last round joins now, with
   no page of it marked, so all of it counts as written.
2. `windows`: get and clear, page by page, in one atomic step; what was cleared goes to the ledger at once.
3. The caller reads the pages: after they were cleared, never before (invariant 2). A write that comes in between marks
   the page as written again, for the next round.
4. Nothing more if the round succeeds; `give_back` if it does not.

What is marked, and what is not: only pages that belong in an image. Marking an empty page table entry would leave a
marker that others take for a swapped page; the zero page and a file's own pages are replaced by a fresh, unmarked page
when they are written to, so that nothing is missed by leaving them alone.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from incdump._uapi import userfaultfd as uapi
from incdump._uapi.pagemap_scan import PM_SCAN_WP_MATCHING
from incdump.errors import NoSuchTarget, TargetExited
from incdump.model.regions import PageIs, Window, mark, merge, merge_into
from incdump.model.runs import PAGE_SIZE, canonical, clip, empty_regions, empty_runs, subtract
from incdump.model.vmas import VmaFlag, VmaKind
from incdump.proc.maps import read_vmas
from incdump.proc.pagemap import ScanReader
from incdump.proc.pagemap.pme import clip_to
from incdump.proc.pagemap.reader import join_near
from incdump.tracking.ledger import Ledger, coarser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump.model.runs import Regions, Runs
    from incdump.model.vmas import VmaTable
    from incdump.proc.pagemap import PagemapReader

NAME = "uffd-wp"

_TRACKABLE = (VmaKind.ANON, VmaKind.FILE_PRIVATE)
_NOT_OURS = PageIs.FILE | PageIs.PFNZERO | PageIs.GUARD
_PROBE = 1 << 30  # any address will do: what is there, if anything, counts as written once more
_MOST_TRIES = 16
_WORTH_A_CALL = 64 << 20
"""Bytes of pages that are clean, and of no interest, that the kernel tells in the time that one more call takes."""
_MAX_GIVE_BACK = 1 << 14
"""More runs than this are given back in coarser spans: what is given back in excess is only written once more."""


class AddressSpaceGone(Exception):
    """The userfaultfd's address space is not the process's any more: it has called execve(2), or exited."""


class UffdWpRound:
    """One process's round with its userfaultfd. Its methods block; none is safe to run beside another of them,
    except `give_back`, which waits for a scan that is under way."""

    def __init__(self, pid: int, uffd: int, pagemap_fd: int, *, keeps_huge: bool = False) -> None:
        """:param keeps_huge: huge pages are never write-protected, so that no write splits them: they always count as
        written.
        """
        self._keeps_huge = keeps_huge
        self._pid = pid
        self._uffd = uffd
        self._pagemap_fd = pagemap_fd
        self._foreign: Runs = empty_runs()
        self.ledger = Ledger()

    def is_alive(self) -> bool:
        """Whether the userfaultfd's address space is still in use: after execve(2) or exit it is not."""
        try:
            uapi.writeprotect(self._uffd, _PROBE, PAGE_SIZE, False)
        except OSError as error:
            return error.errno != errno.ESRCH
        return True

    def register(self, vmas: VmaTable) -> NDArray[np.bool_]:
        """Have the kernel watch every mapping that it can.

        Neighbours are registered by one call, whatever lies unmapped between them; only where that fails, one by one.

        :param vmas: all mappings of the process.
        :returns: for each VMA whether it is watched, shape (n,), bool. One that is not belongs to somebody else's
            userfaultfd, has vanished, or is of a kind that is never watched.
        :raises AddressSpaceGone: the process has another address space by now.
        """
        eligible = vmas.of_kind(*_TRACKABLE)
        foreign = (vmas.flags & np.uint64(VmaFlag.UFFD_MISSING | VmaFlag.UFFD_MINOR)) != 0
        eligible &= ~foreign & ((vmas.flags & np.uint64(VmaFlag.DROPPABLE)) == 0)
        watched = np.zeros(len(vmas), bool)
        for first, last in _stretches(eligible):
            lo, hi = int(vmas.start[first]), int(vmas.end[last])
            if self._register(lo, hi):
                watched[first : last + 1] = True
            elif first != last:
                for i in range(first, last + 1):
                    watched[i] = self._register(int(vmas.start[i]), int(vmas.end[i]))
        foreign |= ~watched & (eligible | ((vmas.flags & np.uint64(VmaFlag.UFFD_WP)) != 0))
        self._foreign = canonical(vmas.spans(foreign))
        return watched

    def _register(self, lo: int, hi: int) -> bool:
        try:
            uapi.register_wp(self._uffd, lo, hi - lo)
        except OSError as error:
            # The kernel says ENOMEM of an address space that is gone, and of one that has too many mappings.
            if error.errno == errno.ESRCH or (error.errno == errno.ENOMEM and not self.is_alive()):
                raise AddressSpaceGone from error
            if error.errno in (errno.EBUSY, errno.EINVAL, errno.EPERM, errno.ENOMEM):
                return False
            raise
        return True

    def written_so_far(self, vmas: VmaTable) -> Runs:
        """About what the next scan will find written; nothing is cleared."""
        scan = ScanReader(inverted=_NOT_OURS, mask=PageIs.WRITTEN | _NOT_OURS, anyof=PageIs.PRESENT | PageIs.SWAPPED)
        wanted = vmas.select(vmas.of_kind(*_TRACKABLE))
        found = [window.regions[:, :2] for window in scan.windows(self._pagemap_fd, wanted)]
        return canonical(np.concatenate([empty_runs(), *found]))

    def windows(
        self,
        reader: PagemapReader,
        vmas: VmaTable,
        watched: NDArray[np.bool_],
        *,
        rearm: bool = True,
        in_parent: Runs | None = None,
    ) -> Iterator[Window]:
        """Read what is populated and what was written, and mark it as clean again.

        :param reader: the pagemap reader for what the write-protecting scan does not itself report.
        :param vmas: the mappings that are wanted, ascending.
        :param watched: of these, which `register` has put under watch.
        :param rearm: False leaves the marks as they are: for a process that nobody will dump again.
        :param in_parent: pages that are known to have been populated when the marks were set, canonical: hardly one of
            them is expected to have been written since. None: there is nothing to be expected.
        :returns: windows over all of `vmas`; pages of watched mappings, and only these, have WPALLOWED, and WRITTEN
            where they were.
        """
        if self._keeps_huge and in_parent is None:
            in_parent = empty_runs()  # by exception: whatever is not protected afterwards is told as written
        if not watched.any():
            yield from unvouched(reader.windows(self._pagemap_fd, vmas))
        elif reader.name == "scan":
            if in_parent is None:
                yield from self._by_scan(vmas, watched, rearm)
            else:
                yield from self._by_exception(vmas, watched, rearm, in_parent)
        else:
            yield from self._by_entries(reader, vmas, watched, rearm)

    def _by_scan(self, vmas: VmaTable, watched: NDArray[np.bool_], rearm: bool) -> Iterator[Window]:
        """One scan gets and clears the watched mappings. All others were read before, and are merged in.

        Which are the others is the kernel's word, not `watched`: a mapping that was registered a moment ago may be
        another one by now, or the whole address space may be (execve), and is not left out for that. But what somebody
        else's userfaultfd watches is not watched by ours.
        """
        others = self._read(ScanReader(mask=PageIs.WPALLOWED, inverted=PageIs.WPALLOWED), vmas)
        if not watched.all():
            others = merge(others, self._read(ScanReader(mask=PageIs.WPALLOWED), vmas.select(~watched)))
        return merge_into(self._taking_scan(vmas.select(watched), rearm), others)

    def _by_exception(
        self, vmas: VmaTable, watched: NDArray[np.bool_], rearm: bool, in_parent: Runs
    ) -> Iterator[Window]:
        """The same, where nearly all pages are clean: of these the kernel says nothing, which is four times as quick.

        First what was written is got and cleared. Then every page is told that is *not* present, watched, unwritten and
        of the process's own: written once more meanwhile, absent, swapped out, of a mapping that is not watched after
        all. What is left of the mappings is clean, if the address space is still there. The kernel keeps as silent
        about a mapping that has gone: silence about pages that the parent does not have is asked about once more, lest
        they pass for pages that have to be read (which populates a mapping that has taken the place).
        """
        others = empty_regions()
        if not watched.all():
            unwatched = vmas.select(~watched)
            for inverted in (PageIs.WPALLOWED, 0):
                others = merge(others, self._read(ScanReader(mask=PageIs.WPALLOWED, inverted=inverted), unwatched))
        return merge_into(self._told_by_exception(vmas.select(watched), rearm, in_parent), others)

    def _told_by_exception(self, vmas: VmaTable, rearm: bool, in_parent: Runs) -> Iterator[Window]:
        exceptions = ScanReader(
            inverted=PageIs.PRESENT | PageIs.WPALLOWED,
            anyof=PageIs.PRESENT | PageIs.WPALLOWED | PageIs.WRITTEN | _NOT_OURS,
            in_steps=False,
        )
        spans = canonical(vmas.spans())
        if not rearm:
            for window in exceptions.windows(self._pagemap_fd, vmas):
                yield self._with_clean(window, vmas, spans, in_parent)
            return
        for taken in self._taking_scan(vmas, rearm, also=PageIs.WRITTEN):
            written = canonical(taken.regions[:, :2])
            for window in exceptions.windows(self._pagemap_fd, vmas.within(taken.lo, taken.hi)):
                told = self._with_clean(window, vmas, spans, in_parent)
                yield Window(told.lo, told.hi, mark(told.regions, written, PageIs.WRITTEN))

    def _with_clean(self, window: Window, vmas: VmaTable, spans: Runs, in_parent: Runs) -> Window:
        """Add to a window of exceptions the pages that it does not speak of."""
        silent = silence(window, spans)
        doubtful = subtract(silent, in_parent)
        asked = empty_regions()
        if len(doubtful):
            scan = ScanReader(in_steps=False)
            parts = [vmas.within(lo, hi) for lo, hi in join_near(doubtful, _WORTH_A_CALL).tolist()]
            found = [there.regions for part in parts for there in scan.windows(self._pagemap_fd, part)]
            asked = clip_to(np.concatenate([asked, *found]), doubtful)
        return with_clean(window, subtract(silent, doubtful), asked)

    def _read(self, reader: PagemapReader, vmas: VmaTable) -> Regions:
        found = [window.regions for window in unvouched(reader.windows(self._pagemap_fd, vmas))]
        return np.concatenate(found) if found else empty_regions()

    def _taking_scan(self, vmas: VmaTable, rearm: bool, *, also: int = 0) -> Iterator[Window]:
        """Get and clear. A scan takes whatever lies between its mappings along, so it is cut at what is not ours.

        :param also: categories that pages must have to be told.
        """
        group = np.searchsorted(self._foreign[:, 0], vmas.start)
        for number in np.unique(group).tolist():
            yield from self._taking_scan_of(vmas.select(group == number), rearm, also)

    def _taking_scan_of(self, vmas: VmaTable, rearm: bool, also: int) -> Iterator[Window]:
        unwanted = _NOT_OURS | (PageIs.HUGE if self._keeps_huge else 0)
        scan = ScanReader(
            flags=PM_SCAN_WP_MATCHING if rearm else 0,
            inverted=unwanted,
            mask=PageIs.WPALLOWED | unwanted | also,
            anyof=PageIs.PRESENT | PageIs.SWAPPED,
            on_regions=self._record if rearm else None,
            on_failure=self.ledger.record_span if rearm else None,
        )
        windows = scan.windows(self._pagemap_fd, vmas)
        while True:
            with self.ledger.lock:
                if self.ledger.closed:
                    return
                window = next(windows, None)
            if window is None:
                return
            yield window

    def _record(self, regions: Regions) -> None:
        self.ledger.record(regions[(regions[:, 2] & np.uint64(PageIs.WRITTEN)) != 0])

    def _by_entries(
        self, reader: PagemapReader, vmas: VmaTable, watched: NDArray[np.bool_], rearm: bool
    ) -> Iterator[Window]:
        """Get and clear everything first, then look at the entries: what either calls written, is."""
        taken = self._taking_scan(vmas.select(watched), rearm, also=PageIs.WRITTEN)
        pieces = [canonical(window.regions[:, :2]) for window in taken]
        written = canonical(np.concatenate([empty_runs(), *pieces]))
        spans = canonical(vmas.spans(watched))
        for window in unvouched(reader.windows(self._pagemap_fd, vmas)):
            regions = mark(window.regions, spans, PageIs.WPALLOWED)
            yield Window(window.lo, window.hi, mark(regions, written, PageIs.WRITTEN))

    def give_back(self, runs: Runs | None = None) -> None:
        """Make pages count as written again, by taking the protection off.

        :param runs: which; None for all that this round has taken, after which it takes nothing more.
        :raises OSError: the kernel refused; the generation is then lost. A mapping that is gone is no failure: one
            that takes its place is not watched, and so counts as written.
        """
        if runs is None:
            runs = self.ledger.close()
        left = self._unprotect_all(subtract(coarser(runs, _MAX_GIVE_BACK), self._foreign))
        # Part of what is left is mapped no more, or is not watched any more: the rest is given back mapping by mapping,
        # until only whole mappings are left, which are not watched. New ones may come meanwhile.
        for _ in range(_MOST_TRIES if len(left) else 0):
            before, left = left, self._unprotect_all(_overlaps(left, self._mappings()))
            if np.array_equal(left, before):
                return
        if len(left):
            raise OSError(errno.EAGAIN, "its mappings change too fast to have pages count as written again")

    def _unprotect_all(self, runs: Runs) -> Runs:
        """Have runs count as written; returns those of which not all is watched."""
        return np.array([run for run in runs.tolist() if not self._unprotect(*run)], np.uint64).reshape(-1, 2)

    def _unprotect(self, lo: int, hi: int) -> bool:
        """Have a range count as written; False if not all of it is watched, and perhaps none of it was changed."""
        try:
            uapi.writeprotect(self._uffd, lo, hi - lo, False)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            if error.errno != errno.ESRCH:
                raise
        return True

    def _mappings(self) -> Runs:
        """Start and end of each mapping by now, neighbours apart; none if the process is gone."""
        try:
            return read_vmas(self._pid, flags=False).spans()
        except (TargetExited, NoSuchTarget):
            return empty_runs()


def silence(window: Window, spans: Runs) -> Runs:
    """The part of some spans that a window of exceptions does not speak of.

    :param spans: the mappings that were scanned, canonical.
    """
    return subtract(clip(spans, window.lo, window.hi), canonical(window.regions[:, :2]))


def with_clean(window: Window, clean: Runs, asked: Regions) -> Window:
    """A window of exceptions with what it does not speak of: an ordinary window, of populated pages only.

    :param clean: pages that are present, watched and not written.
    :param asked: pages about which the kernel was asked once more.
    """
    there = np.full(len(clean), PageIs.PRESENT | PageIs.WPALLOWED, np.uint64)
    populated = window.regions[window.regions[:, 2] & np.uint64(PageIs.PRESENT | PageIs.SWAPPED) != 0]
    return Window(window.lo, window.hi, merge(merge(populated, np.column_stack((clean, there))), asked))


def unvouched(windows: Iterator[Window]) -> Iterator[Window]:
    """Windows of pages that our userfaultfd does not watch: if another does, what it saw is about another time."""
    for window in windows:
        regions = window.regions.copy()
        regions[:, 2] &= ~np.uint64(PageIs.WPALLOWED)
        yield Window(window.lo, window.hi, regions)


def _stretches(eligible: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """First and last index of each stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], eligible, [False]))))
    for first, end in edges.reshape(-1, 2).tolist():
        yield first, end - 1


def _overlaps(runs: Runs, spans: Runs) -> Runs:
    """The pieces of runs that lie in each of some spans; both ascending and disjoint, spans that touch stay apart."""
    first = spans[:, 1].searchsorted(runs[:, 0], "right")
    count = np.maximum(spans[:, 0].searchsorted(runs[:, 1], "left") - first, 0)
    run = np.repeat(np.arange(len(runs)), count)
    span = spans[np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(run))]
    return np.stack((np.maximum(runs[run, 0], span[:, 0]), np.minimum(runs[run, 1], span[:, 1])), axis=1)
