"""The mappings of a process, from /proc/PID/maps or /proc/PID/smaps, as a `VmaTable`.

maps is cheap and says everything but the VmFlags; smaps has them, and makes the kernel walk the target's page tables.
From maps alone a mapping of a file on hugetlbfs, and of a device, looks like that of any other file.

Neither file is a snapshot: the kernel writes it a buffer at a time, and a target that runs may change its mappings in
between, so that a mapping can turn up twice. Where two overlap, the one that was read later is kept.

Parsing is columnwise: the text is one array of bytes, the separators are found in all lines at once, and hexadecimal
columns become numbers without a Python object for each.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from incdump.errors import NoSuchTarget, TargetDenied, TargetError, TargetExited
from incdump.model.vmas import Prot, VmaFlag, VmaKind, VmaTable
from incdump.proc.identity import leaderless, stays_leaderless

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 64 << 10  # the kernel hands out about a page a read, whatever is asked for

_FLAG_OF_CODE = {
    b"gd": VmaFlag.GROWSDOWN,
    b"lo": VmaFlag.LOCKED,
    b"io": VmaFlag.IO,
    b"pf": VmaFlag.PFNMAP,
    b"sr": VmaFlag.SEQ_READ,
    b"rr": VmaFlag.RAND_READ,
    b"dc": VmaFlag.DONTCOPY,
    b"de": VmaFlag.DONTEXPAND,
    b"nr": VmaFlag.NORESERVE,
    b"ht": VmaFlag.HUGETLB,
    b"dd": VmaFlag.DONTDUMP,
    b"sd": VmaFlag.SOFT_DIRTY,
    b"hg": VmaFlag.HUGEPAGE,
    b"nh": VmaFlag.NOHUGEPAGE,
    b"mg": VmaFlag.MERGEABLE,
    b"wf": VmaFlag.WIPEONFORK,
    b"uw": VmaFlag.UFFD_WP,
    b"um": VmaFlag.UFFD_MISSING,
    b"ui": VmaFlag.UFFD_MINOR,
    b"ss": VmaFlag.SHADOW_STACK,
    b"dp": VmaFlag.DROPPABLE,
    b"mm": VmaFlag.MIXEDMAP,
}

_SPECIAL = {
    "[vdso]": VmaKind.VDSO,
    "[vvar]": VmaKind.VVAR,
    "[vvar_vclock]": VmaKind.VVAR,
    "[vsyscall]": VmaKind.VSYSCALL,
    "[uprobes]": VmaKind.UPROBES,
}

_PARASITE = b" /memfd:CRIUMFD (deleted)"

_NIBBLE = np.zeros(256, np.uint8)
_NIBBLE[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


def read_vmas(pid: int, *, flags: bool) -> VmaTable:
    """Read the mappings of a process.

    :param flags: read smaps, which has the VmFlags, instead of maps.
    :raises NoSuchTarget: there is no such process.
    :raises TargetDenied: its mappings may not be read.
    :raises TargetExited: it is a zombie, or exited meanwhile: it has no memory any more.
    :raises TargetUnsuitable: its main thread has exited before the others.
    """
    parse = parse_smaps if flags else parse_maps
    return parse(_read_text(pid, "smaps" if flags else "maps"), shmem_dev=shmem_dev())


@dataclass(frozen=True, slots=True)
class KnownVmas:
    """The mappings of a process, as they were a moment ago.

    :ivar vmas: with flags.
    :ivar text: what maps said just after these were read; empty if it showed others.
    """

    vmas: VmaTable
    text: bytes


def read_known_vmas(pid: int) -> KnownVmas:
    """Read the mappings of a process, for `reread_vmas`. Raises as `read_vmas` does."""
    vmas = read_vmas(pid, flags=True)
    text = _read_text(pid, "maps")
    return KnownVmas(vmas, text if _shows(text, vmas) else b"")


def reread_vmas(pid: int, before: KnownVmas | None, *, may_guess: bool = False) -> VmaTable:
    """Read the mappings again, with flags, at the price of reading maps where they are the same.

    smaps walks the page tables, some 20 ms a GiB, which is long for a process that is kept stopped meanwhile; and to
    compare what maps says spares making numbers of it.

    :param before: of a moment ago. If maps shows the same mappings ``before.vmas`` is returned: flags that were changed
        since without touching any bound (an madvise of a whole mapping) are then those of before. But droppable
        mappings are not told from others in maps: with one of these, all is read again. What CRIU maps into a process
        that it dumps is no part of it, and is passed over.
    :param may_guess: whether new or changed mappings of anonymous memory may be given the flags of the one that was
        there before, or none: they then have `VmaFlag.GUESSED`, and may be droppable, or watched by somebody else's
        userfaultfd.
    :raises TargetError: as `read_vmas`.
    """
    if before is not None:
        text = _without_parasite(_read_text(pid, "maps"), before.text)
        if text == before.text or _shows(text, before.vmas):
            return before.vmas
        if may_guess and not _has_droppable(before.vmas):
            guessed = _with_flags_of(before.vmas, parse_maps(text, shmem_dev=shmem_dev()))
            if guessed is not None:
                return guessed
    return read_vmas(pid, flags=True)


def learn_flags(pid: int, vmas: VmaTable) -> VmaTable:
    """Read the flags that were guessed; a mapping that is another one by now, or gone, keeps the guess.

    :returns: the same mappings, none with `VmaFlag.GUESSED`.
    """
    guessed = (vmas.flags & np.uint64(VmaFlag.GUESSED)) != 0
    if not guessed.any():
        return vmas
    flags = vmas.flags & ~np.uint64(VmaFlag.GUESSED)
    with suppress(TargetError):
        now = read_vmas(pid, flags=True)
        at, same = _in(now, vmas)
        flags = np.where(guessed & same, now.flags[at], flags)
    return replace(vmas, flags=flags)


def _with_flags_of(before: VmaTable, shown: VmaTable) -> VmaTable | None:
    """Mappings read without flags, with those of before; None if one is new that may be anything."""
    if not len(before):
        return None
    at, same = _in(before, shown)
    if (shown.kind[~same] != VmaKind.ANON).any():
        return None
    inherits = same | ((before.at(shown.start) >= 0) & (before.kind[at] == VmaKind.ANON))
    flags = np.where(inherits, before.flags[at], np.uint64(0))
    flags[~same] |= np.uint64(VmaFlag.GUESSED)
    return replace(shown, flags=flags, kind=np.where(same, before.kind[at], shown.kind), has_flags=True)


def _in(table: VmaTable, vmas: VmaTable) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where in a table, not empty, the mapping is that holds the start of each of these; and whether it is the same."""
    at = table.at(vmas.start)
    same = at >= 0
    at = np.maximum(at, 0)
    for column in ("start", "end", "prot", "shared", "pgoff", "dev", "inode"):
        same &= getattr(table, column)[at] == getattr(vmas, column)
    same[same] = [table.names[i] == vmas.names[j] for i, j in zip(at[same], np.flatnonzero(same), strict=True)]
    return at, same


def _has_droppable(vmas: VmaTable) -> bool:
    return bool((vmas.flags & np.uint64(VmaFlag.DROPPABLE)).any())


def _without_parasite(text: bytes, before: bytes) -> bytes:
    """The text of maps without what CRIU has mapped since, which it takes away again before it lets the process go."""
    if _PARASITE not in text:
        return text
    there = set(before.splitlines(keepends=True))
    return b"".join(line for line in text.splitlines(keepends=True) if _PARASITE not in line or line in there)


def _shows(text: bytes, vmas: VmaTable) -> bool:
    """Whether maps shows just these mappings, none of which could be another kind of mapping by now."""
    if _has_droppable(vmas):
        return False
    shown = parse_maps(text, shmem_dev=shmem_dev())
    columns = ("start", "end", "prot", "shared", "pgoff", "dev", "inode")
    return shown.names == vmas.names and all(np.array_equal(getattr(shown, c), getattr(vmas, c)) for c in columns)


def _read_text(pid: int, name: Literal["maps", "smaps"]) -> bytes:
    path = f"/proc/{pid}/{name}"
    try:
        text = _read_whole(path)
    except PermissionError as e:
        message = f"no permission to read the mappings of process {pid}: run as its user or as root (CAP_SYS_PTRACE)"
        raise TargetDenied(message, pid=pid, path=path, errno=e.errno) from None
    except FileNotFoundError as e:
        raise NoSuchTarget(f"there is no process {pid}", pid=pid, errno=e.errno) from None
    except ProcessLookupError as e:
        raise TargetExited(f"process {pid} exited while it was being read", pid=pid, errno=e.errno) from None
    if not text:
        if stays_leaderless(pid):
            raise leaderless(pid)
        raise TargetExited(f"process {pid} has no memory: it has exited, or is a kernel thread", pid=pid)
    return text


@cache
def shmem_dev() -> int | None:
    """The device number of the kernel's own shmem mount, as `VmaTable.dev` has it, or None if that is not to be had.

    Shared anonymous memory, memfds and SysV segments live there; hugetlb ones live on another device.
    """
    try:
        fd = os.memfd_create("incdump", os.MFD_CLOEXEC)
    except OSError:
        return None
    try:
        dev = os.fstat(fd).st_dev
        return os.major(dev) << 20 | os.minor(dev)
    finally:
        os.close(fd)


def parse_maps(text: bytes, *, shmem_dev: int | None = None) -> VmaTable:
    """Parse the text of /proc/PID/maps.

    :param shmem_dev: device number of the machine's shmem mount, see `shmem_dev`; without it, any device of major
        number 0 is taken for it.
    """
    return _table(text, None, shmem_dev)


def parse_smaps(text: bytes, *, shmem_dev: int | None = None) -> VmaTable:
    """Parse the text of /proc/PID/smaps: of each mapping the first line and VmFlags, its last line.

    :param shmem_dev: as for `parse_maps`.
    """
    parts = text.split(b"\nVmFlags: ")  # part i begins with the flags of mapping i-1, then the first line of mapping i
    headers = [parts[0].split(b"\n", 1)[0]]
    flag_texts: list[bytes] = []
    for part in parts[1:]:
        flag_text, _, rest = part.partition(b"\n")
        flag_texts.append(flag_text)
        headers.append(rest.split(b"\n", 1)[0])
    del headers[len(flag_texts) :]  # what follows the last VmFlags is nothing, or a mapping cut off
    known = {flag_text: _flags(flag_text) for flag_text in set(flag_texts)}
    flags = np.array([known[flag_text] for flag_text in flag_texts], np.uint64)
    return _table(b"".join(header + b"\n" for header in headers), flags, shmem_dev)


def _read_whole(path: str) -> bytes:
    """Read a /proc file to its end."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        chunks = []
        while chunk := os.read(fd, _CHUNK):
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        os.close(fd)


def _flags(text: bytes) -> int:
    """The bits of a VmFlags line (without its label)."""
    bits = 0
    for code in text.split():
        bits |= _FLAG_OF_CODE.get(code, 0)
    return bits


def _table(text: bytes, flags: NDArray[np.uint64] | None, shmem_dev: int | None) -> VmaTable:
    """Make the table of maps lines: ``start-end perms pgoff major:minor inode   name``."""
    raw = np.frombuffer(text, np.uint8)
    line_end = np.flatnonzero(raw == 0x0A)
    n = len(line_end)
    line = np.empty(n, np.int64)
    line[:1] = 0
    line[1:] = line_end[:-1] + 1
    blanks = np.flatnonzero(raw == 0x20)
    nth = np.searchsorted(blanks, line)
    blank = [blanks[nth + i] for i in range(4)]  # the ends of the first four columns
    dash = _first_after(raw, 0x2D, line)
    colon = _first_after(raw, 0x3A, blank[2])
    inodes, names = _tails(text, blank[3] + 1, line_end)
    perms = raw[(blank[0] + 1)[:, None] + np.arange(4)]
    table = VmaTable(
        start=_hex(raw, line, dash),
        end=_hex(raw, dash + 1, blank[0]),
        prot=((perms[:, :3] != 0x2D) @ np.array([Prot.READ, Prot.WRITE, Prot.EXEC], np.uint8)).astype(np.uint8),
        shared=perms[:, 3] == 0x73,
        pgoff=_hex(raw, blank[1] + 1, blank[2]),
        dev=_hex(raw, blank[2] + 1, colon) << np.uint64(20) | _hex(raw, colon + 1, blank[3]),
        inode=inodes,
        kind=np.zeros(n, np.uint8),
        flags=np.zeros(n, np.uint64) if flags is None else flags,
        names=names,
        has_flags=flags is not None,
    )
    _set_kinds(table, shmem_dev)
    return _without_overlaps(table)


def _first_after(raw: NDArray[np.uint8], byte: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The position of the first `byte` at or after each of the positions (there must be one)."""
    found = np.flatnonzero(raw == byte)
    return found[np.searchsorted(found, positions)]


def _hex(raw: NDArray[np.uint8], begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hexadecimal numbers in ``raw[begin:end]``, at most 16 digits each, as uint64."""
    width = int((end - begin).max(initial=1))
    width += width & 1
    at = end[:, None] + np.arange(-width, 0)
    digits = np.where(at >= begin[:, None], _NIBBLE[raw[at]], np.uint8(0))
    number = np.zeros((len(begin), 8), np.uint8)
    number[:, 8 - width // 2 :] = digits[:, 0::2] << np.uint8(4) | digits[:, 1::2]
    return number.view(">u8")[:, 0].astype(np.uint64)


def _tails(text: bytes, begin: NDArray[np.int64], end: NDArray[np.int64]) -> tuple[NDArray[np.uint64], tuple[str, ...]]:
    """The last two columns: inode (decimal) and name. Most are "0 " and nothing, which costs next to nothing."""
    tails = [text[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
    parsed = {tail: _tail(tail) for tail in set(tails)}
    inodes = np.array([parsed[tail][0] for tail in tails], np.uint64)
    return inodes, tuple(parsed[tail][1] for tail in tails)


def _tail(tail: bytes) -> tuple[int, str]:
    """Inode and name. A newline in a path reads ``\\012`` there."""
    inode, _, name = tail.partition(b" ")
    return int(inode), os.fsdecode(name.lstrip(b" ").replace(b"\\012", b"\n"))


def _set_kinds(table: VmaTable, shmem_dev: int | None) -> None:
    """Fill the `kind` column: by default from shared and inode, then by what names and flags say."""
    kind = table.kind
    has_file = table.inode != 0
    kind[has_file] = VmaKind.FILE_PRIVATE
    kind[table.shared] = VmaKind.FILE_SHARED
    hugetlb = (table.flags & np.uint64(VmaFlag.HUGETLB)) != 0
    device = (table.flags & np.uint64(VmaFlag.IO | VmaFlag.PFNMAP)) != 0
    kind[device] = VmaKind.DEVICE
    kind[hugetlb] = np.where(table.shared[hugetlb], VmaKind.HUGETLB_SHARED, VmaKind.HUGETLB)
    known: dict[tuple[str, bool, int], int] = {}
    for i, name in enumerate(table.names):
        if name and not hugetlb[i]:
            key = (name, bool(table.shared[i]), int(table.dev[i]))
            if key not in known:
                known[key] = _named_kind(*key, shmem_dev)
            if known[key] >= 0 and not (device[i] and known[key] == VmaKind.SHMEM):
                kind[i] = known[key]


def _named_kind(name: str, shared: bool, dev: int, shmem_dev: int | None) -> int:
    """The kind that a name gives away, or -1."""
    special = _SPECIAL.get(name)
    if special is not None:
        return special
    if name.startswith("/[aio]"):
        return VmaKind.AIO_RING
    if name.startswith("anon_inode:"):
        return VmaKind.DEVICE  # a ring shared with the kernel: io_uring, perf_event, kvm
    if dev >> 20 == 0:
        if name.startswith("/anon_hugepage"):
            return VmaKind.HUGETLB_SHARED if shared else VmaKind.HUGETLB
        if shared and _is_shmem_name(name):
            return VmaKind.SHMEM if shmem_dev in (None, dev) else VmaKind.HUGETLB_SHARED
    if name == "/dev/zero" and not shared:
        return VmaKind.ANON  # a private mapping of the device is anonymous memory
    return -1


def _is_shmem_name(name: str) -> bool:
    """Whether the kernel gives this name to files of its own shmem mount."""
    if name.startswith("[anon_shmem:"):
        return True
    return name.endswith(" (deleted)") and (name.startswith(("/memfd:", "/SYSV")) or name == "/dev/zero (deleted)")


def _without_overlaps(table: VmaTable) -> VmaTable:
    """Make the table ascending and disjoint; of two mappings that overlap, the later line wins."""
    start, end = table.start, table.end
    if (start[1:] >= end[:-1]).all():
        return table
    kept: list[int] = []
    for i in range(len(table)):
        while kept and int(start[kept[-1]]) >= int(start[i]):
            kept.pop()
        if kept and end[kept[-1]] > start[i]:
            end[kept[-1]] = start[i]
        kept.append(i)
    mask = np.zeros(len(table), bool)
    mask[kept] = True
    return table.select(mask)
