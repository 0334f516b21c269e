"""Region tables say the same of every page, however they are cut, marked, merged and clipped."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from incdump.model.regions import PageIs, Window, clip_regions, mark, merge, merge_into, split_at, where
from tests.unit.pagesets import (
    END,
    PAGE,
    categories_of,
    page_dicts,
    page_numbers,
    page_sets,
    pages_of,
    region_tables,
    regions_of,
    runs_of,
    thoroughly,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from incdump.model.runs import Regions

bits = st.integers(0, 511)
tables = region_tables(bits)


@thoroughly
@given(tables, st.lists(page_numbers, max_size=20))
def test_cutting_changes_no_page_and_leaves_no_region_across_a_cut(regions: Regions, at: list[int]) -> None:
    cut = split_at(regions, np.array(at, np.uint64) * np.uint64(PAGE))
    assert categories_of(cut) == categories_of(regions)
    assert not any(lo < page * PAGE < hi for lo, hi, _ in cut.tolist() for page in at)


@thoroughly
@given(tables, st.lists(page_numbers, max_size=20))
def test_cutting_cuts_nowhere_else(regions: Regions, at: list[int]) -> None:
    allowed = {page * PAGE for page in at} | set(regions[:, 0].tolist())
    assert set(split_at(regions, np.array(at, np.uint64) * np.uint64(PAGE))[:, 0].tolist()) <= allowed


@thoroughly
@given(tables, page_sets, bits, bits)
def test_marking_changes_just_the_bits_given_of_just_the_pages_given(
    regions: Regions, pages: set[int], on: int, off: int
) -> None:
    before = categories_of(regions)
    expected = {p: (c & ~off | on) if p in pages else c for p, c in before.items()}
    assert categories_of(mark(regions, runs_of(pages), on, clear=off)) == expected
    assert categories_of(regions) == before


@thoroughly
@given(tables, bits, bits)
def test_the_pages_where_bits_are_set_and_others_are_not(regions: Regions, having: int, lacking: int) -> None:
    lacking &= ~having
    expected = {p for p, c in categories_of(regions).items() if c & having == having and not c & lacking}
    assert pages_of(where(regions, having=having, lacking=lacking)) == expected


@thoroughly
@given(page_dicts(bits), page_sets, page_sets)
def test_merging_two_tables_that_share_no_page_loses_nothing(
    pages: dict[int, int], splits: set[int], first: set[int]
) -> None:
    a = {p: c for p, c in pages.items() if p in first}
    b = {p: c for p, c in pages.items() if p not in first}
    assert categories_of(merge(regions_of(a, splits), regions_of(b, splits))) == pages


@thoroughly
@given(tables, page_numbers, page_numbers)
def test_clipping_keeps_the_pages_between_two_bounds(regions: Regions, lo: int, hi: int) -> None:
    before = categories_of(regions)
    clipped = categories_of(clip_regions(regions, lo * PAGE, hi * PAGE))
    assert clipped == {p: c for p, c in before.items() if lo <= p < hi}
    assert categories_of(regions) == before


def windows_of(pages: dict[int, int], bounds: list[int]) -> list[Window]:
    """Windows over all of the pages, with ends at these page numbers; between some of them there are gaps."""
    edges = sorted({*bounds, 0, END})
    found = []
    for lo, hi in pairwise(edges):
        inside = {p: c for p, c in pages.items() if lo <= p < hi}
        if inside:
            found.append(Window(min(inside) * PAGE, hi * PAGE, regions_of(inside)))
    return found


@thoroughly
@given(page_dicts(bits), page_sets, st.lists(page_numbers, max_size=6))
def test_merging_into_windows_gives_every_page_once_in_windows_without_gaps(
    pages: dict[int, int], extra: set[int], bounds: list[int]
) -> None:
    read = {p: c for p, c in pages.items() if p not in extra}
    known = {p: c for p, c in pages.items() if p in extra}
    merged = list(merge_into(iter(windows_of(read, bounds)), regions_of(known)))
    assert [w.lo for w in merged] == [0, *(w.hi for w in merged[:-1])][: len(merged)]
    assert all(w.lo < w.hi for w in merged)
    told: dict[int, int] = {}
    for window in merged:
        inside = categories_of(window.regions)
        assert all(window.lo <= p * PAGE < window.hi for p in inside)
        assert not told.keys() & inside.keys()
        told |= inside
    assert told == pages


def test_merging_into_windows_reads_one_window_at_a_time() -> None:
    drawn = []

    def windows() -> Iterator[Window]:
        for n in range(5):
            drawn.append(n)
            yield Window(n * PAGE, (n + 1) * PAGE, regions_of({n: PageIs.PRESENT}))

    merged = merge_into(windows(), regions_of({9: PageIs.PRESENT}))
    for n in range(5):
        next(merged)
        assert drawn == list(range(n + 1))


def test_an_empty_window_twice_over_adds_nothing_twice() -> None:
    """A reader may say again that there is nothing up to where it was."""
    empty = regions_of({})
    windows = [Window(0, 2 * PAGE, empty), Window(2 * PAGE, 2 * PAGE, empty), Window(2 * PAGE, 4 * PAGE, empty)]
    merged = list(merge_into(iter(windows), regions_of(dict.fromkeys(range(6), 8))))
    assert [page for w in merged for page in categories_of(w.regions)] == list(range(6))


def test_work_does_not_grow_with_the_number_of_pages() -> None:
    """2^34 pages, in a handful of rows."""
    wide = np.array([[0, 1 << 46, PageIs.PRESENT]], np.uint64)
    marked = mark(wide, np.array([[1 << 45, (1 << 45) + PAGE]], np.uint64), PageIs.WRITTEN)
    assert len(marked) == 3
    assert where(marked, having=PageIs.WRITTEN).tolist() == [[1 << 45, (1 << 45) + PAGE]]


def test_the_categories_have_the_kernels_numbers() -> None:
    """include/uapi/linux/fs.h, PAGE_IS_*."""
    assert {c.name: c.value for c in PageIs} == {
        "WPALLOWED": 1 << 0,
        "WRITTEN": 1 << 1,
        "FILE": 1 << 2,
        "PRESENT": 1 << 3,
        "SWAPPED": 1 << 4,
        "PFNZERO": 1 << 5,
        "HUGE": 1 << 6,
        "SOFT_DIRTY": 1 << 7,
        "GUARD": 1 << 8,
    }
