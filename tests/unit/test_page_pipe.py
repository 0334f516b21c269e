"""Chunks tile the pages image: every page once, in order, in pieces that one system call takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump._uapi.memory import IOV_MAX
from incdump.page_pipe import CHUNK_PAGES, Chunk, cut
from tests.unit.pagesets import PAGE, entries_of, flags_of, moderately, table, thoroughly

if TYPE_CHECKING:
    from incdump.model.runs import Entries

sizes = st.one_of(st.integers(1, 5), st.integers(1, 3 * CHUNK_PAGES), st.sampled_from((1023, 1024, 1025, 2048)))
rows = st.lists(st.tuples(st.integers(0, 2), sizes, st.sampled_from((1, 4, 6))), max_size=40)


def entries_in(drawn: list[tuple[int, int, int]]) -> Entries:
    """Entries from (pages since the last one, pages, flags)."""
    found, page = [], 0x1000
    for gap, nr_pages, flags in drawn:
        page += gap
        found.append((page * PAGE, nr_pages, flags))
        page += nr_pages
    return table(found, 3)


def pages_in(chunk: Chunk) -> list[int]:
    """The page numbers of a chunk, in the order of their bytes."""
    return [page for lo, hi in chunk.runs.tolist() for page in range(lo // PAGE, hi // PAGE)]


@thoroughly
@given(rows, st.integers(0, 1 << 40))
def test_chunks_hold_every_present_page_once_and_in_the_order_of_the_image(
    drawn: list[tuple[int, int, int]], first_page: int
) -> None:
    entries = entries_in(drawn)
    chunks = list(cut(entries, first_page))
    present = [page for page, flags in flags_of(entries).items() if flags & 4]
    assert [page for chunk in chunks for page in pages_in(chunk)] == present
    place = first_page
    for chunk in chunks:
        assert chunk.first_page == place
        assert chunk.nr_pages == len(pages_in(chunk))
        place += chunk.nr_pages


@thoroughly
@given(rows)
def test_a_chunk_fits_a_buffer_and_a_system_call(drawn: list[tuple[int, int, int]]) -> None:
    for chunk in cut(entries_in(drawn), 0):
        assert 1 <= chunk.nr_pages <= CHUNK_PAGES
        assert 1 <= len(chunk.runs) <= IOV_MAX


@moderately
@given(rows, st.integers(0, 3 * CHUNK_PAGES))
def test_every_chunk_but_the_first_begins_at_a_mebibyte_of_the_image(
    drawn: list[tuple[int, int, int]], first_page: int
) -> None:
    """Which is how the page cache likes it; and each hand-over to a thread has its price."""
    chunks = list(cut(entries_in(drawn), first_page))
    assert all(chunk.first_page % CHUNK_PAGES == 0 for chunk in chunks[1:])
    assert all(chunk.nr_pages == CHUNK_PAGES for chunk in chunks[1:-1])


@pytest.mark.parametrize("pages", [255, 256, 257, 5000])
def test_single_pages_far_apart_come_at_most_256_to_a_chunk(pages: int) -> None:
    chunks = list(cut(entries_of(dict.fromkeys(range(0, 2 * pages, 2), 4)), 0))
    assert [len(chunk.runs) for chunk in chunks] == [256] * (pages // 256) + [pages % 256] * (pages % 256 > 0)


def test_a_chunk_is_one_mebibyte() -> None:
    assert CHUNK_PAGES * PAGE == 1 << 20


def test_the_picture_in_the_modules_text() -> None:
    entries = table([(0, 3, 6), (3 * PAGE, 7, 1), (20 * PAGE, 1, 4), (40 * PAGE, 5000, 4)], 3)
    chunks = list(cut(entries, 0))
    assert pages_in(chunks[0])[:5] == [0, 1, 2, 20, 40]
    assert [chunk.nr_pages for chunk in chunks] == [256] * 19 + [5004 - 19 * 256]
    assert [chunk.nr_pages for chunk in cut(entries, 10)] == [246, *[256] * 18, 5004 - 246 - 18 * 256]


@pytest.mark.parametrize("entries", [table([], 3), table([(0, 1 << 30, 1), (1 << 50, 7, 2)], 3)])
def test_entries_with_nothing_to_write_make_no_chunks(entries: Entries) -> None:
    assert list(cut(entries, 5)) == []


def test_the_entries_are_left_as_they_were() -> None:
    entries = table([(0, 5000, 4)], 3)
    list(cut(entries, 0))
    assert np.array_equal(entries, table([(0, 5000, 4)], 3))
