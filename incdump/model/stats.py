"""Counters and times of a dump, under CRIU's names.

Times are microseconds. The first block is what CRIU keeps in stats-dump (images/stats.proto); the second is
incdump's own and goes to ``--json`` and the library only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class DumpStats:
    """What one dump did.

    :ivar freezing_time: from the start of seizing the tree until every thread is stopped.
    :ivar frozen_time: from there until the tree is let go; 0 for a pre-dump that never stopped it.
    :ivar memdump_time: finding out what to write: VMAs, pagemap windows, classification, tracker.
    :ivar memwrite_time: writing pages and pagemaps (sums over writers that ran side by side are not made: wall time).
    :ivar pages_scanned: populated pages of private memory that were looked at.
    :ivar pages_skipped_parent: of these, left to the parent images as holes.
    :ivar pages_written: of these, written.
    :ivar pages_lazy: always 0, pages are never left for later.
    :ivar page_pipes: chunks handed to writers.
    :ivar page_pipe_bufs: runs in these chunks.
    :ivar shpages_scanned: the same for shared memory segments.
    :ivar shpages_skipped_parent: the same for shared memory segments.
    :ivar shpages_written: the same for shared memory segments.
    :ivar scan_time: time in which the pagemap reader and the classify stage were busy, summed; without comparing by
        content.
    :ivar total_time: from the call to the finished images dir.
    :ivar stopped_time: time in which any thread of the tree was kept stopped by incdump, in all: freezing and frozen
        time of a dump; the injection of one system call when tracking starts.
    :ivar pages_untracked: pages written whole because no tracker could vouch for their mapping or process.
    :ivar pages_compared: pages read and compared by hash, for want of a tracker or by ``--tracker content``.
    :ivar pages_deferred: of pages_scanned, left out of a round of the pre-copy loop because they are written in every
        round: neither written nor left to the parent images.
    :ivar pages_vanished: pages that were gone before they could be read (pre-dumps of a running target only).
    :ivar bytes_written: size of all pages images.
    """

    freezing_time: int = 0
    frozen_time: int = 0
    memdump_time: int = 0
    memwrite_time: int = 0
    pages_scanned: int = 0
    pages_skipped_parent: int = 0
    pages_written: int = 0
    pages_lazy: int = 0
    page_pipes: int = 0
    page_pipe_bufs: int = 0
    shpages_scanned: int = 0
    shpages_skipped_parent: int = 0
    shpages_written: int = 0
    scan_time: int = 0
    total_time: int = 0
    stopped_time: int = 0
    pages_untracked: int = 0
    pages_compared: int = 0
    pages_deferred: int = 0
    pages_vanished: int = 0
    bytes_written: int = 0


@dataclass(slots=True)
class CheckpointTimes:
    """How a checkpoint divides, microseconds.

    :ivar way: how CRIU was kept from the memory: ``"leash"``, ``"preload"`` or ``"lazy-pages"``.
    :ivar why: why that way.
    :ivar mappings: ``"told by incdump"``; or ``"read by CRIU"`` and why: that takes longer the more memory there is.
    :ivar before_scan: from the start of CRIU until incdump could begin: the tree is frozen, and CRIU looks for the
        first pages; by lazy pages it has done all its work.
    :ivar memory: incdump's scan and copy, the tree frozen; but by lazy pages CRIU is at work beside it.
    :ivar waited: from there until CRIU had written all else.
    :ivar in_place: from there until the images were complete, the tree still frozen.
    """

    way: str = ""
    why: str = ""
    mappings: str = ""
    before_scan: int = 0
    memory: int = 0
    waited: int = 0
    in_place: int = 0


@dataclass(slots=True)
class DumpResult:
    """The outcome of a dump.

    :ivar images_dir: absolute path of the directory that was filled.
    :ivar parent: absolute path of the parent images dir, or None.
    :ivar pid: the root of the target tree.
    :ivar pids: every process dumped, the root first.
    :ivar exited: processes of the tree that were gone before they could be dumped.
    :ivar tracker: the tracker that was used (``"uffd-wp"``, ``"soft-dirty"``, ``"content"``).
    :ivar tracker_reason: why that one.
    :ivar pagemap: the pagemap reader that was used (``"scan"``, ``"cache"``, ``"plain"``).
    :ivar generation: the generation recorded in the images dir, a hexadecimal text.
    :ivar tracked_for: seconds for which the target stays tracked (0: it is not; None: as long as its session).
    :ivar incremental: whether the parent was built upon (for the root process).
    :ivar stats: counters and times.
    :ivar warnings: every fallback that was taken, one line each.
    :ivar criu: of a checkpoint: which CRIU made the rest of it; else None.
    :ivar checkpoint: of a checkpoint: how its time divides; else None.
    """

    images_dir: str
    pid: int
    parent: str | None = None
    pids: list[int] = field(default_factory=list)
    exited: list[int] = field(default_factory=list)
    tracker: str = ""
    tracker_reason: str = ""
    pagemap: str = ""
    generation: str = ""
    tracked_for: float | None = 0
    incremental: bool = False
    stats: DumpStats = field(default_factory=DumpStats)
    warnings: list[str] = field(default_factory=list)
    criu: str | None = None
    checkpoint: CheckpointTimes | None = None

    def as_dict(self) -> dict[str, Any]:
        """A flat JSON object: the counters beside the other fields."""
        flat = asdict(self)
        flat.update(flat.pop("stats"))
        return flat


@dataclass(frozen=True, slots=True)
class FreezePart:
    """A part of the time for which a last dump kept the tree stopped.

    :ivar name: ``"freezing"``, ``"scan"``, ``"copy"``, ``"waited"``, ``"in_place"``, ``"criu"`` or ``"rest"``.
    :ivar microseconds: how long it took.
    """

    name: str
    microseconds: int


def freeze_parts(result: DumpResult) -> list[FreezePart]:
    """How the time divides for which a dump, or a checkpoint, kept the tree stopped.

    Each moment is in one part, so they add up to ``freezing_time`` plus ``frozen_time``. Scan is finding out what to
    copy, as long as nothing is copied beside it; copy is from the first page copied to the last. Of a checkpoint, criu
    is what CRIU did before it looked for pages, and after it was let through the gate.

    :returns: none, if it is not known how long the tree was stopped.
    """
    stats, times = result.stats, result.checkpoint
    if not stats.frozen_time:
        return []
    memory = stats.memdump_time if times is None else times.memory
    copy = min(stats.memwrite_time, memory)
    parts = {"freezing": stats.freezing_time, "scan": memory - copy, "copy": copy}
    if times is not None:
        parts |= {"waited": times.waited, "in_place": times.in_place}
    rest = stats.freezing_time + stats.frozen_time - sum(parts.values())
    if rest < 0:  # the clocks of CRIU and incdump do not agree to the microsecond
        parts[max(parts, key=parts.__getitem__)] += rest
    parts["rest" if times is None else "criu"] = max(0, rest)
    return [FreezePart(name, microseconds) for name, microseconds in parts.items()]


@dataclass(slots=True)
class RestoreResult:
    """The outcome of a restore.

    :ivar images_dir: absolute path of the directory that was restored.
    :ivar pid: the root of the restored tree.
    :ivar criu: which CRIU did it.
    :ivar forking_time: microseconds that CRIU took to make the processes.
    :ivar restore_time: microseconds that it took in all.
    :ivar pages_restored: pages that it filled in.
    """

    images_dir: str
    pid: int
    criu: str
    forking_time: int = 0
    restore_time: int = 0
    pages_restored: int = 0

    def as_dict(self) -> dict[str, Any]:
        """A flat JSON object."""
        return asdict(self)
