"""Proving a chain of images dirs: ``incdump check``, and what a dump does before it trusts a parent.

Every level is held to the same: it is finished; each pagemap decodes; the pages image is there and exactly as long as
the present entries say; no two pagemaps share a pages image; each page that is left to the parent is covered by the
parent's pagemap of the same number. As that holds between every two neighbours, every page of every level is found
somewhere. The first thing that is wrong is raised. CRIU's restore does not notice much of this and reads wrong pages,
or never ends.

Memory use is that of a pagemap's file and of the runs of two levels; time goes with their entries.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from incdump.errors import BadImage, ParentMismatch
from incdump.images.framing import raise_io_error
from incdump.images.images_dir import ImagesDir, Kind, lazy_left, orphan
from incdump.images.new_dir import INVENTORY
from incdump.model.runs import PAGE_SHIFT, Runs, page_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from incdump.images.pagemap import PagemapSummary


@dataclass(frozen=True, slots=True)
class LevelReport:
    """What one directory of a chain holds.

    :ivar path: the directory.
    :ivar pids: the processes with a pagemap in it.
    :ivar shmem_ids: the shared memory segments with a pagemap in it.
    :ivar pages_present: pages in its pages images, of processes and segments.
    :ivar pages_in_parent: pages that it leaves to its parent.
    :ivar bytes: the size of its pages images.
    :ivar warnings: what is odd but harms nobody, one line each.
    """

    path: Path
    pids: tuple[int, ...]
    shmem_ids: tuple[int, ...]
    pages_present: int
    pages_in_parent: int
    bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChainReport:
    """A chain that holds.

    :ivar levels: the newest directory first.
    """

    levels: tuple[LevelReport, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all levels."""
        return tuple(chain.from_iterable(level.warnings for level in self.levels))


class Table(NamedTuple):
    """A pagemap of a level."""

    kind: Kind
    number: int
    pagemap: PagemapSummary


Tables: TypeAlias = "dict[tuple[Kind, int], Table]"
"""The pagemaps of a level."""


def check_chain(images: ImagesDir) -> ChainReport:
    """Prove a directory and all it stands on.

    :param images: the newest directory.
    :returns: what each level holds.
    :raises BrokenChain: a parent is missing, or does not have a page that its child leaves to it.
    :raises BadImage: an image is damaged, missing or of the wrong size.
    :raises UnfinishedImages: a level's dump never ended, or left pages to a lazy-pages server.
    :raises ParentMismatch: a parent is of another process.
    :raises ImagesIOError: something cannot be read.
    """
    return ChainReport(tuple(report for report, _ in prove_levels(images, load_tables)))


def prove_levels(
    images: ImagesDir, load: Callable[[ImagesDir], Tables], *, elsewhere: bool = False
) -> Iterator[tuple[LevelReport, ImagesDir | None]]:
    """Prove level after level, the newest first. Each holds if those below it do; errors are those of `check_chain`.

    :param load: gives the pagemaps of a level, as `load_tables` does. Of a level that is not asked for any more, only
        what they cover counts.
    :param elsewhere: whether pages that were sent to a page server may be missing: there they are.
    :returns: for each level what it holds, and its parent.
    """
    # With a closing None, so that the oldest level is a child, too: one without a parent.
    levels = chain(images.levels(), (None,))
    tables: Tables | None = None
    for level, parent in pairwise(levels):
        assert level is not None
        tables = load(level) if tables is None else tables
        above = {} if parent is None else load(parent)
        report = _check_level(level, tables, elsewhere=elsewhere)
        if parent is not None:
            _check_identities(level, parent, tables)
        for table in tables.values():
            _check_holes(level, parent, table, above)
        yield report, parent
        tables = above


def load_tables(level: ImagesDir) -> Tables:
    """Summarise every pagemap of a level."""
    tables: Tables = {}
    names: list[tuple[Kind, int]] = [("pagemap", pid) for pid in level.pids()]
    names += [("pagemap-shmem", shmem_id) for shmem_id in level.shmem_ids()]
    for kind, number in names:
        found = level.summary(kind, number)
        if found is None:
            path = level.image_path(kind, number)
            raise BadImage(f"{path} is gone: the images dir is being changed", path=path)
        tables[kind, number] = Table(kind, number, found)
    return tables


def _check_level(level: ImagesDir, tables: Tables, *, elsewhere: bool) -> LevelReport:
    """Check a level by itself: inventory, pages images, flags."""
    if INVENTORY in level.names():  # absent only where the caller allowed it
        level.inventory()
    owners: dict[int, Table] = {}
    size = in_parent = 0
    for table in tables.values():
        other = owners.setdefault(table.pagemap.pages_id, table)
        path = level.image_path(table.kind, table.number)
        if other is not table:
            raise BadImage(
                f"{path} uses the pages image of {other.kind}-{other.number}.img, {other.pagemap.pages_id}", path=path
            )
        size += _check_pages_image(level, table, elsewhere=elsewhere)
        if table.pagemap.lazy is not None:
            raise lazy_left(path, table.pagemap.lazy)
        in_parent += page_count(table.pagemap.holes)
    return LevelReport(
        path=level.path,
        pids=tuple(level.pids()),
        shmem_ids=tuple(level.shmem_ids()),
        pages_present=size >> PAGE_SHIFT,
        pages_in_parent=in_parent,
        bytes=size,
        warnings=tuple(_oddities(level, owners)),
    )


def _check_pages_image(level: ImagesDir, table: Table, *, elsewhere: bool) -> int:
    """Check that a pages image is as long as its pagemap says, and return that, bytes."""
    expected = table.pagemap.pages_present << PAGE_SHIFT
    path = level.pages_path(table.pagemap.pages_id)
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if not expected:
            return 0
        server = level.page_server()
        if server is None:
            raise BadImage(f"{path} is missing: the images dir is damaged", path=path) from error
        if elsewhere:
            return 0
        raise BadImage(
            f"{path} is missing: the pages were sent to the page server at {server}; put its images here", path=path
        ) from error
    except OSError as error:
        raise_io_error(error, "look at", path)
    if not stat.S_ISREG(status.st_mode) or status.st_size != expected:
        raise BadImage(
            f"{path} has {status.st_size} bytes where {table.kind}-{table.number}.img counts {expected}: it is damaged",
            path=path,
            pid=_pid(table),
        )
    return expected


def _check_holes(level: ImagesDir, parent: ImagesDir | None, table: Table, above: Tables) -> None:
    """Check that the parent covers every page that a pagemap leaves to it."""
    holes = table.pagemap.holes
    if not len(holes):
        return
    if parent is None:
        raise orphan(level, table.kind, table.number, int(holes[0, 0]))
    parent_table = above.get((table.kind, table.number))
    if parent_table is None:
        raise parent.lacks(table.kind, table.number, int(holes[0, 0]), no_pagemap=True)
    missing = _first_missing(parent_table.pagemap.covered, holes)
    if missing is not None:
        raise parent.lacks(table.kind, table.number, missing, no_pagemap=False)


def _first_missing(outer: Runs, inner: Runs) -> int | None:
    """The first address of `inner` that `outer` lacks, or None.

    Runs do not touch each other, so a run that is covered lies within a single one.
    """
    if not len(outer):
        return int(inner[0, 0])
    row = np.searchsorted(outer[:, 0], inner[:, 0], "right").astype(np.int64) - 1
    reach = np.where(row >= 0, outer[np.maximum(row, 0), 1], np.uint64(0))
    wrong = reach < inner[:, 1]
    if not wrong.any():
        return None
    first = int(wrong.argmax())
    return max(int(inner[first, 0]), int(reach[first]))


def _check_identities(level: ImagesDir, parent: ImagesDir, tables: Tables) -> None:
    """Check that parent and child are of the same processes, as far as incdump.json tells."""
    child_meta, parent_meta = level.meta(), parent.meta()
    if child_meta is None or parent_meta is None:
        return
    for table in tables.values():
        if table.kind != "pagemap" or not len(table.pagemap.holes):
            continue
        ours, theirs = _identity(child_meta, table.number), _identity(parent_meta, table.number)
        if None not in (ours, theirs) and ours != theirs:
            raise ParentMismatch(
                f"{parent.path} is of an earlier process {table.number}, not of the one in {level.path}: "
                "start a new chain",
                path=parent.path,
                pid=table.number,
            )


def _identity(meta: dict[str, Any], pid: int) -> tuple[Any, Any] | None:
    """The boot and start time of a process in an incdump.json, or None where it does not say."""
    processes = meta.get("processes")
    process = processes.get(str(pid)) if isinstance(processes, dict) else None
    if not isinstance(process, dict) or process.get("start_time") is None or meta.get("boot_id") is None:
        return None
    return meta["boot_id"], process["start_time"]


def _oddities(level: ImagesDir, owners: dict[int, Table]) -> list[str]:
    """What is odd about a level's files but harms nobody."""
    used = {level.pages_path(pages_id).name for pages_id in owners}
    unused = sorted(name for name in level.names() if name.startswith("pages-") and name not in used)
    found = [f"{level.path / name} belongs to no pagemap" for name in unused]
    return found + ([] if owners else [f"{level.path} holds no pagemap at all"])


def _pid(table: Table) -> int | None:
    return table.number if table.kind == "pagemap" else None
