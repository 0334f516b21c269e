"""The page pipe: pages to be written, cut into chunks for the writers.

A chunk is at most `CHUNK_PAGES` pages in at most `CHUNK_IOVECS` runs (the most that one process_vm_readv(2) takes). Its
place in the pages image is fixed here, so that writers may finish in any order:

    entries          [A: 3 pages] [hole] [B: 1 page] [C: 5000 pages]
    pages image      |A A A B C C C C ... C|C C C C ... |
    chunks            ^ chunk 0 (1024 pages) ^ chunk 1 ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from incdump.model.runs import PAGE_SHIFT, PE_PRESENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from incdump.model.runs import Entries, Runs

CHUNK_PAGES = 1024
"""4 MiB: large enough for full copying speed, small enough for a buffer per writer."""
CHUNK_IOVECS = 1024
"""UIO_MAXIOV."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of work for a writer.

    :ivar runs: the pages, ascending; their bytes lie back to back in the pages image. Shape (n, 2).
    :ivar first_page: where in the pages image they begin, in pages.
    :ivar nr_pages: how many there are.
    """

    runs: Runs
    first_page: int
    nr_pages: int


def cut(entries: Entries, first_page: int) -> Iterator[Chunk]:
    """Cut the pages of an entry table into chunks.

    :param entries: rows without PE_PRESENT take no place and are passed over.
    :param first_page: where in the pages image the first of them goes, in pages.
    """
    rows = entries[(entries[:, 2] & np.uint64(PE_PRESENT)) != 0]
    if not len(rows):
        return
    pieces = _split_long(rows)
    counts = pieces[:, 1].astype(np.int64)
    before = np.concatenate(([0], np.cumsum(counts)))
    spans = np.stack((pieces[:, 0], pieces[:, 0] + (pieces[:, 1] << np.uint64(PAGE_SHIFT))), axis=1)
    begin = 0
    while begin < len(pieces):
        end = int(np.searchsorted(before, before[begin] + CHUNK_PAGES, "right")) - 1
        end = min(max(end, begin + 1), begin + CHUNK_IOVECS)
        yield Chunk(spans[begin:end], first_page + int(before[begin]), int(before[end] - before[begin]))
        begin = end


def _split_long(rows: Entries) -> Entries:
    """Cut entries of more than a chunk into pieces of a chunk at most."""
    parts = (rows[:, 1].astype(np.int64) + CHUNK_PAGES - 1) // CHUNK_PAGES
    if (parts == 1).all():
        return rows
    of = np.repeat(np.arange(len(rows)), parts)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
    skipped = (nth * CHUNK_PAGES).astype(np.uint64)
    start = rows[of, 0] + (skipped << np.uint64(PAGE_SHIFT))
    size = np.minimum(rows[of, 1] - skipped, np.uint64(CHUNK_PAGES))
    return np.stack((start, size, rows[of, 2]), axis=1)
