"""The page pipe: pages to be written, cut into chunks for the writers.

A chunk is at most `CHUNK_PAGES` pages, and so never more runs than one process_vm_readv(2) takes. Its place in the
pages image is fixed here, so that writers may finish in any order. Chunks are cut at multiples of `CHUNK_PAGES` of the
image, wherever the first one begins:

    entries          [A: 3 pages] [hole] [B: 1 page] [C: 5000 pages]
    pages image      |A A A B C C C C ... C|C C C C ... |
    chunks            ^ chunk 0 (256 pages) ^ chunk 1 ...

because the page cache takes an aligned MiB as one piece (a large folio), and another one as a dozen: a tenth of the
time of a full dump.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from incdump.model.runs import PAGE_SHIFT, present_entries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump.model.runs import Entries, Runs

CHUNK_PAGES = 256
"""1 MiB: what was read is still in the processor's own cache when it is written."""


class Chunk(NamedTuple):
    """A piece of work for a writer.

    :ivar runs: the pages, ascending; their bytes lie back to back in the pages image. Shape (n, 2).
    :ivar first_page: where in the pages image they begin, in pages.
    :ivar nr_pages: how many there are.
    :ivar flags: of the entry that each run is of, or is a part of. Shape (n,).
    """

    runs: Runs
    first_page: int
    nr_pages: int
    flags: NDArray[np.uint64]


def cut(entries: Entries, first_page: int) -> Iterator[Chunk]:
    """Cut the pages of an entry table into chunks, all full but the first and the last.

    :param entries: rows without PE_PRESENT take no place and are passed over.
    :param first_page: where in the pages image the first of them goes, in pages.
    """
    rows = present_entries(entries)
    if not len(rows):
        return
    spans, flags, place, end_place = _split(rows, first_page)
    begins = np.flatnonzero(np.diff(place // CHUNK_PAGES, prepend=-1))
    places = [*place[begins].tolist(), end_place]
    bounds = [*begins.tolist(), len(spans)]
    for i in range(len(begins)):
        of = slice(bounds[i], bounds[i + 1])
        yield Chunk(spans[of], places[i], places[i + 1] - places[i], flags[of])


def _split(rows: Entries, first_page: int) -> tuple[Runs, NDArray[np.uint64], NDArray[np.int64], int]:
    """Cut entries wherever a chunk ends.

    :returns: the pieces, start and end, shape (n, 2); the flags of each, shape (n,); its place in the image, in pages,
        shape (n,); and where in the image the last one ends.
    """
    sizes = rows[:, 1].astype(np.int64)
    ends = np.cumsum(sizes) + first_page
    begins = ends - sizes
    chunk = begins // CHUNK_PAGES
    parts = (ends - 1) // CHUNK_PAGES - chunk + 1
    of = np.repeat(np.arange(len(rows)), parts)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)
    place = np.maximum(begins[of], (chunk[of] + nth) * CHUNK_PAGES)
    until = np.minimum(ends[of], (chunk[of] + nth + 1) * CHUNK_PAGES)
    within = np.stack((place - begins[of], until - begins[of]), axis=1).astype(np.uint64)
    return rows[of, :1] + (within << np.uint64(PAGE_SHIFT)), rows[of, 2], place, int(ends[-1])
