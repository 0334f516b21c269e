"""Which pages are hot: those that were written in every one of the last rounds, told page by page."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from incdump.model.hot import ROUNDS, HotPages
from tests.unit.pagesets import moderately, page_sets, pages_of, runs_of

PROCESSES = ((7, 100), (8, 101), (8, 200))


@moderately
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(PROCESSES, st.none() | page_sets)), max_size=6))
def test_hot_is_what_was_written_in_all_of_the_rounds_that_count(
    rounds: list[dict[tuple[int, int], set[int] | None]],
) -> None:
    hot = HotPages()
    for number, written in enumerate(rounds, 1):
        hot.note({process: runs_of(pages) for process, pages in written.items() if pages is not None})
        for process in PROCESSES:
            last = [done[process] for done in rounds[:number]][-(ROUNDS - 1) :]
            counted = [pages for pages in last if pages is not None]
            expected = set.intersection(*counted) if len(counted) == ROUNDS - 1 else set()
            assert pages_of(hot.before(process)) == expected
            all_of_them = [done[process] for done in rounds[:number]][-ROUNDS:]
            counted = [pages for pages in all_of_them if pages is not None]
            expected = set.intersection(*counted) if len(counted) == ROUNDS else set()
            assert pages_of(hot.left(process)) == expected


def test_nothing_is_hot_before_the_first_round() -> None:
    assert not len(HotPages().before((7, 100)))
    assert not len(HotPages().written(7))
    assert not len(HotPages().left((7, 100)))


def test_a_process_is_told_from_an_earlier_one_of_its_pid() -> None:
    hot = HotPages()
    hot.note({(8, 101): runs_of({1, 2})})
    assert np.array_equal(hot.written(8), runs_of({1, 2}))
    hot.note({(8, 200): runs_of({3})})
    assert np.array_equal(hot.written(8), runs_of({3}))
    assert not len(hot.before((8, 101)))
