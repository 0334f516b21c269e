"""pagemap-PID.img and pagemap-shmem-ID.img: which pages a dump holds, as an entry table.

The file is a head, with the number of the pages image, and then entries ascending by address. An entry is a run of
pages with flags: in the pages image (`PE_PRESENT`), in the parent images (`PE_PARENT`), left to a lazy-pages server
(`PE_LAZY` alone). The pages image holds the pages of all present entries back to back, so an entry's offset is the
sum of the present entries before it (`page_offsets`).

Both ways are vectorised, use no protobuf, and can go part by part: a table of a million entries is 24 MB, and there
need not be more of it in memory than its file. Files in any layout but today's usual one (older CRIU, which had no
flags and a 32-bit count) are decoded by protobuf, entry by entry.
"""

from __future__ import annotations

import os
from array import array
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from incdump.errors import BadImage
from incdump.images.framing import Magic, body, header, split_records, truncated
from incdump.images.messages import parse
from incdump.images.varints import CHUNK_ROWS, Field, encode_messages, varint
from incdump.model.runs import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PE_PARENT,
    PE_PRESENT,
    Entries,
    Runs,
    canonical,
    empty_regions,
    empty_runs,
    entry_runs,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    Path = str | os.PathLike[str]

_U64 = np.uint64
# Neither nothing nor anything unknown, and never both in the parent and in the pages image.
_GOOD_FLAGS = np.array([0 < f < 8 and f & (PE_PARENT | PE_PRESENT) != 5 for f in range(9)])
_STOP_BITS = _U64(0x8080808080808080)
_CHUNK_BYTES = 24 * CHUNK_ROWS
_LONGEST = 40  # bytes of an entry that the fast path takes, its length included
_PAD = 16


def encode_pagemap(pages_id: int, entries: Entries) -> bytes:
    """Encode a whole pagemap image.

    The count of pages is written in both its fields, for CRIU from before and after September 2025.

    :param pages_id: N of the pages-N.img with the contents.
    :param entries: shape (n, 3): vaddr (bytes), pages, flags.
    :returns: the file's bytes.
    """
    return b"".join(encode_in_parts(pages_id, (entries,)))


def encode_in_parts(pages_id: int, tables: Iterable[Entries]) -> Iterator[bytes]:
    """The same for an entry table that comes in parts, each of them gone when the next one comes.

    :param tables: ascending throughout.
    :returns: the file's bytes, in parts.
    """
    yield encode_head(pages_id)
    for table in tables:
        yield from encode_entries(table)


def encode_head(pages_id: int) -> bytes:
    """What a pagemap image begins with."""
    first = b"\x08" + varint(pages_id)
    return header(Magic.PAGEMAP) + len(first).to_bytes(4, "little") + first


def encode_entries(table: Entries) -> Iterator[bytes]:
    """The bytes of some entries, in parts."""
    for row in range(0, len(table), CHUNK_ROWS):
        vaddr, nr_pages, flags = np.ascontiguousarray(table[row : row + CHUNK_ROWS].T, _U64)
        # The old field has 32 bits. An entry of 16 TiB cannot be told to an old reader.
        compat = np.where(nr_pages >> _U64(32), _U64(0), nr_pages)
        fields = (Field(1, vaddr), Field(2, compat), Field(4, flags), Field(5, nr_pages))
        yield encode_messages(fields, b"", b"\0\0\0")


def decode_pagemap(data: bytes, path: Path) -> tuple[int, Entries]:
    """Decode and validate a whole pagemap image.

    :param data: the file's bytes.
    :param path: where they came from, for errors.
    :returns: the number of the pages image, and the entries, shape (n, 3): vaddr (bytes), pages, flags.
    :raises BadImage: it is no pagemap, or damaged: every entry that is returned is page aligned, not empty, ends
        below 2**64 and begins at or after the end of the one before.
    """
    pages_id, tables = decode_in_parts(data, path)
    found = list(tables)
    return pages_id, np.concatenate(found) if found else empty_regions()


def decode_in_parts(data: bytes, path: Path) -> tuple[int, Iterator[Entries]]:
    """The same, the entries some ten thousand at a time; what is wrong with one is raised when it is its turn."""
    rest = body(data, Magic.PAGEMAP, path)
    if len(rest) < 4:
        raise truncated(path)
    size = int.from_bytes(rest[:4], "little")
    if len(rest) < 4 + size:
        raise truncated(path)
    return _decode_head(rest[4 : 4 + size], path), _validated(_decode_entries(rest[4 + size :], path), path)


class PagemapSummary(NamedTuple):
    """What of a pagemap it takes to prove a chain, and to dump on top of it.

    :ivar pages_id: the number of its pages image.
    :ivar pages_present: pages in that.
    :ivar holes: pages that are left to the parent.
    :ivar covered: all pages that it lists.
    :ivar lazy: the first page that is in neither, but left to a lazy-pages server; None without one.
    """

    pages_id: int
    pages_present: int
    holes: Runs
    covered: Runs
    lazy: int | None


def summarise(data: bytes, path: Path) -> PagemapSummary:
    """Decode and validate a whole pagemap image, and keep its summary alone.

    :raises BadImage: as `decode_pagemap`.
    """
    pages_id, tables = decode_in_parts(data, path)
    present, lazy = 0, None
    holes, covered = [empty_runs()], [empty_runs()]
    for table in tables:
        flags = table[:, 2]
        present += int(table[(flags & _U64(PE_PRESENT)) != 0, 1].sum())
        holes.append(entry_runs(table[(flags & _U64(PE_PARENT)) != 0]))
        covered.append(entry_runs(table))
        left = table[(flags & _U64(PE_PARENT | PE_PRESENT)) == 0, 0]
        lazy = int(left[0]) if lazy is None and len(left) else lazy
    return PagemapSummary(pages_id, present, canonical(np.concatenate(holes)), canonical(np.concatenate(covered)), lazy)


class Pagemap:
    """A decoded pagemap image, with what looking pages up in it takes.

    :ivar pages_id: the number of its pages image.
    :ivar entries: the entry table.
    """

    def __init__(self, pages_id: int, entries: Entries) -> None:
        self.pages_id = pages_id
        self.entries = entries

    def __repr__(self) -> str:
        return f"<Pagemap of pages-{self.pages_id}.img, {len(self.entries)} entries>"

    @cached_property
    def start(self) -> NDArray[np.uint64]:
        """Where each entry begins, bytes; contiguous, unlike the table's column."""
        return np.ascontiguousarray(self.entries[:, 0])

    @cached_property
    def end(self) -> NDArray[np.uint64]:
        """Where each entry ends, bytes."""
        return self.start + (self.entries[:, 1] << _U64(PAGE_SHIFT))

    @cached_property
    def offsets(self) -> NDArray[np.uint64]:
        """See `page_offsets`."""
        return page_offsets(self.entries)


def page_offsets(entries: Entries) -> NDArray[np.uint64]:
    """Where each entry's pages begin in the pages image, and its whole size, in bytes; shape (n + 1,).

    What stands there for an entry without `PE_PRESENT` is the offset of the next one that has it.
    """
    pages = np.where(entries[:, 2] & _U64(PE_PRESENT), entries[:, 1], _U64(0))
    offsets = np.zeros(len(entries) + 1, _U64)
    np.cumsum(pages, out=offsets[1:])
    return offsets << _U64(PAGE_SHIFT)


def _decode_head(record: memoryview, path: Path) -> int:
    """The pages_id of a head record."""
    raw = bytes(record)
    if len(raw) == 2 and raw[0] == 8 and raw[1] < 0x80:
        return raw[1]
    from incdump.images._pb import pagemap_pb2

    return parse(pagemap_pb2.pagemap_head, raw, path).pages_id


def _decode_entries(stream: memoryview, path: Path) -> Iterator[Entries]:
    """Decode entries: as long as they are in the usual layout, a chunk at a time; from the first other one on (or one
    that is damaged), one by one."""
    at = 0
    while at < len(stream):
        window = np.frombuffer(stream[at : at + _CHUNK_BYTES + _LONGEST], np.uint8)
        starts = _entry_starts(window, at + len(window) == len(stream))
        table = None if starts is None else _decode_fields(window, starts)
        if starts is None or table is None:
            yield from _decode_any(stream[at:], path)
            return
        yield table
        at += int(starts[-1])


def _entry_starts(window: NDArray[np.uint8], is_last: bool) -> NDArray[np.int64] | None:
    """Where entries begin in a window that begins with one, and where the last of them ends; None if not usual.

    A 32-bit length under 256 and the tag of the first field are the bytes (length, 0, 0, 0, 8). Canonical varints
    cannot hold three zeros in a row, so all places that look like this are entries, if the lengths confirm it: then
    following them from the first leads exactly through these places.
    """
    if len(window) < 5:
        return None
    zeros = (window[1:-3] | window[2:-2] | window[3:-1]) == 0
    starts = np.flatnonzero(zeros & (window[4:] == 8))
    if not len(starts) or starts[0] != 0:
        return None
    ends = starts + 4 + window[starts]
    if is_last:
        starts = np.append(starts, len(window))
    else:
        ends = ends[:-1]
    if not len(ends) or not np.array_equal(starts[1:], ends):
        return None
    return starts


def _decode_fields(window: NDArray[np.uint8], starts: NDArray[np.int64]) -> Entries | None:
    """Decode entries that are vaddr, compat_nr_pages, flags, nr_pages; None if any is not exactly that."""
    padded = np.zeros(len(window) + _PAD, np.uint8)
    padded[: len(window)] = window
    words = np.lib.stride_tricks.as_strided(padded[:8].view(_U64), (len(window) + 8,), (1,))
    table = np.empty((len(starts) - 1, 3), _U64)
    scratch = np.empty(len(table), _U64)
    at = starts[:-1] + 4
    for tag, out in ((0x08, table[:, 0]), (0x10, scratch), (0x20, table[:, 2]), (0x28, table[:, 1])):
        word = words[np.minimum(at, len(window))]
        if not ((word & _U64(0xFF)) == tag).all():
            return None
        # Without the tag, seven bytes are left: values below 2**49. The eighth ends nothing.
        word = (word >> _U64(8)) | _U64(0x80 << 56)
        size = _read_varint(word, out)
        if size is None:
            return None
        at = at + 1 + size
    return table if np.array_equal(at, starts[1:]) else None


def _read_varint(word: NDArray[np.uint64], out: NDArray[np.uint64]) -> NDArray[np.int64] | None:
    """Decode the varint in the low bytes of each word.

    :param out: takes the values.
    :returns: how many bytes each varint has, or None when one does not end within its word.
    """
    stop = ~word & _STOP_BITS
    if not stop.all():
        return None
    stop &= (~stop) + _U64(1)  # the lowest bit alone: the top bit of the varint's last byte
    bits = word & (stop - _U64(1)) & ~_STOP_BITS
    bits = (bits & _U64(0x007F007F007F007F)) | ((bits & _U64(0x7F007F007F007F00)) >> _U64(1))
    bits = (bits & _U64(0x00003FFF00003FFF)) | ((bits & _U64(0x3FFF00003FFF0000)) >> _U64(2))
    np.bitwise_or(bits & _U64(0x0FFFFFFF), (bits & _U64(0x0FFFFFFF00000000)) >> _U64(4), out=out)
    # A power of two is exact as a float, whose exponent is then its logarithm: 7, 15, 23, ...
    exponent = (stop.astype(np.float64).view(np.int64) >> 52) - 1023
    return (exponent >> 3) + 1


def _decode_any(stream: memoryview, path: Path) -> Iterator[Entries]:
    """Decode entries in any layout, one by one."""
    from incdump.images._pb import pagemap_pb2

    rows = array("Q")
    for record in split_records(stream, path):
        entry = parse(pagemap_pb2.pagemap_entry, record, path)
        flags = entry.flags if entry.HasField("flags") else 0 if entry.in_parent else PE_PRESENT
        pages = entry.nr_pages if entry.HasField("nr_pages") else entry.compat_nr_pages
        rows.extend((entry.vaddr, pages, flags | PE_PARENT if entry.in_parent else flags))
        if len(rows) == 3 * CHUNK_ROWS:
            yield np.frombuffer(rows, _U64).reshape(-1, 3)
            rows = array("Q")
    if rows:
        yield np.frombuffer(rows, _U64).reshape(-1, 3)


def _validated(tables: Iterable[Entries], path: Path) -> Iterator[Entries]:
    """The same tables; raise `BadImage` unless the entries are what any reader may rely on."""
    reach, total = _U64(0), 0.0
    for table in tables:
        vaddr, pages, flags = np.ascontiguousarray(table.T)
        _refuse((vaddr & _U64(PAGE_SIZE - 1)) != 0, vaddr, path, "is not page aligned")
        _refuse(pages - _U64(1) >= _U64((1 << 64 - PAGE_SHIFT) - 1), vaddr, path, "has no pages, or too many")
        end = vaddr + (pages << _U64(PAGE_SHIFT))
        _refuse(end <= vaddr, vaddr, path, "ends beyond 2**64")
        _refuse(~_GOOD_FLAGS[np.minimum(flags, _U64(8))], vaddr, path, "has impossible flags")
        before = np.concatenate(([reach], end[:-1]))
        _refuse(vaddr < before, vaddr, path, "begins before the end of the entry before it")
        # In all, the pages image has to be addressable: a signed 64-bit offset.
        reach, total = end[-1], total + float(pages.sum(dtype=np.float64))
        if total >= 2.0 ** (63 - PAGE_SHIFT):
            raise BadImage(f"{os.fspath(path)} is damaged: more pages than an address space has", path=path)
        yield table


def _refuse(wrong: NDArray[np.bool_], vaddr: NDArray[np.uint64], path: Path, what: str) -> None:
    if wrong.any():
        where = int(vaddr[int(wrong.argmax())])
        raise BadImage(f"{os.fspath(path)} is damaged: the entry at {where:#x} {what}", path=path, vaddr=where)
