"""What becomes of a page: held against CRIU's rules and the invariants, restated here page by page.

`fate` is the reference. It looks at one page at a time and shares nothing with `incdump.classify` but the names of
mapping kinds and categories.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.classify import Rule, classify, payload_runs, rules
from incdump.model.regions import PageIs, Window
from incdump.model.vmas import Prot, VmaFlag, VmaKind, VmaTable
from tests.unit.pagesets import (
    END,
    FAR,
    PAGE,
    flags_of,
    moderately,
    page_dicts,
    page_sets,
    pages_of,
    regions_of,
    runs_of,
    thoroughly,
)

if TYPE_CHECKING:
    from collections.abc import Collection

IN_PARENT, PRESENT, LAZY_PRESENT = 1, 4, 6
CLEAN = PageIs.WPALLOWED | PageIs.PRESENT
"""Watched, there, and not written."""


NO_FLAGS = VmaFlag(0)


@dataclass(frozen=True)
class Vma:
    """One mapping of a test: page numbers, and what matters of it."""

    first: int
    last: int
    kind: VmaKind = VmaKind.ANON
    prot: Prot = Prot.READ | Prot.WRITE
    flags: VmaFlag = NO_FLAGS


def table_of(vmas: list[Vma]) -> VmaTable:
    """These mappings as a table."""
    return VmaTable(
        start=np.array([v.first * PAGE for v in vmas], np.uint64),
        end=np.array([v.last * PAGE for v in vmas], np.uint64),
        prot=np.array([v.prot for v in vmas], np.uint8),
        shared=np.zeros(len(vmas), bool),
        pgoff=np.zeros(len(vmas), np.uint64),
        dev=np.zeros(len(vmas), np.uint64),
        inode=np.zeros(len(vmas), np.uint64),
        kind=np.array([v.kind for v in vmas], np.uint8),
        flags=np.array([v.flags for v in vmas], np.uint64),
        names=("",) * len(vmas),
        has_flags=True,
    )


def belongs(category: int, vma: Vma | None) -> bool:
    """CRIU's rules: whether a page is the process's own, so that it has to be in the images."""
    private = (VmaKind.ANON, VmaKind.FILE_PRIVATE, VmaKind.HUGETLB, VmaKind.AIO_RING, VmaKind.VDSO)
    if vma is None or vma.kind not in private or vma.flags & VmaFlag.DROPPABLE:
        return False
    if not category & (PageIs.PRESENT | PageIs.SWAPPED) or category & PageIs.GUARD:
        return False
    whole = vma.kind in (VmaKind.VDSO, VmaKind.AIO_RING)
    return whole or not category & (PageIs.FILE | PageIs.PFNZERO)


def is_told_written(category: int, vma: Vma | None) -> bool:
    """Whether a tracker says that a page of a process was written, and will say so again."""
    told = PageIs.WPALLOWED | PageIs.WRITTEN
    trackable = (VmaKind.ANON, VmaKind.FILE_PRIVATE)
    return belongs(category, vma) and vma is not None and vma.kind in trackable and category & told == told


def fate(page: int, category: int, vma: Vma | None, parent: set[int] | None, hot: Collection[int] = ()) -> int | None:
    """The flags of a page's entry, or None when it gets none."""
    if not belongs(category, vma) or (page in hot and is_told_written(category, vma)):
        return None
    assert vma is not None
    vouched_for = bool(category & PageIs.WPALLOWED) and not category & PageIs.WRITTEN
    may_be_hole = vma.kind == VmaKind.ANON or (vma.kind == VmaKind.FILE_PRIVATE and bool(category & PageIs.PRESENT))
    if parent is not None and page in parent and vouched_for and may_be_hole:
        return IN_PARENT
    return LAZY_PRESENT if vma.kind == VmaKind.ANON and not vma.flags & VmaFlag.LOCKED else PRESENT


@st.composite
def vma_lists(draw: st.DrawFn) -> list[Vma]:
    """Mappings with and without gaps between them, in both clusters of pages."""
    found = []
    for at in (0, FAR + 20):
        first = at
        for _ in range(draw(st.integers(0, 6))):
            first += draw(st.integers(0, 3))
            last = first + draw(st.integers(1, 9))
            kind = draw(st.one_of(st.just(VmaKind.ANON), st.sampled_from(VmaKind)))
            flags = draw(st.sampled_from((0, 0, 0, VmaFlag.LOCKED, VmaFlag.DROPPABLE, VmaFlag.HUGEPAGE)))
            found.append(Vma(first, last, kind, draw(st.sampled_from((Prot(0), Prot.READ, Prot(3)))), VmaFlag(flags)))
            first = last
    return found


likely = st.sampled_from((CLEAN, CLEAN | PageIs.WRITTEN, PageIs.PRESENT, PageIs.SWAPPED | PageIs.WPALLOWED))
categories = st.one_of(likely.map(int), st.integers(0, 511))
parents = st.none() | page_sets | st.just(set(range(FAR + 20, END)) | set(range(60)))


def vma_at(vmas: list[Vma], page: int) -> Vma | None:
    """The mapping that a page is in."""
    return next((v for v in vmas if v.first <= page < v.last), None)


@thoroughly
@given(vma_lists(), page_dicts(categories), page_sets, parents)
def test_every_page_meets_the_fate_that_the_rules_have_for_it(
    vmas: list[Vma], pages: dict[int, int], splits: set[int], parent: set[int] | None
) -> None:
    vma_table = table_of(vmas)
    window = Window(0, END * PAGE, regions_of(pages, splits))
    result = classify(window, vma_table, rules(vma_table), None if parent is None else runs_of(parent))
    fates = {p: fate(p, c, vma_at(vmas, p), parent) for p, c in pages.items()}
    expected = {p: f for p, f in fates.items() if f is not None}
    assert flags_of(result.entries) == expected
    assert result.scanned == len(expected)
    assert result.holes == sum(f == IN_PARENT for f in expected.values())
    assert result.pages == result.scanned - result.holes
    assert result.unwatched == sum(not pages[p] & PageIs.WPALLOWED for p in expected)


@thoroughly
@given(vma_lists(), page_dicts(categories), page_sets, parents, page_sets)
def test_a_hot_page_that_was_written_once_more_gets_no_entry_and_no_other_page_is_touched_by_that(
    vmas: list[Vma], pages: dict[int, int], splits: set[int], parent: set[int] | None, hot: set[int]
) -> None:
    vma_table = table_of(vmas)
    window = Window(0, END * PAGE, regions_of(pages, splits))
    known = None if parent is None else runs_of(parent)
    result = classify(window, vma_table, rules(vma_table), known, runs_of(hot))
    fates = {p: fate(p, c, vma_at(vmas, p), parent, hot) for p, c in pages.items()}
    expected = {p: f for p, f in fates.items() if f is not None}
    written = {p for p, c in pages.items() if is_told_written(c, vma_at(vmas, p))}
    assert flags_of(result.entries) == expected
    assert pages_of(result.written) == written
    assert result.deferred == len(written & hot)
    assert result.holes == sum(f == IN_PARENT for f in expected.values())
    assert result.pages == len(expected) - result.holes
    assert result.scanned == len(expected) + result.deferred


@thoroughly
@given(vma_lists(), page_dicts(categories), page_sets, page_sets, st.sampled_from((0, PageIs.WRITTEN)))
def test_whatever_was_deferred_is_in_the_next_dump(
    vmas: list[Vma], pages: dict[int, int], parent: set[int], hot: set[int], meanwhile: int
) -> None:
    """Also if it was not written since, and if nobody watches it any more: the parent images lack it."""
    vma_table = table_of(vmas)
    rule = rules(vma_table)
    first = classify(Window(0, END * PAGE, regions_of(pages)), vma_table, rule, runs_of(parent), runs_of(hot))
    entries = flags_of(first.entries)
    deferred = {p for p, c in pages.items() if belongs(c, vma_at(vmas, p))} - set(entries)
    assert len(deferred) == first.deferred
    for watched in (PageIs.WPALLOWED, 0):
        later = {p: c & ~(PageIs.WRITTEN | PageIs.WPALLOWED) | meanwhile | watched for p, c in pages.items()}
        window = Window(0, END * PAGE, regions_of(later))
        second = flags_of(classify(window, vma_table, rule, runs_of(set(entries))).entries)
        assert all(second[p] & PRESENT for p in deferred)


@moderately
@given(vma_lists(), page_dicts(categories), page_sets, parents)
def test_entries_that_touch_differ_in_their_flags(
    vmas: list[Vma], pages: dict[int, int], splits: set[int], parent: set[int] | None
) -> None:
    vma_table = table_of(vmas)
    window = Window(0, END * PAGE, regions_of(pages, splits))
    rows = classify(window, vma_table, rules(vma_table), None if parent is None else runs_of(parent)).entries.tolist()
    for (vaddr, nr_pages, flags), (following, _, other) in pairwise(rows):
        assert vaddr + nr_pages * PAGE < following or flags != other


@moderately
@given(vma_lists(), page_dicts(categories), parents, st.sets(st.integers(0, END), max_size=5))
def test_it_does_not_matter_where_windows_begin_and_end(
    vmas: list[Vma], pages: dict[int, int], parent: set[int] | None, bounds: set[int]
) -> None:
    vma_table = table_of(vmas)
    known = None if parent is None else runs_of(parent)
    edges = sorted({0, END, FAR + 30, *bounds})
    told: dict[int, int] = {}
    for lo, hi in pairwise(edges):
        inside = regions_of({p: c for p, c in pages.items() if lo <= p < hi})
        told |= flags_of(classify(Window(lo * PAGE, hi * PAGE, inside), vma_table, rules(vma_table), known).entries)
    whole = classify(Window(0, END * PAGE, regions_of(pages)), vma_table, rules(vma_table), known)
    assert told == flags_of(whole.entries)


@moderately
@given(vma_lists(), page_dicts(categories), st.sampled_from((Rule.HOLE, Rule.DUMP, Rule.LAZY, Rule.DUMP | Rule.LAZY)))
def test_the_content_tracker_is_asked_about_pages_that_belong_and_nobody_watches(
    vmas: list[Vma], pages: dict[int, int], wanted: Rule
) -> None:
    vma_table = table_of(vmas)
    rule = rules(vma_table)
    window = Window(0, END * PAGE, regions_of(pages))
    expected = {
        p
        for p, c in pages.items()
        if not c & PageIs.WPALLOWED
        and belongs(c, vma_at(vmas, p))
        and any(v.first <= p < v.last and r & wanted == wanted for v, r in zip(vmas, rule.tolist(), strict=True))
    }
    assert pages_of(payload_runs(window, vma_table, rule, wanted)) == expected


ANON = Vma(0, 10)


def one_page(category: int, vma: Vma = ANON, parent: Collection[int] | None = (3,)) -> int | None:
    """What becomes of page 3, in this mapping of pages 0 to 9."""
    vma_table = table_of([vma])
    window = Window(0, 10 * PAGE, regions_of({3: category}))
    return flags_of(
        classify(window, vma_table, rules(vma_table), None if parent is None else runs_of(parent)).entries
    ).get(3)


def test_a_hole_is_a_page_that_is_watched_and_unwritten_and_in_the_parent() -> None:
    assert one_page(CLEAN) == IN_PARENT


@pytest.mark.parametrize(
    ("category", "parent"),
    [
        pytest.param(PageIs.PRESENT, {3}, id="not watched"),
        pytest.param(CLEAN | PageIs.WRITTEN, {3}, id="written"),
        pytest.param(CLEAN, {2, 4}, id="not in the parent"),
        pytest.param(CLEAN, set(), id="the parent has nothing"),
        pytest.param(CLEAN, None, id="the tracker's answer is not about the parent"),
    ],
)
def test_a_page_is_no_hole_if_any_of_these_fails(category: PageIs, parent: set[int] | None) -> None:
    assert one_page(category, parent=parent) == LAZY_PRESENT


@pytest.mark.parametrize("kind", [VmaKind.HUGETLB, VmaKind.AIO_RING, VmaKind.VDSO])
def test_mappings_that_are_dumped_whole_have_no_holes(kind: VmaKind) -> None:
    assert one_page(CLEAN, Vma(0, 10, kind)) == PRESENT


def test_a_swapped_out_page_may_be_a_hole_in_anonymous_memory_but_not_in_a_file_mapping() -> None:
    swapped = PageIs.WPALLOWED | PageIs.SWAPPED
    assert one_page(swapped) == IN_PARENT
    assert one_page(swapped, Vma(0, 10, VmaKind.FILE_PRIVATE)) == PRESENT


@pytest.mark.parametrize(
    "category",
    [
        PageIs(0),
        PageIs.WPALLOWED | PageIs.WRITTEN,
        PageIs.PRESENT | PageIs.FILE,
        PageIs.PRESENT | PageIs.PFNZERO,
        PageIs.SWAPPED | PageIs.GUARD,
        PageIs.PRESENT | PageIs.GUARD,
    ],
)
def test_absent_file_zero_and_guard_pages_are_not_the_processs_own(category: PageIs) -> None:
    assert one_page(category) is None
    assert one_page(category | PageIs.WPALLOWED) is None


@pytest.mark.parametrize("kind", [VmaKind.VDSO, VmaKind.AIO_RING])
def test_every_populated_page_of_the_vdso_and_of_aio_rings_is_dumped(kind: VmaKind) -> None:
    for category in (PageIs.PRESENT | PageIs.FILE, PageIs.PRESENT | PageIs.PFNZERO, PageIs.PRESENT):
        assert one_page(category, Vma(0, 10, kind)) == PRESENT


@pytest.mark.parametrize(
    "kind",
    [
        VmaKind.FILE_SHARED,
        VmaKind.SHMEM,
        VmaKind.HUGETLB_SHARED,
        VmaKind.VVAR,
        VmaKind.VSYSCALL,
        VmaKind.DEVICE,
        VmaKind.UPROBES,
    ],
)
def test_shared_memory_and_the_kernels_own_mappings_are_not_in_a_processs_pagemap(kind: VmaKind) -> None:
    assert one_page(PageIs.PRESENT | PageIs.WRITTEN, Vma(0, 10, kind)) is None


def test_every_kind_of_mapping_has_a_rule_here() -> None:
    """A kind that is added has to be thought of: by default it is not dumped."""
    dumped = {kind for kind in VmaKind if one_page(PageIs.PRESENT, Vma(0, 10, kind)) is not None}
    assert dumped == {VmaKind.ANON, VmaKind.FILE_PRIVATE, VmaKind.HUGETLB, VmaKind.AIO_RING, VmaKind.VDSO}


def test_droppable_memory_is_not_dumped() -> None:
    assert one_page(PageIs.PRESENT, Vma(0, 10, flags=VmaFlag.DROPPABLE)) is None


def test_only_anonymous_memory_that_is_not_locked_may_be_restored_lazily() -> None:
    assert one_page(PageIs.PRESENT) == LAZY_PRESENT
    assert one_page(PageIs.PRESENT, Vma(0, 10, flags=VmaFlag.LOCKED)) == PRESENT
    assert one_page(PageIs.PRESENT, Vma(0, 10, VmaKind.FILE_PRIVATE)) == PRESENT


def test_memory_that_may_not_be_read_is_dumped_like_any_other_and_marked_for_the_reader() -> None:
    closed = Vma(0, 10, prot=Prot(0))
    assert one_page(PageIs.PRESENT, closed) == LAZY_PRESENT
    rule = rules(table_of([closed, replace(closed, first=10, last=20, prot=Prot.READ)]))
    assert [bool(r & Rule.UNREADABLE) for r in rule.tolist()] == [True, False]


def test_one_entry_may_span_mappings() -> None:
    vma_table = table_of([Vma(0, 4), Vma(4, 8), Vma(9, 12)])
    window = Window(0, 12 * PAGE, regions_of(dict.fromkeys((*range(8), *range(9, 12)), PageIs.PRESENT)))
    entries = classify(window, vma_table, rules(vma_table), None).entries
    assert entries.tolist() == [[0, 8, LAZY_PRESENT], [9 * PAGE, 3, LAZY_PRESENT]]


def test_pages_outside_all_mappings_are_nothing() -> None:
    window = Window(0, 12 * PAGE, regions_of({11: PageIs.PRESENT}))
    for vmas in ([Vma(0, 4)], [Vma(0, 11), Vma(12, 13)], []):
        vma_table = table_of(vmas)
        assert not len(classify(window, vma_table, rules(vma_table), None).entries)


def test_work_does_not_grow_with_the_number_of_pages() -> None:
    """2^34 pages, of which one is in the parent."""
    vma_table = table_of([Vma(0, 1 << 34)])
    window = Window(0, 1 << 46, np.array([[0, 1 << 46, CLEAN]], np.uint64))
    result = classify(window, vma_table, rules(vma_table), runs_of({1 << 33}))
    assert result.holes == 1
    assert result.pages == (1 << 34) - 1
    assert len(result.entries) == 3
