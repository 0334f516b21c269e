"""The images of one session of incdump's own protocol, while they are being received.

Pages come as blocks for any place of any pages image, on several channels at once; all other images come as files.
What of it makes sense is looked at when everything is there (`StoredImages.finish`): each pages image belongs to one
pagemap, has as many pages as that says, and what that leaves to the parent images is there. The inventory is the last
to be written; whatever happens before that, `discard` leaves nothing.
"""

from __future__ import annotations

import errno
import math
import os
import re
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from incdump._uapi.fallocate import fallocate
from incdump.errors import ProtocolError, XferError
from incdump.images.framing import raise_io_error, read_file
from incdump.images.images_dir import read_meta
from incdump.images.inventory import decode_inventory
from incdump.images.new_dir import INVENTORY, SIDECAR
from incdump.images.pagemap import decode_in_parts
from incdump.model.runs import (
    PAGE_SHIFT,
    PE_PARENT,
    canonical,
    empty_runs,
    entry_runs,
    first_uncovered,
    page_count,
    present_entries,
)
from incdump.xfer.blocks import MOST_NAMES
from incdump.xfer.local import close_gaps, cut_off
from incdump.xfer.received import GOOD_FLAGS, MOST_RUNS, Received, give_back
from incdump.xfer.wire import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from incdump.images.images_dir import ImagesDir, Kind
    from incdump.images.new_dir import NewImagesDir
    from incdump.model.runs import Runs

_PAGEMAP = re.compile(r"(pagemap(?=-[1-9])|pagemap-shmem)-(0|[1-9]\d{0,18})\.img")  # System V numbers from 0
_MOST_INVENTORY = 1 << 20
_MOST_SIDECAR = 64 << 20
_MOST_PAGEMAP = 32 * MOST_RUNS


class _PagesImage:
    def __init__(self, fd: int, path: str) -> None:
        self.fd, self.path = fd, path
        self.users = 0  # channels that write to it just now
        self.came = 0  # bytes, what came twice twice


class StoredImages:
    """The images of one session. Methods may be called from several threads.

    :ivar received: what has come; counted at the end.
    :ivar bytes_arrived: what has come so far, as it was sent: blocks may be compressed.
    """

    def __init__(self, images: NewImagesDir, parent: ImagesDir | None, *, max_bytes: int | None = None) -> None:
        """Receive into a new images dir.

        :param images: the directory, which is this session's to finish or to discard.
        :param parent: its parent images.
        :param max_bytes: that may come; more is refused.
        """
        self.received = Received()
        self.bytes_arrived = 0
        self._images = images
        self._parent = parent
        self._left = max_bytes
        self._reservable = max_bytes
        self._lock = threading.Lock()
        self._pages: dict[int, _PagesImage] = {}
        self._sizes: dict[int, int] = {}  # pages of those that are complete
        self._files: dict[str, int] = {}  # descriptors of those that are not complete
        self._names: set[str] = set()
        self._inventory: bytearray | None = None
        self._has_inventory = False  # all of it
        self._pagemaps: dict[Image, str] = {}

    def stands_on(self, generation: str | None) -> bool:
        """Whether the parent images are those of a client's parent."""
        meta = None if self._parent is None or generation is None else self._parent.meta()
        return meta is not None and meta.get("generation") == generation

    def claim(self, size: int) -> None:
        """Count bytes that come.

        :raises XferError: these are more than was allowed.
        """
        with self._lock:
            self.bytes_arrived += size
            if self._left is not None:
                self._left -= size
                if self._left < 0:
                    raise XferError("the client sends more than --max-bytes allows: its session is dropped")

    @contextmanager
    def pages(self, number: int, size: int = 0) -> Iterator[tuple[int, str]]:
        """A pages image to write blocks to: its descriptor and path.

        :param size: bytes that come.
        :raises ProtocolError: it was complete already.
        :raises ImagesError: it cannot be made.
        """
        with self._lock:
            image = self._pages.get(number)
            if image is None:
                self._check_new(number)
                image = _PagesImage(self._images.open_pages(number), str(self._images.path / f"pages-{number}.img"))
                self._pages[number] = image
            image.users += 1
            image.came += size
        try:
            yield image.fd, image.path
        finally:
            with self._lock:
                image.users -= 1

    def _check_new(self, number: int) -> None:
        if number in self._sizes:
            raise ProtocolError(f"the client sends pages for pages-{number}.img after it was complete")
        if len(self._pages) + len(self._sizes) >= MOST_NAMES:
            raise ProtocolError(f"the client sends more than {MOST_NAMES} pages images")

    def lay_out(self, number: int, size: int) -> None:
        """Have disk space reserved for a pages image; that it cannot be had is told of when the pages come."""
        with self.pages(number) as (fd, _):
            disk = os.fstatvfs(fd)
            if size and size < disk.f_bavail * disk.f_frsize and self._may_reserve(size):
                with suppress(OSError):
                    fallocate(fd, size)

    def _may_reserve(self, size: int) -> bool:
        with self._lock:
            fits = self._reservable is None or size <= self._reservable
            if fits and self._reservable is not None:
                self._reservable -= size
            return fits

    def resize(self, number: int, size: int, gaps: Runs, *, is_last: bool) -> None:
        """Set how long a pages image is.

        :param size: bytes, gaps included.
        :param gaps: byte ranges that are taken out, what follows them closing up.
        :param is_last: it is complete then.
        :raises ProtocolError: they cannot be taken out, or somebody still writes to it.
        :raises ImagesError: the image cannot be changed.
        """
        inside = not len(gaps) or (int(gaps[-1, 1]) <= size and bool((gaps[:, 0] < gaps[:, 1]).all()))
        apart = bool((gaps[1:, 0] > gaps[:-1, 1]).all())
        if not (inside and apart) or (gaps & np.uint64((1 << PAGE_SHIFT) - 1)).any():
            raise ProtocolError(f"the client takes out of pages-{number}.img what cannot be")
        with self._taken(number) as image:
            if size > image.came:  # not even as zeros
                raise ProtocolError(f"the client makes pages-{number}.img longer than what it sent of it")
            if os.fstat(image.fd).st_size < size:  # it ends with zeros
                cut_off(image.fd, size >> PAGE_SHIFT, image.path)
            pages = close_gaps(image.fd, gaps, size >> PAGE_SHIFT, image.path)
            cut_off(image.fd, pages, image.path)
            if is_last:
                self._sizes[number] = pages
                self._close_pages(number)

    def drop(self, number: int) -> None:
        """A pages image is not needed after all.

        :raises ProtocolError: somebody still writes to it.
        """
        with self._taken(number):
            self._images.remove(f"pages-{number}.img")
            self._close_pages(number)

    @contextmanager
    def _taken(self, number: int) -> Iterator[_PagesImage]:
        """A pages image that no channel writes to, nor begins to meanwhile."""
        with self.pages(number), self._lock:
            image = self._pages[number]
            if image.users > 1:
                raise ProtocolError(f"the client ends pages-{number}.img while it sends it")
            yield image

    def _close_pages(self, number: int) -> None:
        image = self._pages.pop(number)
        _close(image.fd, image.path)

    def add_to_file(self, name: str, data: memoryview, *, is_last: bool) -> None:
        """A part of another image.

        :raises ProtocolError: there cannot be such a file, it was complete already, or there are too many.
        :raises ImagesError: it cannot be written.
        """
        self.claim(len(data))
        if name == INVENTORY:
            self._add_to_inventory(data, is_last=is_last)
            return
        fd = self._files.get(name)
        if fd is None:
            if name.startswith("pagemap") and not _PAGEMAP.fullmatch(name):
                raise ProtocolError(f"the client sends {name}, which cannot be")
            if name in self._names or len(self._names) >= 16 * MOST_NAMES:
                raise ProtocolError(f"the client sends {name} twice, or too many files")
            self._names.add(name)
            fd = self._files[name] = self._images.open_file(name)
        try:
            if os.fstat(fd).st_size + len(data) > _most_bytes(name):
                raise ProtocolError(f"the client sends more of {name} than there can be")
            while data:
                data = data[os.write(fd, data) :]
        except OSError as error:
            raise_io_error(error, "write", self._images.path / name)
        if is_last:
            _close(self._files.pop(name), str(self._images.path / name))

    def _add_to_inventory(self, data: memoryview, *, is_last: bool) -> None:
        if self._has_inventory:
            raise ProtocolError(f"the client sends {INVENTORY} twice")
        if self._inventory is None:
            self._inventory = bytearray()
        if len(self._inventory) + len(data) > _MOST_INVENTORY:
            raise ProtocolError("the client sends an inventory that is larger than there can be")
        self._inventory += data
        self._has_inventory = is_last

    def finish(self) -> Received:
        """Everything has come: prove it, and write what makes it complete.

        :returns: what has come.
        :raises ProtocolError: it makes no sense.
        :raises ImagesError: an image is damaged, or the disk is full.
        """
        if self._files or self._pages or (self._inventory is not None and not self._has_inventory):
            raise ProtocolError("the client is through before it has sent all of what it began")
        left = dict(self._sizes)
        for name in sorted(self._names):
            if match := _PAGEMAP.fullmatch(name):
                self._check_pagemap(Image(_kind(match[1]), int(match[2])), name, left)
        if any(left.values()):
            raise ProtocolError("the client sends pages that are in no pagemap")
        read_meta(self._images.path)  # the next session asks for it
        if self._inventory is not None:
            decode_inventory(bytes(self._inventory), self._images.path / INVENTORY)
            self._images.finish(bytes(self._inventory))
        else:
            self._images.finish_received(self.received.summary())
        return self.received

    def _check_pagemap(self, image: Image, name: str, left: dict[int, int]) -> None:
        """Prove one pagemap, and take its pages image off the list."""
        path = self._images.path / name
        pages_id, tables = decode_in_parts(read_file(path) or b"", path)
        pages, holes = 0, [empty_runs()]
        for table in tables:
            if not np.isin(table[:, 2], GOOD_FLAGS).all():
                raise ProtocolError(f"{name} has entries with impossible flags")
            pages += int(present_entries(table)[:, 1].sum())
            holes.append(entry_runs(table[(table[:, 2] & np.uint64(PE_PARENT)) != 0]))
        if left.pop(pages_id, None) != pages and (pages or pages_id in self._sizes):
            raise ProtocolError(f"{name} has {pages} pages, pages-{pages_id}.img has not, or is another one's")
        if pages_id not in self._sizes:  # one without pages was never sent
            _close(self._images.open_pages(pages_id), str(path))
        self._check_holes(image, name, canonical(np.concatenate(holes)))
        self._pagemaps[image] = name
        self.received.images += 1
        self.received.pages += pages

    def _check_holes(self, image: Image, name: str, holes: Runs) -> None:
        if not len(holes):
            return
        found = None if self._parent is None else self._parent.summary(image.kind, image.number)
        missing = first_uncovered(empty_runs() if found is None else found.covered, holes)
        if len(missing):
            where = int(missing[0, 0])
            raise ProtocolError(f"{name} leaves page {where:#x} to parent images that do not have it", vaddr=where)
        self.received.holes += page_count(holes)

    def dedup(self) -> None:
        """Have all parent images give back the disk space of pages that have come again.

        :raises ImagesError: the parents cannot be read, or not changed.
        """
        self.received.punched += give_back(self._parent, self._images.path, self._pagemaps)

    def discard(self) -> None:
        """Remove everything that has come. Never fails; no channel may be at work any more."""
        for fd in (*self._files.values(), *(image.fd for image in self._pages.values())):
            with suppress(OSError):
                os.close(fd)
        self._files.clear()
        self._pages.clear()
        self._images.discard()


def _most_bytes(name: str) -> float:
    """Of a file that is read as a whole."""
    if name == SIDECAR:
        return _MOST_SIDECAR
    return _MOST_PAGEMAP if name.startswith("pagemap") else math.inf


def _kind(text: str) -> Kind:
    return "pagemap" if text == "pagemap" else "pagemap-shmem"


def _close(fd: int, path: str) -> None:
    try:
        os.close(fd)
    except OSError as error:  # what was written has not arrived (NFS)
        if error.errno != errno.EINTR:
            raise_io_error(error, "write", path)
