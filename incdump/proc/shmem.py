"""Shared memory segments: shared anonymous memory, memfds and SysV segments, each dumped once however often mapped.

A segment is a file on the kernel's own shmem mount (or, for huge pages, on its hugetlbfs mount). It is read as that
file, not through anybody's mapping: its pages are there whether or not a page table points to them, and a page that
was never written is a hole and reads as zero. lseek(2) with SEEK_DATA and SEEK_HOLE tells the populated extents;
swapped-out pages count as data. hugetlbfs knows no holes: such a segment is data throughout.

The file is opened through /proc/PID/map_files, which takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE; a memfd also
through /proc/PID/fd of a process that still has it open. When neither works the segment can only be read through the
mappings, `incdump.proc.memory`.

Addresses of a segment's pages are offsets in it, here and in its pagemap image.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from incdump.errors import TargetExited
from incdump.model.runs import PAGE_SIZE, Runs, canonical, empty_runs
from incdump.model.runs import run as one_run
from incdump.model.vmas import VmaKind, VmaTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

_SYSV_ID = 1 << 32


@dataclass(frozen=True, slots=True)
class SegmentMapping:
    """One mapping of a segment.

    :ivar pid: the process.
    :ivar start: first address, bytes.
    :ivar end: end address.
    :ivar pgoff: where in the segment the mapping begins, bytes.
    """

    pid: int
    start: int
    end: int
    pgoff: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A shared memory segment.

    :ivar id: the number of its image files: the inode number, or for a SysV segment its shmid (plus 2**32 if another
        segment has that number).
    :ivar name: as in maps, for example ``/memfd:name (deleted)``.
    :ivar kind: `VmaKind.SHMEM` or `VmaKind.HUGETLB_SHARED`.
    :ivar size: bytes, page aligned: of the file if it can be opened, else up to where it is mapped.
    :ivar path: /proc path by which it can be opened, or None.
    :ivar mappings: who maps it where; never empty.
    :ivar file: its device and inode number, as in `VmaTable`; None if they are not known.
    """

    id: int
    name: str
    kind: VmaKind
    size: int
    path: str | None
    mappings: tuple[SegmentMapping, ...]
    file: tuple[int, int] | None = None

    @property
    def is_sysv(self) -> bool:
        """Whether it is a SysV segment (shmget)."""
        return self.name.startswith("/SYSV")

    def open(self) -> SegmentFile | None:
        """Open it for reading, or None when that takes privileges that we do not have.

        :raises TargetExited: it is mapped no more where it was.
        """
        denied = False
        paths = [_map_file(mapping) for mapping in self.mappings]
        for path in paths if self.path is None else [self.path, *paths]:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                denied = denied or e.errno in (errno.EPERM, errno.EACCES)
                continue
            if self.file in (None, _file_of(fd)):  # else something else is mapped there by now
                return SegmentFile(fd)
            os.close(fd)
        if denied:
            return None
        raise TargetExited(f"shared memory {self.name} is mapped no more", path=self.path)


def find_segments(tables: Mapping[int, VmaTable]) -> tuple[Segment, ...]:
    """The shared memory segments that a set of processes maps, by ascending id.

    :param tables: each process's mappings, by pid.
    """
    # A SysV segment shows its shmid for an inode number: that may be another segment's inode number, too.
    found: dict[tuple[int, int, bool], list[tuple[VmaTable, int, SegmentMapping]]] = {}
    for pid, table in tables.items():
        for i in np.flatnonzero(table.of_kind(VmaKind.SHMEM, VmaKind.HUGETLB_SHARED)).tolist():
            key = (int(table.dev[i]), int(table.inode[i]), table.names[i].startswith("/SYSV"))
            mapping = SegmentMapping(pid, int(table.start[i]), int(table.end[i]), int(table.pgoff[i]))
            found.setdefault(key, []).append((table, i, mapping))
    taken: set[int] = set()
    segments = []
    for (dev, inode, _), rows in sorted(found.items(), key=lambda item: (item[0][2], item[0])):
        number = inode
        while number in taken:
            number += _SYSV_ID
        taken.add(number)
        table, i, _ = rows[0]
        mappings = tuple(mapping for _, _, mapping in rows)
        path = _path_of(mappings, dev, inode, table.names[i])
        name, kind = table.names[i], VmaKind(int(table.kind[i]))
        segments.append(Segment(number, name, kind, _size_of(path, mappings), path, mappings, (dev, inode)))
    return tuple(sorted(segments, key=lambda segment: segment.id))


def _path_of(mappings: Iterable[SegmentMapping], dev: int, inode: int, name: str) -> str | None:
    """A path by which the segment can be opened for reading, or None."""
    pids: dict[int, None] = {}
    for mapping in mappings:
        pids[mapping.pid] = None
        path = _map_file(mapping)
        if _can_open(path, (dev, inode)):
            return path
    if name.startswith("/memfd:"):
        for pid in pids:
            for path in _fd_paths(pid, dev, inode):
                if _can_open(path, (dev, inode)):
                    return path
    return None


def _map_file(mapping: SegmentMapping) -> str:
    return f"/proc/{mapping.pid}/map_files/{mapping.start:x}-{mapping.end:x}"


def _can_open(path: str, file: tuple[int, int]) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _file_of(fd) == file
    finally:
        os.close(fd)


def _file_of(fd: int) -> tuple[int, int]:
    """Device and inode number of an open file."""
    status = os.fstat(fd)
    return os.major(status.st_dev) << 20 | os.minor(status.st_dev), status.st_ino


def _fd_paths(pid: int, dev: int, inode: int) -> Iterable[str]:
    """The /proc/PID/fd entries that are this file."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in names:
        path = f"/proc/{pid}/fd/{name}"
        try:
            status = os.stat(path)
        except OSError:
            continue
        if status.st_ino == inode and os.major(status.st_dev) << 20 | os.minor(status.st_dev) == dev:
            yield path


def _size_of(path: str | None, mappings: Iterable[SegmentMapping]) -> int:
    """The size of the segment in bytes, whole pages."""
    if path is not None:
        try:
            return os.stat(path).st_size + PAGE_SIZE - 1 & -PAGE_SIZE
        except OSError:
            pass
    return max(mapping.pgoff + mapping.end - mapping.start for mapping in mappings)


class SegmentFile:
    """A segment, open for reading; threads may share it. A context manager.

    :param fd: owned by the object from now on.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def size(self) -> int:
        """Its present size in bytes, in whole pages."""
        return os.fstat(self._fd).st_size + PAGE_SIZE - 1 & -PAGE_SIZE

    def populated(self) -> Runs:
        """The extents that hold data, as offsets; everything else is zero. One pair of system calls an extent."""
        size = self.size
        extents: list[tuple[int, int]] = []
        end = 0
        while end < size:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
                end = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as e:
                if e.errno == errno.ENXIO:  # no data up to the end, or truncated meanwhile
                    break
                if e.errno == errno.EINVAL:  # a file system without holes
                    return one_run(0, size)
                raise
            extents.append((start & -PAGE_SIZE, min(end + PAGE_SIZE - 1 & -PAGE_SIZE, size)))
        return canonical(np.array(extents, np.uint64)) if extents else empty_runs()

    def read_into(self, buffer: memoryview | NDArray[np.uint8], runs: Runs) -> None:
        """Read runs of offsets, back to back, into a buffer; what lies beyond the end of the file is zero.

        :param buffer: writable, contiguous, at least as many bytes as the runs have.
        :param runs: shape (n, 2), start and end, bytes.
        """
        into = np.frombuffer(buffer, np.uint8)
        view = into.data
        position = 0
        for start, end in runs.tolist():
            stop = position + end - start
            offset = start
            while position < stop:
                copied = os.preadv(self._fd, (view[position:stop],), offset)
                if not copied:
                    into[position:stop] = 0
                    break
                position += copied
                offset += copied
            position = stop
