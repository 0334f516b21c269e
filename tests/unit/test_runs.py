"""The run algebra is set algebra, in time by the number of runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.model import runs as algebra
from incdump.model.runs import PAGE_SIZE, Runs
from tests.unit.pagesets import PAGE, entry_tables, flags_of, page_numbers, page_sets, pages_of, runs_of, thoroughly

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=30)
addresses = st.lists(st.tuples(page_numbers, st.integers(0, PAGE - 1)), max_size=20)


def test_the_page_size_is_that_of_the_images() -> None:
    assert PAGE_SIZE == PAGE == 1 << algebra.PAGE_SHIFT


@thoroughly
@given(spans)
def test_canonical_spans_hold_the_same_pages_sorted_merged_and_not_empty(drawn: list[tuple[int, int]]) -> None:
    rows = np.array([(lo * PAGE, (lo + n) * PAGE) for lo, n in drawn], np.uint64).reshape(-1, 2)
    assert pages_of(algebra.canonical(rows)) == {p for lo, n in drawn for p in range(lo, lo + n)}


@thoroughly
@given(page_sets)
def test_a_canonical_run_set_is_its_own_canonical_form(pages: set[int]) -> None:
    assert np.array_equal(algebra.canonical(runs_of(pages)), runs_of(pages))


@thoroughly
@given(page_sets, page_sets)
def test_union_intersection_and_difference_are_those_of_the_sets_of_pages(a: set[int], b: set[int]) -> None:
    assert pages_of(algebra.union(runs_of(a), runs_of(b))) == a | b
    assert pages_of(algebra.intersect(runs_of(a), runs_of(b))) == a & b
    assert pages_of(algebra.subtract(runs_of(a), runs_of(b))) == a - b


@thoroughly
@given(page_sets, page_sets)
def test_a_run_set_covers_another_just_if_it_holds_all_its_pages(a: set[int], b: set[int]) -> None:
    assert algebra.covers(runs_of(a), runs_of(b)) == (b <= a)


@thoroughly
@given(page_sets, page_sets)
def test_what_is_first_uncovered_is_the_lowest_run_of_missing_pages(a: set[int], b: set[int]) -> None:
    assert np.array_equal(algebra.first_uncovered(runs_of(a), runs_of(b)), runs_of(b - a)[:1])


@thoroughly
@given(page_sets, page_numbers, page_numbers)
def test_clipping_keeps_the_pages_between_two_bounds(pages: set[int], lo: int, hi: int) -> None:
    assert pages_of(algebra.clip(runs_of(pages), lo * PAGE, hi * PAGE)) == {p for p in pages if lo <= p < hi}


@thoroughly
@given(page_sets, page_numbers, page_numbers)
def test_clipping_leaves_the_run_set_that_it_was_given_alone(pages: set[int], lo: int, hi: int) -> None:
    given_runs = runs_of(pages)
    algebra.clip(given_runs, lo * PAGE, hi * PAGE)
    assert np.array_equal(given_runs, runs_of(pages))


@thoroughly
@given(page_sets, addresses)
def test_an_address_is_a_member_just_if_its_page_is_in_the_set(pages: set[int], drawn: list[tuple[int, int]]) -> None:
    asked = np.array([page * PAGE + offset for page, offset in drawn], np.uint64)
    assert algebra.member(runs_of(pages), asked).tolist() == [page in pages for page, _ in drawn]


@thoroughly
@given(page_sets)
def test_pages_are_counted_and_listed_one_by_one(pages: set[int]) -> None:
    runs = runs_of(pages)
    assert algebra.page_count(runs) == len(pages)
    assert algebra.page_addresses(runs).tolist() == [page * PAGE for page in sorted(pages)]


@thoroughly
@given(page_sets)
def test_runs_are_found_again_from_the_list_of_their_pages(pages: set[int]) -> None:
    assert np.array_equal(algebra.runs_of_pages(algebra.page_addresses(runs_of(pages))), runs_of(pages))


@thoroughly
@given(entry_tables(st.sampled_from((1, 2, 4, 6))))
def test_the_runs_of_entries_are_their_pages_whatever_their_flags(entries: Runs) -> None:
    assert pages_of(algebra.entry_runs(entries)) == set(flags_of(entries))


def test_a_run_with_no_page_in_it_is_no_run() -> None:
    assert algebra.run(PAGE, PAGE).shape == algebra.run(2 * PAGE, PAGE).shape == algebra.empty_runs().shape == (0, 2)
    assert pages_of(algebra.run(PAGE, 3 * PAGE)) == {1, 2}
    assert algebra.empty_regions().shape == (0, 3)


def test_work_does_not_grow_with_the_number_of_pages() -> None:
    """Each of these sets has 2^34 pages and more: one byte a page would be 16 GiB."""
    wide = np.array([[0, 1 << 46], [1 << 47, (1 << 47) + (1 << 46)]], np.uint64)
    hole = np.array([[1 << 45, (1 << 45) + PAGE]], np.uint64)
    without = algebra.subtract(wide, hole)
    assert len(without) == 3
    assert algebra.page_count(without) == (1 << 35) - 1
    assert np.array_equal(algebra.union(without, hole), wide)
    assert np.array_equal(algebra.intersect(wide, hole), hole)
    assert np.array_equal(algebra.clip(wide, 1 << 45, (1 << 45) + PAGE), hole)
    assert algebra.first_uncovered(without, wide).tolist() == hole.tolist()


@pytest.mark.parametrize("top", [1 << 47, 0xFFFF_FFFF_FF60_1000])
def test_addresses_at_the_top_of_the_address_space_are_as_good_as_any(top: int) -> None:
    runs = algebra.run(top - 2 * PAGE, top)
    assert algebra.page_count(runs) == 2
    assert algebra.page_addresses(runs).tolist() == [top - 2 * PAGE, top - PAGE]
    assert np.array_equal(algebra.runs_of_pages(algebra.page_addresses(runs)), runs)
    assert algebra.subtract(runs, algebra.run(top - PAGE, top)).tolist() == [[top - 2 * PAGE, top - PAGE]]
