"""Pages that go to a page server instead of into the images dir.

The server takes one image after the other, its runs and holes ascending. So there is one writer, which gets the chunks
in order; the holes that lie before a chunk are sent with it. What could not be read is not sent, where the image on
disk has to close up gaps.

The images dir gets the pagemaps all the same: the next dump has to know which pages the server has. Their pages images
are where incdump.json says (``page_server``).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from incdump.engine.pages_image import PageTable, without
from incdump.errors import XferError
from incdump.model.runs import PAGE_SHIFT, PAGE_SIZE, PE_PRESENT, empty_regions
from incdump.xfer.received import FIRST_PAGES_ID

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from incdump.engine.pages_image import Hashes
    from incdump.images.new_dir import NewImagesDir
    from incdump.model.runs import Entries, Runs
    from incdump.page_pipe import Chunk
    from incdump.xfer.local import PageSource
    from incdump.xfer.page_client import PageClient
    from incdump.xfer.wire import Image


class Sending:
    """A session with a page server, in CRIU's protocol.

    :ivar server: where it is, for people.
    :ivar writers: how many writers there may be: one, which gets the chunks in order.
    """

    writers = 1

    def __init__(self, client: PageClient) -> None:
        """
        :param client: connected; this session's to close.
        """
        self._client = client
        self.server = client.server
        self._current: SentImage | None = None
        self._opened = 0

    def new_image(self, images: NewImagesDir, name: str, image: Image) -> SentImage:
        """An empty image, whose pages go to the server."""
        return SentImage(images, name, image, self)

    def has_parent(self, image: Image) -> bool:
        """Whether the server has parent images of an image. Blocks.

        :raises incdump.errors.ConnectionLost: it does not answer.
        """
        return self._client.ask(image)

    def begin(self, image: SentImage) -> None:
        """Have what is sent next be of this image. Blocks.

        :raises incdump.errors.ConnectionLost: the server does not answer, or refuses.
        """
        if self._current is image:
            return
        if self._current is not None:
            self._current.send_rest()
        image.has_parent = self._client.open(image.image)
        image.pages_id = FIRST_PAGES_ID + self._opened
        self._opened += 1
        self._current = image

    def send(self, image: SentImage, entries: Entries, places: NDArray[np.int64], buffer: NDArray[np.uint8]) -> None:
        """Send runs of an image that was begun; see `incdump.xfer.page_client.PageClient.send`.

        :raises incdump.errors.XferError: the server has gone, is silent, refuses, or does not have what holes need.
        """
        if not image.has_parent and not (entries[:, 2] & np.uint64(PE_PRESENT)).all():
            raise XferError(f"the page server at {self.server} has no parent images of {image.name} any more")
        self._client.send(image.image, entries, places, buffer)

    def end(self, images: NewImagesDir, other: Mapping[str, bytes]) -> None:
        """All pages were sent, and are at the server when this returns. Blocks.

        :raises incdump.errors.XferError: they are not.
        """
        self._client.end()

    def break_off(self) -> None:
        """Have whatever blocks fail. Called from any thread."""
        self._client.break_off()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class SentImage(PageTable):
    """The pages of one process or segment on their way to a page server; written by one task.

    :ivar image: what they are of.
    :ivar pages_id: the number of the pages image at the server, which counts them; 0 before it was begun.
    :ivar has_parent: whether the server has parent images of it.
    """

    def __init__(self, images: NewImagesDir, name: str, image: Image, sending: Sending) -> None:
        super().__init__(images, name)
        self.image = image
        self.pages_id = 0
        self.has_parent = False
        self._sending = sending
        self._lock = threading.Lock()
        self._holes = empty_regions()  # not yet sent
        self._is_gone = False

    def lay_out(self, pages: int) -> None:
        """Nothing: there is no file."""

    def make_room(self, pages: int) -> None:
        """Nothing: there is no file."""

    def append(self, entries: Entries) -> Iterator[Chunk]:
        """See `PageTable.append`."""
        holes = entries[(entries[:, 2] & np.uint64(PE_PRESENT)) == 0]
        if len(holes):
            with self._lock:
                self._holes = np.concatenate((self._holes, holes))
        return super().append(entries)

    def write(self, chunk: Chunk, source: PageSource, buffer: NDArray[np.uint8], hashes: Hashes) -> Runs:
        """Send one chunk, and the holes before it.

        :returns: the pages that could not be read, and were not sent.
        :raises incdump.errors.XferError: the server has gone, is silent, or refuses.
        """
        failed = source.read_into(buffer[: chunk.nr_pages * PAGE_SIZE], chunk.runs)
        self._read(chunk, failed, buffer, hashes)
        pages, places = _readable(chunk, failed)
        holes = self._holes_below(int(chunk.runs[-1, 1]))
        entries = np.concatenate((holes, pages))
        places = np.concatenate((np.zeros(len(holes), np.int64), places))
        order = entries[:, 0].argsort(kind="stable")
        self._sending.begin(self)
        self._sending.send(self, entries[order], places[order], buffer)
        return failed

    def rewrite(self, spans: Runs, source: PageSource, buffer: NDArray[np.uint8]) -> None:
        """Cannot be: what was sent was sent."""
        raise NotImplementedError

    def _holes_below(self, address: int) -> Entries:
        with self._lock:
            count = int(self._holes[:, 0].searchsorted(np.uint64(address)))
            holes, self._holes = self._holes[:count], self._holes[count:]
        return holes

    def send_rest(self) -> None:
        """Send the holes that come after the last page. Blocks.

        :raises incdump.errors.XferError: as `write`.
        """
        holes = self._holes_below(1 << 63)
        if len(holes) and not self._is_gone:
            self._sending.send(self, holes, np.zeros(len(holes), np.int64), np.empty(0, np.uint8))

    def finish(self) -> int:
        """Send what is left, and write the pagemap. Blocks.

        :returns: pages that were sent.
        :raises incdump.errors.XferError: as `write`.
        """
        if not self.pages_id:
            self._sending.begin(self)
        self.send_rest()
        failed = self.failed()
        if len(failed):
            gaps = self._take_out(failed)
            self.nr_pages -= int((gaps[:, 1] - gaps[:, 0]).sum()) >> PAGE_SHIFT
        self._write_pagemap(self.pages_id)
        return self.nr_pages

    def discard(self) -> None:
        """What it belongs to is gone: there will be no pagemap. What the server has of it is never asked for."""
        self._is_gone = True
        self.nr_pages = 0

    def close(self) -> None:
        """Nothing: the connection is common to all."""


def _readable(chunk: Chunk, failed: Runs) -> tuple[Entries, NDArray[np.int64]]:
    """The pages of a chunk that could be read.

    :returns: entries, and where in the chunk's buffer each begins, bytes.
    """
    begin, end = chunk.runs.T
    places = (end - begin).cumsum() - (end - begin)
    entries = np.column_stack((begin, (end - begin) >> np.uint64(PAGE_SHIFT), chunk.flags))
    if len(failed):
        entries, _ = without(entries, failed)
    of = begin.searchsorted(entries[:, 0], "right") - 1
    return entries, (places[of] + entries[:, 0] - begin[of]).astype(np.int64)
