"""Pages told one by one: what run sets, region tables and entry tables are held against in tests.

Everything here is slow and obvious, and shares no code with incdump: a run set is a set of page numbers, a region or
entry table a dict from page number to its bits. The hypothesis strategies draw both forms at once where that helps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PAGE = 4096
FAR = 0x7FFFF7DD0
"""A page number as high as those of a stack."""
HALF = 24
END = FAR + 4 * HALF
"""Beyond every page that is drawn."""
MANY = 1 << 32
"""More bytes than any test tells page by page: a wrong answer is not to fill the machine's memory."""

Table = NDArray[np.uint64]

thoroughly = settings(deadline=None, max_examples=200)
moderately = settings(deadline=None, max_examples=75)
seldom = settings(deadline=None, max_examples=25)

page_numbers = st.integers(0, 2 * HALF - 1).map(lambda n: n if n < HALF else FAR + n)
"""Two clusters of neighbours, one at address 0, one far up."""
_stretches = st.tuples(page_numbers, st.integers(1, 12))
page_sets = st.lists(_stretches, max_size=8).map(lambda drawn: {p for at, n in drawn for p in range(at, at + n)})
"""Sets of pages, mostly in stretches of several."""


def page_dicts(bits: st.SearchStrategy[int]) -> st.SearchStrategy[dict[int, int]]:
    """Bits by page number, mostly the same for several pages in a row."""
    drawn = st.lists(st.tuples(_stretches, bits), max_size=12)
    return drawn.map(lambda rows: {p: b for (at, n), b in rows for p in range(at, at + n)})


def stretches(pages: Iterable[int]) -> list[tuple[int, int]]:
    """First page and one past the last of each stretch of consecutive pages."""
    found: list[tuple[int, int]] = []
    for page in sorted(pages):
        if found and found[-1][1] == page:
            found[-1] = (found[-1][0], page + 1)
        else:
            found.append((page, page + 1))
    return found


def table(rows: Iterable[tuple[int, ...]], columns: int) -> Table:
    """Rows as an array, also if there are none."""
    return np.array(list(rows), np.uint64).reshape(-1, columns)


def runs_of(pages: Iterable[int]) -> Table:
    """A set of page numbers as a run set."""
    return table(((lo * PAGE, hi * PAGE) for lo, hi in stretches(pages)), 2)


def pages_of(runs: Table) -> set[int]:
    """A run set as a set of page numbers; it must be in canonical form."""
    assert runs.dtype == np.uint64
    assert runs.ndim == 2
    assert runs.shape[1] == 2
    rows = runs.tolist()
    assert all(lo % PAGE == 0 and hi % PAGE == 0 and lo < hi for lo, hi in rows), rows
    assert all(a[1] < b[0] for a, b in pairwise(rows)), f"touching or out of order: {rows}"
    assert sum(hi - lo for lo, hi in rows) <= MANY, "too many pages to be right"
    return {page for lo, hi in rows for page in range(lo // PAGE, hi // PAGE)}


def regions_of(pages: Mapping[int, int], splits: Iterable[int] = ()) -> Table:
    """Categories by page number as a region table; a region begins at each page of `splits`, needed or not."""
    rows: list[list[int]] = []
    begin = set(splits)
    for page in sorted(pages):
        if rows and rows[-1][1] == page and rows[-1][2] == pages[page] and page not in begin:
            rows[-1][1] = page + 1
        else:
            rows.append([page, page + 1, pages[page]])
    return table(((lo * PAGE, hi * PAGE, bits) for lo, hi, bits in rows), 3)


def categories_of(regions: Table) -> dict[int, int]:
    """A region table as categories by page number; it must be sorted and disjoint."""
    assert regions.dtype == np.uint64
    assert regions.ndim == 2
    assert regions.shape[1] == 3
    rows = regions.tolist()
    assert all(lo % PAGE == 0 and hi % PAGE == 0 and lo < hi for lo, hi, _ in rows), rows
    assert all(a[1] <= b[0] for a, b in pairwise(rows)), f"overlapping or out of order: {rows}"
    assert sum(hi - lo for lo, hi, _ in rows) <= MANY, "too many pages to be right"
    return {page: bits for lo, hi, bits in rows for page in range(lo // PAGE, hi // PAGE)}


def entries_of(pages: Mapping[int, int], splits: Iterable[int] = ()) -> Table:
    """Flags by page number as an entry table."""
    regions = regions_of(pages, splits)
    return np.stack((regions[:, 0], (regions[:, 1] - regions[:, 0]) // np.uint64(PAGE), regions[:, 2]), axis=1)


def flags_of(entries: Table) -> dict[int, int]:
    """An entry table as flags by page number; it must be sorted and disjoint."""
    return categories_of(
        np.stack((entries[:, 0], entries[:, 0] + entries[:, 1] * np.uint64(PAGE), entries[:, 2]), axis=1)
    )


def region_tables(bits: st.SearchStrategy[int]) -> st.SearchStrategy[Table]:
    """Region tables, with regions that touch though they need not."""
    return st.builds(regions_of, page_dicts(bits), page_sets)


def entry_tables(flags: st.SearchStrategy[int]) -> st.SearchStrategy[Table]:
    """Entry tables, with entries that touch though they need not."""
    return st.builds(entries_of, page_dicts(flags), page_sets)


def content_of(page: int, version: int = 0) -> NDArray[np.uint8]:
    """Some contents of a page, other ones for each page and version; shape (4096,)."""
    return np.resize(np.array([page, version, ~page], np.int64).view(np.uint8), PAGE)


class Memory:
    """Pages to be read: contents by page number, and pages that cannot be.

    :ivar versions: which contents a page has now, where not the first.
    :ivar unreadable: pages whose reading fails.
    :ivar read: the pages asked for, in order.
    """

    def __init__(self, unreadable: Iterable[int] = ()) -> None:
        self.versions: dict[int, int] = {}
        self.unreadable = set(unreadable)
        self.read: list[int] = []

    def content(self, page: int) -> NDArray[np.uint8]:
        """What a page holds."""
        return content_of(page, self.versions.get(page, 0))

    def read_into(self, buffer: NDArray[np.uint8], runs: Any, /) -> Table:
        """As a page source does: back to back, zeros for what cannot be read, which is returned."""
        pages = [page for lo, hi in runs.tolist() for page in range(lo // PAGE, hi // PAGE)]
        self.read += pages
        for at, page in enumerate(pages):
            buffer[at * PAGE : (at + 1) * PAGE] = 0 if page in self.unreadable else self.content(page)
        return runs_of(self.unreadable.intersection(pages))
