"""The images of one page-server session, while they are being received.

What a client says is not believed: runs are to be page aligned, ascending and apart from each other, a hole is to be
covered by the parent images, an image is sent once. That is looked at some thousand runs at a time, before they are
written to the pagemap. Nothing has a name that somebody could take for an image until the client has said that it is
through (`ReceivedImages.finish`); whatever happens before that, `discard` leaves nothing.

Memory use is bounded: runs go to the pagemap's file as they come, pages are never here (`pages_fd`).
"""

from __future__ import annotations

import json
import os
from array import array
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from incdump._uapi.fallocate import punch_hole
from incdump.errors import ImagesError, ProtocolError, XferError
from incdump.images.framing import raise_io_error, read_file
from incdump.images.page_reads import cut
from incdump.images.pagemap import Pagemap, decode_in_parts, decode_pagemap, encode_entries, encode_head
from incdump.model.runs import (
    PAGE_SHIFT,
    PAGE_SIZE,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    canonical,
    empty_runs,
    entry_runs,
    first_uncovered,
    present_entries,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from incdump.images.images_dir import ImagesDir
    from incdump.images.new_dir import NewImagesDir
    from incdump.model.runs import Entries, Runs
    from incdump.xfer.wire import Image, Message

FIRST_PAGES_ID = 0x10001
"""As CRIU's page server numbers its pages images: whoever dumps beside it numbers from 1."""
RUNS_AT_ONCE = 1 << 15
MOST_IMAGES = 1 << 16
"""Images in one session: each costs two files."""
MOST_RUNS = 1 << 24
"""Runs of one image: its pagemap is read as a whole when the next session stands on it."""
_HIGHEST_PID = 1 << 31
_MOST_PAGES = 1 << 63 - PAGE_SHIFT
GOOD_FLAGS = (PE_PRESENT, PE_PRESENT | PE_LAZY, PE_PARENT)


@dataclass(slots=True)
class Received:
    """What came in one session.

    :ivar images: processes and segments.
    :ivar pages: pages that came.
    :ivar holes: pages that were left to the parent images.
    :ivar punched: bytes that the parent images gave back.
    """

    images: int = 0
    pages: int = 0
    holes: int = 0
    punched: int = 0

    def summary(self) -> bytes:
        """What incdump-received.json says."""
        return json.dumps({"version": 1, "images": self.images, "pages": self.pages}).encode()


class _Open:
    """The image that is being received now."""

    def __init__(self, images: NewImagesDir, image: Image, covered: Runs | None) -> None:
        self.image = image
        self.covered = covered
        self.name = f"{image.kind}-{image.number}.img"
        pages_id = images.next_pages_id()
        self.pages_path = images.path / f"pages-{pages_id}.img"
        self.pagemap_path = images.path / self.name
        self.rows = array("Q")
        self.runs = 0  # written to the pagemap
        self.pages = 0.0  # of these
        self.reach = 0  # where the last of them ended
        self.pagemap_fd = -1
        self.pages_fd = images.open_pages(pages_id)
        try:
            self.pagemap_fd = images.open_file(f"{self.name}.unfinished")
            _write(self.pagemap_fd, encode_head(pages_id), self.pagemap_path)
        except BaseException:
            with suppress(ImagesError):
                self.close()
            raise

    def close(self) -> None:
        """Close both files.

        :raises ImagesError: what was written has not arrived (NFS).
        """
        problem: OSError | None = None
        for fd in (self.pages_fd, self.pagemap_fd):
            try:
                if fd >= 0:
                    os.close(fd)
            except OSError as error:
                problem = error
        self.pages_fd = self.pagemap_fd = -1
        if problem is not None:
            raise_io_error(problem, "write", self.pagemap_path)


class ReceivedImages:
    """The images of one session.

    Calls come in the order of the messages: `open`, then `add` for each run and, if it has pages, their bytes to
    `pages_fd`; at the end `finish`, or `discard`.

    :ivar received: what has come so far.
    :ivar pages_fd: where the bytes of pages go, one after the other; -1 without an open image.
    """

    def __init__(self, images: NewImagesDir, parent: ImagesDir | None, *, max_bytes: int | None = None) -> None:
        """Receive into a new images dir.

        :param images: the directory, which is this session's to finish or to discard.
        :param parent: its parent images.
        :param max_bytes: of pages; more is refused.
        """
        images.number_pages_from(FIRST_PAGES_ID)
        self.received = Received()
        self.pages_fd = -1
        self._images = images
        self._parent = parent
        self._left = max_bytes
        self._open: _Open | None = None
        self._bytes_before = 0  # of the images that are complete
        self._done: dict[Image, str] = {}

    @property
    def current(self) -> Image | None:
        """The image that is being received."""
        return None if self._open is None else self._open.image

    @property
    def bytes_arrived(self) -> int:
        """Bytes of pages that have come so far; any thread may ask."""
        current = self._open
        with suppress(OSError):
            return self._bytes_before + (0 if current is None else os.stat(current.pages_path).st_size)
        return self._bytes_before

    @property
    def pages_path(self) -> str:
        """Of the image that is being received, for messages."""
        return "" if self._open is None else os.fspath(self._open.pages_path)

    def has_parent(self, image: Image) -> bool:
        """Whether the parent images have such an image.

        :raises ProtocolError: there cannot be such an image.
        """
        _check_number(image)
        return self._parent is not None and self._parent.has(image.kind, image.number)

    def open(self, image: Image) -> bool:
        """Begin an image, and end the one before.

        :returns: whether the parent images have such an image.
        :raises ProtocolError: it has come already, or there cannot be such an image.
        :raises ImagesError: the disk is full, or the parent images are damaged.
        """
        has_parent = self.has_parent(image)
        if image in self._done or image == self.current:
            raise ProtocolError(f"the client sends {image.kind}-{image.number} twice")
        if len(self._done) + (self._open is not None) >= MOST_IMAGES:
            raise ProtocolError(f"the client sends more than {MOST_IMAGES} images")
        self._end_image()
        self._open = _Open(self._images, image, self._covered(image) if has_parent else None)
        self.pages_fd = self._open.pages_fd
        self.received.images += 1
        return has_parent

    def _covered(self, image: Image) -> Runs:
        assert self._parent is not None
        found = self._parent.summary(image.kind, image.number)
        return empty_runs() if found is None else found.covered

    def add(self, message: Message) -> None:
        """Note a run of the open image.

        :raises ProtocolError: there cannot be such a run (or the one of an earlier call could not be).
        :raises XferError: these are more pages than was allowed.
        :raises ImagesError: the disk is full.
        """
        assert self._open is not None
        if message.flags & PE_PRESENT and self._left is not None:
            self._left -= message.nr_pages * PAGE_SIZE
            if self._left < 0:
                raise XferError("the client sends more than --max-bytes allows: its session is dropped")
        rows = self._open.rows
        rows.extend((message.vaddr, message.nr_pages, message.flags))
        if len(rows) >= 3 * RUNS_AT_ONCE:
            self._write_rows(self._open)

    def _write_rows(self, current: _Open) -> None:
        if not current.rows:
            return
        table = np.frombuffer(current.rows, np.uint64).reshape(-1, 3)
        current.rows = array("Q")
        _check(table, current)
        holes = entry_runs(table[(table[:, 2] & np.uint64(PE_PARENT)) != 0])
        self._check_holes(current, holes)
        for part in encode_entries(table):
            _write(current.pagemap_fd, part, current.pagemap_path)
        self.received.pages += int(present_entries(table)[:, 1].sum())
        self.received.holes += int((holes[:, 1] - holes[:, 0]).sum()) >> PAGE_SHIFT

    def _check_holes(self, current: _Open, holes: Runs) -> None:
        """A hole that nothing fills would be restored with other pages in it."""
        if not len(holes):
            return
        if current.covered is None:
            raise ProtocolError(
                f"the client leaves pages of {current.name} to parent images that are not here: "
                "give the page server the same --prev-images-dir as the client"
            )
        missing = first_uncovered(current.covered, canonical(holes))
        if len(missing):
            where = int(missing[0, 0])
            raise ProtocolError(
                f"the client leaves the page at {where:#x} of {current.name} to parent images that do not have it",
                vaddr=where,
            )

    def _end_image(self) -> None:
        if self._open is None:
            return
        self._write_rows(self._open)
        self._done[self._open.image] = self._open.name
        arrived = self.bytes_arrived
        self._close()
        self._bytes_before = arrived

    def finish(self) -> Received:
        """Everything has come: give the images their names.

        :returns: what has come.
        :raises ProtocolError: the last runs could not be.
        :raises ImagesError: the disk is full.
        """
        self._end_image()
        for name in self._done.values():
            self._images.rename(f"{name}.unfinished", name)
        self._images.finish_received(self.received.summary())
        return self.received

    def dedup(self) -> None:
        """Have all parent images give back the disk space of pages that have come again.

        Called when the images are finished: before that a broken session would have cost the parents' pages.

        :raises ImagesError: the parents cannot be read, or not changed.
        """
        self.received.punched += give_back(self._parent, self._images.path, self._done)

    def discard(self) -> None:
        """Remove everything that has come. Never fails."""
        with suppress(ImagesError):
            self._close()
        self._images.discard()

    def _close(self) -> None:
        current, self._open, self.pages_fd = self._open, None, -1
        if current is not None:
            current.close()


def _check_number(image: Image) -> None:
    lowest, highest = (1, _HIGHEST_PID) if image.kind == "pagemap" else (0, 1 << 56)  # those of System V begin with 0
    if not lowest <= image.number < highest:
        raise ProtocolError(f"the client names {image.kind}-{image.number}, which cannot be")


def _check(table: Entries, current: _Open) -> None:
    """Make sure that runs are what a pagemap may have, and note where they end.

    :param table: shape (n, 3): vaddr, pages, flags; no run longer than `incdump.xfer.wire.MOST_PAGES`.
    """
    vaddr, pages, flags = table.T
    end = vaddr + (pages << np.uint64(PAGE_SHIFT))
    before = np.concatenate((np.array([current.reach], np.uint64), end[:-1]))
    problems = (
        ((vaddr & np.uint64(PAGE_SIZE - 1)) != 0, "is not page aligned"),
        (pages == 0, "has no pages"),
        (end <= vaddr, "ends beyond the address space"),
        (flags == PE_LAZY, "is left to a lazy-pages server: dump without --lazy-pages"),
        (~np.isin(flags, GOOD_FLAGS), "has impossible flags"),
        (vaddr < before, "begins before the end of the run before it"),
    )
    for wrong, what in problems:
        if wrong.any():
            where = int(vaddr[int(wrong.argmax())])
            raise ProtocolError(f"the run at {where:#x} of {current.name} {what}", vaddr=where)
    current.reach = int(end[-1])
    current.runs += len(table)
    current.pages += float(pages.sum(dtype=np.float64))
    if current.runs > MOST_RUNS or current.pages >= _MOST_PAGES:
        raise ProtocolError(f"the client sends more of {current.name} than there can be")


def give_back(parent: ImagesDir | None, path: Path, names: Mapping[Image, str]) -> int:
    """Have parent images give back the disk space of pages that newer images have.

    :param parent: the parent images, and those above them.
    :param path: the newer images dir.
    :param names: its pagemaps' files.
    :returns: bytes that were given back.
    :raises ImagesError: something cannot be read, or not changed.
    """
    punched = 0
    for level in () if parent is None else parent.levels():
        for image, name in names.items():
            for table in decode_in_parts(read_file(path / name) or b"", path / name)[1]:
                punched += _punch(level, image, canonical(entry_runs(present_entries(table))))
    return punched


def _punch(level: ImagesDir, image: Image, runs: Runs) -> int:
    """Give back what a level's pages image has of some pages; returns how many bytes that are."""
    pagemap_path = level.image_path(image.kind, image.number)
    data = read_file(pagemap_path)
    if data is None:
        return 0
    pagemap = Pagemap(*decode_pagemap(data, pagemap_path))
    pieces, _ = cut(np.column_stack((runs, runs[:, 0])), pagemap)
    row = pieces[:, 3].astype(np.int64)
    here = (pagemap.entries[row, 2] & np.uint64(PE_PRESENT)) != 0
    pieces, row = pieces[here], row[here]
    if not len(pieces):
        return 0
    offsets = pagemap.offsets[row] + pieces[:, 0] - pagemap.start[row]
    spans = canonical(np.column_stack((offsets, offsets + (pieces[:, 1] - pieces[:, 0]))))
    path = level.pages_path(pagemap.pages_id)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            for start, end in spans.tolist():
                punch_hole(fd, start, end - start)
        finally:
            os.close(fd)
    except OSError as error:
        raise_io_error(error, "give back the pages of", path)
    return int((spans[:, 1] - spans[:, 0]).sum())


def _write(fd: int, data: bytes, path: os.PathLike[str]) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        raise_io_error(error, "write", path)
