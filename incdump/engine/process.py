"""One process of a dump: its mappings, what becomes of their pages, its image.

What was written is the business of its `incdump.engine.watch.Watch`; this is the `PageOwner` of
`incdump.engine.pipeline`. The engine calls, in this order: `prepare`; `freeze`, if the tree is frozen, and `begin`, if
the watch may not wait for the scan; then the pipeline `windows`, `classify`, `chunks` and `write`; then `finish`; and
at last, when the images dir is complete, `commit`, or whatever happened `give_back`.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from incdump.classify import Classified, Rule, classify, payload_runs, rules
from incdump.engine.pages_image import PagesImage
from incdump.engine.watch import ParentImages, Watch
from incdump.errors import NoSuchTarget, TargetExited
from incdump.model.regions import PageIs, Window, mark, merge_into
from incdump.model.runs import PAGE_SIZE, canonical, empty_runs, page_count, union
from incdump.model.vmas import Prot, VmaFlag, VmaKind
from incdump.proc.lazy_memory import check_supplied
from incdump.proc.maps import read_vmas, reread_vmas
from incdump.proc.memory import ProcessMemory
from incdump.proc.mm_info import anonymous_pages
from incdump.tracking import content
from incdump.xfer.wire import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from incdump.engine.metadata import Ahead
    from incdump.engine.page_server_session import ServerSession
    from incdump.engine.pages_image import PageTable
    from incdump.holder.client import Keeper
    from incdump.images.images_dir import Kind
    from incdump.images.new_dir import NewImagesDir
    from incdump.model.hot import HotPages, Process
    from incdump.model.runs import Regions, Runs
    from incdump.model.stats import DumpStats
    from incdump.model.vmas import VmaTable
    from incdump.page_pipe import Chunk
    from incdump.proc.pagemap import PagemapReader
    from incdump.proc.tree import Task
    from incdump.tracking.soft_dirty import SoftDirtyLog


@dataclass(frozen=True, slots=True)
class Means:
    """With what a dump is made: the same for all its processes.

    :ivar tracker: ``"uffd-wp"``, ``"soft-dirty"`` or ``"content"``.
    :ivar rearm: whether another dump may follow.
    :ivar lasts: seconds for which the processes stay tracked after this one.
    :ivar keeps_huge: whether huge pages are not to be split.
    :ivar sending: the session with the page server that is to have the pages; None if the images dir is.
    :ivar seed: of the content hashes of this chain.
    :ivar boot_id: of the running kernel.
    :ivar warn: takes one line for the user.
    :ivar runs_in_memory_of: tells of a process which other one has the same address space (vfork): there is one tracker
        for both.
    :ivar check_incremental: says so, or raises, when a process turns out not to be incremental only now.
    :ivar hot: of a round of the pre-copy loop: what was written in the rounds before; else None: no page is deferred.
    """

    images: NewImagesDir
    tracker: str
    reader: PagemapReader
    keeper: Keeper
    soft_dirty_log: SoftDirtyLog | None
    rearm: bool
    lasts: float
    keeps_huge: bool
    sending: ServerSession | None
    seed: int
    boot_id: str
    warn: Warn
    stats: DumpStats
    runs_in_memory_of: Callable[[Task], int | None]
    check_incremental: Callable[[ProcessDump], None]
    hot: HotPages | None = None

    def new_image(self, kind: Kind, number: int) -> PageTable:
        """An empty image of a process or a segment."""
        name = f"{kind}-{number}.img"
        if self.sending is None:
            return PagesImage(self.images, name)
        return self.sending.new_image(self.images, name, Image(kind, number))


class Warn:
    """Gathers one-line warnings, each once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)


class ProcessDump:
    """A process in a dump; see the module's text for the order of calls."""

    def __init__(self, task: Task, means: Means, parent: ParentImages | None) -> None:
        self.task = task
        self.exited = False
        self.prepared = False
        self.incremental = False
        self.ahead: Ahead | None = None
        self.vmas: VmaTable | None = None
        self._means = means
        self._parent = parent
        self._watch = Watch(task, means)
        self._memory: ProcessMemory | None = None
        self._image: PageTable | None = None
        self._rule: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._hashes = content.HashCollector(means.seed)
        self._hashed_spans: Runs = empty_runs()
        self._begun: tuple[VmaTable, NDArray[np.bool_], bool] | None = None
        self._collected: list[Window] | None = None
        self._compared = 0
        self._stands_still = False
        self._hot: Runs | None = None
        self._written: list[Runs] = []
        self._counted = np.zeros(5, np.int64)

    def __repr__(self) -> str:
        return f"<ProcessDump {self.task.pid} {self.task.comm!r}{' exited' if self.exited else ''}>"

    @property
    def identity(self) -> Process:
        """Which process it is, for as long as the machine runs."""
        return self.task.pid, self.task.start_time

    # -- before the scan ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Open the process and have its tracker ready. Blocks. A process that is gone is marked as exited."""
        self.prepared = True
        try:
            self._watch.open()
            self._memory = ProcessMemory(self.task.pid)
        except (TargetExited, NoSuchTarget):
            self.exited = True
            return
        self.incremental = self._parent is not None and self._watch.is_about(self._parent)

    def lay_out(self) -> None:
        """Have the pages image of a dump of everything laid out, before the freeze. Blocks."""
        if self.exited or self.incremental:
            return
        with contextlib.suppress(NoSuchTarget):
            self._image = self._new_image()

    def make_room(self, left: Runs) -> None:
        """Have the pages image ready for as many pages as were written so far, of an incremental dump. Blocks.

        Done before the freeze: to get memory for the page cache takes longer than to fill it.

        :param left: pages that have to be copied in any case.
        """
        if self.exited or not self.incremental or self.ahead is None:
            return
        with contextlib.suppress(TargetExited):
            if pages := page_count(union(self._watch.written_so_far(self.ahead.known.vmas), left)):
                self._image = self._new_image()
                self._image.make_room(pages + pages // 8)

    def _new_image(self) -> PageTable:
        """An empty image; of a dump of everything, laid out for all anonymous memory."""
        pages = 0 if self.incremental else anonymous_pages(self.task.pid)
        image = self._means.new_image("pagemap", self.task.vpid)
        image.lay_out(pages)
        return image

    def freeze(self, task: Task, *, may_share: bool, until_read: bool) -> None:
        """The process is frozen from now on: look at it afresh. Blocks.

        :param task: what it is by now.
        :param may_share: see `ProcessMemory`.
        :param until_read: whether it stays frozen until all of it was read.
        """
        known, self.prepared = self.prepared, True
        self._stands_still = until_read
        self._begun = None
        self.task = self._watch.task = task
        if self._memory is not None:
            self._memory.close()
        self.exited = False
        try:
            self._watch.open_frozen()
            self._memory = ProcessMemory(task.pid, may_share=may_share, stopped=until_read)
        except (TargetExited, NoSuchTarget):
            self.exited = True
        self.incremental = self.incremental and known

    # -- scanning -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Have the mappings of the frozen process watched now, rather than when it is scanned. Blocks."""
        if not self.exited:
            with contextlib.suppress(TargetExited, NoSuchTarget):  # the scan finds out
                self._begun = self._begin()

    def collect(self) -> None:
        """Scan now, and keep the windows for later: for a tracker that needs the target stopped meanwhile. Blocks."""
        try:
            self._collected = list(self._scan())
        except (TargetExited, NoSuchTarget):
            self.exited = True

    def windows(self) -> Iterator[Window]:
        """See `incdump.engine.pipeline.PageOwner`."""
        if self.exited:
            return
        yield from self._scan() if self._collected is None else self._collected

    def _scan(self) -> Iterator[Window]:
        vmas, watched, anew = self._begun or self._begin()
        self.vmas, self._rule = vmas, rules(vmas)
        if anew and self.incremental:
            self.incremental = False
            self._means.check_incremental(self)
        if self._means.hot is not None and self.incremental:
            self._hot = self._means.hot.before(self.identity)
        self._image = self._image or self._new_image()
        self._hashed_spans = canonical(vmas.spans(((self._rule & Rule.HOLE) != 0) & ~watched))
        whole = vmas.of_kind(VmaKind.VDSO, VmaKind.AIO_RING)
        wanted = ((self._rule & Rule.DUMP) != 0) & ~whole
        scratch = np.empty(content.BATCH_PAGES * PAGE_SIZE, np.uint8) if self._has_hashes() else None
        in_parent = self._parent.covered if self._parent is not None and self.incremental else None
        raw = self._timed(self._watch.windows(vmas.select(wanted), watched[wanted], in_parent=in_parent))
        for window in merge_into(raw, _present(vmas.spans(whole))):
            regions = window.regions if self.incremental else _all_written(window.regions)
            if scratch is not None:
                regions = self._compare(Window(window.lo, window.hi, regions), vmas, scratch)
            yield Window(window.lo, window.hi, regions)

    def _begin(self) -> tuple[VmaTable, NDArray[np.bool_], bool]:
        """The mappings, which of them are watched, and whether the watch begins only now.

        :raises LazyMemory: pages of them are yet to come from elsewhere.
        """
        known = self.ahead.known if self.ahead is not None else None
        vmas = reread_vmas(self.task.pid, known, may_guess=self._watch.finds_out)
        watched, anew = self._watch.begin(vmas)
        if ((vmas.flags & np.uint64(VmaFlag.GUESSED)) != 0)[~watched].any():
            vmas = read_vmas(self.task.pid, flags=True)
            watched, once_more = self._watch.begin(vmas)
            anew |= once_more
        check_supplied(self.task.pid, vmas)
        return vmas, watched, anew

    def _timed(self, windows: Iterator[Window]) -> Iterator[Window]:
        """The same windows; the time that reading them takes is counted as scan_time."""
        while True:
            began = time.perf_counter_ns()
            window = next(windows, None)
            self._means.stats.scan_time += (time.perf_counter_ns() - began) // 1000
            if window is None:
                return
            yield window

    def _has_hashes(self) -> bool:
        return self._parent is not None and self._parent.hashes is not None and bool(len(self._parent.hashes))

    def _compare(self, window: Window, vmas: VmaTable, scratch: NDArray[np.uint8]) -> Regions:
        """Have pages that no tracker watches vouched for by their content."""
        if self._parent is None or self._parent.hashes is None or self._memory is None:
            return window.regions
        candidates = payload_runs(window, vmas, self._rule, Rule.HOLE)
        if not len(candidates):
            return window.regions
        unchanged, compared = content.unchanged_pages(
            candidates, self._memory.read_into, self._parent.hashes, self._hashes, scratch
        )
        self._compared += compared
        return mark(window.regions, unchanged, PageIs.WPALLOWED, clear=PageIs.WRITTEN)

    # -- classifying and writing ----------------------------------------------------------------------------------

    def classify(self, window: Window) -> Classified:
        """See `incdump.engine.pipeline.PageOwner`."""
        assert self.vmas is not None
        covered = None if self._parent is None else self._parent.covered
        classified = classify(window, self.vmas, self._rule, covered, self._hot)
        if self._hot is not None:
            self._written.append(classified.written)
        return classified

    def chunks(self, classified: Classified) -> Iterator[Chunk]:
        """See `incdump.engine.pipeline.PageOwner`."""
        assert self._image is not None
        return self._image.append(classified.entries)

    def write(self, chunk: Chunk, buffer: NDArray[np.uint8]) -> None:
        """See `incdump.engine.pipeline.PageOwner`.

        :raises TargetDenied: the process stands still, and a page that is there cannot be read.
        """
        assert self._image is not None
        assert self._memory is not None
        hashes = (self._hashes, self._hashed_spans) if len(self._hashed_spans) else None
        failed = self._image.write(chunk, self._memory, buffer, hashes)
        if len(failed) and self._stands_still:
            self._watch.check_absent(failed)

    def count(self, classified: Classified, stats: DumpStats) -> None:
        """See `incdump.engine.pipeline.PageOwner`."""
        unwatched = classified.unwatched if self._means.tracker != content.NAME else 0
        self._add(stats, classified.scanned, classified.holes, classified.pages, unwatched, classified.deferred)

    def _add(
        self, stats: DumpStats, scanned: int, holes: int, pages: int, unwatched: int = 0, deferred: int = 0
    ) -> None:
        stats.pages_scanned += scanned
        stats.pages_skipped_parent += holes
        stats.pages_written += pages
        stats.pages_untracked += unwatched
        stats.pages_deferred += deferred
        self._counted += (scanned, holes, pages, unwatched, deferred)

    def write_code_again(self, buffer: NDArray[np.uint8]) -> None:
        """Copy what is mapped as executable once more. Blocks.

        Another tracer, CRIU, runs system calls in the process by putting instructions there, for a moment.
        """
        if self.exited or self._image is None or self._memory is None or self.vmas is None:
            return
        code = canonical(self.vmas.spans((self.vmas.prot & Prot.EXEC) != 0))
        self._image.rewrite(code, self._memory, buffer)

    # -- the end --------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write the pagemap and the hashes; what could not be read counts as never taken. Blocks."""
        stats = self._means.stats
        stats.pages_compared += self._compared
        if self._image is None:
            self.exited = True
            return
        if self.exited:
            self._add(stats, *(-self._counted).tolist())
            self._image.discard()
            return
        failed = self._image.failed()
        if len(failed):
            self._watch.give_back(failed)
        gone = self._image.nr_pages - self._image.finish()
        self._add(stats, -gone, 0, -gone)
        stats.pages_vanished += gone
        table = self._hashes.table(drop=failed)
        if len(table):
            self._means.images.write_raw(f"incdump-hashes-{self.task.vpid}", table.encode())

    def written(self) -> Runs | None:
        """What the tracker called written since the parent dump; None if it could not tell, or nobody asks."""
        return None if self._hot is None or self.exited else canonical(np.concatenate([empty_runs(), *self._written]))

    def commit(self, generation: str) -> None:
        """The images dir is complete. Blocks."""
        self._watch.commit(generation)

    def let_go(self) -> None:
        """The images dir is complete, and there is to be no dump on top of it. Blocks."""
        self._watch.let_go()

    @property
    def tracking_ended(self) -> str | None:
        """Why tracking ended before this dump; None: it did not, or that is not known."""
        return self._watch.ended

    def give_back(self) -> None:
        """The dump failed: no write may be forgotten. Blocks."""
        self._watch.give_back()

    def discard(self) -> None:
        """The process is gone, and no part of the dump: nothing is left of it.

        :raises incdump.errors.XferError: the page server has gone, or refuses; all the same nothing is left open.
        :raises incdump.errors.ImagesIOError: the pages image cannot be removed; likewise.
        """
        try:
            if self._image is not None:
                self._image.discard()
        finally:
            self.close()

    def close(self) -> None:
        """Close all descriptors; whatever was not committed is lost."""
        self._watch.close()
        if self._memory is not None:
            self._memory.close()
        if self._image is not None:
            self._image.close()

    def meta(self, generation: str) -> dict[str, object]:
        """What incdump.json says of this process."""
        return self._watch.meta(generation)


def _present(spans: NDArray[np.uint64]) -> Regions:
    """Spans as regions of pages that are simply there, and written: nobody has to vouch for them."""
    there = PageIs.PRESENT | PageIs.WPALLOWED | PageIs.WRITTEN
    return np.stack((spans[:, 0], spans[:, 1], np.full(len(spans), there, np.uint64)), axis=1)


def _all_written(regions: Regions) -> Regions:
    """The tracker's answer is about another time than the parent's: nothing counts as clean."""
    written = regions[:, 2] | np.uint64(PageIs.WRITTEN)
    return np.stack((regions[:, 0], regions[:, 1], written), axis=1)
