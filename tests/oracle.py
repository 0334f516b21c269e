"""The oracle: decides from outside whether images hold the memory of a frozen process tree.

It shares no code with incdump. It reads the images by itself (framing, protobuf varints, the `parent` chain), reads
smaps, pagemap and mem of every frozen process by itself, decides page by page what CRIU's rules want in the images, and
compares bytes with bytes::

    with oracle.stopped_tree(target.pid) as pids:      # {vpid: pid}, everything SIGSTOPped
        ...                                             # incdump dump
        report = oracle.compare(images, pids)
    assert report.ok, report

What a `Finding` can be:

===========  ==========================================================================================================
kind         meaning
===========  ==========================================================================================================
format       an image is damaged: magic, order, overlap, size of a pages file, an entry without contents
hole         a page is promised to be in the parent chain and is not there (or there is no such chain)
missing      the process has the page, the images do not
wrong        the images hold other bytes than the process
stray        the images hold a page that the process does not have there, with other bytes than the process would read
outside      the images hold a page where the process has no private mapping (nothing at all, shared, [vvar], droppable)
shmem        a shared segment's page differs from ``pagemap-shmem-ID.img``, or lies beyond its end
unreadable   the oracle could not read the process's page (the oracle's problem, or a frozen process that is not)
extra        images of a process (or segment) that is not in the tree
===========  ==========================================================================================================

A page of zeros that the process has and the images lack is restored as zeros: accepted, see `Report.absent_zero`.
A page that need not be in the images but is, with the right bytes, is accepted and counted in `Report.superfluous`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PAGE = 4096
COMMON_MAGIC = 0x54564319
PAGEMAP_MAGIC = 0x56084025
INVENTORY_MAGIC = 0x58313116
PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4
PM_PRESENT, PM_SWAP, PM_FILE, PM_GUARD, PM_UFFD_WP = 1 << 63, 1 << 62, 1 << 61, 1 << 58, 1 << 57
MARKER_TYPE = 31
CHUNK = 1 << 18  # pages of pagemap at a time: 2 MiB
SHOWN = 8  # findings of a kind that are kept with their address
FREEZE_SECONDS = 5.0  # a process that was told to stop does so at once, unless it waits for a processor

Array: TypeAlias = "np.ndarray[Any, Any]"


# --- what was found ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One wrong thing."""

    kind: str
    pid: int
    vaddr: int
    where: str

    def __str__(self) -> str:
        return f"{self.kind}: pid {self.pid} at {self.vaddr:#x} ({self.where})"


@dataclass
class Report:
    """What `compare` found.

    :ivar findings: the first few of every kind.
    :ivar counts: how many of every kind (pages, for most).
    :ivar compared: pages compared byte by byte.
    :ivar required: pages that had to be in the images.
    :ivar from_parents: pages of the images that lie in a parent.
    :ivar shmem_compared: pages of shared segments compared.
    """

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    required: int = 0
    compared: int = 0
    from_parents: int = 0
    shmem_compared: int = 0
    absent_zero: int = 0
    superfluous: int = 0

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.counts

    def add(self, kind: str, pid: int, vaddr: int, where: str, count: int = 1) -> None:
        """Note `count` pages of a kind, of which this is the first."""
        if sum(f.kind == kind for f in self.findings) < SHOWN:
            self.findings.append(Finding(kind, pid, vaddr, where))
        self.counts[kind] += count

    def __str__(self) -> str:
        head = (
            f"{'ok' if self.ok else 'NOT ok'}: {self.compared} pages compared ({self.required} required, "
            f"{self.from_parents} of the images' in parents), {self.shmem_compared} shared, "
            f"{self.absent_zero} zero pages absent, {self.superfluous} superfluous"
        )
        wrong = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return "\n".join([head, *([wrong] if wrong else []), *(f"  {finding}" for finding in self.findings)])


# --- images -----------------------------------------------------------------------------------------------------------


class BadImageError(Exception):
    """An image cannot be parsed."""


def parse_message(data: bytes) -> dict[int, list[int | bytes]]:
    """A protobuf message as {field number: values}; varints as ints, everything else as bytes."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data):
                raise BadImageError("a varint runs out of its record")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            fields.setdefault(number, []).append(varint())
            continue
        length = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else -1)
        if length < 0 or at + length > len(data):
            raise BadImageError(f"wire type {wire}, length {length} in a record of {len(data)}")
        fields.setdefault(number, []).append(data[at : at + length])
        at += length
    return fields


def read_records(path: Path, magic: int) -> Iterator[dict[int, list[int | bytes]]]:
    """The records of an image file.

    :raises BadImageError: wrong magic, or truncated.
    """
    data = path.read_bytes()
    if len(data) < 8 or struct.unpack_from("<II", data) != (COMMON_MAGIC, magic):
        raise BadImageError(f"{path}: wrong magic")
    at = 8
    while at < len(data):
        if at + 4 > len(data):
            raise BadImageError(f"{path}: truncated at {at}")
        (size,) = struct.unpack_from("<I", data, at)
        if at + 4 + size > len(data):
            raise BadImageError(f"{path}: record at {at} is truncated")
        yield parse_message(data[at + 4 : at + 4 + size])
        at += 4 + size


def _number(record: dict[int, list[int | bytes]], number: int) -> int | None:
    value = record[number][-1] if number in record else None
    if isinstance(value, bytes):
        raise BadImageError(f"field {number} is no number")
    return value


@dataclass
class PageTable:
    """Where the contents of each page are, through the whole chain: parallel arrays, ascending by address."""

    vaddr: Array  # uint64
    file: Array  # int32, index into `files`
    index: Array  # int64, page number in that file
    in_parent: int
    files: list[Path]

    def read(self, rows: Array) -> Array:
        """The contents of some rows, shape (n, 4096)."""
        out = np.empty((len(rows), PAGE), np.uint8)
        for number in np.unique(self.file[rows]):
            mine = self.file[rows] == number
            with self.files[number].open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                view = np.frombuffer(data, np.uint8, count=len(data) // PAGE * PAGE).reshape(-1, PAGE)
                out[mine] = view[self.index[rows][mine]]
                del view
        return out


def _expand(starts: list[int], counts: list[int], step: int) -> Array:
    """start, start + step, ... for each start, `count` times."""
    parts = [np.empty(0, np.uint64)]
    for start, count in zip(starts, counts, strict=True):
        parts.append(np.arange(count, dtype=np.uint64) * np.uint64(step) + np.uint64(start))
    return np.concatenate(parts)


def read_entries(path: Path) -> tuple[int, list[tuple[int, int, int]]]:
    """The pages id and the entries (vaddr, pages, flags) of a pagemap image."""
    records = read_records(path, PAGEMAP_MAGIC)
    head = next(records, None)
    pages_id = _number(head, 1) if head is not None else None
    if pages_id is None:
        raise BadImageError(f"{path}: no pagemap_head")
    entries = []
    for record in records:
        vaddr, nr, flags = _number(record, 1), _number(record, 5), _number(record, 4)
        nr = _number(record, 2) if nr is None else nr
        if vaddr is None or nr is None or _number(record, 2) is None:
            raise BadImageError(f"{path}: an entry without a required field")
        if _number(record, 3):
            flags = (flags or 0) | PE_PARENT
        entries.append((vaddr, nr, PE_PRESENT if flags is None else flags))
    return pages_id, entries


def load_table(images: Path, name: str, report: Report, pid: int, depth: int = 0) -> PageTable | None:
    """Follow one pagemap through its chain. None when this directory has no such pagemap."""
    path = images / name
    if depth > 1000:
        report.add("hole", pid, 0, f"{path}: the chain of parents has no end")
        return None
    if not path.exists():
        return None
    try:
        pages_id, entries = read_entries(path)
    except BadImageError as error:
        report.add("format", pid, 0, str(error))
        return None
    _check_entries(path, entries, report, pid)
    pages = images / f"pages-{pages_id}.img"
    present = [e for e in entries if e[2] & PE_PRESENT and not e[2] & PE_PARENT]
    holes = [e for e in entries if e[2] & PE_PARENT]
    total = sum(e[1] for e in present)
    size = pages.stat().st_size if pages.exists() else 0
    if size != total * PAGE:
        report.add("format", pid, 0, f"{pages} has {size} bytes instead of {total * PAGE}")
        present = present if size >= total * PAGE else []
    vaddr = _expand([e[0] for e in present], [e[1] for e in present], PAGE)
    table = PageTable(vaddr, np.zeros(len(vaddr), np.int32), np.arange(len(vaddr), dtype=np.int64), 0, [pages])
    if holes:
        _add_holes(table, holes, images, name, report, pid, depth)
    return table


def _check_entries(path: Path, entries: list[tuple[int, int, int]], report: Report, pid: int) -> None:
    end = 0
    for vaddr, nr, flags in entries:
        if vaddr < end or nr == 0 or vaddr % PAGE:
            report.add("format", pid, vaddr, f"{path}: entry out of order, overlapping, empty, or not aligned")
        if flags not in (PE_PARENT, PE_PRESENT, PE_PRESENT | PE_LAZY):
            report.add("format", pid, vaddr, f"{path}: flags {flags}")
        end = max(end, vaddr + nr * PAGE)


def _add_holes(
    table: PageTable, holes: list[tuple[int, int, int]], images: Path, name: str, report: Report, pid: int, depth: int
) -> None:
    """Look the pages that are in the parent up there, and merge them in."""
    wanted = _expand([e[0] for e in holes], [e[1] for e in holes], PAGE)
    parent_dir = images / "parent"
    parent = load_table(parent_dir.resolve(), name, report, pid, depth + 1) if parent_dir.exists() else None
    if parent is None:
        why = "no such pagemap there" if parent_dir.exists() else "the parent is missing"
        report.add("hole", pid, int(wanted[0]), f"{parent_dir}: {why}", len(wanted))
        return
    at = np.minimum(np.searchsorted(parent.vaddr, wanted), max(0, len(parent.vaddr) - 1))
    found = parent.vaddr[at] == wanted if len(parent.vaddr) else np.zeros(len(wanted), bool)
    if not found.all():
        report.add("hole", pid, int(wanted[~found][0]), f"not in {parent_dir}", int((~found).sum()))
    at = at[found]
    vaddr = np.concatenate((table.vaddr, wanted[found]))
    order = np.argsort(vaddr, kind="stable")
    table.file = np.concatenate((table.file, parent.file[at] + np.int32(len(table.files))))[order]
    table.index = np.concatenate((table.index, parent.index[at]))[order]
    table.vaddr = vaddr[order]
    table.in_parent = len(at)
    table.files += parent.files


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass
class Vma:
    """A mapping as smaps shows it."""

    start: int
    end: int
    perms: str
    inode: int
    name: str
    flags: frozenset[str]

    @property
    def shared(self) -> bool:
        """Whether it is MAP_SHARED (an AIO ring counts as private: its pages are written with the process's)."""
        return self.perms[3] == "s" and not self.aio

    @property
    def aio(self) -> bool:
        """Whether it is an AIO ring."""
        return self.name.startswith("/[aio]")

    @property
    def segment(self) -> bool:
        """Whether it is a mapping of anonymous shared memory, a memfd or a SysV segment."""
        return self.perms[3] == "s" and bool(re.match(r"/dev/zero \(deleted\)|/memfd:|/SYSV", self.name))

    @property
    def file(self) -> bool:
        """Whether pages that it lacks are a file's (anonymous huge pages have an inode, and nothing in it)."""
        return self.inode != 0 and not self.name.startswith("/anon_hugepage")

    @property
    def private(self) -> bool:
        """Whether its pages belong into pagemap-PID.img at all."""
        if self.name in ("[vvar]", "[vvar_vclock]", "[vsyscall]") or "dp" in self.flags:
            return False
        return not self.shared and not self.flags & {"io", "pf"}

    @property
    def whole(self) -> bool:
        """Whether every page of it must be in the images."""
        return self.name == "[vdso]" or self.aio


_VMA_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+) *(.*)")


def read_vmas(pid: int) -> list[Vma]:
    """The mappings of a process, ascending."""
    vmas: list[Vma] = []
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="surrogateescape").splitlines():
        if match := _VMA_HEAD.fullmatch(line):
            start, end, perms, _, inode, name = match.groups()
            vmas.append(Vma(int(start, 16), int(end, 16), perms, int(inode), name, frozenset()))
        elif line.startswith("VmFlags:"):
            vmas[-1].flags = frozenset(line.split()[1:])
    return vmas


def read_pagemap(pid: int, start: int, end: int) -> Array:
    """The pagemap entries of [start, end), uint64; shorter beyond the end of the address space."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as f:
        data = os.pread(f.fileno(), (end - start) // PAGE * 8, start // PAGE * 8)
    return np.frombuffer(data, np.uint64)


@cache
def zero_pfn() -> int:
    """The frame number of the kernel's shared zero page; 0 when the kernel does not show it to this user."""
    page = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = _address_of(page)
    (entry,) = read_pagemap(os.getpid(), address, address + PAGE)
    return int(entry) & ((1 << 55) - 1)


def _address_of(page: mmap.mmap) -> int:
    """Where a mapping is, having read its first byte."""
    view = np.frombuffer(page, np.uint8)
    assert view[0] == 0
    return int(view.ctypes.data)


def required_pages(pid: int, vma: Vma) -> Array:
    """The addresses of the pages of a private mapping that CRIU's rules want in the images, uint64."""
    if vma.whole:
        return np.arange(vma.start, vma.end, PAGE, dtype=np.uint64)
    parts = [np.empty(0, np.uint64)]
    for lo in range(vma.start, vma.end, CHUNK * PAGE):
        entries = read_pagemap(pid, lo, min(vma.end, lo + CHUNK * PAGE))
        parts.append(np.flatnonzero(_wanted(entries)).astype(np.uint64) * np.uint64(PAGE) + np.uint64(lo))
    return np.concatenate(parts)


def _wanted(entries: Array) -> Array:
    """Which pagemap entries are pages with contents of their own."""

    def bit(mask: int) -> Array:
        is_set: Array = (entries & np.uint64(mask)) != 0
        return is_set

    present, swapped = bit(PM_PRESENT), bit(PM_SWAP)
    frame = entries & np.uint64((1 << 55) - 1)
    # A marker of userfaultfd or of a guard region looks like a page in swap, of a type that no swap file has.
    marker = swapped & ~present & (((entries & np.uint64(31)) == MARKER_TYPE) | (bit(PM_UFFD_WP) & (frame == 0)))
    zero = present & (frame == np.uint64(zero_pfn())) if zero_pfn() else np.zeros(len(entries), bool)
    wanted: Array = (present | swapped) & ~marker & ~zero & ~bit(PM_FILE) & ~bit(PM_GUARD)
    return wanted


def read_memory(pid: int, addresses: Array) -> tuple[Array, Array]:
    """The pages at some addresses (ascending), shape (n, 4096), and which of them could be read, shape (n,)."""
    out = np.zeros((len(addresses), PAGE), np.uint8)
    good = np.zeros(len(addresses), bool)
    breaks = np.flatnonzero(np.diff(addresses) != np.uint64(PAGE)) + 1
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        for first, last in zip([0, *breaks], [*breaks, len(addresses)], strict=True):
            at = int(first)
            while at < last:
                try:
                    got = os.preadv(mem.fileno(), [out[at:last].data], int(addresses[at])) // PAGE
                except OSError:
                    got = 0
                good[at : at + got] = True
                at += got if got else 1
    return out, good


def states(pid: int) -> set[str]:
    """The states of all threads of a process."""
    found = set()
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            found.add(Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[0])
    return found


def _until_frozen(pid: int) -> None:
    """A process that was sent SIGSTOP, or that a tracer has left stopped, stops when it gets a processor.

    :raises ValueError: it does not stop.
    """
    deadline = time.monotonic() + FREEZE_SECONDS
    while not states(pid) <= set("tT"):
        if time.monotonic() > deadline:
            raise ValueError(f"process {pid} is not frozen: {states(pid)}")
        time.sleep(0.001)


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(images_dir: str | os.PathLike[str], pids: Mapping[int, int], *, finished: bool = True) -> Report:
    """Compare the images of a final dump with the frozen processes.

    :param images_dir: the newest directory of the chain.
    :param pids: {pid in the images: pid here} of every process of the tree.
    :param finished: also demand an inventory.img.
    :raises ValueError: a process is not frozen.
    """
    images = Path(images_dir)
    report = Report()
    if finished:
        _check_inventory(images, report)
    found: dict[tuple[bool, int], tuple[int, Vma]] = {}
    for vpid, pid in pids.items():
        _until_frozen(pid)
        vmas = read_vmas(pid)
        _compare_process(images, vpid, pid, vmas, report)
        for vma in vmas:
            if vma.segment:
                found.setdefault((vma.name.startswith("/SYSV"), vma.inode), (pid, vma))
    # A SysV segment shows its shmid for an inode number; where another segment has that number, 2**32 is added to it.
    segments = {
        inode + (1 << 32 if sysv and (False, inode) in found else 0): where for (sysv, inode), where in found.items()
    }
    for number, (pid, vma) in segments.items():
        _compare_segment(images, number, pid, vma, report)
    for path in sorted(images.glob("pagemap-*.img")):
        kind, _, number_text = path.stem.removeprefix("pagemap-").rpartition("-")
        known: Mapping[int, object] = segments if kind == "shmem" else pids
        if int(number_text) not in known:
            report.add("extra", int(number_text), 0, path.name)
    return report


def _check_inventory(images: Path, report: Report) -> None:
    try:
        data = (images / "inventory.img").read_bytes()
    except OSError as error:
        report.add("format", 0, 0, f"no inventory.img: {error.strerror}")
        return
    if len(data) < 8 or struct.unpack_from("<I", data)[0] != INVENTORY_MAGIC:
        report.add("format", 0, 0, "inventory.img: wrong magic")


def _compare_process(images: Path, vpid: int, pid: int, vmas: list[Vma], report: Report) -> None:
    table = load_table(images, f"pagemap-{vpid}.img", report, pid)
    if table is None:
        table = PageTable(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.int64), 0, [])
    report.from_parents += table.in_parent
    inside = np.zeros(len(table.vaddr), bool)
    for vma in vmas:
        if not vma.private:
            continue
        first, last = np.searchsorted(table.vaddr, np.array([vma.start, vma.end], np.uint64))
        inside[first:last] = True
        required = required_pages(pid, vma)
        report.required += len(required)
        for lo in range(0, max(1, len(required)), 1024):
            _compare_required(table, pid, vma, required[lo : lo + 1024], report)
        rest = np.arange(first, last)[~np.isin(table.vaddr[first:last], required, assume_unique=True)]
        for lo in range(0, len(rest), 1024):
            _compare_rest(table, pid, vma, rest[lo : lo + 1024], report)
    _report_outside(table, pid, vmas, np.flatnonzero(~inside), report)


def _compare_required(table: PageTable, pid: int, vma: Vma, required: Array, report: Report) -> None:
    """Pages that must be in the images."""
    if not len(required):
        return
    at = np.searchsorted(table.vaddr, required)
    have = np.zeros(len(required), bool)
    in_range = at < len(table.vaddr)
    have[in_range] = table.vaddr[at[in_range]] == required[in_range]
    actual, readable = read_memory(pid, required)
    for vaddr in required[~readable]:
        report.add("unreadable", pid, int(vaddr), _describe(vma))
    absent = readable & ~have
    # In a private mapping of a file, a page that is absent is restored from the file: not as zeros.
    zero = absent & ~actual.any(axis=1) & (not vma.file)
    report.absent_zero += int(zero.sum())
    for vaddr in required[absent & ~zero]:
        report.add("missing", pid, int(vaddr), _describe(vma))
    both = np.flatnonzero(have & readable)
    differs = (table.read(at[both]) != actual[both]).any(axis=1)
    report.compared += len(both)
    for n in both[differs]:
        report.add("wrong", pid, int(required[n]), _describe(vma, table, int(at[n])))


def _compare_rest(table: PageTable, pid: int, vma: Vma, rows: Array, report: Report) -> None:
    """Pages of the images, in a private mapping, that need not be there."""
    actual, readable = read_memory(pid, table.vaddr[rows])
    same = readable & (table.read(rows) == actual).all(axis=1)
    report.superfluous += int(same.sum())
    report.compared += len(rows)
    for n in np.flatnonzero(~same):
        report.add("stray", pid, int(table.vaddr[rows[n]]), _describe(vma, table, int(rows[n])))


def _report_outside(table: PageTable, pid: int, vmas: list[Vma], rows: Array, report: Report) -> None:
    for row in rows:
        vaddr = int(table.vaddr[row])
        vma = next((v for v in vmas if v.start <= vaddr < v.end), None)
        report.add("outside", pid, vaddr, _describe(vma, table, int(row)) if vma else "nothing is mapped there")


def _describe(vma: Vma, table: PageTable | None = None, row: int = 0) -> str:
    text = f"{vma.start:x}-{vma.end:x} {vma.perms} {vma.name or 'anonymous'}"
    if table is None:
        return text
    return f"{text}, from {table.files[table.file[row]]} page {int(table.index[row])}"


def _compare_segment(images: Path, number: int, pid: int, vma: Vma, report: Report) -> None:
    """A shared segment, whole, against pagemap-shmem-NUMBER.img."""
    table = load_table(images, f"pagemap-shmem-{number}.img", report, pid)
    if table is None:
        table = PageTable(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.int64), 0, [])
    report.from_parents += table.in_parent
    where = f"segment {number}, {vma.name}"
    with open(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}", "rb", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        pages = -(-size // PAGE)
        for lo in range(0, pages, 1024):
            count = min(1024, pages - lo)
            actual = np.zeros((count, PAGE), np.uint8)
            os.preadv(f.fileno(), [actual.data], lo * PAGE)
            held = np.zeros_like(actual)
            first, last = np.searchsorted(table.vaddr, np.array([lo * PAGE, (lo + count) * PAGE], np.uint64))
            rows = np.arange(first, last)
            held[(table.vaddr[rows] // np.uint64(PAGE)).astype(np.int64) - lo] = table.read(rows)
            report.shmem_compared += count
            for n in np.flatnonzero((held != actual).any(axis=1)):
                report.add("shmem", pid, (lo + int(n)) * PAGE, where)
    for vaddr in table.vaddr[table.vaddr >= np.uint64(pages * PAGE)]:
        report.add("shmem", pid, int(vaddr), f"{where}: beyond its end")


# --- freezing a tree for a comparison ---------------------------------------------------------------------------------


def tree(root: int) -> dict[int, int]:
    """{pid in the root's pid namespace: pid here} of a process and all its descendants, without zombies."""
    level = len(_nspids(root)) - 1
    found: dict[int, int] = {}
    todo = [root]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            if not states(pid) <= set("ZX"):
                found[_nspids(pid)[level]] = pid
            for tid in os.listdir(f"/proc/{pid}/task"):
                todo += map(int, Path(f"/proc/{pid}/task/{tid}/children").read_text().split())
    return found


def _nspids(pid: int) -> list[int]:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return [int(word) for word in line.split()[1:]]
    return [pid]


def _stop(pid: int) -> bool:
    """SIGSTOP a process and wait until every thread stands; False when it is gone."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGSTOP)
        while True:
            now = states(pid)
            if not now or now <= set("ZX"):
                return False
            if now <= set("tTZX"):
                return True
            time.sleep(0.0005)  # not our child: there is nothing to wait on
    return False


@contextlib.contextmanager
def stopped_tree(root: int) -> Iterator[dict[int, int]]:
    """Stop a whole tree with SIGSTOP, for as long as the context lasts. Yields what `tree` returns.

    Parents are stopped before their children: a parent in vfork cannot stop until its child has gone on to exec.
    """
    stopped: set[int] = set()
    try:
        while todo := [pid for pid in tree(root).values() if pid not in stopped]:
            for pid in todo:
                if _stop(pid):
                    stopped.add(pid)
        yield tree(root)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
