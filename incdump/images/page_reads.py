"""Finding and reading pieces of a pages image: the arithmetic and the system calls of `incdump.images.images_dir`.

A *piece* is a run of pages that is in one piece in an entry, and in the buffer that it is wanted in.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from incdump.errors import BadImage
from incdump.images.framing import raise_io_error

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from incdump.images.pagemap import Pagemap

    U64Array = NDArray[np.uint64]

_IOV_MAX = 1024


def cut(wanted: U64Array, pagemap: Pagemap) -> tuple[U64Array, U64Array]:
    """Cut what is wanted along the bounds of a pagemap's entries.

    :param wanted: shape (n, 3): start, end (bytes), and the place in a buffer (bytes); sorted and disjoint.
    :param pagemap: with the entries.
    :returns: the pieces within entries, shape (k, 4): start, end, place, row of the entry; and the pieces in none,
        shape (m, 3): start, end, place. Both ascending.
    """
    start, end = wanted[:, 0].copy(), wanted[:, 1].copy()
    first = last = 0
    if len(wanted):
        first = int(np.searchsorted(pagemap.end, start[0], "right"))
        last = int(np.searchsorted(pagemap.start, end[-1], "left"))
    entry_start, entry_end = pagemap.start[first:last], pagemap.end[first:last]
    # Four ascending sequences: the stable sort merges them, where the default one would start from nothing.
    bounds = np.sort(np.concatenate((start, end, entry_start, entry_end)), kind="stable")
    bounds = bounds[np.flatnonzero(np.diff(bounds, append=np.uint64(0)))]
    lo, hi = bounds[:-1], bounds[1:]
    of_wanted = np.searchsorted(start, lo, "right").astype(np.int64) - 1
    inside = (of_wanted >= 0) & (lo < end[of_wanted]) if len(wanted) else np.zeros(len(lo), bool)
    lo, hi, of_wanted = lo[inside], hi[inside], of_wanted[inside]
    place = wanted[of_wanted, 2] + (lo - start[of_wanted])
    if not len(entry_start):
        return np.empty((0, 4), np.uint64), np.stack((lo, hi, place), axis=1)
    of_entry = np.searchsorted(entry_start, lo, "right").astype(np.int64) - 1
    held = (of_entry >= 0) & (lo < entry_end[of_entry])
    pieces = np.stack((lo, hi, place, (of_entry + first).astype(np.uint64)), axis=1)
    return pieces[held], pieces[~held, :3]


def read_pieces(path: Path, offset: U64Array, place: U64Array, size: U64Array, out: NDArray[np.uint8]) -> None:
    """Read pieces of a pages image into their places in a buffer.

    :param path: the pages image.
    :param offset: where each piece is in the image, bytes, ascending; shape (n,).
    :param place: where it goes in `out`, bytes; shape (n,).
    :param size: how long it is, bytes; shape (n,).
    :param out: the buffer, shape (bytes,).
    :raises BadImage: the image is missing or too short.
    :raises ImagesIOError: it cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BadImage(f"{path} is missing: the images dir is damaged", path=path) from error
    except OSError as error:
        raise_io_error(error, "read", path)
    try:
        _read_groups(fd, path, *_join(offset, place, size), out.data)
    except OSError as error:
        raise_io_error(error, "read", path)
    finally:
        os.close(fd)


def _join(offset: U64Array, place: U64Array, size: U64Array) -> tuple[U64Array, U64Array, U64Array]:
    """Merge pieces that are neighbours both in the image and in the buffer."""
    first = np.ones(len(offset), bool)
    first[1:] = (offset[1:] != offset[:-1] + size[:-1]) | (place[1:] != place[:-1] + size[:-1])
    starts = np.flatnonzero(first)
    return offset[starts], place[starts], np.add.reduceat(size, starts)


def _read_groups(fd: int, path: Path, offset: U64Array, place: U64Array, size: U64Array, out: memoryview) -> None:
    """Read pieces, one preadv for those that are neighbours in the image."""
    breaks = np.flatnonzero(offset[1:] != offset[:-1] + size[:-1]) + 1
    at, ends = place.tolist(), (place + size).tolist()
    firsts = [0, *breaks.tolist(), len(at)]
    for first, last in pairwise(firsts):
        position = int(offset[first])
        buffers = [out[at[index] : ends[index]] for index in range(first, last)]
        while buffers:
            done = os.preadv(fd, buffers[:_IOV_MAX], position)
            if done == 0:
                raise BadImage(f"{path} is cut short: it ends before {position:#x}", path=path)
            position += done
            buffers = rest_of(buffers, done)


def rest_of(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of some buffers when `done` bytes of them are filled, or written."""
    for index, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[index + 1 :]]
        done -= len(buffer)
    return []
