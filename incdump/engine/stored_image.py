"""Images that go to incdump's page server, all of them, in incdump's own protocol (`incdump.xfer.blocks`).

Several writers send chunks side by side, each on a channel of its own, and every page has its place from the start, as
on disk. When all is known, the small images follow, from the images dir, which keeps them: the next dump has to know
which pages the server has.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

from incdump.engine.pages_image import PageTable
from incdump.images.framing import raise_io_error
from incdump.model.runs import PAGE_SHIFT, PAGE_SIZE, empty_runs, page_count
from incdump.xfer.blocks import MOST_BEHIND, pages_id_of
from incdump.xfer.local import make_buffer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from incdump.engine.pages_image import Hashes
    from incdump.images.new_dir import NewImagesDir
    from incdump.model.runs import Runs
    from incdump.page_pipe import Chunk
    from incdump.xfer.block_client import BlockClient
    from incdump.xfer.local import PageSource
    from incdump.xfer.wire import Image


class Storing:
    """A session with incdump's page server.

    :ivar server: where it is, for people.
    :ivar writers: how many writers there may be.
    """

    def __init__(self, client: BlockClient) -> None:
        """
        :param client: this session's to close.
        """
        self._client = client
        self.server = client.server
        self.writers = client.channels

    def new_image(self, images: NewImagesDir, name: str, image: Image) -> StoredImage:
        """An empty image, whose pages go to the server."""
        return StoredImage(images, name, self._client)

    def has_parent(self, image: Image) -> bool:
        """Whether the server has the images that are the parent's here, all of them."""
        return self._client.stands_on_parent

    def end(self, images: NewImagesDir, other: Mapping[str, bytes]) -> None:
        """All pages were sent: send what is in the images dir. It is complete at the server when this returns. Blocks.

        :param other: what the server is to have instead of, or besides, the files of these names.
        :raises incdump.errors.XferError: it is not.
        :raises incdump.errors.ImagesIOError: an image cannot be read.
        """
        for name in images.files():
            path = images.path / name
            number = pages_id_of(name)
            if name in other:
                continue
            try:
                if number is not None:
                    self._send_pages(number, path)
                else:
                    with open(path, "rb", buffering=0) as file:
                        self._client.send_file(name, file)
            except OSError as error:
                raise_io_error(error, "read", path)
        for name, data in other.items():
            self._client.send_file(name, io.BytesIO(data))
        self._client.end()

    def _send_pages(self, number: int, path: Path) -> None:
        """Send a pages image that CRIU wrote."""
        size = path.stat().st_size
        buffer = make_buffer(MOST_BEHIND >> PAGE_SHIFT)
        with open(path, "rb", buffering=0) as file:
            for offset in range(0, size, MOST_BEHIND):
                data = buffer[: size - offset]
                if os.preadv(file.fileno(), [data.data], offset) != len(data):
                    raise OSError(f"{path} became shorter")
                with self._client.channel() as channel:
                    channel.send(number, offset, data)
        self._client.complete(number, size, empty_runs())

    def break_off(self) -> None:
        """Have whatever blocks fail. Called from any thread."""
        self._client.break_off()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class StoredImage(PageTable):
    """The pages of one process or segment on their way to the server."""

    def __init__(self, images: NewImagesDir, name: str, client: BlockClient) -> None:
        super().__init__(images, name)
        self._pages_id = images.next_pages_id()
        self._client = client
        self._is_there = False  # at the server, as far as it has begun

    def lay_out(self, pages: int) -> None:
        """Have the server reserve disk space for pages that are to come; too many, or too few, do no harm."""
        if pages > 0:
            self._is_there = True
            self._client.lay_out(self._pages_id, pages * PAGE_SIZE)

    def make_room(self, pages: int) -> None:
        """Nothing: the page cache is over there."""

    def write(self, chunk: Chunk, source: PageSource, buffer: NDArray[np.uint8], hashes: Hashes) -> Runs:
        """See `PageTable.write`."""
        data = buffer[: chunk.nr_pages * PAGE_SIZE]
        failed = source.read_into(data, chunk.runs)
        self._read(chunk, failed, data, hashes)
        self._is_there = True
        with self._client.channel() as channel:
            channel.send(self._pages_id, chunk.first_page * PAGE_SIZE, data)
        return failed

    def rewrite(self, spans: Runs, source: PageSource, buffer: NDArray[np.uint8]) -> None:
        """See `PageTable.rewrite`. What was sent of these pages before must not arrive after it, on another channel."""
        self._client.flush()
        super().rewrite(spans, source, buffer)

    def finish(self) -> int:
        """Have the server close up the places of pages that could not be read, and write the pagemap. Blocks.

        :returns: pages in the image.
        """
        failed = self.failed()
        gaps = self._take_out(failed) if len(failed) else empty_runs()
        if self._is_there or self.nr_pages:
            self._client.complete(self._pages_id, self.nr_pages * PAGE_SIZE, gaps)
        self.nr_pages -= page_count(gaps)
        self._write_pagemap(self._pages_id)
        return self.nr_pages

    def discard(self) -> None:
        """What it belongs to is gone: there will be no pagemap."""
        if self._is_there:
            self._client.drop(self._pages_id)
        self.nr_pages = 0

    def close(self) -> None:
        """Nothing: the connections are common to all."""
