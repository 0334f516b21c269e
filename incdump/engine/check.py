"""Proving images: the chain in itself, and against the live process.

`check` needs the images alone: every hole is found in a parent, sizes and offsets are right, every directory is
finished. `check_against` freezes the process and compares every page. It reads the pagemap by the `plain` reader and
without any tracker, so that it does not share the ways by which a dump could go wrong.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from incdump.classify import Rule, classify, rules
from incdump.engine.segments import MappedSegment, OpenedSegment
from incdump.engine.threads import in_thread
from incdump.errors import ParentMismatch
from incdump.freeze.seize import Freezer
from incdump.holder.client import keep_holder_out_of_trees
from incdump.images.chain import ChainReport, check_chain
from incdump.images.images_dir import ImagesDir
from incdump.model.arguments import check_arguments
from incdump.model.runs import (
    PAGE_SIZE,
    Runs,
    canonical,
    empty_runs,
    entry_runs,
    intersect,
    page_addresses,
    page_count,
    runs_of_pages,
    subtract,
    union,
)
from incdump.model.vmas import VmaKind
from incdump.proc.lazy_memory import check_supplied
from incdump.proc.limits import names_limits
from incdump.proc.maps import read_vmas
from incdump.proc.memory import ProcessMemory
from incdump.proc.pagemap import make_reader
from incdump.proc.served import refuse_served
from incdump.proc.shmem import find_segments
from incdump.proc.tree import check_target, process_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from incdump.model.vmas import VmaTable

_BATCH = 4 << 20
_SHOWN = 5


@dataclass(slots=True)
class AgainstReport:
    """What a comparison of images with a live process found.

    :ivar processes: processes compared.
    :ivar pages_compared: pages that are in the images and in the process.
    :ivar pages_wrong: of these, with other bytes.
    :ivar pages_missing: pages of the process that the images do not have (and that are not all zero).
    :ivar pages_stray: pages of the images at addresses that the process has not mapped.
    :ivar first: the first few of these places, one line each.
    """

    processes: int = 0
    pages_compared: int = 0
    pages_wrong: int = 0
    pages_missing: int = 0
    pages_stray: int = 0
    first: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every page is right."""
        return not (self.pages_wrong or self.pages_missing or self.pages_stray)

    def _note(self, what: str, where: str, runs: Runs, vmas: VmaTable | None = None) -> int:
        """Name the first of some pages; returns how many there are."""
        for start in runs[: max(0, _SHOWN - len(self.first)), 0].tolist():
            name = ""
            if vmas is not None:
                at = int(vmas.at(np.array([start], np.uint64))[0])
                name = f" in {vmas.names[at] or 'anonymous memory'}" if at >= 0 else " (not mapped)"
            self.first.append(f"{where}: page {start:#x}{name} {what}")
        return page_count(runs)


class _LiveReport(AgainstReport):
    """One that says when it grows."""

    def __init__(self, grown: Callable[[], None]) -> None:
        super().__init__()
        self._grown = grown

    def _note(self, what: str, where: str, runs: Runs, vmas: VmaTable | None = None) -> int:
        self._grown()
        return super()._note(what, where, runs, vmas)


def check(images_dir: str | os.PathLike[str]) -> ChainReport:
    """Prove a chain of images: every hole found in a parent, sizes and offsets right, no unfinished directory.

    :param images_dir: the newest directory of the chain.
    :raises incdump.errors.ImagesError: what is wrong, with path, pid and address.
    """
    check_arguments(images_dir=images_dir)
    return check_chain(ImagesDir(images_dir))


@names_limits
async def check_against(
    images_dir: str | os.PathLike[str], pid: int, *, freeze_timeout: float = 10.0, stall_timeout: float = 30.0
) -> AgainstReport:
    """Freeze a process tree and compare every page of it with the images. It is let go afterwards as it was.

    The images are expected to be of this very moment: a tree that was left stopped after ``incdump dump``.

    :param pid: the root of the tree.
    :param freeze_timeout: seconds to wait for every thread to stop.
    :param stall_timeout: seconds for which it stays frozen while nothing gets done, as in `incdump.DumpOptions`.
    :raises incdump.errors.ImagesError: the chain is broken.
    :raises incdump.errors.TargetError: the process cannot be looked at.
    """
    check_arguments(images_dir=images_dir, pid=pid, freeze_timeout=freeze_timeout, stall_timeout=stall_timeout)
    images = ImagesDir(images_dir)
    await in_thread(check_chain, images)
    root = await in_thread(check_target, pid)
    await in_thread(refuse_served, images.path, pid)
    await in_thread(keep_holder_out_of_trees)
    if images.pagemap(root.vpid) is None:
        held = ", ".join(map(str, images.pids()[:5])) or "none"
        raise ParentMismatch(f"{images.path} holds no process {root.vpid} (but {held})", pid=pid, path=images.path)
    async with Freezer(timeout=freeze_timeout, stall_timeout=stall_timeout) as freezer:
        await freezer.freeze(pid)
        report = _LiveReport(freezer.report)
        await in_thread(_compare_tree, images, pid, report, break_off=freezer.abandon)
        await freezer.thaw()
        return report


def _compare_tree(images: ImagesDir, pid: int, report: AgainstReport) -> None:
    tables: dict[int, VmaTable] = {}
    for task in process_tree(pid):
        if task.state == "Z":
            continue
        tables[task.pid] = read_vmas(task.pid, flags=True)
        check_supplied(task.pid, tables[task.pid])
        _compare_process(images, task.pid, task.vpid, tables[task.pid], report)
        report.processes += 1
    for segment in find_segments(tables):
        entries = images.shmem_pagemap(segment.id)
        if entries is None:
            continue  # CRIU's pre-dumps have none
        file = segment.open()
        source = MappedSegment(segment) if file is None else OpenedSegment(file)
        try:
            held = entry_runs(entries)
            where = f"shared memory {segment.name}"
            read_images = partial(images.read_shmem_pages, segment.id)
            _compare(held, read_images, source.read_into, where, report)
            _look_for_missing(subtract(source.populated(), held), source.read_into, where, report)
        finally:
            source.close()


def _compare_process(images: ImagesDir, pid: int, vpid: int, vmas: VmaTable, report: AgainstReport) -> None:
    where = f"process {pid}"
    held = images.covered(vpid) if images.has("pagemap", vpid) else empty_runs()
    with ProcessMemory(pid) as memory:
        mapped = canonical(vmas.spans(~vmas.of_kind(VmaKind.VVAR, VmaKind.VSYSCALL, VmaKind.DEVICE)))
        report.pages_stray += report._note("is in the images only", where, subtract(held, mapped), vmas)
        both = intersect(held, mapped)
        _compare(both, partial(images.read_pages, vpid), memory.read_into, where, report, vmas)
        missing = subtract(_payload(pid, vmas), held)
        _look_for_missing(missing, memory.read_into, where, report, vmas)


def _payload(pid: int, vmas: VmaTable) -> Runs:
    """The pages that belong in the images, by the rules of `incdump.classify`, without a tracker or a parent."""
    rule = rules(vmas)
    wanted = (rule & Rule.DUMP) != 0
    found = canonical(vmas.spans(vmas.of_kind(VmaKind.VDSO)))
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for window in make_reader("plain").windows(fd, vmas.select(wanted)):
            found = union(found, entry_runs(classify(window, vmas, rule, None).entries))
    finally:
        os.close(fd)
    return found


def _batches(runs: Runs) -> list[Runs]:
    """Runs in portions of at most 4 MiB."""
    addresses = page_addresses(runs)
    step = _BATCH // PAGE_SIZE
    return [runs_of_pages(addresses[i : i + step]) for i in range(0, len(addresses), step)]


def _compare(
    runs: Runs,
    read_images: Callable[[Runs, NDArray[np.uint8]], Runs],
    read_memory: Callable[[NDArray[np.uint8], Runs], Runs],
    where: str,
    report: AgainstReport,
    vmas: VmaTable | None = None,
) -> None:
    ours, theirs = np.empty(_BATCH, np.uint8), np.empty(_BATCH, np.uint8)
    for batch in _batches(runs):
        size = page_count(batch) * PAGE_SIZE
        read_images(batch, ours[:size])
        failed = read_memory(theirs[:size], batch)
        differ = (ours[:size].reshape(-1, PAGE_SIZE) != theirs[:size].reshape(-1, PAGE_SIZE)).any(1)
        wrong = union(runs_of_pages(page_addresses(batch)[differ]), failed)
        report.pages_compared += page_count(batch)
        report.pages_wrong += report._note("differs", where, wrong, vmas)


def _look_for_missing(
    missing: Runs,
    read_memory: Callable[[NDArray[np.uint8], Runs], Runs],
    where: str,
    report: AgainstReport,
    vmas: VmaTable | None = None,
) -> None:
    """Pages that the images lack; one that is all zero is restored right all the same."""
    buffer = np.empty(_BATCH, np.uint8)
    for batch in _batches(missing):
        size = page_count(batch) * PAGE_SIZE
        failed = read_memory(buffer[:size], batch)
        used = buffer[:size].reshape(-1, PAGE_SIZE).any(1)
        lost = subtract(runs_of_pages(page_addresses(batch)[used]), failed)
        report.pages_missing += report._note("is missing", where, lost, vmas)
