"""files.img and memfd.img: the files that a tree's mappings are of.

Each file has one id however many processes map it, and the executable's is that of its own mappings. A file is looked
at through /proc/PID/map_files, which finds it wherever it is mounted and even when it was deleted; without the
privilege for that, by its name under /proc/PID/root. What cannot be looked at is listed by its name alone.

Shared anonymous memory and memfds are both memfds here, as CRIU has them; the former are called ``/dev/zero``. SysV
segments, and the few segments whose number does not fit into memfd.img, are not files, and the mappings name the
segment itself.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from incdump.images.build_id import read_build_id
from incdump.images.framing import Magic, frame, unframe
from incdump.images.messages import parse
from incdump.model.vmas import VmaKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from incdump.images._pb.files_pb2 import file_entry, memfd_inode_entry
    from incdump.model.vmas import VmaTable
    from incdump.proc.shmem import Segment

    FilePath = str | os.PathLike[str]

_DELETED = " (deleted)"
_HUGEPAGE_NAME = "/anon_hugepage"
_MFD_HUGE_SHIFT = 26


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """The files behind one process's mappings.

    :ivar exe_id: of its executable in files.img; 0 if it has none.
    :ivar shmid: for each VMA the id of its file in files.img, or of its segment, or 0; shape (n,), uint64.
    :ivar is_file: for each VMA, whether `shmid` is of files.img (memfds included); shape (n,), bool.
    """

    exe_id: int
    shmid: NDArray[np.uint64]
    is_file: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _RegularFile:
    id: int
    name: bytes
    size: int | None
    mode: int | None
    build_id: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Memfd:
    id: int
    name: bytes
    shmid: int
    size: int
    status: os.stat_result | None
    seals: int
    hugetlb_flag: int | None


class FileTable:
    """The files of a dump, gathered process by process while those are there to be asked."""

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        """Begin with the shared memory segments.

        :param segments: of all processes, as `incdump.proc.shmem.find_segments` has them.
        """
        self._regular: dict[tuple[int, str], _RegularFile] = {}
        self._memfds: list[_Memfd] = []
        self._next_id = 1
        self._segment_at: dict[tuple[int, int], tuple[int, bool]] = {}
        for segment in segments:
            self._add_segment(segment)

    def __repr__(self) -> str:
        return f"<FileTable {len(self._regular)} files, {len(self._memfds)} memfds>"

    def add_process(self, pid: int, vmas: VmaTable) -> MappedFiles:
        """Take up the files that a process maps, and its executable.

        :param pid: in this process's pid namespace.
        :param vmas: its mappings.
        """
        shmid = np.zeros(len(vmas), np.uint64)
        is_file = np.zeros(len(vmas), bool)
        shared = vmas.of_kind(VmaKind.SHMEM, VmaKind.HUGETLB_SHARED)
        for row in np.flatnonzero(shared).tolist():
            shmid[row], is_file[row] = self._segment_at.get((pid, int(vmas.start[row])), (int(vmas.inode[row]), False))
        for row in np.flatnonzero(_of_files(vmas)).tolist():
            name = vmas.names[row]
            key = (int(vmas.inode[row]), name)
            if key not in self._regular:
                paths = (f"/proc/{pid}/map_files/{vmas.start[row]:x}-{vmas.end[row]:x}", f"/proc/{pid}/root{name}")
                self._add_regular(key, paths)
            shmid[row], is_file[row] = self._regular[key].id, True
        return MappedFiles(self._executable(pid), shmid, is_file)

    def encode_files(self) -> bytes:
        """The bytes of files.img."""
        from incdump.images._pb import files_pb2 as pb

        nobody = pb.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
        entries = []
        for file in self._regular.values():
            reg = pb.reg_file_entry(
                id=file.id, flags=0, pos=0, fown=nobody, name=file.name, size=file.size, mode=file.mode
            )
            reg.build_id.extend(file.build_id)
            entries.append(pb.file_entry(type=pb.REG, id=file.id, reg=reg))
        for memfd in self._memfds:
            opened = pb.memfd_file_entry(id=memfd.id, flags=os.O_RDWR, pos=0, fown=nobody, inode_id=memfd.shmid)
            entries.append(pb.file_entry(type=pb.MEMFD, id=memfd.id, memfd=opened))
        entries.sort(key=lambda entry: entry.id)
        return frame(Magic.FILES, [entry.SerializeToString() for entry in entries])

    def encode_memfds(self) -> bytes:
        """The bytes of memfd.img."""
        from incdump.images._pb import files_pb2 as pb

        entries = [
            pb.memfd_inode_entry(
                name=memfd.name,
                uid=memfd.status.st_uid if memfd.status else 0,
                gid=memfd.status.st_gid if memfd.status else 0,
                size=memfd.size,
                shmid=memfd.shmid,
                seals=memfd.seals,
                inode_id=memfd.shmid,
                hugetlb_flag=memfd.hugetlb_flag,
                mode=memfd.status.st_mode if memfd.status else None,
            )
            for memfd in self._memfds
        ]
        return frame(Magic.MEMFD, [entry.SerializeToString() for entry in entries])

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _executable(self, pid: int) -> int:
        link = f"/proc/{pid}/exe"
        try:
            name, inode = os.readlink(link), os.stat(link).st_ino
        except OSError:
            return 0
        key = (inode, name)
        if key not in self._regular:
            self._add_regular(key, (link,))
        return self._regular[key].id

    def _add_regular(self, key: tuple[int, str], paths: Iterable[str]) -> None:
        inode, name = key
        looked_at = (_look_at(path, inode) for path in paths)
        size, mode, build_id = next((found for found in looked_at if found is not None), (None, None, ()))
        self._regular[key] = _RegularFile(
            self._new_id(), os.fsencode(name.removesuffix(_DELETED)), size, mode, build_id
        )

    def _add_segment(self, segment: Segment) -> None:
        is_memfd = not segment.is_sysv and segment.id < 1 << 32
        number = segment.id
        if is_memfd:
            number = self._new_id()
            self._memfds.append(_memfd(number, segment))
        for mapping in segment.mappings:
            self._segment_at[mapping.pid, mapping.start] = (number, is_memfd)


def _of_files(vmas: VmaTable) -> NDArray[np.bool_]:
    """For each VMA, whether it is of a file that has a name."""
    candidates = vmas.of_kind(VmaKind.FILE_PRIVATE, VmaKind.FILE_SHARED, VmaKind.HUGETLB, VmaKind.DEVICE)
    candidates &= vmas.inode != 0
    for row in np.flatnonzero(vmas.of_kind(VmaKind.HUGETLB)).tolist():
        candidates[row] &= not vmas.names[row].startswith(_HUGEPAGE_NAME)
    return candidates


def _look_at(path: str, inode: int) -> tuple[int, int, tuple[int, ...]] | None:
    """Size, mode and build id of a file, or None if it is not there, not allowed, or another one."""
    try:
        status = os.stat(path)
        if status.st_ino != inode:
            return None
        if not stat.S_ISREG(status.st_mode):
            return status.st_size, status.st_mode, ()  # opening a device can have effects
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return None
    try:
        return status.st_size, status.st_mode, read_build_id(fd)
    except OSError:
        return status.st_size, status.st_mode, ()
    finally:
        os.close(fd)


def _memfd(number: int, segment: Segment) -> _Memfd:
    """What memfd.img says of a segment."""
    name = segment.name.removesuffix(_DELETED)
    name = "/dev/zero" if name.startswith("[anon_shmem:") else name.removeprefix("/memfd:")
    status, seals, size, hugetlb_flag = None, 0, segment.size, None
    if segment.path is not None:
        try:
            fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            fd = -1
        if fd >= 0:
            status = os.fstat(fd)
            size = status.st_size
            seals = _seals(fd)
            os.close(fd)
    if segment.kind == VmaKind.HUGETLB_SHARED:
        page_size = status.st_blksize if status else 2 << 20
        hugetlb_flag = (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
    return _Memfd(number, os.fsencode(name), segment.id, size, status, seals, hugetlb_flag)


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return 0


def decode_files(data: bytes, path: FilePath) -> list[file_entry]:
    """The entries of a files.img, incdump's or CRIU's.

    :raises BadImage: it is damaged.
    """
    from incdump.images._pb import files_pb2 as pb

    return [parse(pb.file_entry, record, path) for record in unframe(data, Magic.FILES, path)]


def decode_memfds(data: bytes, path: FilePath) -> list[memfd_inode_entry]:
    """The entries of a memfd.img, incdump's or CRIU's.

    :raises BadImage: it is damaged.
    """
    from incdump.images._pb import files_pb2 as pb

    return [parse(pb.memfd_inode_entry, record, path) for record in unframe(data, Magic.MEMFD, path)]
