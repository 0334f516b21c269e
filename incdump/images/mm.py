"""mm-PID.img: the address space of a process, mapping by mapping.

A mapping's kind is told three times over: by its `Status` bits, which are CRIU's own, by the MAP_* bits that mmap(2)
would want, and by the MADV_* advice in force. The mappings are encoded as whole columns, see
`incdump.images.varints`, so that a process with tens of thousands of them costs milliseconds.
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING

import numpy as np

from incdump.images.framing import Magic, frame, only_record
from incdump.images.messages import parse
from incdump.images.varints import Field, encode_messages
from incdump.model.runs import empty_runs
from incdump.model.vmas import Prot, VmaFlag, VmaKind, VmaTable

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from incdump.images._pb.mm_pb2 import mm_entry
    from incdump.images.files import MappedFiles
    from incdump.model.mm import MmInfo
    from incdump.model.runs import Runs

    U64Array = NDArray[np.uint64]


class Status(IntFlag):
    """What kind of mapping a VMA is, in CRIU's bits."""

    REGULAR = 1 << 0
    STACK = 1 << 1
    VSYSCALL = 1 << 2
    VDSO = 1 << 3
    HEAP = 1 << 5
    FILE_PRIVATE = 1 << 6
    FILE_SHARED = 1 << 7
    ANON_SHARED = 1 << 8
    ANON_PRIVATE = 1 << 9
    SYSVIPC = 1 << 10
    VVAR = 1 << 12
    AIORING = 1 << 13
    MEMFD = 1 << 14
    SHSTK = 1 << 15
    GUARD = 1 << 16


_MAP_SHARED = 0x01
_MAP_PRIVATE = 0x02
_MAP_DROPPABLE = 0x08
_MAP_ANONYMOUS = 0x20
_MAP_GROWSDOWN = 0x100
_MAP_LOCKED = 0x2000
_MAP_NORESERVE = 0x4000
_MAP_HUGETLB = 0x40000
_MAP_HUGE_SHIFT = 26
_HUGE_2MB = 21

_MAP_OF_FLAG = {
    VmaFlag.GROWSDOWN: _MAP_GROWSDOWN,
    VmaFlag.LOCKED: _MAP_LOCKED,
    VmaFlag.NORESERVE: _MAP_NORESERVE,
}

# 1 << MADV_x, of include/uapi/asm-generic/mman-common.h.
_MADV_OF_FLAG = {
    VmaFlag.RAND_READ: 1 << 1,
    VmaFlag.SEQ_READ: 1 << 2,
    VmaFlag.DONTCOPY: 1 << 10,
    VmaFlag.MERGEABLE: 1 << 12,
    VmaFlag.HUGEPAGE: 1 << 14,
    VmaFlag.NOHUGEPAGE: 1 << 15,
    VmaFlag.DONTDUMP: 1 << 16,
    VmaFlag.WIPEONFORK: 1 << 18,
}

_ANON = Status.REGULAR | Status.ANON_PRIVATE
_SEGMENT = Status.REGULAR | Status.FILE_SHARED | Status.MEMFD
_STATUS_OF_KIND = {
    VmaKind.ANON: _ANON,
    VmaKind.FILE_PRIVATE: Status.REGULAR | Status.FILE_PRIVATE,
    VmaKind.FILE_SHARED: Status.REGULAR | Status.FILE_SHARED,
    VmaKind.SHMEM: _SEGMENT,
    VmaKind.HUGETLB: _ANON,
    VmaKind.HUGETLB_SHARED: _SEGMENT,
    VmaKind.AIO_RING: Status.AIORING,
    VmaKind.VDSO: _ANON | Status.VDSO,
    VmaKind.VVAR: _ANON | Status.VVAR,
    VmaKind.VSYSCALL: Status.ANON_PRIVATE | Status.VSYSCALL,
    VmaKind.DEVICE: Status.REGULAR | Status.FILE_SHARED,
}
_STATUS = np.zeros(256, np.uint64)
for _kind, _status in _STATUS_OF_KIND.items():
    _STATUS[_kind] = _status

_VMAS_TAG = bytes([14 << 3 | 2])
_MINUS_ONE = 1  # as a sint64


def encode_mm(info: MmInfo, vmas: VmaTable, files: MappedFiles, guards: Runs | None = None) -> bytes:
    """The bytes of mm-PID.img.

    :param info: what else there is to an address space.
    :param vmas: the mappings, with flags.
    :param files: what they are of, row for row.
    :param guards: guard regions (MADV_GUARD_INSTALL), as runs; they are listed after the mappings.
    """
    from incdump.images._pb import mm_pb2 as pb

    first = pb.mm_entry(
        mm_start_code=info.start_code,
        mm_end_code=info.end_code,
        mm_start_data=info.start_data,
        mm_end_data=info.end_data,
        mm_start_stack=info.start_stack,
        mm_start_brk=info.start_brk,
        mm_brk=info.brk or _heap_end(vmas) or info.start_brk,
        mm_arg_start=info.arg_start,
        mm_arg_end=info.arg_end,
        mm_env_start=info.env_start,
        mm_env_end=info.env_end,
        exe_file_id=files.exe_id,
        mm_saved_auxv=info.auxv,
    )
    last = pb.mm_entry(dumpable=info.dumpable)
    if info.thp_disabled is not None:
        last.thp_disabled = info.thp_disabled
    # A message may be written in parts: fields 1 to 13, the mappings (14), and then the rest.
    entries = encode_vmas(vmas, files, empty_runs() if guards is None else guards)
    return frame(Magic.MM, [first.SerializeToString() + entries + last.SerializePartialToString()])


def encode_vmas(vmas: VmaTable, files: MappedFiles, guards: Runs) -> bytes:
    """The repeated field ``vmas`` of a mm_entry, encoded."""
    kept, end = _merged(vmas)
    columns = {
        "start": vmas.start[kept],
        "end": end,
        "pgoff": vmas.pgoff[kept],
        "shmid": files.shmid[kept],
        "prot": vmas.prot[kept].astype(np.uint64),
        "flags": _map_flags(vmas, files)[kept],
        "status": _status_bits(vmas, files)[kept],
        "madv": _translate(vmas.flags, _MADV_OF_FLAG)[kept],
        "fdflags": np.where(vmas.shared & ((vmas.prot & Prot.WRITE) != 0), np.uint64(2), np.uint64(0))[kept],
    }
    has_fd = files.is_file[kept]
    if len(guards):
        zeros = np.zeros(len(guards), np.uint64)
        guard = {"start": guards[:, 0], "end": guards[:, 1], "status": np.full(len(guards), Status.GUARD, np.uint64)}
        columns = {name: np.concatenate((column, guard.get(name, zeros))) for name, column in columns.items()}
        has_fd = np.concatenate((has_fd, np.zeros(len(guards), bool)))
    fields = [
        Field(number, columns[name])
        for number, name in enumerate(("start", "end", "pgoff", "shmid", "prot", "flags", "status"), 1)
    ]
    fields += [
        Field(8, np.full(len(has_fd), _MINUS_ONE, np.uint64)),
        Field(9, columns["madv"], columns["madv"] != 0),
        Field(10, columns["fdflags"], has_fd),
    ]
    return encode_messages(fields, _VMAS_TAG, b"")


def decode_mm(data: bytes, path: str | os.PathLike[str]) -> mm_entry:
    """The entry of a mm-PID.img, incdump's or CRIU's.

    :raises BadImage: it is damaged.
    """
    from incdump.images._pb import mm_pb2 as pb

    return parse(pb.mm_entry, only_record(data, Magic.MM, path), path)


def _merged(vmas: VmaTable) -> tuple[NDArray[np.int64], U64Array]:
    """The rows to write, and where each ends: [vvar] and [vvar_vclock] beside it are one; [uprobes] is left out."""
    joined = np.zeros(len(vmas), bool)
    vvar = vmas.of_kind(VmaKind.VVAR)
    joined[1:] = vvar[1:] & vvar[:-1] & (vmas.start[1:] == vmas.end[:-1])
    kept = np.flatnonzero(~joined)
    last = np.append(kept[1:], len(vmas)) - 1
    wanted = ~vmas.of_kind(VmaKind.UPROBES)[kept]
    return kept[wanted], vmas.end[last[wanted]]


def _translate(flags: U64Array, table: dict[VmaFlag, int]) -> U64Array:
    """Flags in other bits."""
    out = np.zeros(len(flags), np.uint64)
    for flag, bit in table.items():
        out |= np.where((flags & np.uint64(flag)) != 0, np.uint64(bit), np.uint64(0))
    return out


def _where(mask: NDArray[np.bool_], bits: int) -> U64Array:
    return np.where(mask, np.uint64(bits), np.uint64(0))


def _named(vmas: VmaTable, start: str) -> NDArray[np.bool_]:
    """For each VMA, whether its name begins so."""
    return np.fromiter((name.startswith(start) for name in vmas.names), bool, len(vmas))


def _is_anonymous(vmas: VmaTable, files: MappedFiles) -> NDArray[np.bool_]:
    """For each VMA, whether mmap(2) would be given no file for it."""
    kinds = (VmaKind.AIO_RING, VmaKind.FILE_PRIVATE, VmaKind.FILE_SHARED, VmaKind.DEVICE)
    return ~files.is_file & ~vmas.of_kind(*kinds)


def _map_flags(vmas: VmaTable, files: MappedFiles) -> U64Array:
    """The MAP_* bits of each VMA."""
    droppable = (vmas.flags & np.uint64(VmaFlag.DROPPABLE)) != 0
    visibility = np.where(vmas.shared, np.uint64(_MAP_SHARED), np.uint64(_MAP_PRIVATE))
    bits = np.where(droppable, np.uint64(_MAP_DROPPABLE), visibility)
    bits |= _where(_is_anonymous(vmas, files), _MAP_ANONYMOUS)
    bits |= _where(vmas.of_kind(VmaKind.HUGETLB, VmaKind.HUGETLB_SHARED), _MAP_HUGETLB | _HUGE_2MB << _MAP_HUGE_SHIFT)
    if not vmas.has_flags:
        bits |= _where(_named(vmas, "[stack]"), _MAP_GROWSDOWN)
    return bits | _translate(vmas.flags, _MAP_OF_FLAG)


def _status_bits(vmas: VmaTable, files: MappedFiles) -> U64Array:
    """The `Status` bits of each VMA."""
    bits = _STATUS[vmas.kind]
    private_file = vmas.of_kind(VmaKind.HUGETLB, VmaKind.DEVICE) & files.is_file & ~vmas.shared
    bits[private_file] = _STATUS[VmaKind.FILE_PRIVATE]
    # A segment that is no file of files.img: SysV, or one that could not be given a number there.
    bare = vmas.of_kind(VmaKind.SHMEM, VmaKind.HUGETLB_SHARED) & ~files.is_file
    bits[bare] = int(Status.REGULAR | Status.ANON_SHARED)
    bits |= _where(bare & _named(vmas, "/SYSV"), Status.SYSVIPC)
    bits |= _where(_named(vmas, "[heap]"), Status.HEAP)
    return bits | _where((vmas.flags & np.uint64(VmaFlag.SHADOW_STACK)) != 0, Status.SHSTK)


def _heap_end(vmas: VmaTable) -> int:
    """The end of the last [heap] mapping, or 0."""
    ends = vmas.end[_named(vmas, "[heap]")]
    return int(ends[-1]) if len(ends) else 0
