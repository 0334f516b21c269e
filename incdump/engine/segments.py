"""Shared memory in a dump: each segment once, however many processes map it.

No tracker vouches for shared memory: a write through another mapping, or by write(2) on a memfd, touches no page table
that is watched. So segments are compared with the parent by content (`incdump.tracking.content`), whatever the tracker.
Their images are pagemap-shmem-ID.img; addresses in them are offsets in the segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from incdump.classify import Classified
from incdump.model.regions import PageIs, Window, mark
from incdump.model.runs import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PE_PARENT,
    PE_PRESENT,
    Runs,
    canonical,
    clip,
    empty_runs,
    intersect,
    page_count,
    run,
)
from incdump.proc import shmem
from incdump.proc.memory import ProcessMemory
from incdump.tracking import content

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump.engine.pages_image import PageTable
    from incdump.engine.parent import Parent
    from incdump.engine.process import Means, ProcessDump
    from incdump.engine.watch import ParentImages
    from incdump.model.stats import DumpStats
    from incdump.page_pipe import Chunk

WINDOW_BYTES = 256 << 20
"""Offsets looked at in one go."""


def find_segments(processes: list[ProcessDump], means: Means, parent: Parent | None) -> list[SegmentDump]:
    """The segments that these processes map."""
    tables = {p.task.pid: p.vmas for p in processes if p.vmas is not None}
    return [
        SegmentDump(segment, means, None if parent is None else parent.segment(segment.id))
        for segment in shmem.find_segments(tables)
    ]


class MappedSegment:
    """A segment read through the mappings that processes have of it, where it cannot be opened as a file.

    Everything that is mapped counts as populated; what no process maps cannot be seen.
    """

    def __init__(self, segment: shmem.Segment) -> None:
        self._memories: dict[int, ProcessMemory] = {}
        self._mappings: list[tuple[Runs, ProcessMemory, int]] = []
        self._populated = empty_runs()
        try:
            self._find_mappings(segment)
        except BaseException:
            self.close()
            raise

    def _find_mappings(self, segment: shmem.Segment) -> None:
        seen = empty_runs()
        for m in segment.mappings:
            offsets = run(m.pgoff, min(m.pgoff + m.end - m.start, segment.size))
            if not len(offsets) or np.array_equal(intersect(offsets, seen), offsets):
                continue
            if m.pid not in self._memories:
                self._memories[m.pid] = ProcessMemory(m.pid)
            self._mappings.append((offsets, self._memories[m.pid], m.start - m.pgoff))
            seen = canonical(np.concatenate((seen, offsets)))
        self._populated = seen

    def populated(self) -> Runs:
        """The offsets that some process maps."""
        return self._populated

    def read_into(self, buffer: NDArray[np.uint8], runs: Runs) -> Runs:
        """Read runs of offsets; see `incdump.proc.memory.ProcessMemory.read_into`."""
        failed: list[Runs] = []
        begin = 0
        for lo, hi in runs.tolist():
            at = lo
            while at < hi:
                end = self._read_some(buffer[begin + at - lo : begin + hi - lo], at, hi, failed)
                at = end
            begin += hi - lo
        return canonical(np.concatenate(failed)) if failed else empty_runs()

    def _read_some(self, buffer: NDArray[np.uint8], lo: int, hi: int, failed: list[Runs]) -> int:
        for offsets, memory, shift in self._mappings:
            first, last = int(offsets[0, 0]), int(offsets[0, 1])
            if first <= lo < last:
                end = min(hi, last)
                missed = memory.read_into(buffer[: end - lo], run(lo + shift, end + shift))
                if len(missed):
                    failed.append((missed.astype(np.int64) - shift).astype(np.uint64))
                return end
        failed.append(run(lo, lo + PAGE_SIZE))
        buffer[:PAGE_SIZE] = 0
        return lo + PAGE_SIZE

    def close(self) -> None:
        """Close the processes' memories."""
        for memory in self._memories.values():
            memory.close()


class OpenedSegment:
    """A segment read as a file."""

    def __init__(self, file: shmem.SegmentFile) -> None:
        self._file = file

    def populated(self) -> Runs:
        """The offsets that hold data."""
        return self._file.populated()

    def read_into(self, buffer: NDArray[np.uint8], runs: Runs) -> Runs:
        """Read runs of offsets; none fails, what is not there is zero."""
        self._file.read_into(buffer, runs)
        return empty_runs()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SegmentDump:
    """A shared memory segment in a dump; see `incdump.engine.pipeline.PageOwner`."""

    def __init__(self, segment: shmem.Segment, means: Means, parent: ParentImages | None) -> None:
        self.segment = segment
        self.exited = False
        self._means = means
        self._parent = parent
        self._source: OpenedSegment | MappedSegment | None = None
        self._image: PageTable | None = None
        self._hashes = content.HashCollector(means.seed)
        self._compared = 0
        self._counted = np.zeros(3, np.int64)

    def __repr__(self) -> str:
        return f"<SegmentDump {self.segment.id} {self.segment.name!r}>"

    def windows(self) -> Iterator[Window]:
        """What is populated; pages that are as the parent has them come as watched and unwritten."""
        file = self.segment.open()
        if file is None:
            self._means.warn(
                f"shared memory {self.segment.name} cannot be opened (no CAP_SYS_ADMIN): read through its mappings"
            )
            self._source = MappedSegment(self.segment)
        else:
            self._source = OpenedSegment(file)
        self._image = self._means.new_image("pagemap-shmem", self.segment.id)
        populated = self._source.populated()
        if self._parent is None:
            self._image.lay_out(page_count(populated))
        scratch = np.empty(content.BATCH_PAGES * PAGE_SIZE, np.uint8)
        end = int(populated[-1, 1]) if len(populated) else 0
        for lo in range(0, end, WINDOW_BYTES):
            runs = clip(populated, lo, lo + WINDOW_BYTES)
            regions = np.column_stack((runs, np.full(len(runs), PageIs.PRESENT, np.uint64)))
            if self._parent is not None and self._parent.hashes is not None:
                same, compared = content.unchanged_pages(
                    runs, self._source.read_into, self._parent.hashes, self._hashes, scratch
                )
                self._compared += compared
                regions = mark(regions, same, PageIs.WPALLOWED)
            yield Window(lo, lo + WINDOW_BYTES, regions)

    def classify(self, window: Window) -> Classified:
        """Unchanged pages are holes, all others are written."""
        size = (window.regions[:, 1] - window.regions[:, 0]) >> np.uint64(PAGE_SHIFT)
        hole = (window.regions[:, 2] & np.uint64(PageIs.WPALLOWED)) != 0
        flags = np.where(hole, np.uint64(PE_PARENT), np.uint64(PE_PRESENT))
        entries = np.column_stack((window.regions[:, 0], size, flags))
        scanned, holes = int(size.sum()), int(size[hole].sum())
        return Classified(entries, scanned, holes, scanned - holes, 0)

    def chunks(self, classified: Classified) -> Iterator[Chunk]:
        """See `incdump.engine.pipeline.PageOwner`."""
        assert self._image is not None
        return self._image.append(classified.entries)

    def write(self, chunk: Chunk, buffer: NDArray[np.uint8]) -> None:
        """See `incdump.engine.pipeline.PageOwner`."""
        assert self._image is not None
        assert self._source is not None
        self._image.write(chunk, self._source, buffer, (self._hashes, chunk.runs))

    def count(self, classified: Classified, stats: DumpStats) -> None:
        """See `incdump.engine.pipeline.PageOwner`."""
        self._add(stats, classified.scanned, classified.holes, classified.pages)

    def _add(self, stats: DumpStats, scanned: int, holes: int, pages: int) -> None:
        stats.shpages_scanned += scanned
        stats.shpages_skipped_parent += holes
        stats.shpages_written += pages
        self._counted += (scanned, holes, pages)

    def finish(self) -> None:
        """Write the pagemap and the hashes; nothing, if it turned out to be gone. Blocks."""
        if self._image is None:
            return
        stats = self._means.stats
        if self.exited:
            self._add(stats, *(-self._counted).tolist())
            self._image.discard()
            return
        failed = self._image.failed()
        gone = self._image.nr_pages - self._image.finish()
        stats.pages_vanished += gone
        self._add(stats, -gone, 0, -gone)
        stats.pages_compared += self._compared
        table = self._hashes.table(drop=failed)
        self._means.images.write_raw(f"incdump-hashes-shmem-{self.segment.id}", table.encode())

    def close(self) -> None:
        """Close the segment and its image."""
        if self._source is not None:
            self._source.close()
        if self._image is not None:
            self._image.close()
