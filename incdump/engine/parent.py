"""What the parent images say, proved before it is trusted."""

from __future__ import annotations

import os
import time
from functools import cache
from typing import TYPE_CHECKING, Any

from incdump.engine.watch import ParentImages
from incdump.errors import ParentMismatch
from incdump.images.images_dir import ImagesDir
from incdump.images.proved import ProvedChain
from incdump.model.runs import empty_runs
from incdump.proc.identity import Identity, boot_offset, is_same
from incdump.tracking import content
from incdump.tracking.content import HashTable
from incdump.xfer.wire import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from incdump.proc.tree import Task

_TICKS = os.sysconf("SC_CLK_TCK")
_NONE = "none"
"""The tracker of a process that none has followed."""


class Parent:
    """A finished, proven parent images dir.

    :param is_there: whether the pages of an image are where they are needed; None: they are all here. Asked when
        something wants to stand on that image.
    :param proved: what of its chain was proved before, and takes note of what is proved now; None: all is read.
    :raises incdump.errors.ImagesError: it, or an images dir above it, is unfinished, damaged or missing.
    """

    def __init__(
        self,
        path: Path,
        boot_id: str,
        is_there: Callable[[Image], bool] | None = None,
        proved: ProvedChain | None = None,
    ) -> None:
        self.path = path
        self._images = ImagesDir(path)
        self._covered = (proved or ProvedChain()).prove(self._images)
        self._is_there = cache(is_there) if is_there is not None else None
        self._boot_id = boot_id
        inventory = self._images.inventory()
        self._uptime = None if inventory is None else inventory.dump_uptime
        meta = self._images.meta()
        self._processes: dict[str, Any] | None = None if meta is None else meta.get("processes", {})
        self.seed = None if meta is None else meta.get("hash_seed")
        self._holder = _holder(meta, boot_id)
        self._ended = None if meta is None else _why_tracking_ended(meta)
        self._is_checkpoint = meta is not None and meta.get("kind") == "checkpoint"

    def check_root(self, root: Task) -> None:
        """Refuse a parent that does not hold this very process.

        :raises incdump.errors.ParentMismatch: it holds another, or an earlier one of the same pid.
        """
        if not self._images.has("pagemap", root.vpid):
            held = ", ".join(map(str, self._images.pids()[:5])) or "none"
            raise ParentMismatch(
                f"{self.path} holds no process {root.vpid} (but {held}): give the images dir of this target, or dump "
                "without --prev-images-dir",
                pid=root.pid,
                path=self.path,
            )
        if not self._is_same(root) and not self._is_checkpoint:
            raise ParentMismatch(
                f"{self.path} holds an earlier process that had pid {root.vpid}: dump without --prev-images-dir",
                pid=root.pid,
                path=self.path,
            )

    def _is_same(self, task: Task) -> bool:
        if self._processes is None:
            # CRIU's own check: a process that started after the dump cannot be in it.
            started = task.start_time + boot_offset()  # as CRIU sees both, which has been started from here
            return self._uptime is None or started < self._uptime * _TICKS // 1_000_000
        entry = self._processes.get(str(task.vpid))
        return (
            isinstance(entry, dict)
            and entry.get("start_time") == task.start_time
            and entry.get("boot_id", self._boot_id) == self._boot_id
        )

    def holds(self, task: Task) -> bool:
        """Whether these images have something of a process, not of an earlier one of its pid."""
        return self._images.has("pagemap", task.vpid) and (self._is_same(task) or self._is_checkpoint)

    def process(self, task: Task) -> ParentImages | None:
        """What is known of one process; None if the parent has nothing of it, or of an earlier one of its pid.

        A process that was restored from the parent, a checkpoint, has its pid but is another: no tracker has followed
        it, and only hashes tell what of it the parent has.
        """
        if not self.holds(task) or self.lacks_pages(task):
            return None
        same = self._is_same(task)
        entry = (self._processes or {}).get(str(task.vpid), {})
        if not same:
            entry = {"tracker": entry.get("tracker") if entry.get("tracker") == content.NAME else _NONE}
        return ParentImages(
            covered=self._covered.get(("pagemap", task.vpid), empty_runs()),
            generation=entry.get("generation"),
            tracker=entry.get("tracker"),
            uptime=self._uptime if self._processes is None else None,
            hashes=self._hashes(f"incdump-hashes-{task.vpid}"),
        )

    def lacks_pages(self, task: Task) -> bool:
        """Whether the pages of a process are not where they are needed."""
        return self._is_there is not None and not self._is_there(Image("pagemap", task.vpid))

    def why_untold(self, task: Task) -> str | None:
        """Why no tracker knows what a process has written since: who kept it has ended; None for another reason."""
        entry = (self._processes or {}).get(str(task.vpid), {})
        if self._holder is None or entry.get("generation") is None or not self._is_same(task) or is_same(self._holder):
            return None
        return (
            f"the process that kept track of writes (the holder, process {self._holder.pid}, started "
            f"{_clock(self._holder.start_time)}) is gone: it ended with the container or unit that started it, by "
            "`incdump untrack`, or was killed (`incdump holder` runs one outside of such)"
        )

    @property
    def tracking_ended(self) -> str | None:
        """Why nothing is tracked any more since these images were made; None: it is, or that is not known."""
        return self._ended

    def segment(self, shmem_id: int) -> ParentImages | None:
        """What is known of one shared memory segment."""
        if self._processes is None or not self._images.has("pagemap-shmem", shmem_id):
            return None
        if self._is_there is not None and not self._is_there(Image("pagemap-shmem", shmem_id)):
            return None
        hashes = self._hashes(f"incdump-hashes-shmem-{shmem_id}")
        return None if hashes is None else ParentImages(covered=hashes.known(), hashes=hashes)

    def _hashes(self, name: str) -> HashTable | None:
        path = self.path / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        return HashTable.decode(data, str(path))


def _holder(meta: dict[str, Any] | None, boot_id: str) -> Identity | None:
    """The holder process that kept the tracking, by what incdump.json says."""
    said = (meta or {}).get("holder")
    if not isinstance(said, dict) or not all(isinstance(said.get(name), int) for name in ("pid", "start_time")):
        return None
    return Identity(said["pid"], said["start_time"], boot_id)


def _clock(start_time: int) -> str:
    """A start time, in clock ticks since boot, as local time of day."""
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME) - (start_time + boot_offset()) / _TICKS
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - since_boot))


def _why_tracking_ended(meta: Mapping[str, Any]) -> str | None:
    lasts, finished = meta.get("tracked_for"), meta.get("finished")
    if not isinstance(lasts, (int, float)) or not isinstance(finished, (int, float)):
        return None
    if lasts == 0:
        return "nothing was tracked after that dump, as it did not say for how long (--track-for)"
    if time.time() < finished + lasts:
        return None
    return f"tracking ended {lasts:g} s after that dump (--track-for)"
