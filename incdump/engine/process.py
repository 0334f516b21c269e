"""One process of a dump: its tracker's lease, its mappings, its image.

The order of things is the whole point here (invariants 1 to 3); `ProcessDump` is driven in this order by the engine:

1. `prepare`: borrow the userfaultfd, before anything is frozen (the holder has to stop a thread to make one).
2. `windows`: read the mappings, put them under watch, get and clear what was written. Every page that is taken is in
   the ledger before it is in a window.
3. `classify`, `chunks`, `write`: pages are read after they were cleared.
4. `finish`: the pagemap. Then, once the whole images dir is complete, `commit`; or, whatever happened, `give_back`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from incdump.classify import Classified, Rule, classify, payload_runs, rules
from incdump.engine.pages_image import PagesImage
from incdump.errors import (
    AlreadyTraced,
    IncdumpError,
    InjectionFailed,
    NoSuchTarget,
    TargetDenied,
    TargetExited,
    TargetUnsuitable,
)
from incdump.model.regions import PageIs, Window, mark, merge_into
from incdump.model.runs import PAGE_SIZE, canonical, empty_runs
from incdump.model.vmas import VmaKind
from incdump.proc.maps import reread_vmas
from incdump.proc.memory import ProcessMemory
from incdump.proc.pinned import pinned_io
from incdump.tracking import content, soft_dirty, uffd_wp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump.engine.metadata import Ahead
    from incdump.holder.client import Keeper, Lease
    from incdump.images.new_dir import NewImagesDir
    from incdump.model.runs import Regions, Runs
    from incdump.model.stats import DumpStats
    from incdump.model.vmas import VmaTable
    from incdump.page_pipe import Chunk
    from incdump.proc.pagemap import PagemapReader
    from incdump.proc.tree import Task


@dataclass(frozen=True, slots=True)
class ParentImages:
    """What the parent images dir says of one process or segment.

    :ivar covered: the pages that its pagemap has.
    :ivar generation: of the dump that wrote it; None if CRIU did.
    :ivar tracker: that was reset by that dump; None if unknown.
    :ivar uptime: when that was, microseconds since boot; None if unknown.
    :ivar hashes: of the pages that were compared by content; None if none were.
    """

    covered: Runs
    generation: str | None = None
    tracker: str | None = None
    uptime: int | None = None
    hashes: content.HashTable | None = None


@dataclass(frozen=True, slots=True)
class Means:
    """With what a dump is made: the same for all its processes.

    :ivar tracker: ``"uffd-wp"``, ``"soft-dirty"`` or ``"content"``.
    :ivar rearm: whether another dump may follow.
    :ivar seed: of the content hashes of this chain.
    :ivar boot_id: of the running kernel.
    :ivar warn: takes one line for the user.
    """

    images: NewImagesDir
    tracker: str
    reader: PagemapReader
    keeper: Keeper
    soft_dirty_log: soft_dirty.SoftDirtyLog | None
    rearm: bool
    seed: int
    boot_id: str
    warn: Warn
    stats: DumpStats


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
        self.vmas: VmaTable | None = None
        self.ahead: Ahead | None = None
        self._means = means
        self._parent = parent
        self._image: PagesImage | None = None
        self._lease: Lease | None = None
        self._round: uffd_wp.UffdWpRound | None = None
        self._rule: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._hashes = content.HashCollector(means.seed)
        self._hashed_spans: Runs = empty_runs()
        self._collected: list[Window] | None = None
        self._pagemap_fd = -1
        self._memory: ProcessMemory | None = None
        self._suspect: str | None = None
        self._compared = 0
        self._counted = np.zeros(4, np.int64)

    def __repr__(self) -> str:
        return f"<ProcessDump {self.task.pid} {self.task.comm!r}{' exited' if self.exited else ''}>"

    # -- before the scan ------------------------------------------------------------------------------------------

    def prepare(self, *, borrow: bool = True) -> None:
        """Open the process and borrow its userfaultfd. Blocks. A process that is gone is marked as exited.

        :param borrow: False when the process is frozen already: its tracking then starts with a later dump.
        """
        pid = self.task.pid
        self.prepared = True
        try:
            self._pagemap_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._memory = ProcessMemory(pid)
            if borrow and self._means.tracker == uffd_wp.NAME:
                self._borrow()
        except (TargetExited, NoSuchTarget, FileNotFoundError, ProcessLookupError):
            self.exited = True
        self.incremental = self._trusts_parent()

    def _borrow(self, *, renew: bool = False) -> None:
        pid = self.task.pid
        reason = pinned_io(pid)
        if reason is not None:
            self._means.warn(f"process {pid} {reason}: writes to its memory can go unseen, so it is compared by content")
            return
        try:
            self._lease = self._means.keeper.acquire(pid, self.task.start_time, renew=renew)
        except (InjectionFailed, TargetUnsuitable, AlreadyTraced, TargetDenied) as error:
            self._means.warn(f"process {pid} cannot be tracked ({error}): it is compared by content")
            return
        self._means.stats.stopped_time += self._lease.stopped_us
        self._round = uffd_wp.UffdWpRound(self._lease.uffd, self._pagemap_fd)

    def _trusts_parent(self) -> bool:
        """Whether the tracker's answer is about the time since the parent dump."""
        parent, means = self._parent, self._means
        if parent is None or self.exited:
            return False
        if means.tracker == content.NAME:
            return parent.hashes is not None
        if means.tracker == soft_dirty.NAME:
            record = None
            if means.soft_dirty_log is not None:
                record = means.soft_dirty_log.read(self.task.pid, self.task.start_time, means.boot_id)
            same = parent.tracker in (soft_dirty.NAME, None)
            return same and soft_dirty.may_trust(record, parent.generation, parent.uptime)
        if self._lease is None:
            return parent.hashes is not None
        return parent.tracker == uffd_wp.NAME and self._lease.generation == parent.generation is not None

    # -- scanning -------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Scan now, and keep the windows for later: for a tracker that needs the target stopped meanwhile. Blocks."""
        try:
            self._collected = list(self._scan())
        except TargetExited:
            self.exited = True

    def windows(self) -> Iterator[Window]:
        """See `incdump.engine.pipeline.PageOwner`."""
        if self.exited:
            return
        yield from self._scan() if self._collected is None else self._collected

    def _scan(self) -> Iterator[Window]:
        self.vmas = reread_vmas(self.task.pid, self.ahead.vmas if self.ahead is not None else None)
        watched = self._watch(self.vmas)
        self._rule = rules(self.vmas)
        self._image = PagesImage(self._means.images, f"pagemap-{self.task.vpid}.img")
        if self._means.tracker == content.NAME:
            self._hashed_spans = canonical(self.vmas.spans((self._rule & Rule.HOLE) != 0))
        else:
            self._hashed_spans = canonical(self.vmas.spans(((self._rule & Rule.HOLE) != 0) & ~watched))
        vdso = self.vmas.of_kind(VmaKind.VDSO)
        wanted = ((self._rule & Rule.DUMP) != 0) & ~vdso
        scratch = np.empty(content.BATCH_PAGES * PAGE_SIZE, np.uint8) if self._has_hashes() else None
        raw = self._raw_windows(self.vmas.select(wanted), watched[wanted])
        for window in merge_into(raw, _present(self.vmas.spans(vdso))):
            regions = window.regions
            if not self.incremental:
                regions = _all_written(regions)
            if scratch is not None:
                regions = self._compare(Window(window.lo, window.hi, regions), self.vmas, scratch)
            yield Window(window.lo, window.hi, regions)
        self._after_scan()

    def _watch(self, vmas: VmaTable) -> NDArray[np.bool_]:
        """Put the mappings under watch; for each, whether it is."""
        if self._means.tracker == soft_dirty.NAME:
            return vmas.of_kind(VmaKind.ANON, VmaKind.FILE_PRIVATE)
        if self._round is None:
            return np.zeros(len(vmas), bool)
        try:
            return self._round.register(vmas)
        except uffd_wp.AddressSpaceGone:
            pass
        self._means.warn(f"process {self.task.pid} has a new address space (execve): tracking starts anew")
        if self._lease is not None:
            self._lease.close()
        self._lease = self._round = None
        self.incremental = False
        self._borrow(renew=True)
        return np.zeros(len(vmas), bool) if self._round is None else self._round.register(vmas)

    def _raw_windows(self, vmas: VmaTable, watched: NDArray[np.bool_]) -> Iterator[Window]:
        means = self._means
        if not len(vmas):
            return iter(())
        if means.tracker == soft_dirty.NAME:
            return soft_dirty.windows(self._pagemap_fd, means.reader, vmas, watched)
        if self._round is not None:
            return self._round.windows(means.reader, vmas, watched, rearm=means.rearm)
        return means.reader.windows(self._pagemap_fd, vmas)

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

    def _after_scan(self) -> None:
        """What has to be known, or done, once everything was taken, and before the target may run on."""
        means = self._means
        if means.tracker == soft_dirty.NAME and means.rearm and means.soft_dirty_log is not None:
            self._log_soft_dirty(None)
            soft_dirty.reset(self.task.pid)
        if self._round is not None:
            # I/O that was under way when pages were marked as clean would be seen here: its file is still open.
            self._suspect = pinned_io(self.task.pid)
            if self._suspect is not None:
                means.warn(f"process {self.task.pid} {self._suspect}: its next dump will be full")

    # -- classifying and writing ----------------------------------------------------------------------------------

    def classify(self, window: Window) -> Classified:
        """See `incdump.engine.pipeline.PageOwner`."""
        assert self.vmas is not None
        return classify(window, self.vmas, self._rule, None if self._parent is None else self._parent.covered)

    def chunks(self, classified: Classified) -> Iterator[Chunk]:
        """See `incdump.engine.pipeline.PageOwner`."""
        assert self._image is not None
        return self._image.append(classified.entries)

    def write(self, chunk: Chunk, buffer: NDArray[np.uint8]) -> None:
        """See `incdump.engine.pipeline.PageOwner`."""
        assert self._image is not None
        assert self._memory is not None
        hashes = (self._hashes, self._hashed_spans) if len(self._hashed_spans) else None
        self._image.write(chunk, self._memory, buffer, hashes)

    def count(self, classified: Classified, stats: DumpStats) -> None:
        """See `incdump.engine.pipeline.PageOwner`."""
        unwatched = classified.unwatched if self._means.tracker != content.NAME else 0
        self._add(stats, classified.scanned, classified.holes, classified.pages, unwatched)

    def _add(self, stats: DumpStats, scanned: int, holes: int, pages: int, unwatched: int = 0) -> None:
        stats.pages_scanned += scanned
        stats.pages_skipped_parent += holes
        stats.pages_written += pages
        stats.pages_untracked += unwatched
        self._counted += (scanned, holes, pages, unwatched)

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
        if len(failed) and self._round is not None:
            self._round.give_back(failed)
        gone = self._image.nr_pages - self._image.finish()
        self._add(stats, -gone, 0, -gone)
        stats.pages_vanished += gone
        table = self._hashes.table(drop=failed)
        if len(table):
            self._means.images.write_raw(f"incdump-hashes-{self.task.vpid}", table.encode())

    def commit(self, generation: str) -> None:
        """The images dir is complete: the tracker's answers are about the time since it. Blocks."""
        if self._lease is not None:
            self._means.keeper.commit(self._lease, None if self._suspect else generation)
        elif self._means.tracker == soft_dirty.NAME and self._means.rearm:
            self._log_soft_dirty(generation)

    def give_back(self) -> None:
        """The dump failed: every page that was taken counts as written again, or the generation is lost. Blocks."""
        if self._lease is None or self._round is None or self._lease.uffd < 0:
            return
        try:
            self._round.give_back()
        except OSError as error:
            self._means.warn(f"process {self.task.pid}: {error.strerror}: its next dump will be full")
            return
        try:
            self._means.keeper.commit(self._lease, self._lease.generation)
        except IncdumpError as error:
            self._means.warn(str(error))

    def close(self) -> None:
        """Close all descriptors; whatever was not committed is lost."""
        if self._lease is not None:
            self._lease.close()
        if self._memory is not None:
            self._memory.close()
        if self._image is not None:
            self._image.close()
        if self._pagemap_fd >= 0:
            os.close(self._pagemap_fd)
            self._pagemap_fd = -1

    def meta(self, generation: str) -> dict[str, object]:
        """What incdump.json says of this process."""
        tracked = self._lease is not None or self._means.tracker != uffd_wp.NAME
        return {
            "pid": self.task.pid,
            "start_time": self.task.start_time,
            "comm": self.task.comm,
            "tracker": self._means.tracker if tracked else content.NAME,
            "generation": generation if self._means.rearm and self._suspect is None else None,
        }

    def _log_soft_dirty(self, generation: str | None) -> None:
        log = self._means.soft_dirty_log
        assert log is not None
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = int(float(file.read().split()[0]) * 1e6)
        record = soft_dirty.SoftDirtyRecord(self.task.start_time, self._means.boot_id, generation, uptime)
        log.write(self.task.pid, record)


def _present(spans: NDArray[np.uint64]) -> Regions:
    """Spans as regions of pages that are simply there, and written: nobody has to vouch for them."""
    there = PageIs.PRESENT | PageIs.WPALLOWED | PageIs.WRITTEN
    return np.stack((spans[:, 0], spans[:, 1], np.full(len(spans), there, np.uint64)), axis=1)


def _all_written(regions: Regions) -> Regions:
    """The tracker's answer is about another time than the parent's: nothing counts as clean."""
    written = regions[:, 2] | np.uint64(PageIs.WRITTEN)
    return np.stack((regions[:, 0], regions[:, 1], written), axis=1)
