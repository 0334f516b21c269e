"""Tracking writes by the soft-dirty bit (CONFIG_MEM_SOFT_DIRTY; x86_64, s390, ppc64;
Documentation/admin-guide/mm/soft-dirty.rst).

The kernel sets bit 55 of a page's pagemap entry when the page is written to; writing ``4`` to /proc/PID/clear_refs
clears it for the whole process at once. Reading and clearing are two steps, so the target stays stopped from the first
to the second. CRIU uses the same bit: chains may go from one to the other.

There is one bit for everybody. Who cleared it last is written down in the runtime directory, per process: a generation.
It is marked as lost before the bit is cleared, and set when the images are complete.

On most kernels the bit says nothing of a page table that mremap(2) moved as a whole: so the generation comes with notes
of where the page tables were (`incdump.tracking.page_tables`).
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from incdump import kerndat
from incdump.errors import TrackerUnavailable
from incdump.model.regions import PageIs, Window, mark
from incdump.model.runs import canonical
from incdump.model.vmas import VmaFlag, VmaKind
from incdump.tracking.page_tables import PageTableWatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump.model.vmas import VmaTable
    from incdump.proc.pagemap import PagemapReader
    from incdump.tracking.page_tables import Notes

NAME = "soft-dirty"


@dataclass(frozen=True, slots=True)
class SoftDirtyRecord:
    """Who reset the soft-dirty bits of a process last, as far as incdump knows.

    :ivar start_time: of the process, clock ticks since boot.
    :ivar boot_id: of the running kernel.
    :ivar generation: of the dump that did it; None if that dump was not finished.
    :ivar uptime: when, microseconds since boot.
    """

    start_time: int
    boot_id: str
    generation: str | None
    uptime: int


class SoftDirtyLog:
    """The records of all processes, a small file each."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def _path(self, pid: int) -> str:
        return os.path.join(self._directory, f"soft-dirty-{pid}.json")

    def read(self, pid: int, start_time: int, boot_id: str) -> SoftDirtyRecord | None:
        """The record of this very process, or None when incdump never reset it."""
        try:
            with open(self._path(pid), encoding="utf-8") as file:
                record = SoftDirtyRecord(**json.load(file))
        except (OSError, ValueError, TypeError):
            return None
        return record if (record.start_time, record.boot_id) == (start_time, boot_id) else None

    def write(self, pid: int, record: SoftDirtyRecord) -> None:
        """Replace the record of a process; whole, or not at all."""
        temporary = f"{self._path(pid)}.{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(asdict(record), file)
        os.replace(temporary, self._path(pid))

    def _notes_path(self, pid: int) -> str:
        return os.path.join(self._directory, f"page-tables-{pid}.npz")

    def read_notes(self, pid: int, generation: str) -> Notes | None:
        """Where the page tables were at the reset by a generation, or None if that was not noted."""
        try:
            with open(self._notes_path(pid), "rb") as file, np.load(file, allow_pickle=False) as saved:
                notes: Notes = saved["notes"]
                return notes if str(saved["generation"]) == generation else None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None

    def write_notes(self, pid: int, generation: str, notes: Notes) -> None:
        """Replace the notes of a process; before the record of that generation."""
        temporary = f"{self._notes_path(pid)}.{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            np.savez(file, notes=notes, generation=np.array(generation))
        os.replace(temporary, self._notes_path(pid))

    def forget(self, pid: int) -> bool:
        """Remove the record of a process; whether there was one."""
        with suppress(FileNotFoundError):
            os.unlink(self._notes_path(pid))
        try:
            os.unlink(self._path(pid))
        except FileNotFoundError:
            return False
        return True

    def pids(self) -> list[int]:
        """The processes with a record."""
        names = os.listdir(self._directory)
        return sorted(int(n[11:-5]) for n in names if n.startswith("soft-dirty-") and n[11:-5].isdecimal())


def may_trust(record: SoftDirtyRecord | None, parent_generation: str | None, parent_uptime: int | None) -> bool:
    """Whether the bits tell what was written since a parent dump.

    :param record: the last reset by incdump.
    :param parent_generation: of the parent images; None when CRIU wrote them.
    :param parent_uptime: dump_uptime of the parent's inventory, microseconds; None if it has none.
    """
    if parent_generation is not None:
        return record is not None and record.generation == parent_generation
    if parent_uptime is None:
        return False
    return record is None or record.uptime < parent_uptime


def reset(pid: int) -> None:
    """Clear the soft-dirty bits of a process, which the caller keeps stopped.

    :raises incdump.errors.TrackerUnavailable: the kernel does not let us.
    """
    try:
        with open(f"/proc/{pid}/clear_refs", "wb", buffering=0) as file:
            file.write(b"4")
    except OSError as error:
        raise TrackerUnavailable(
            f"cannot reset soft-dirty bits of process {pid}: {error.strerror}", pid=pid, errno=error.errno
        ) from error


def blind_spot(reader: PagemapReader) -> str | None:
    """Why what this reader sees is not enough to say that a page was not written, or None.

    A page that was dropped, and then read, is the zero page: its soft-dirty bit is clear though it has changed.
    """
    if reader.name == "scan":
        known = kerndat.scan_categories() & PageIs.SOFT_DIRTY
        return None if known else "this kernel's PAGEMAP_SCAN does not tell soft-dirty pages"
    if kerndat.zero_page_pfn() is None:
        return "without page frame numbers (CAP_SYS_ADMIN) zero pages look like pages that were not written"
    return None


def watchable(vmas: VmaTable) -> NDArray[np.bool_]:
    """The VMAs whose bit means something, shape (n,): private memory, but not where KSM merges pages.

    A merged page gets a new entry without the bit, whatever was written before (replace_page() in mm/ksm.c).
    """
    private = vmas.of_kind(VmaKind.ANON, VmaKind.FILE_PRIVATE)
    private &= (vmas.flags & np.uint64(VmaFlag.MERGEABLE)) == 0
    return private


def table_watch(pagemap_fd: int, before: Notes | None) -> PageTableWatch | None:
    """What finds page tables that were moved where the bits do not tell; None where they do, or where it cannot.

    :param before: of the parent's dump; None: they are taken to be in place.
    """
    needed = kerndat.sees_moves() and not kerndat.soft_dirty_moves().works
    return PageTableWatch(pagemap_fd, before) if needed else None


def windows(
    pagemap_fd: int,
    reader: PagemapReader,
    vmas: VmaTable,
    watched: NDArray[np.bool_],
    tables: PageTableWatch | None = None,
) -> Iterator[Window]:
    """Windows in which the soft-dirty bit is told as WRITTEN.

    :param watched: of `watchable`; only their pages get WPALLOWED.
    :param tables: is told of what is there, and asked whether it was there before.
    """
    found = _windows(pagemap_fd, reader, vmas, watched)
    return found if tables is None else tables.told(found)


def _windows(pagemap_fd: int, reader: PagemapReader, vmas: VmaTable, watched: NDArray[np.bool_]) -> Iterator[Window]:
    spans = canonical(vmas.spans(watched))
    for window in reader.windows(pagemap_fd, vmas):
        regions = window.regions
        dirty = (regions[:, 2] & np.uint64(PageIs.SOFT_DIRTY)) != 0
        categories = regions[:, 2] & ~np.uint64(PageIs.WRITTEN | PageIs.WPALLOWED)
        categories |= np.where(dirty, np.uint64(PageIs.WRITTEN), np.uint64(0))
        told = np.stack((regions[:, 0], regions[:, 1], categories), axis=1)
        yield Window(window.lo, window.hi, mark(told, spans, PageIs.WPALLOWED))
