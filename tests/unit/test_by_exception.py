"""What a scan by exception keeps silent about is clean, page for page, and nothing else is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from incdump.model.regions import PageIs, Window
from incdump.proc.maps import parse_maps
from incdump.proc.pagemap.scan import _Masks
from incdump.tracking.uffd_wp import silence, with_clean
from tests.unit.pagesets import (
    END,
    PAGE,
    categories_of,
    page_dicts,
    page_sets,
    pages_of,
    regions_of,
    runs_of,
    thoroughly,
)

if TYPE_CHECKING:
    from incdump.model.runs import Runs

HERE = PageIs.PRESENT | PageIs.SWAPPED
exceptions = page_dicts(st.sampled_from((0, 1, 3, 8, 10, 11, 12, 16, 17, 19)))


@thoroughly
@given(exceptions, page_sets, page_sets, st.integers(0, END), st.integers(0, END))
def test_silence_means_clean_of_pages_that_the_parent_has(
    told: dict[int, int], mapped: set[int], in_parent: set[int], a: int, b: int
) -> None:
    lo, hi = sorted((a, b))
    told = {page: bits for page, bits in told.items() if page in mapped and lo <= page < hi}
    window = Window(lo * PAGE, hi * PAGE, regions_of(told))
    silent = silence(window, runs_of(mapped))
    assert pages_of(silent) == {page for page in mapped if lo <= page < hi and page not in told}
    asked = {page: 19 for page in pages_of(silent) if page % 2 and page not in in_parent}
    found = with_clean(window, clip_runs(silent, in_parent), regions_of(asked))
    expected = {page: bits for page, bits in told.items() if bits & HERE} | asked
    expected |= dict.fromkeys(pages_of(silent) & in_parent, PageIs.PRESENT | PageIs.WPALLOWED)
    assert categories_of(found.regions) == expected
    assert (found.lo, found.hi) == (window.lo, window.hi)


def clip_runs(runs: Runs, pages: set[int]) -> Runs:
    return runs_of(pages_of(runs) & pages)


@thoroughly
@given(page_sets, st.integers(0, END), st.integers(0, END))
def test_mappings_within_a_span_are_cut_to_it(mapped: set[int], a: int, b: int) -> None:
    lo, hi = sorted((a, b))
    lines = [f"{start:x}-{end:x} rw-p 00000000 00:00 0 \n" for start, end in runs_of(mapped).tolist()]
    table = parse_maps("".join(lines).encode())
    assert pages_of(table.within(lo * PAGE, hi * PAGE).spans()) == {page for page in mapped if lo <= page < hi}


@thoroughly
@given(*[st.integers(0, 0x1FF)] * 4, st.integers(0, 0x1FF).map(lambda bits: bits & ~PageIs.FILE))
def test_where_there_is_no_file_page_file_need_not_be_asked_for(
    mask: int, inverted: int, anyof: int, returned: int, page: int
) -> None:
    masks = _Masks(mask, inverted, anyof, returned)
    less = masks.without_file()
    if masks.anyof & ~masks.inverted & ~masks.mask == PageIs.FILE == masks.anyof:
        return  # nothing matches, which no masks without FILE can say
    assert matches(less, page) == matches(masks, page)
    assert not less.returned & PageIs.FILE


def matches(masks: _Masks, page: int) -> bool:
    """As Documentation/admin-guide/mm/pagemap.rst has it."""
    bits = page ^ masks.inverted
    return bits & masks.mask == masks.mask and (not masks.anyof or bool(bits & masks.anyof))


def test_a_window_of_exceptions_may_be_empty() -> None:
    nothing = Window(0, 8 * PAGE, np.empty((0, 3), np.uint64))
    assert len(with_clean(nothing, silence(nothing, runs_of(set())), nothing.regions).regions) == 0
