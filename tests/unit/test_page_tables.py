"""Page tables: which of their pages are noted, and what follows from the notes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from incdump.model.regions import PageIs, Window
from incdump.model.runs import page_addresses
from incdump.tracking.page_tables import SAMPLE, PageTableWatch, in_place, read_notes, samples
from tests.unit.pagesets import PAGE, moderately, regions_of, runs_of, stretches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TABLE = 512
PRESENT, SWAP, SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 55
WATCHED = int(PageIs.PRESENT | PageIs.WPALLOWED)

pages_of_three_tables = st.lists(st.tuples(st.integers(0, 3 * TABLE - 1), st.integers(1, 700)), max_size=6).map(
    lambda drawn: {page for at, n in drawn for page in range(at, min(at + n, 3 * TABLE))}
)


class Pagemap:
    """A file like a process's pagemap."""

    def __init__(self, entries: Mapping[int, int]) -> None:
        self.fd = os.memfd_create("pagemap")
        os.ftruncate(self.fd, 8 * 4 * TABLE)
        self.update(entries)

    def __del__(self) -> None:
        os.close(self.fd)

    def update(self, entries: Mapping[int, int]) -> None:
        for page, entry in entries.items():
            os.pwrite(self.fd, entry.to_bytes(8, "little"), 8 * page)


def filled(first: int, number: int = TABLE) -> dict[int, int]:
    """Pages in frames of their own."""
    return {page: PRESENT | 0x1000 + page for page in range(first, first + number)}


def tables_in_place(pagemap: Pagemap, notes: np.ndarray) -> set[int]:
    return {int(address) // (PAGE * TABLE) for address in page_addresses(in_place(pagemap.fd, notes))}


def windows(entries: Mapping[int, int], at_once: int) -> Iterator[Window]:
    """Watched pages that nobody wrote to, some at a time."""
    for lo in range(0, 3 * TABLE, at_once):
        pages = {page: WATCHED for page in entries if lo <= page < lo + at_once}
        yield Window(lo * PAGE, (lo + at_once) * PAGE, regions_of(pages))


@moderately
@given(pages_of_three_tables)
def test_the_first_and_the_last_pages_of_each_table_are_sampled(pages: set[int]) -> None:
    expected = set()
    for table in {page // TABLE for page in pages}:
        runs = stretches(page for page in pages if page // TABLE == table)
        expected |= set(range(*runs[0])) & set(range(runs[0][0], runs[0][0] + SAMPLE))
        expected |= set(range(*runs[-1])) & set(range(runs[-1][1] - SAMPLE, runs[-1][1]))
    assert (samples(runs_of(pages)) == runs_of(expected)).all()


def test_tables_whose_pages_keep_their_frames_are_in_place() -> None:
    pagemap = Pagemap(filled(0) | filled(TABLE))
    notes = read_notes(pagemap.fd, samples(runs_of(range(2 * TABLE))))
    assert len(notes) == 4 * SAMPLE
    assert tables_in_place(pagemap, notes) == {0, 1}


def test_a_table_that_was_replaced_by_another_one_is_not_in_place() -> None:
    pagemap = Pagemap(filled(0) | filled(TABLE))
    notes = read_notes(pagemap.fd, samples(runs_of(range(2 * TABLE))))
    pagemap.update(dict(zip(range(TABLE), filled(TABLE).values(), strict=True)))
    assert tables_in_place(pagemap, notes) == {1}


def test_one_page_of_many_that_was_not_written_is_proof() -> None:
    pagemap = Pagemap(filled(0))
    notes = read_notes(pagemap.fd, samples(runs_of(range(TABLE))))
    pagemap.update({page: entry | SOFT_DIRTY for page, entry in filled(1).items() if page < TABLE})
    assert tables_in_place(pagemap, notes) == {0}
    pagemap.update({0: PRESENT | SOFT_DIRTY | 0x1000})
    assert tables_in_place(pagemap, notes) == set()


def test_one_page_in_another_frame_refutes_all_others() -> None:
    pagemap = Pagemap(filled(0))
    notes = read_notes(pagemap.fd, samples(runs_of(range(TABLE))))
    pagemap.update({3: PRESENT | 0x99})
    assert tables_in_place(pagemap, notes) == set()


def test_pages_that_were_dropped_say_nothing() -> None:
    pagemap = Pagemap(filled(0))
    notes = read_notes(pagemap.fd, samples(runs_of(range(TABLE))))
    pagemap.update(dict.fromkeys(range(1, TABLE), 0))
    assert tables_in_place(pagemap, notes) == {0}
    pagemap.update({0: 0})
    assert tables_in_place(pagemap, notes) == set()


def test_a_page_in_swap_has_a_slot_of_its_own() -> None:
    pagemap = Pagemap({0: SWAP | 0x123})
    notes = read_notes(pagemap.fd, samples(runs_of({0})))
    assert tables_in_place(pagemap, notes) == {0}
    pagemap.update({0: SWAP | 0x125})
    assert tables_in_place(pagemap, notes) == set()
    pagemap.update({0: PRESENT | 0x123})
    assert tables_in_place(pagemap, notes) == set()


@moderately
@given(pages_of_three_tables, st.sampled_from([100, 512, 700, 3 * TABLE]), st.sets(st.integers(0, 2)))
def test_watched_pages_count_as_written_in_tables_that_are_not_in_place(
    pages: set[int], at_once: int, moved: set[int]
) -> None:
    entries = {page: PRESENT | 0x1000 + page for page in pages}
    pagemap = Pagemap(entries)
    first = PageTableWatch(pagemap.fd, None)
    told = [w.regions for w in first.told(windows(entries, at_once))]
    assert not any((regions[:, 2] & np.uint64(PageIs.WRITTEN)).any() for regions in told)
    notes = first.notes()
    pagemap.update({page: PRESENT | 0x9000 + page for page in pages if page // TABLE in moved})
    written = set()
    for window in PageTableWatch(pagemap.fd, notes).told(windows(entries, at_once)):
        marked = (window.regions[:, 2] & np.uint64(PageIs.WRITTEN)) != 0
        written |= {int(a) // PAGE for a in page_addresses(window.regions[marked, :2])}
    assert written == {page for page in pages if page // TABLE in moved}


def test_without_notes_nothing_is_in_place() -> None:
    pagemap = Pagemap(filled(0))
    watch = PageTableWatch(pagemap.fd, np.empty((0, 2), np.uint64))
    (window,) = watch.told(windows(filled(0), 3 * TABLE))
    assert (window.regions[:, 2] & np.uint64(PageIs.WRITTEN) != 0).all()
