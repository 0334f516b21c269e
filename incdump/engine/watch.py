"""What is known of one process's writes, by whichever tracker: the part of a dump that invariants 1 to 3 hang on.

A `Watch` is asked in this order: `open` before anything is frozen (the holder has to stop a thread to make a
userfaultfd), `begin` with the mappings, `windows`, and then either `commit`, once the images dir is complete, or
`give_back`, whatever else happened.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from incdump import kerndat
from incdump.errors import (
    AlreadyTraced,
    IncdumpError,
    InjectionFailed,
    TargetDenied,
    TargetExited,
    TargetUnsuitable,
)
from incdump.model.runs import empty_runs, page_addresses
from incdump.proc.identity import is_exiting, read_stat
from incdump.proc.pagemap import pmes_at
from incdump.proc.pagemap.pme import PME_PRESENT
from incdump.proc.pinned import pinned_io
from incdump.proc.tree import TRACER_PATIENCE, tracer_leaves
from incdump.tracking import content, soft_dirty, uffd_wp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump.engine.process import Means
    from incdump.holder.client import Lease
    from incdump.model.regions import Window
    from incdump.model.runs import Runs
    from incdump.model.vmas import VmaTable
    from incdump.proc.tree import Task
    from incdump.tracking.page_tables import Notes, PageTableWatch


_NEW_ADDRESS_SPACE = "process {pid} has a new address space (execve): tracking starts anew"


@dataclass(frozen=True, slots=True)
class ParentImages:
    """What the parent images dir says of one process or segment.

    :ivar covered: the pages that its pagemap has.
    :ivar generation: of the dump that wrote it; None if CRIU did.
    :ivar tracker: that was reset by that dump; None if unknown.
    :ivar uptime: when that was, microseconds since boot, if CRIU wrote it; else None.
    :ivar hashes: of the pages that were compared by content; None if none were.
    """

    covered: Runs
    generation: str | None = None
    tracker: str | None = None
    uptime: int | None = None
    hashes: content.HashTable | None = None


class Watch:
    """The tracker's side of one process in one dump.

    :ivar ended: why its tracking ended before this dump; None: it did not, or that is not known.
    """

    def __init__(self, task: Task, means: Means) -> None:
        self.task = task
        self._means = means
        self._pagemap_fd = -1
        self._lease: Lease | None = None
        self._round: uffd_wp.UffdWpRound | None = None
        self._untrusted = means.tracker == content.NAME
        self._suspect: str | None = None
        self._mappings: tuple[str, ...] = ()
        self._frozen = False
        self._since: str | None = None  # the parent's generation, of soft-dirty
        self.ended: str | None = None
        self._tables: PageTableWatch | None = None
        self._notes: Notes | None = None

    def open(self) -> None:
        """Open the process's pagemap, and borrow its userfaultfd if that is the tracker. Blocks.

        :raises incdump.errors.TargetExited: it is gone, or another process has its pid.
        """
        self._reopen()
        if self._means.tracker != content.NAME:
            self._entrust()

    def open_frozen(self) -> None:
        """Open the process anew now that it is frozen: it may have called execve(2) since `open`.

        A process that turns up only now is not tracked: nothing can be injected into it any more.
        """
        self._frozen = True
        self._reopen()
        if self._lease is not None:
            self._round = self._new_round(self._lease)
        elif self._means.tracker == uffd_wp.NAME:
            self._untrusted = True
        elif self._means.tracker == soft_dirty.NAME:
            self._entrust()

    def _reopen(self) -> None:
        pid = self.task.pid
        self._close_pagemap()
        try:
            self._pagemap_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            start_time = read_stat(pid).start_time
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetExited(f"process {pid} exited", pid=pid, errno=error.errno) from None
        # The descriptor keeps to the address space that it was opened on, so this holds from here on.
        if start_time != self.task.start_time:
            raise TargetExited(f"process {pid} exited, and another one has its pid", pid=pid)

    def _entrust(self, *, renew: bool = False) -> None:
        """Leave the process to the tracker, unless something about it makes its answers worthless."""
        pid, warn = self.task.pid, self._means.warn
        self._untrusted = True
        reason = pinned_io(pid)
        if reason is not None:
            warn(f"process {pid} {reason}: writes to its memory can go unseen, so it is compared by content")
            return
        other = self._means.runs_in_memory_of(self.task)
        if other is not None:
            warn(f"process {pid} runs in the memory of process {other} (vfork): not tracked itself")
            return
        blind = soft_dirty.blind_spot(self._means.reader) if self._means.tracker == soft_dirty.NAME else None
        if blind is not None:
            warn(f"process {pid} cannot be tracked by soft-dirty ({blind}): it is compared by content")
            return
        if self._means.tracker == uffd_wp.NAME:
            try:
                self._acquire(renew=renew)
            except (InjectionFailed, TargetUnsuitable, AlreadyTraced, TargetDenied) as error:
                warn(f"process {pid} cannot be tracked ({error}): it is compared by content")
                return
        self._untrusted = False

    def _acquire(self, *, renew: bool) -> None:
        lease = self._lease_without_tracer(renew)
        self.ended = lease.ended or self.ended
        self._lease, self._round = lease, self._new_round(lease)
        self._means.stats.stopped_time += lease.stopped_us
        if not lease.started and not self._round.is_alive():
            self._means.warn(_NEW_ADDRESS_SPACE.format(pid=self.task.pid))
            self._drop_lease()
            self._acquire(renew=True)

    def _lease_without_tracer(self, renew: bool) -> Lease:
        """Somebody who traces the process for a moment only is waited for: only one may at a time."""
        pid, started = self.task.pid, self.task.start_time
        patience = time.monotonic() + TRACER_PATIENCE
        while True:
            try:
                return self._means.keeper.acquire(pid, started, renew=renew)
            except AlreadyTraced:
                left = patience - time.monotonic()
                if left <= 0 or not tracer_leaves(pid, left):
                    raise

    def _new_round(self, lease: Lease) -> uffd_wp.UffdWpRound:
        return uffd_wp.UffdWpRound(self.task.pid, lease.uffd, self._pagemap_fd, keeps_huge=self._means.keeps_huge)

    @property
    def tracker(self) -> str:
        """The tracker that this process is entrusted to."""
        return content.NAME if self._untrusted else self._means.tracker

    def is_about(self, parent: ParentImages) -> bool:
        """Whether the tracker's answer will be about the time since this parent dump."""
        if self._untrusted:
            return parent.tracker == content.NAME and parent.hashes is not None
        if self._means.tracker == soft_dirty.NAME:
            same = parent.tracker in (soft_dirty.NAME, None)
            self._since = parent.generation
            return same and soft_dirty.may_trust(self._soft_dirty_record(), parent.generation, parent.uptime)
        assert self._lease is not None
        return parent.tracker == uffd_wp.NAME and parent.generation == self._lease.generation is not None

    @property
    def finds_out(self) -> bool:
        """Whether `begin` leaves out mappings that should not be watched even if their flags do not say so."""
        return self._round is not None and not kerndat.watches_droppable()

    def begin(self, vmas: VmaTable) -> tuple[NDArray[np.bool_], bool]:
        """Put the mappings under watch.

        :param vmas: all mappings of the process.
        :returns: for each of them whether it is watched, shape (n,); and whether the watch begins only now because the
            process has called execve(2).
        """
        self._mappings = vmas.names
        unwatched = np.zeros(len(vmas), bool)
        if self._untrusted:
            return unwatched, False
        if self._round is None:
            return soft_dirty.watchable(vmas), False
        try:
            return self._round.register(vmas), False
        except uffd_wp.AddressSpaceGone:
            if is_exiting(self.task.pid):  # rather than that it has called execve(2)
                raise TargetExited(f"process {self.task.pid} exited", pid=self.task.pid) from None
            self._means.warn(_NEW_ADDRESS_SPACE.format(pid=self.task.pid))
        watched = self._begin_anew(vmas)
        return unwatched if watched is None else watched, True

    def _begin_anew(self, vmas: VmaTable) -> NDArray[np.bool_] | None:
        """Watch another address space than the one that was tracked so far; None if that cannot be."""
        self._drop_lease()
        if self._frozen:
            self._untrusted = True
        else:
            self._entrust(renew=True)
        try:
            return None if self._round is None else self._round.register(vmas)
        except uffd_wp.AddressSpaceGone:  # once more, or it has exited
            self._drop_lease()
            self._untrusted = True
            return None

    def written_so_far(self, vmas: VmaTable) -> Runs:
        """About what was written so far, where that is quick to find out; else nothing. Nothing is cleared.

        :raises incdump.errors.TargetExited: the process is gone.
        """
        return empty_runs() if self._round is None else self._round.written_so_far(vmas)

    def windows(self, vmas: VmaTable, watched: NDArray[np.bool_], *, in_parent: Runs | None) -> Iterator[Window]:
        """Read what is populated and, of watched mappings, what was written; the answer is cleared with the reading.

        :param vmas: the mappings that are wanted.
        :param watched: what `begin` said of them.
        :param in_parent: the pages that the parent images have, canonical, where what was not written may be left out;
            None: nothing may be.
        """
        for window in self._raw_windows(vmas, watched, in_parent):
            if not self._frozen:
                # After pages were marked as clean, before they are read: I/O that was under way to them either has
                # ended by now, so that its bytes are read, or its file is still open.
                self._look_for_pinned_io()
            yield window
        if self._means.tracker == soft_dirty.NAME and self._means.rearm and not self._untrusted:
            if self._tables is not None:
                self._notes = self._tables.notes()
            self._log_soft_dirty(None)
            soft_dirty.reset(self.task.pid)
        self._look_for_pinned_io()

    def check_absent(self, runs: Runs) -> None:
        """Make sure that pages of a frozen process, which could not be read, are not there. Blocks.

        :param runs: no more than a chunk of pages. Guard pages, and the markers of pages that are the file's again, may
            be among them.
        :raises incdump.errors.TargetDenied: one is.
        """
        there = page_addresses(runs)[pmes_at(self._pagemap_fd, runs) & np.uint64(PME_PRESENT) != 0]
        if len(there):
            pid, first = self.task.pid, int(there[0])
            raise TargetDenied(
                f"{len(there)} pages of process {pid} cannot be read, the first at {first:#x}, and would be missing: "
                "does the kernel forbid it (proc_mem.force_override=)? See `incdump doctor`",
                pid=pid,
                vaddr=first,
            )

    def _raw_windows(self, vmas: VmaTable, watched: NDArray[np.bool_], in_parent: Runs | None) -> Iterator[Window]:
        means = self._means
        if not len(vmas):
            return iter(())
        if self._round is not None:
            return self._round.windows(means.reader, vmas, watched, rearm=means.rearm, in_parent=in_parent)
        if means.tracker == soft_dirty.NAME and not self._untrusted:
            self._tables = soft_dirty.table_watch(
                self._pagemap_fd, None if in_parent is None else self._notes_of_parent()
            )
            return soft_dirty.windows(self._pagemap_fd, means.reader, vmas, watched, self._tables)
        return uffd_wp.unvouched(means.reader.windows(self._pagemap_fd, vmas))

    def _look_for_pinned_io(self) -> None:
        if self._untrusted or self._suspect is not None:
            return
        self._suspect = pinned_io(self.task.pid, self._mappings)
        if self._suspect is not None:
            self._means.warn(f"process {self.task.pid} {self._suspect}: its next dump will be full")

    def give_back(self, runs: Runs | None = None) -> None:
        """Have pages count as written again. Blocks.

        :param runs: pages that could not be read after all; None for everything, when the dump failed: the generation
            is then the parent's as before, or lost, and the next dump is full.
        """
        if self._round is None or self._lease is None or self._lease.uffd < 0:
            return
        if runs is not None:
            self._round.give_back(runs)
            return
        if self._lease.generation is None:  # nothing is known of the time before either
            return
        try:
            self._round.give_back()
            self._means.keeper.commit(self._lease, self._lease.generation)
        except (OSError, IncdumpError) as error:
            self._means.warn(f"process {self.task.pid}: {error}: its next dump will be full")

    def commit(self, generation: str) -> None:
        """The images dir is complete: from here on the tracker's answers are about the time since it. Blocks."""
        if self._lease is not None:
            self._means.keeper.commit(self._lease, self._generation(generation), self._means.lasts)
        elif self._means.tracker == soft_dirty.NAME and self._means.rearm and not self._untrusted:
            self._note_tables(self._generation(generation))
            self._log_soft_dirty(self._generation(generation))

    def let_go(self) -> None:
        """The images dir is complete, and no dump is to follow: the target is tracked no more. Blocks."""
        if self._lease is not None:
            lease = self._lease
            self._drop_lease()  # the kernel takes the protection off with the last descriptor
            self._means.keeper.commit(lease, None, 0)

    def _generation(self, generation: str) -> str | None:
        return generation if self._means.rearm and self._suspect is None else None

    def meta(self, generation: str) -> dict[str, object]:
        """What incdump.json says of this process."""
        return {
            "pid": self.task.pid,
            "start_time": self.task.start_time,
            "comm": self.task.comm,
            "tracker": self.tracker,
            "generation": self._generation(generation),
        }

    def close(self) -> None:
        """Close descriptors; whatever was not committed is lost."""
        self._drop_lease()
        self._close_pagemap()

    def _drop_lease(self) -> None:
        if self._lease is not None:
            self._lease.close()
        self._lease = self._round = None

    def _close_pagemap(self) -> None:
        fd, self._pagemap_fd = self._pagemap_fd, -1
        if fd >= 0:
            os.close(fd)

    def _soft_dirty_record(self) -> soft_dirty.SoftDirtyRecord | None:
        log = self._means.soft_dirty_log
        return None if log is None else log.read(self.task.pid, self.task.start_time, self._means.boot_id)

    def _notes_of_parent(self) -> Notes | None:
        """Where the page tables were then. CRIU notes nothing: on top of its images they are taken to be in place."""
        log = self._means.soft_dirty_log
        if self._since is None or log is None:
            return None
        notes = log.read_notes(self.task.pid, self._since)
        return np.empty((0, 2), np.uint64) if notes is None else notes

    def _note_tables(self, generation: str | None) -> None:
        log = self._means.soft_dirty_log
        if log is not None and generation is not None and self._notes is not None:
            log.write_notes(self.task.pid, generation, self._notes)

    def _log_soft_dirty(self, generation: str | None) -> None:
        log = self._means.soft_dirty_log
        assert log is not None
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = int(float(file.read().split()[0]) * 1e6)
        record = soft_dirty.SoftDirtyRecord(self.task.start_time, self._means.boot_id, generation, uptime)
        log.write(self.task.pid, record)
