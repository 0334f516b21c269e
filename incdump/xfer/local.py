"""Page-xfer to a local pages image.

Each writer has one buffer, used again for every chunk: the target's pages are read into it and written at the chunk's
place in the image. Both calls release the GIL, so writers in several threads keep several processors busy.

A page of a running target can vanish between the scan and the read. Its place in the image is then closed up at the end
(`close_gaps`), so that the image holds what its pagemap says, page for page.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Protocol

import numpy as np

from incdump.errors import ImagesIOError
from incdump.model.runs import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from incdump.model.runs import Runs
    from incdump.page_pipe import Chunk


class PageSource(Protocol):
    """Where pages come from: a process's memory, or a shared memory segment."""

    def read_into(self, buffer: NDArray[np.uint8], runs: Runs, /) -> Runs:
        """Fill a buffer with the bytes of runs, back to back; return the pages that could not be read."""


def make_buffer(pages: int) -> NDArray[np.uint8]:
    """A page-aligned buffer, shape (pages * 4096,), its memory there already: no fault while a target waits."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return np.frombuffer(mmap.mmap(-1, pages * PAGE_SIZE, flags=flags), np.uint8)


def write_chunk(fd: int, chunk: Chunk, source: PageSource, buffer: NDArray[np.uint8], path: str) -> Runs:
    """Copy a chunk's pages from the source to its place in the pages image. Blocks; releases the GIL.

    :param fd: of the pages image.
    :param buffer: scratch space for the whole chunk; holds its bytes afterwards.
    :param path: of the pages image, for messages.
    :returns: the pages that could not be read: their places hold zeros.
    :raises incdump.errors.ImagesIOError: the image cannot be written.
    """
    view = buffer[: chunk.nr_pages * PAGE_SIZE]
    failed = source.read_into(view, chunk.runs)
    _write_at(fd, view.data, chunk.first_page * PAGE_SIZE, path)
    return failed


def _write_at(fd: int, data: memoryview, offset: int, path: str) -> None:
    while data:
        try:
            written = os.pwrite(fd, data, offset)
        except OSError as error:
            hint = "; free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise ImagesIOError(f"cannot write {path}: {error.strerror}{hint}", path=path, errno=error.errno) from error
        data = data[written:]
        offset += written


def close_gaps(fd: int, gaps: Runs, nr_pages: int, path: str) -> int:
    """Take pages out of a pages image and close up what follows.

    :param gaps: byte ranges in the image to take out, a run set.
    :param nr_pages: pages in the image.
    :returns: pages left in it.
    :raises incdump.errors.ImagesIOError: the image cannot be changed.
    """
    size = nr_pages << PAGE_SHIFT
    if not len(gaps):
        return nr_pages
    ends = [int(start) for start in gaps[1:, 0]] + [size]
    target = int(gaps[0, 0])
    try:
        for start, end in zip(gaps[:, 1].tolist(), ends, strict=True):
            target = _move_down(fd, start, end, target)
        os.ftruncate(fd, target)
    except OSError as error:
        raise ImagesIOError(f"cannot rewrite {path}: {error.strerror}", path=path, errno=error.errno) from error
    return target >> PAGE_SHIFT


def cut_off(fd: int, nr_pages: int, path: str) -> None:
    """Cut off what a pages image has behind its pages.

    :raises incdump.errors.ImagesIOError: it cannot be changed.
    """
    try:
        os.ftruncate(fd, nr_pages << PAGE_SHIFT)
    except OSError as error:
        raise ImagesIOError(f"cannot cut {path}: {error.strerror}", path=path, errno=error.errno) from error


def _move_down(fd: int, start: int, end: int, target: int) -> int:
    """Move ``[start, end)`` of a file down to ``target``; returns where it then ends.

    Copying within the page cache is quicker than FALLOC_FL_COLLAPSE_RANGE, which writes the file to disk first.
    """
    while start < end:
        block = os.pread(fd, min(1 << 22, end - start), start)
        if not block:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        written = os.pwrite(fd, block, target)
        start += written
        target += written
    return target
