"""The content tracker never calls a changed page unchanged, and what it notes is true of the images."""

from __future__ import annotations

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.errors import BadImage
from incdump.tracking.content import BATCH_PAGES, HashCollector, HashTable, hash_pages, new_seed, unchanged_pages
from tests.unit.pagesets import PAGE, Memory, content_of, moderately, page_sets, pages_of, runs_of, thoroughly

SEED = 0x1234_5678_9ABC_DEF0


def hash_table(pages: set[int], memory: Memory | None = None, seed: int = SEED) -> HashTable:
    """The table of a dump of these pages as they are now."""
    memory = memory or Memory()
    collector = HashCollector(seed)
    for page in pages:
        collector.add(np.array([page * PAGE], np.uint64), hash_pages(memory.content(page), seed))
    return collector.table()


def compare(candidates: set[int], memory: Memory, parent: HashTable) -> tuple[set[int], int, HashTable]:
    """The unchanged pages, how many were compared, and what was noted."""
    collector = HashCollector(parent.seed)
    buffer = np.empty(BATCH_PAGES * PAGE, np.uint8)
    unchanged, compared = unchanged_pages(runs_of(candidates), memory.read_into, parent, collector, buffer)
    return pages_of(unchanged), compared, collector.table()


@thoroughly
@given(page_sets, page_sets, page_sets, page_sets)
def test_unchanged_is_a_page_that_was_asked_for_and_known_and_read_and_is_the_same(
    candidates: set[int], known: set[int], changed: set[int], unreadable: set[int]
) -> None:
    parent = hash_table(known)
    memory = Memory(unreadable)
    memory.versions = dict.fromkeys(changed, 1)
    unchanged, compared, noted = compare(candidates, memory, parent)
    assert unchanged == (candidates & known) - changed - unreadable
    assert compared == len(candidates & known)
    assert set(memory.read) == candidates & known
    assert pages_of(noted.known()) == unchanged
    assert noted.rows.tolist() == [row for row in parent.rows.tolist() if row[0] // PAGE in unchanged]


@moderately
@given(st.integers(0, PAGE - 1), st.integers(1, 255))
def test_one_byte_makes_the_difference(at: int, by: int) -> None:
    page = content_of(5)
    before = hash_pages(page, SEED)
    page[at] ^= by
    assert not np.array_equal(before, hash_pages(page, SEED))


def test_a_page_of_zeros_that_cannot_be_read_is_not_a_page_of_zeros_unchanged() -> None:
    """What cannot be read is zeros in the buffer."""
    collector = HashCollector(SEED)
    collector.add(np.array([3 * PAGE], np.uint64), hash_pages(np.zeros(PAGE, np.uint8), SEED))
    assert compare({3}, Memory(unreadable={3}), collector.table())[0] == set()


def test_the_same_bytes_at_another_address_are_not_unchanged() -> None:
    collector = HashCollector(SEED)
    collector.add(np.array([3 * PAGE], np.uint64), hash_pages(content_of(4), SEED))
    assert compare({3, 4}, Memory(), collector.table())[0] == set()


def test_more_pages_than_a_batch_are_all_compared() -> None:
    pages = set(range(0, 5 * BATCH_PAGES, 2))
    memory = Memory()
    memory.versions = dict.fromkeys(range(0, 5 * BATCH_PAGES, 14), 1)
    unchanged, compared, _ = compare(pages, memory, hash_table(pages))
    assert unchanged == pages - memory.versions.keys()
    assert compared == len(pages)


def test_what_is_noted_of_a_page_that_is_read_twice_is_the_second_reading() -> None:
    """It was found unchanged, then written to the images all the same, and was another by then."""
    collector = HashCollector(SEED)
    memory = Memory()
    buffer = np.empty(BATCH_PAGES * PAGE, np.uint8)
    unchanged_pages(runs_of({1, 2, 3}), memory.read_into, hash_table({1, 2, 3}), collector, buffer)
    memory.versions = {2: 1}
    collector.add(np.array([2 * PAGE], np.uint64), hash_pages(memory.content(2), SEED))
    noted = HashTable.decode(b"".join(collector.table().encode()), "hashes")
    assert noted.rows.tolist() == hash_table({1, 2, 3}, memory).rows.tolist()


@moderately
@given(page_sets, page_sets)
def test_pages_that_vanished_are_left_out_of_the_table(pages: set[int], gone: set[int]) -> None:
    collector = HashCollector(SEED)
    for page in pages:
        collector.add(np.array([page * PAGE], np.uint64), hash_pages(content_of(page), SEED))
    assert pages_of(collector.table(drop=runs_of(gone)).known()) == pages - gone


@moderately
@given(page_sets)
def test_hashes_are_those_of_each_page_by_itself(pages: set[int]) -> None:
    together = np.concatenate([content_of(p) for p in sorted(pages)] or [np.empty(0, np.uint8)])
    hashes = hash_pages(together, SEED)
    assert hashes.shape == (len(pages), 2)
    for at, page in enumerate(sorted(pages)):
        assert np.array_equal(hashes[at : at + 1], hash_pages(content_of(page), SEED))


def test_another_seed_gives_other_hashes() -> None:
    assert not np.array_equal(hash_pages(content_of(1), 1), hash_pages(content_of(1), 2))
    assert new_seed() != new_seed()
    assert 0 <= new_seed() < 1 << 64


def test_a_table_made_with_another_seed_calls_nothing_unchanged_that_changed() -> None:
    parent = hash_table({1, 2}, seed=7)
    memory = Memory()
    memory.versions = {2: 1}
    assert compare({1, 2}, memory, parent)[0] == {1}


@moderately
@given(page_sets, st.integers(0, (1 << 64) - 1))
def test_a_table_is_read_back_as_it_was_written(pages: set[int], seed: int) -> None:
    written = hash_table(pages, seed=seed)
    read = HashTable.decode(b"".join(written.encode()), "hashes")
    assert (read.seed, read.rows.tolist(), len(read)) == (seed, written.rows.tolist(), len(pages))


@moderately
@given(st.sampled_from(range(200)), st.binary(min_size=1, max_size=4))
def test_a_damaged_table_is_refused_or_still_in_order(at: int, damage: bytes) -> None:
    good = b"".join(hash_table(set(range(10))).encode())
    bad = good[:at] + damage + good[at + len(damage) :]
    with suppress(BadImage):
        table = HashTable.decode(bad, "hashes")
        assert len(pages_of(table.known())) == len(table) == 10


@thoroughly
@given(st.binary(max_size=200))
def test_bytes_that_are_no_table_are_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        HashTable.decode(data, "hashes")


def packed(*addresses: int, count: int | None = None) -> bytes:
    """A table of pages at these addresses, with a count that may be a lie."""
    header = struct.pack("<8sQQ", b"incdumph", SEED, len(addresses) if count is None else count)
    return header + b"".join(struct.pack("<QQQ", address, 1, 2) for address in addresses)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(packed(0, PAGE)[:-1], id="cut short"),
        pytest.param(packed(0, PAGE) + b"\0", id="too long"),
        pytest.param(packed(0, PAGE, count=1), id="count too small"),
        pytest.param(packed(0, PAGE, count=3), id="count too large"),
        pytest.param(packed(0, PAGE, count=(1 << 64) - 1), id="count absurd"),
        pytest.param(packed(0, count=1 + (1 << 64) // 24), id="count that overflows"),
        pytest.param(packed(PAGE, 0), id="out of order"),
        pytest.param(packed(PAGE, PAGE), id="a page twice"),
        pytest.param(packed((1 << 64) - PAGE, PAGE), id="out of order across the sign"),
        pytest.param(packed(1 << 63, 1 << 62), id="out of order by more than a signed number holds"),
        pytest.param(packed(0, PAGE + 8), id="not a page's address"),
        pytest.param(packed(0, 8), id="pages that overlap"),
        pytest.param(packed((1 << 64) - PAGE), id="a page that ends beyond the address space"),
        pytest.param(b"INCDUMPH" + packed()[8:], id="other magic"),
    ],
)
def test_a_table_that_cannot_be_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        HashTable.decode(data, "hashes")
    assert caught.value.path == "hashes"
    assert "--prev-images-dir" in str(caught.value)


@pytest.mark.parametrize("half", [0, 1])
def test_equal_is_a_page_that_the_table_has_with_both_halves_of_its_hash(half: int) -> None:
    parent = hash_table({1, 3})
    asked = np.array([0, 1, 2, 3, 4], np.uint64) * np.uint64(PAGE)
    hashes = hash_pages(np.concatenate([content_of(p) for p in (1, 1, 3, 3, 3)]), SEED).copy()
    assert parent.equal(asked, hashes).tolist() == [False, True, False, True, False]
    hashes[3, half] ^= np.uint64(1)
    assert parent.equal(asked, hashes).tolist() == [False, True, False, False, False]


def test_a_table_of_no_pages_knows_nothing() -> None:
    nothing = HashTable.decode(packed(), "hashes")
    assert len(nothing) == 0
    assert pages_of(nothing.known()) == set()
    assert compare({1, 2}, Memory(), nothing)[:2] == (set(), 0)
