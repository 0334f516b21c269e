"""What is given back where mappings have gone: the pieces of runs that lie in what is mapped now."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given

from incdump.tracking.uffd_wp import _overlaps
from tests.unit.pagesets import page_sets, pages_of, runs_of, stretches, thoroughly


@thoroughly
@given(page_sets, page_sets, page_sets)
def test_every_page_that_is_mapped_is_in_one_piece_that_reaches_across_no_bound(
    runs: set[int], mapped: set[int], bounds: set[int]
) -> None:
    spans = []
    for first, last in stretches(mapped):  # neighbours may touch
        edges = [first, *sorted(b for b in bounds if first < b < last), last]
        spans += [(a * 4096, b * 4096) for a, b in pairwise(edges)]
    table = np.array(spans, np.uint64).reshape(-1, 2)
    pieces = _overlaps(runs_of(runs), table)
    found = [page for piece in pieces for page in pages_of(piece[None, :])]
    assert sorted(found) == sorted(runs & mapped)
    assert all(any(a <= lo and hi <= b for a, b in spans) for lo, hi in pieces.tolist())
