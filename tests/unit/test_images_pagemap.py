"""The vectorised pagemap codec, held against protobuf and against hostile bytes."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from incdump.errors import BadImage
from incdump.images import pagemap, varints
from incdump.images._pb import pagemap_pb2 as pb
from incdump.images.framing import Magic, frame, unframe
from incdump.images.pagemap import decode_pagemap, encode_pagemap, page_offsets
from incdump.images.varints import Field, encode_messages, varint
from incdump.model.runs import PAGE_SIZE, Entries

if TYPE_CHECKING:
    import random

# As CRIU 4.2 wrote it: magics, a head with pages_id 3, then 3 pages at 0x10000000 with flags 6.
CRIU_BYTES = bytes.fromhex("19435654 25400856 02000000 0803 0c000000 0880808080011000 2006 2803")
OUR_BYTES = bytes.fromhex("19435654 25400856 02000000 0803 0c000000 0880808080011003 2006 2803")
ONE_ENTRY = np.array([[0x10000000, 3, 6]], np.uint64)

FLAGS = st.sampled_from([1, 2, 3, 4, 6])


@st.composite
def entry_tables(draw: st.DrawFn) -> Entries:
    """Valid entry tables: small and huge gaps and counts."""
    small = st.integers(0, 300)
    gaps = st.one_of(small, st.integers(0, 1 << 40))
    counts = st.one_of(st.integers(1, 300), st.integers(1, 1 << 33), st.integers(1 << 48, 1 << 50))
    rows, at = [], draw(st.sampled_from([0, 0x400, 0x7F0000000, 1 << 45]))
    for gap, count, flags in draw(st.lists(st.tuples(gaps, counts, FLAGS), max_size=40)):
        at += gap
        if at + count >= 1 << 51:
            break
        rows.append((at * PAGE_SIZE, count, flags))
        at += count
    return np.array(rows, np.uint64).reshape(-1, 3)


def by_protobuf(pages_id: int, entries: Entries) -> bytes:
    """The same image, encoded entry by entry by protobuf."""
    records = [pb.pagemap_head(pages_id=pages_id)]
    for vaddr, pages, flags in entries.tolist():
        compat = pages if pages < 1 << 32 else 0
        records.append(pb.pagemap_entry(vaddr=vaddr, compat_nr_pages=compat, flags=flags, nr_pages=pages))
    return frame(Magic.PAGEMAP, [record.SerializeToString() for record in records])


def image_of(*entries: pb.pagemap_entry, pages_id: int = 1) -> bytes:
    records = [pb.pagemap_head(pages_id=pages_id), *entries]
    return frame(Magic.PAGEMAP, [record.SerializeToString() for record in records])


def test_the_bytes_are_criu_s() -> None:
    assert encode_pagemap(3, ONE_ENTRY) == OUR_BYTES


@pytest.mark.parametrize("data", [CRIU_BYTES, OUR_BYTES])
def test_criu_s_bytes_are_understood(data: bytes) -> None:
    pages_id, entries = decode_pagemap(data, "x")
    assert pages_id == 3
    assert np.array_equal(entries, ONE_ENTRY)


@settings(deadline=None)
@given(st.integers(1, 0xFFFFFFFF), entry_tables())
@example(65537, np.array([[0x1000, 1, 4]], np.uint64))
def test_encoding_is_protobuf_s_to_the_byte(pages_id: int, entries: Entries) -> None:
    assert encode_pagemap(pages_id, entries) == by_protobuf(pages_id, entries)


@settings(deadline=None)
@given(st.integers(1, 0xFFFFFFFF), entry_tables())
@example(1, np.array([[0x1000, (1 << 49) + 5, 4]], np.uint64))
@example(1, np.array([[1 << 57, 1, 4]], np.uint64))
def test_what_is_encoded_is_decoded(pages_id: int, entries: Entries) -> None:
    decoded = decode_pagemap(encode_pagemap(pages_id, entries), "x")
    assert decoded[0] == pages_id
    assert np.array_equal(decoded[1], entries)


def big_table(rows: int, seed: int) -> Entries:
    rng = np.random.default_rng(seed)
    pages = np.where(rng.random(rows) < 0.5, 1, rng.integers(1, 1 << 22, rows)).astype(np.uint64)
    gaps = rng.integers(0, 3, rows).astype(np.uint64)
    first = np.cumsum(pages + gaps) - pages
    flags = rng.choice(np.array([1, 4, 6], np.uint64), rows)
    return np.stack((first * np.uint64(PAGE_SIZE), pages, flags), axis=1)


def test_tables_of_many_chunks_round_trip_without_protobuf(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = big_table(3 * varints.CHUNK_ROWS + 17, seed=1)
    data = encode_pagemap(7, entries)
    assert data == by_protobuf(7, entries)
    monkeypatch.setattr(pagemap, "_decode_any", None)
    assert np.array_equal(decode_pagemap(data, "x")[1], entries)


def test_neither_way_imports_protobuf() -> None:
    code = (
        "import sys, numpy as np; from incdump.images.pagemap import *\n"
        "decode_pagemap(encode_pagemap(3, np.array([[4096, 1, 4]], np.uint64)), 'x')\n"
        "sys.exit('google.protobuf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_empty_pagemap_has_only_its_head() -> None:
    data = encode_pagemap(300, np.empty((0, 3), np.uint64))
    assert data == bytes.fromhex("19435654 25400856 03000000 08ac02")
    assert len(decode_pagemap(data, "x")[1]) == 0


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (pb.pagemap_entry(vaddr=0x1000, compat_nr_pages=2), (0x1000, 2, 4)),
        (pb.pagemap_entry(vaddr=0x1000, compat_nr_pages=2, in_parent=True), (0x1000, 2, 1)),
        (pb.pagemap_entry(vaddr=0x1000, compat_nr_pages=2, in_parent=False), (0x1000, 2, 4)),
        (pb.pagemap_entry(vaddr=0x1000, compat_nr_pages=2, flags=6), (0x1000, 2, 6)),
        (pb.pagemap_entry(vaddr=0x1000, compat_nr_pages=2, in_parent=True, flags=2), (0x1000, 2, 3)),
        (pb.pagemap_entry(vaddr=0x1000, compat_nr_pages=2, nr_pages=9), (0x1000, 9, 4)),
        (pb.pagemap_entry(vaddr=0x1000, compat_nr_pages=2, flags=1, nr_pages=9), (0x1000, 9, 1)),
        (pb.pagemap_entry(vaddr=1 << 60, compat_nr_pages=0, flags=4, nr_pages=1), (1 << 60, 1, 4)),
    ],
)
def test_entries_of_every_age_are_understood(entry: pb.pagemap_entry, expected: tuple[int, int, int]) -> None:
    _, entries = decode_pagemap(image_of(entry), "x")
    assert entries.tolist() == [list(expected)]


def test_old_and_new_entries_may_stand_side_by_side() -> None:
    data = image_of(
        pb.pagemap_entry(vaddr=0x1000, compat_nr_pages=1, flags=4, nr_pages=1),
        pb.pagemap_entry(vaddr=0x2000, compat_nr_pages=1, in_parent=True),
    )
    assert decode_pagemap(data, "x")[1].tolist() == [[0x1000, 1, 4], [0x2000, 1, 1]]


def test_unknown_fields_are_ignored() -> None:
    entry = pb.pagemap_entry(vaddr=0x1000, compat_nr_pages=1, flags=4, nr_pages=1).SerializeToString() + b"\x30\x07"
    data = frame(Magic.PAGEMAP, [b"\x08\x01", entry])
    assert decode_pagemap(data, "x")[1].tolist() == [[0x1000, 1, 4]]


def test_varints_longer_than_need_be_are_understood() -> None:
    padded = bytes.fromhex("0880a08000 108100 20848000 2881808080808080808000")
    data = frame(Magic.PAGEMAP, [b"\x08\x01", padded])
    assert decode_pagemap(data, "x")[1].tolist() == [[0x1000, 1, 4]]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([(0x1001, 1, 4)], "is not page aligned"),
        ([(0x1000, 0, 4)], "has no pages"),
        ([(0x1000, 1 << 52, 4)], "has no pages, or too many"),
        ([(0x1000, (1 << 64) - 1, 4)], "has no pages, or too many"),
        ([((1 << 64) - 0x1000, 1, 4)], "ends beyond"),
        ([(1 << 63, 1 << 51, 4)], "ends beyond"),
        ([(0x1000, 1, 0)], "has impossible flags"),
        ([(0x1000, 1, 5)], "has impossible flags"),
        ([(0x1000, 1, 7)], "has impossible flags"),
        ([(0x1000, 1, 8)], "has impossible flags"),
        ([(0x1000, 1, 0xFFFFFFFF)], "has impossible flags"),
        ([(0x1000, 2, 4), (0x2000, 1, 4)], "begins before the end"),
        ([(0x2000, 1, 4), (0x1000, 1, 4)], "begins before the end"),
        ([(0x1000, 1, 4), (0x1000, 1, 4)], "begins before the end"),
    ],
)
def test_an_impossible_entry_is_refused_with_its_address(rows: list[tuple[int, int, int]], what: str) -> None:
    data = by_protobuf(1, np.array(rows, np.uint64))
    with pytest.raises(BadImage, match=what) as caught:
        decode_pagemap(data, "dir/pagemap-1.img")
    assert caught.value.path == "dir/pagemap-1.img"
    assert caught.value.vaddr == rows[-1][0]


def test_the_order_is_checked_across_chunks() -> None:
    entries = big_table(2 * varints.CHUNK_ROWS, seed=2)
    for row in (varints.CHUNK_ROWS - 1, varints.CHUNK_ROWS, varints.CHUNK_ROWS + 1):
        swapped = entries.copy()
        swapped[[row - 1, row]] = swapped[[row, row - 1]]
        with pytest.raises(BadImage, match="begins before the end"):
            decode_pagemap(encode_pagemap(1, swapped), "x")


def test_more_pages_than_a_file_can_hold_are_refused() -> None:
    data = by_protobuf(1, np.array([(0, 1 << 50, 4), (1 << 62, 1 << 51, 4)], np.uint64))
    with pytest.raises(BadImage, match="more pages than"):
        decode_pagemap(data, "x")


@pytest.mark.parametrize("rows", [1, 2, varints.CHUNK_ROWS + 3])
def test_every_truncation_is_refused_or_ends_at_an_entry(rows: int) -> None:
    entries = big_table(rows, seed=3)
    data = encode_pagemap(1, entries)
    sizes = [4 + len(record) for record in unframe(data, Magic.PAGEMAP, "x")]
    ends = dict(zip((8 + np.cumsum(sizes)).tolist(), range(rows + 1), strict=True))
    for size in range(max(0, len(data) - 30), len(data)):
        if size in ends:
            assert np.array_equal(decode_pagemap(data[:size], "x")[1], entries[: ends[size]])
        else:
            with pytest.raises(BadImage):
                decode_pagemap(data[:size], "x")


@settings(max_examples=300, deadline=None)
@given(entry_tables(), st.randoms(use_true_random=False))
def test_damaged_bytes_are_refused_or_read_as_protobuf_reads_them(entries: Entries, rng: random.Random) -> None:
    data = bytearray(encode_pagemap(1, entries))
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.choice([0, 1, 8, 0x10, 0x20, 0x28, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    try:
        _, decoded = decode_pagemap(bytes(data), "x")
    except BadImage:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagemap, "_entry_starts", lambda _window, _is_last: None)
        assert np.array_equal(decoded, decode_pagemap(bytes(data), "x")[1])


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_at_all_are_refused_or_decoded(rest: bytes) -> None:
    try:
        decode_pagemap(CRIU_BYTES[:14] + rest, "x")
        decode_pagemap(CRIU_BYTES[:8] + rest, "x")
    except BadImage:
        pass


@pytest.mark.parametrize("size", [255, 256, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_giant_record_length_is_refused(size: int) -> None:
    with pytest.raises(BadImage, match="cut short"):
        decode_pagemap(CRIU_BYTES[:14] + size.to_bytes(4, "little") + CRIU_BYTES[18:], "x")
    with pytest.raises(BadImage, match="cut short"):
        decode_pagemap(CRIU_BYTES[:8] + size.to_bytes(4, "little") + CRIU_BYTES[12:], "x")


def test_a_file_of_zeros_is_refused_at_once() -> None:
    with pytest.raises(BadImage):
        decode_pagemap(CRIU_BYTES[:8] + bytes(1 << 20), "x")
    with pytest.raises(BadImage):
        decode_pagemap(CRIU_BYTES[:14] + bytes(1 << 20), "x")


def test_offsets_count_present_entries_only() -> None:
    entries = np.array([[0x1000, 2, 4], [0x5000, 3, 1], [0x9000, 5, 2], [0x10000, 1, 6]], np.uint64)
    assert (page_offsets(entries) // PAGE_SIZE).tolist() == [0, 2, 2, 2, 3]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 20), st.booleans()), min_size=1))
def test_messages_of_any_integers_are_protobuf_s(rows: list[tuple[int, int, bool]]) -> None:
    first = np.array([row[0] for row in rows], np.uint64)
    second = np.array([row[1] for row in rows], np.uint64)
    present = np.array([row[2] for row in rows])
    encoded = encode_messages([Field(1, first), Field(2, second), Field(4, second, present)], b"", b"\0\0\0")
    expected = b""
    for a, b, has in rows:
        message = pb.pagemap_entry(vaddr=a, compat_nr_pages=b, flags=b if has else None).SerializeToString()
        expected += len(message).to_bytes(4, "little") + message
    assert encoded == expected


@settings(deadline=None)
@given(st.integers(0, (1 << 64) - 1))
def test_a_varint_is_protobuf_s(value: int) -> None:
    message = pb.pagemap_entry(vaddr=value)
    assert b"\x08" + varint(value) == message.SerializePartialToString()
