"""The table of a process's memory mappings (VMAs), one NumPy column each.

Filled by `incdump.proc.maps` from /proc/PID/maps or smaps (Documentation/filesystems/proc.rst); what kind of mapping
each VMA is decides what is dumped of it, see `VmaKind`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class VmaKind(IntEnum):
    """What a mapping is, as far as dumping it is concerned."""

    ANON = 0
    """Private anonymous memory; the heap and the stacks included."""
    FILE_PRIVATE = 1
    """A private mapping of a file: only pages that were written to are the process's own."""
    FILE_SHARED = 2
    """A shared mapping of a file: its pages are the file's, nothing is dumped."""
    SHMEM = 3
    """Shared anonymous memory, memfd or a SysV segment: dumped once per segment."""
    HUGETLB = 4
    """A private hugetlb mapping: dumped whole, never as holes."""
    HUGETLB_SHARED = 5
    """A shared hugetlb mapping."""
    AIO_RING = 6
    """The completion ring of io_setup(2): dumped whole, the kernel writes to it unseen."""
    VDSO = 7
    """The vDSO: every page, always."""
    VVAR = 8
    """The kernel's data for the vDSO: never dumped."""
    VSYSCALL = 9
    """The vsyscall page: never dumped."""
    DEVICE = 10
    """Memory of a device (VM_IO, VM_PFNMAP) or a kernel ring: never dumped."""
    UPROBES = 11
    """The trampoline page of uprobes: never dumped."""


class VmaFlag(IntFlag):
    """The two-letter codes of VmFlags in smaps that matter here."""

    GROWSDOWN = 1 << 0  # gd
    LOCKED = 1 << 1  # lo
    IO = 1 << 2  # io
    PFNMAP = 1 << 3  # pf
    SEQ_READ = 1 << 4  # sr
    RAND_READ = 1 << 5  # rr
    DONTCOPY = 1 << 6  # dc
    DONTEXPAND = 1 << 7  # de
    NORESERVE = 1 << 8  # nr
    HUGETLB = 1 << 9  # ht
    DONTDUMP = 1 << 10  # dd
    SOFT_DIRTY = 1 << 11  # sd
    HUGEPAGE = 1 << 12  # hg
    NOHUGEPAGE = 1 << 13  # nh
    MERGEABLE = 1 << 14  # mg
    WIPEONFORK = 1 << 15  # wf
    UFFD_WP = 1 << 16  # uw
    UFFD_MISSING = 1 << 17  # um
    UFFD_MINOR = 1 << 18  # ui
    SHADOW_STACK = 1 << 19  # ss
    DROPPABLE = 1 << 20  # dp
    MIXEDMAP = 1 << 21  # mm
    GUESSED = 1 << 63
    """Not the kernel's: the other bits are those of the mapping that was there before."""


class Prot(IntFlag):
    """Protection of a mapping (PROT_* of mmap(2))."""

    READ = 1
    WRITE = 2
    EXEC = 4


@dataclass(frozen=True, slots=True)
class VmaTable:
    """The mappings of one process, ascending by address; row i of every column is one VMA.

    :ivar start: first byte, uint64.
    :ivar end: one past the last byte, uint64.
    :ivar prot: `Prot` bits, uint8.
    :ivar shared: mapped MAP_SHARED, bool.
    :ivar pgoff: offset in the file, bytes, uint64.
    :ivar dev: device number of the file as ``(major << 20) | minor``, uint64 (0 for anonymous memory).
    :ivar inode: inode number of the file, uint64 (0 for anonymous memory). For a SysV segment it is the shmid.
    :ivar kind: `VmaKind`, uint8.
    :ivar flags: `VmaFlag` bits, uint64; zero throughout when the table came from maps, see `has_flags`.
    :ivar names: the path or ``[name]`` column, ``""`` where there is none.
    :ivar has_flags: whether `flags` was read (smaps) or not (maps).
    """

    start: NDArray[np.uint64]
    end: NDArray[np.uint64]
    prot: NDArray[np.uint8]
    shared: NDArray[np.bool_]
    pgoff: NDArray[np.uint64]
    dev: NDArray[np.uint64]
    inode: NDArray[np.uint64]
    kind: NDArray[np.uint8]
    flags: NDArray[np.uint64]
    names: tuple[str, ...]
    has_flags: bool

    def __len__(self) -> int:
        return len(self.start)

    def __repr__(self) -> str:
        total = int((self.end - self.start).sum()) if len(self) else 0
        return f"<VmaTable {len(self)} VMAs, {total >> 10} KiB{'' if self.has_flags else ', no flags'}>"

    def select(self, mask: NDArray[np.bool_]) -> VmaTable:
        """The rows for which `mask` (shape (n,), bool) holds."""
        columns = {f.name: getattr(self, f.name)[mask] for f in fields(self) if f.name not in ("names", "has_flags")}
        names = tuple(self.names[i] for i in np.flatnonzero(mask))
        return VmaTable(**columns, names=names, has_flags=self.has_flags)

    def within(self, lo: int, hi: int) -> VmaTable:
        """The mappings that reach into ``[lo, hi)``, their bounds cut to it."""
        reach = (self.end > np.uint64(lo)) & (self.start < np.uint64(hi))
        part = self.select(reach if lo < hi else np.zeros(len(self), bool))
        return replace(part, start=np.maximum(part.start, np.uint64(lo)), end=np.minimum(part.end, np.uint64(hi)))

    def of_kind(self, *kinds: VmaKind) -> NDArray[np.bool_]:
        """For each VMA, whether it is of one of these kinds; shape (n,), bool."""
        wanted = np.zeros(len(self), bool)
        for kind in kinds:
            wanted |= self.kind == kind
        return wanted

    def at(self, addresses: NDArray[np.uint64]) -> NDArray[np.int64]:
        """For each address, the index of the VMA that holds it, or -1; shape (n,), int64."""
        if not len(self):
            return np.full(len(addresses), -1, np.int64)
        index = np.searchsorted(self.start, addresses, "right").astype(np.int64) - 1
        inside = (index >= 0) & (addresses < self.end[np.maximum(index, 0)])
        return np.where(inside, index, -1)

    def spans(self, mask: NDArray[np.bool_] | None = None) -> NDArray[np.uint64]:
        """start and end of (the masked) VMAs as shape (n, 2); neighbours that touch stay apart."""
        pairs = np.empty((len(self.start), 2), np.uint64)
        pairs[:, 0], pairs[:, 1] = self.start, self.end
        return pairs if mask is None else pairs[mask]
