"""One pagemap and its pages image, while they are being filled: in the images dir, or sent to a page server."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from incdump._uapi.fallocate import fallocate
from incdump.images.pagemap import encode_in_parts
from incdump.model.regions import split_at
from incdump.model.runs import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PE_PRESENT,
    canonical,
    empty_regions,
    empty_runs,
    entry_runs,
    intersect,
    member,
    page_addresses,
    present_entries,
)
from incdump.page_pipe import CHUNK_PAGES, Chunk, cut
from incdump.tracking.content import hash_pages
from incdump.xfer.local import close_gaps, cut_off, write_chunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from incdump.images.new_dir import NewImagesDir
    from incdump.model.runs import Entries, Runs
    from incdump.tracking.content import HashCollector
    from incdump.xfer.local import PageSource


Hashes: TypeAlias = "tuple[HashCollector, Runs] | None"
"""Where to note the hashes of what was written, and for which pages; or None."""

MOST_ROOM = 1 << 16
"""256 MiB: to fill more with zeros takes longer than is to be waited before a freeze."""


class PageTable(ABC):
    """The entries of one process or segment, on their way to a pagemap. Appended in ascending order by one task.

    :ivar name: of the pagemap's file.
    :ivar nr_pages: pages of the entries so far.
    """

    def __init__(self, images: NewImagesDir, name: str) -> None:
        self.name = name
        self._images = images
        self._tables: list[Entries] = []
        self._firsts: list[int] = []  # where in the image each table's pages begin, in pages
        self._failed: list[Runs] = []
        self.nr_pages = 0

    def append(self, entries: Entries) -> Iterator[Chunk]:
        """Fix the place of every page of these entries, and cut them into chunks to be written."""
        first = self.nr_pages
        self._tables.append(entries)
        self._firsts.append(first)
        self.nr_pages += int(present_entries(entries)[:, 1].sum())
        return cut(entries, first)

    @abstractmethod
    def write(self, chunk: Chunk, source: PageSource, buffer: NDArray[np.uint8], hashes: Hashes) -> Runs:
        """Copy one chunk; called from several threads.

        :returns: the pages that could not be read: they will not be in the image.
        :raises incdump.errors.ImagesIOError: the image cannot be written.
        :raises incdump.errors.XferError: the page server has gone, is silent, or refuses.
        """

    @abstractmethod
    def lay_out(self, pages: int) -> None:
        """Have the disk's blocks reserved for pages that are to come; too many, or too few, do no harm."""

    @abstractmethod
    def make_room(self, pages: int) -> None:
        """Lay out, and have memory for the pages as well."""

    @abstractmethod
    def finish(self) -> int:
        """Close up the places of pages that could not be read, and write the pagemap. Blocks.

        :returns: pages in the image.
        """

    @abstractmethod
    def discard(self) -> None:
        """What it belongs to is gone: there will be no pagemap."""

    @abstractmethod
    def close(self) -> None:
        """Give up what it holds; no writer may be at work any more."""

    def rewrite(self, spans: Runs, source: PageSource, buffer: NDArray[np.uint8]) -> None:
        """Copy those pages of some address ranges that are in the image once more, each to its place. Blocks.

        Errors are those of `write`.
        """
        for first, table in zip(self._firsts, self._tables, strict=True):
            rows = present_entries(table)
            places = np.cumsum(rows[:, 1]) - rows[:, 1]
            for start, end in intersect(entry_runs(rows), spans).tolist():
                row = int(rows[:, 0].searchsorted(np.uint64(start), "right")) - 1
                place = first + int(places[row]) + (start - int(rows[row, 0]) >> PAGE_SHIFT)
                again = np.array([[start, end - start >> PAGE_SHIFT, PE_PRESENT]], np.uint64)
                for chunk in cut(again, place):
                    self.write(chunk, source, buffer, None)

    def failed(self) -> Runs:
        """The pages that could not be read."""
        return canonical(np.concatenate(self._failed)) if self._failed else empty_runs()

    def _read(self, chunk: Chunk, failed: Runs, buffer: NDArray[np.uint8], hashes: Hashes) -> None:
        """Note what came of reading a chunk's pages into a buffer."""
        if len(failed):
            self._failed.append(failed)
        if hashes is not None:
            _note_hashes(chunk, buffer, *hashes)

    def _take_out(self, failed: Runs) -> Runs:
        """Take pages out of all tables; returns the byte ranges of the pages image that fall away."""
        gaps = []
        for i, first in enumerate(self._firsts):
            self._tables[i], gap = without(self._tables[i], failed)
            gaps.append(gap + np.uint64(first << PAGE_SHIFT))
        return canonical(np.concatenate(gaps))

    def _write_pagemap(self, pages_id: int) -> None:
        self._images.write_raw(self.name, encode_in_parts(pages_id, merge_tables(self._tables)))


class PagesImage(PageTable):
    """The pages of one process or segment on their way to disk.

    Chunks of the entries are written by several tasks.
    """

    def __init__(self, images: NewImagesDir, name: str) -> None:
        super().__init__(images, name)
        self._pages_id = images.next_pages_id()
        self._path = str(images.path / f"pages-{self._pages_id}.img")
        self._fd = images.open_pages(self._pages_id)
        self._room = 0

    def lay_out(self, pages: int) -> None:
        """Have the disk's blocks reserved for pages that are to come; too many, or too few, do no harm.

        On ext4, to look for a place for each block while it is written takes a fifth of all the writing. A disk that
        has no room is told of when the pages do come; it is not filled up for nothing.
        """
        try:
            disk = os.fstatvfs(self._fd)
            if not 0 < pages * PAGE_SIZE < disk.f_bavail * disk.f_frsize:
                return
            self._room = pages
            fallocate(self._fd, pages * PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                self._give_up_room()

    def make_room(self, pages: int) -> None:
        """Lay out, and write zeros, so that the page cache has memory for the pages as well.

        At most `MOST_ROOM` pages.
        """
        self.lay_out(min(pages, MOST_ROOM))
        zeros = memoryview(bytes(CHUNK_PAGES * PAGE_SIZE))
        try:  # as many as were laid out, if any
            for first in range(0, self._room, CHUNK_PAGES):
                os.pwrite(self._fd, zeros[: (self._room - first) * PAGE_SIZE], first * PAGE_SIZE)
        except OSError:
            self._give_up_room()

    def _give_up_room(self) -> None:
        self._room = 0
        with suppress(OSError):
            os.ftruncate(self._fd, 0)

    def write(self, chunk: Chunk, source: PageSource, buffer: NDArray[np.uint8], hashes: Hashes) -> Runs:
        """See `PageTable.write`."""
        failed = write_chunk(self._fd, chunk, source, buffer, self._path)
        self._read(chunk, failed, buffer, hashes)
        return failed

    def finish(self) -> int:
        """Close up the places of pages that could not be read, and write the pagemap. Blocks.

        :returns: pages in the image.
        """
        failed = self.failed()
        if len(failed):
            gaps = self._take_out(failed)
            self.nr_pages = close_gaps(self._fd, gaps, self.nr_pages, self._path)
        if self._room > self.nr_pages:
            cut_off(self._fd, self.nr_pages, self._path)
        self._write_pagemap(self._pages_id)
        return self.nr_pages

    def discard(self) -> None:
        """Remove the pages image: what it belongs to is gone. There will be no pagemap."""
        self._images.remove(f"pages-{self._pages_id}.img")
        self.nr_pages = 0

    def close(self) -> None:
        """Close the pages image's descriptor; no writer may be at work any more."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _note_hashes(chunk: Chunk, buffer: NDArray[np.uint8], collector: HashCollector, wanted: Runs) -> None:
    addresses = page_addresses(chunk.runs)
    chosen = member(wanted, addresses)
    if chosen.any():
        pages = buffer[: chunk.nr_pages * PAGE_SIZE].reshape(-1, PAGE_SIZE)
        kept = pages if chosen.all() else pages[chosen]
        collector.add(addresses[chosen], hash_pages(kept.reshape(-1), collector.seed))


def without(entries: Entries, failed: Runs) -> tuple[Entries, Runs]:
    """Take pages out of an entry table.

    :returns: what is left, and the byte ranges of the table's part of the pages image that fall away.
    """
    ends = entries[:, 0] + (entries[:, 1] << np.uint64(PAGE_SHIFT))
    table = np.stack((entries[:, 0], ends, entries[:, 2]), axis=1)
    pieces = split_at(table, failed.ravel())
    sizes = pieces[:, 1] - pieces[:, 0]
    present = (pieces[:, 2] & np.uint64(PE_PRESENT)) != 0
    offsets = np.cumsum(np.where(present, sizes, np.uint64(0)))
    gone = member(failed, pieces[:, 0]) & present
    gaps = canonical(np.stack((offsets[gone] - sizes[gone], offsets[gone]), axis=1))
    left = pieces[~gone]
    rest = np.stack((left[:, 0], (left[:, 1] - left[:, 0]) >> np.uint64(PAGE_SHIFT), left[:, 2]), axis=1)
    return rest, gaps


def merge_tables(tables: Iterable[Entries]) -> Iterator[Entries]:
    """Merge the entries of tables that follow one another, also across their bounds."""
    last = empty_regions()
    for table in tables:
        merged = merge_entries(np.concatenate((last, table)))
        yield merged[:-1]
        last = merged[-1:]
    yield last


def merge_entries(entries: Entries) -> Entries:
    """Entries that touch and have the same flags become one."""
    if len(entries) < 2:
        return entries
    ends = entries[:, 0] + (entries[:, 1] << np.uint64(PAGE_SHIFT))
    new = np.concatenate(([True], (entries[1:, 0] != ends[:-1]) | (entries[1:, 2] != entries[:-1, 2])))
    starts = np.flatnonzero(new)
    sizes = ends[np.append(starts[1:], len(entries)) - 1] - entries[starts, 0]
    return np.stack((entries[starts, 0], sizes >> np.uint64(PAGE_SHIFT), entries[starts, 2]), axis=1)
