"""What a dump writes beside pages, so that they can be understood without the process.

Everything is read from /proc while the tree is frozen, beside the copying of pages, and encoded when it runs again:
pstree.img, core-PID.img without registers, mm-PID.img with every mapping, files.img with the executables and mapped
files, memfd.img. What takes a walk of the page tables (VmFlags, guard regions) is read before the freeze, and again
only where the mappings have changed since: see `look_ahead`.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from incdump import kerndat
from incdump._uapi.arch import ARCH
from incdump._uapi.pagemap_scan import pagemap_scan
from incdump.errors import NoSuchTarget, TargetExited
from incdump.images.core import encode_core
from incdump.images.files import FileTable
from incdump.images.mm import encode_mm
from incdump.images.pstree import encode_pstree
from incdump.model.regions import PageIs
from incdump.model.runs import canonical, empty_runs
from incdump.proc.maps import learn_flags, read_known_vmas, read_vmas, reread_vmas
from incdump.proc.mm_info import read_mm_info
from incdump.proc.shmem import find_segments
from incdump.proc.task_core import read_task_core

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from incdump.images.files import MappedFiles
    from incdump.images.new_dir import NewImagesDir
    from incdump.model.core import TaskCore
    from incdump.model.mm import MmInfo
    from incdump.model.runs import Runs
    from incdump.model.vmas import VmaTable
    from incdump.proc.maps import KnownVmas
    from incdump.proc.tree import Task

_GUARD_REGIONS = 4096


@dataclass(frozen=True, slots=True)
class Ahead:
    """What was read of a process just before it was frozen."""

    known: KnownVmas
    guards: Runs


def look_ahead(pid: int) -> Ahead | None:
    """Read what would take long while the process is frozen; None if it is gone. Blocks.

    Both readings walk the page tables, so they are made side by side.
    """
    try:
        with ThreadPoolExecutor(1) as beside:
            guards = beside.submit(lambda: _guard_regions(pid, read_vmas(pid, flags=False)))
            known = read_known_vmas(pid)
        return Ahead(known, guards.result())
    except (OSError, TargetExited, NoSuchTarget):
        return None


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """One process, as /proc shows it."""

    task: Task
    core: TaskCore
    info: MmInfo
    vmas: VmaTable
    files: MappedFiles
    guards: Runs


class Metadata:
    """The facts about a frozen tree; `read` gathers them, `write` makes images of them."""

    def __init__(self, tasks: Sequence[Task], snapshots: list[_Snapshot], files: FileTable) -> None:
        self._tasks = tasks
        self._snapshots = snapshots
        self._files = files

    @classmethod
    def read(
        cls, tasks: Sequence[Task], ahead: Mapping[int, Ahead], known: Mapping[int, VmaTable] | None = None
    ) -> Metadata:
        """Ask /proc. Blocks; the tree is frozen meanwhile.

        :param tasks: the processes that are dumped, the root first. One that is killed meanwhile is left out.
        :param ahead: what `look_ahead` found, by pid.
        :param known: mappings that were read since the freeze, by pid.
        """
        tables: dict[int, VmaTable] = dict(known or {})
        for task in tasks:
            if task.pid in tables:
                continue
            before = ahead.get(task.pid)
            with contextlib.suppress(TargetExited, NoSuchTarget):
                tables[task.pid] = reread_vmas(task.pid, None if before is None else before.known)
        files = FileTable(find_segments(tables))
        snapshots = []
        for task in tasks:
            with contextlib.suppress(KeyError, OSError, TargetExited, NoSuchTarget):
                vmas = tables[task.pid]
                before = ahead.get(task.pid)
                same = before is not None and before.known.vmas is vmas
                guards = before.guards if before is not None and same else _guard_regions(task.pid, vmas)
                mapped = files.add_process(task.pid, vmas)
                core, info = read_task_core(task.pid), read_mm_info(task.pid)
                snapshots.append(_Snapshot(task, core, info, vmas, mapped, guards))
        return cls([s.task for s in snapshots], snapshots, files)

    def write(self, images: NewImagesDir) -> None:
        """Write the images. Blocks."""
        images.write_raw("pstree.img", encode_pstree(self._tasks))
        for s in self._snapshots:
            images.write_raw(f"core-{s.task.vpid}.img", encode_core(s.core))
            vmas = learn_flags(s.task.pid, s.vmas)
            images.write_raw(f"mm-{s.task.vpid}.img", encode_mm(s.info, vmas, s.files, s.guards))
        images.write_raw("files.img", self._files.encode_files())
        images.write_raw("memfd.img", self._files.encode_memfds())


def _guard_regions(pid: int, vmas: VmaTable) -> Runs:
    """The guard regions (MADV_GUARD_INSTALL) of a process, where the kernel can tell them."""
    if not kerndat.pagemap_scan_guard().works or not len(vmas):
        return empty_runs()
    vec = np.empty((_GUARD_REGIONS, 3), np.uint64)
    found = [empty_runs()]
    start, end = 0, int(vmas.end[vmas.end <= np.uint64(ARCH.task_size)][-1])
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while start < end:
            count, start = pagemap_scan(fd, start, end, vec, mask=PageIs.GUARD, returned=PageIs.GUARD)
            found.append(vec[:count, :2].copy())
    finally:
        os.close(fd)
    return canonical(np.concatenate(found))
