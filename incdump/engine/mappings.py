"""Which mappings a dump wrote, and how much of each: the pagemaps of its images beside the processes' mappings.

Mappings come and go while rounds are made, and the images of a pre-dump do not have them. So they are read right after
each dump, and of a process that is gone by then (killed, say, when the dump was complete) they are as they last were.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from incdump.errors import IncdumpError
from incdump.images.images_dir import ImagesDir
from incdump.model.precopy import MappingWrites
from incdump.model.runs import PAGE_SHIFT, empty_runs, entry_runs, intersect, present_entries, run, union
from incdump.proc.maps import read_vmas
from incdump.proc.shmem import find_segments
from incdump.proc.tree import process_tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from incdump.model.runs import Entries, Runs
    from incdump.model.stats import DumpResult
    from incdump.model.vmas import VmaTable
    from incdump.proc.tree import Task


class WrittenMappings:
    """Tells of one dump after the other, of one tree, what it wrote."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Task, VmaTable]] = {}

    def of(
        self, result: DumpResult, limit: int | None = None, deferred: Mapping[int, Runs] | None = None
    ) -> list[MappingWrites]:
        """The mappings that a dump wrote something of, the most first. Blocks.

        :param limit: so many of them; None for all.
        :param deferred: of each process, pages that count as well: that were written, but not copied.
        :raises incdump.errors.IncdumpError: the images are gone.
        """
        self._look(result)
        images = ImagesDir(result.images_dir)
        found: list[MappingWrites] = []
        for pid in result.pids:
            if pid in self._seen:
                task, vmas = self._seen[pid]
                entries = images.pagemap(task.vpid)
                if entries is not None:
                    written = union(entry_runs(present_entries(entries)), (deferred or {}).get(pid, empty_runs()))
                    found += _written(task, vmas, _within(written, vmas.spans()))
        found += self._written_segments(images)
        found.sort(key=lambda mapping: mapping.pages, reverse=True)
        return found[:limit]

    def _look(self, result: DumpResult) -> None:
        """Read the mappings of the processes that are still there."""
        with suppress(IncdumpError):
            for task in process_tree(result.pid):
                with suppress(IncdumpError):
                    self._seen[task.pid] = task, read_vmas(task.pid, flags=False)
        self._seen = {pid: seen for pid, seen in self._seen.items() if pid in result.pids}

    def _written_segments(self, images: ImagesDir) -> Iterator[MappingWrites]:
        """Shared memory, which is in the images once: under the first mapping of each part."""
        if not (numbers := set(images.shmem_ids())):
            return
        for segment in find_segments({pid: vmas for pid, (_, vmas) in self._seen.items()}):
            entries = images.shmem_pagemap(segment.id) if segment.id in numbers else None
            if entries is None:
                continue
            told = empty_runs()
            for mapping in segment.mappings:
                offsets = run(mapping.pgoff, mapping.pgoff + mapping.end - mapping.start)
                pages = pages_within(entries, offsets).sum() - pages_within(entries, intersect(offsets, told)).sum()
                told = union(told, offsets)
                if pages:
                    task, _ = self._seen[mapping.pid]
                    yield _mapping(task, mapping.start, mapping.end, segment.name, int(pages))


def pages_within(entries: Entries, spans: Runs) -> NDArray[np.int64]:
    """How many pages of an entry table, of those that have a place in the pages image, are in each span; shape (n,).

    An entry may reach over several mappings, where they touch.
    """
    return _within(entry_runs(present_entries(entries)), spans)


def _within(written: Runs, spans: Runs) -> NDArray[np.int64]:
    """How many pages of ascending runs are in each span."""
    if not len(written):
        return np.zeros(len(spans), np.int64)
    starts = written[:, 0]
    counts = ((written[:, 1] - starts) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    before = np.cumsum(counts) - counts

    def below(addresses: NDArray[np.uint64]) -> NDArray[np.int64]:
        at = np.searchsorted(starts, addresses, "right").astype(np.int64) - 1
        last = np.maximum(at, 0)
        inside = ((addresses - np.minimum(starts[last], addresses)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        return np.where(at < 0, 0, before[last] + np.minimum(inside, counts[last]))

    return below(spans[:, 1]) - below(spans[:, 0])


def _written(task: Task, vmas: VmaTable, pages: NDArray[np.int64]) -> Iterator[MappingWrites]:
    for n in np.flatnonzero(pages).tolist():
        yield _mapping(task, int(vmas.start[n]), int(vmas.end[n]), vmas.names[n], int(pages[n]))


def _mapping(task: Task, start: int, end: int, name: str, pages: int) -> MappingWrites:
    return MappingWrites(pid=task.pid, comm=task.comm, start=start, end=end, name=name, pages=pages)
