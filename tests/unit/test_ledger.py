"""The ledger has every page that was taken, and says so only when nothing more is being taken."""

from __future__ import annotations

import threading
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.model import runs
from incdump.model.runs import covers
from incdump.tracking import ledger as module
from incdump.tracking.ledger import MOST_RUNS, Ledger, coarser
from tests.unit.pagesets import PAGE, moderately, page_sets, pages_of, runs_of, table, thoroughly

if TYPE_CHECKING:
    from incdump.model.runs import Runs

WAIT = 10.0


@thoroughly
@given(st.lists(page_sets, max_size=8), st.sampled_from((2, 3, 10, MOST_RUNS)))
def test_nothing_that_was_recorded_is_lost(taken: list[set[int]], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_RUNS", limit)
        ledger = Ledger()
        for pages in taken:
            ledger.record(runs_of(pages))
            assert covers(ledger.taken(), runs_of(pages))
        everything = set().union(*taken)
        assert covers(ledger.close(), runs_of(everything))
        assert np.array_equal(ledger.taken(), ledger.close())
        if limit == MOST_RUNS:
            assert pages_of(ledger.close()) == everything


@moderately
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=10))
def test_spans_are_taken_whole(spans: list[tuple[int, int]]) -> None:
    ledger = Ledger()
    for lo, size in spans:
        ledger.record_span(lo * PAGE, (lo + size) * PAGE)
    assert pages_of(ledger.close()) == {page for lo, size in spans for page in range(lo, lo + size)}


@thoroughly
@given(page_sets, st.integers(1, 8))
def test_coarser_runs_have_every_page_and_none_beyond_the_first_and_the_last(pages: set[int], most: int) -> None:
    runs = runs_of(pages)
    coarse = coarser(runs, most)
    assert len(coarse) <= most
    assert covers(coarse, runs)
    assert np.array_equal(coarse, runs) or len(runs) > most
    assert coarse[:1, 0].tolist() == runs[:1, 0].tolist()
    assert coarse[-1:, 1].tolist() == runs[-1:, 1].tolist()


def test_regions_may_be_recorded_as_they_come_and_their_array_used_again() -> None:
    """A scan has one array of regions, which the next system call fills anew."""
    ledger = Ledger()
    regions = table([(9 * PAGE, 10 * PAGE, 2), (0, 2 * PAGE, 2), (PAGE, 3 * PAGE, 2)], 3)
    ledger.record(regions)
    regions[:] = 0
    assert pages_of(ledger.taken()) == {0, 1, 2, 9}


def test_what_was_taken_stays_after_closing() -> None:
    ledger = Ledger()
    ledger.record(runs_of({1}))
    before = ledger.closed
    assert pages_of(ledger.close()) == {1}
    assert (before, ledger.closed) == (False, True)
    assert pages_of(ledger.close()) == {1}
    assert "1 pages, closed" in repr(ledger)


def test_an_empty_ledger_has_taken_nothing() -> None:
    assert pages_of(Ledger().close()) == set()


def test_closing_waits_for_the_scan_that_is_under_way() -> None:
    ledger = Ledger()
    scanning, finish, closed = threading.Event(), threading.Event(), threading.Event()
    answer: list[set[int]] = []

    def scan() -> None:
        with ledger.lock:
            scanning.set()
            assert finish.wait(WAIT)
            ledger.record(runs_of({7}))

    def close() -> None:
        answer.append(pages_of(ledger.close()))
        closed.set()

    threads = [threading.Thread(target=scan), threading.Thread(target=close)]
    threads[0].start()
    assert scanning.wait(WAIT)
    threads[1].start()
    came_back = closed.wait(0.1)  # the only way to see that something does not happen
    finish.set()
    for thread in threads:
        thread.join(WAIT)
    assert not came_back
    assert answer == [{7}]


@pytest.mark.parametrize("seed", range(5))
def test_what_scanners_took_before_they_found_the_ledger_closed_is_what_closing_returns(seed: int) -> None:
    ledger = Ledger()
    order = Random(seed)
    taken: list[set[int]] = [set() for _ in range(4)]
    halfway = threading.Barrier(5)

    def scan(number: int, pages: list[int]) -> None:
        for nth, page in enumerate(pages):
            if nth == 20:
                halfway.wait(WAIT)
            with ledger.lock:
                if ledger.closed:
                    return
                taken[number].add(page)
                ledger.record(runs_of({page}))

    every = [order.sample(range(10_000), 2000) for _ in taken]
    threads = [threading.Thread(target=scan, args=work) for work in enumerate(every)]
    for thread in threads:
        thread.start()
    halfway.wait(WAIT)
    closed = pages_of(ledger.close())
    for thread in threads:
        thread.join(WAIT)
    assert closed == set().union(*taken)


def test_putting_a_ledger_in_order_is_rare_however_scattered_its_pages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it had more runs than the limit that do not touch, ordering it at each record would be quadratic."""
    monkeypatch.setattr(module, "MOST_RUNS", 100)
    ordered = []

    def canonical(spans: Runs) -> Runs:
        ordered.append(len(spans))
        return runs.canonical(spans)

    monkeypatch.setattr(module, "canonical", canonical)
    ledger = Ledger()
    for n in range(1000):
        ledger.record(runs_of(range(200 * n, 200 * n + 100, 2)))
        assert len(ledger.taken()) <= 100
    assert sum(ordered) < 12 * 50_000 + 1000 * 100
