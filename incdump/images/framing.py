"""How an image file is framed: magics, then records.

====================  ===============================================================
normal image          common magic, own magic, records
inventory.img         own magic, one record
stats-dump            service magic, own magic, one record
pages-N.img           no frame: byte 0 is the first byte of the first page
====================  ===============================================================

A magic is 32 bits; a record is a 32-bit length and that many bytes of protobuf; all little-endian, without padding or
checksum. The numbers are CRIU's.
"""

from __future__ import annotations

import os
import stat
import struct
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from incdump.errors import BadImage, ImagesIOError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

COMMON_MAGIC = 0x54564319
SERVICE_MAGIC = 0x55105940

MAX_IMAGE_SIZE = 4 << 30
"""No image but pages is anywhere near this; what is bigger is not read into memory, bytes."""

_U32 = struct.Struct("<I")


class Magic(IntEnum):
    """Each kind of image's own magic."""

    INVENTORY = 0x58313116
    PSTREE = 0x50273030
    MM = 0x57492820
    PAGEMAP = 0x56084025
    CORE = 0x55053847
    FILES = 0x56303138
    MEMFD = 0x48453499
    STATS = 0x57093306
    USERNS = 0x55474906


_LEADING: dict[Magic, tuple[int, ...]] = {Magic.INVENTORY: (), Magic.STATS: (SERVICE_MAGIC,)}


def header(magic: Magic) -> bytes:
    """The bytes in front of an image's first record."""
    return b"".join(_U32.pack(word) for word in (*_LEADING.get(magic, (COMMON_MAGIC,)), magic))


def frame(magic: Magic, records: Iterable[bytes]) -> bytes:
    """A whole image file.

    :param magic: what kind of image.
    :param records: protobuf messages, serialised, one a record.
    """
    parts = [header(magic)]
    for record in records:
        parts += (_U32.pack(len(record)), record)
    return b"".join(parts)


def body(data: bytes, magic: Magic, path: str | os.PathLike[str]) -> memoryview:
    """What follows the magics.

    :param data: the whole file.
    :param path: where it came from, for the error.
    :raises BadImage: the file does not begin with this kind's magics.
    """
    expected = header(magic)
    if not data.startswith(expected):
        raise BadImage(f"{os.fspath(path)} is not a {magic.name.lower()} image: its magic is wrong", path=path)
    return memoryview(data)[len(expected) :]


def unframe(data: bytes, magic: Magic, path: str | os.PathLike[str]) -> Iterator[memoryview]:
    """The records of an image file, one after the other.

    :raises BadImage: the magics are wrong or a record is cut short.
    """
    return split_records(body(data, magic, path), path)


def split_records(rest: memoryview, path: str | os.PathLike[str]) -> Iterator[memoryview]:
    """The records that follow one another up to a file's end.

    :raises BadImage: a record is cut short.
    """
    while rest:
        if len(rest) < 4:
            raise truncated(path)
        (size,) = _U32.unpack_from(rest)
        if len(rest) - 4 < size:
            raise truncated(path)
        yield rest[4 : 4 + size]
        rest = rest[4 + size :]


def only_record(data: bytes, magic: Magic, path: str | os.PathLike[str]) -> memoryview:
    """The record of an image that has exactly one.

    :raises BadImage: it has none, or more, or is damaged.
    """
    records = list(islice(unframe(data, magic, path), 2))
    if len(records) != 1:
        raise BadImage(f"{os.fspath(path)} has {'more' if records else 'less'} than one record", path=path)
    return records[0]


def truncated(path: str | os.PathLike[str]) -> BadImage:
    """The error for an image that ends in the middle of a record."""
    return BadImage(f"{os.fspath(path)} is cut short: its last record is incomplete", path=path)


_HINTS = {
    "ENOSPC": "; free some space or choose another images dir",
    "EDQUOT": "; the disk quota is used up: free some space or choose another images dir",
    "EROFS": "; choose an images dir on a file system that can be written to",
    "EACCES": "; choose an images dir that you may use",
    "EPERM": "; choose an images dir that you may use",
    "ENOTDIR": "; choose a directory",
    "ENOENT": "; check the path",
}


def raise_io_error(error: OSError, doing: str, path: str | os.PathLike[str]) -> NoReturn:
    """Raise an `OSError` of the file system as what it means for the images dir.

    :param doing: what was tried, as in ``"write"``.
    :raises ImagesIOError: always.
    """
    mapped = ImagesIOError("", path=path, errno=error.errno)
    reason = os.strerror(error.errno) if error.errno else str(error)
    mapped.args = (f"cannot {doing} {os.fspath(path)}: {reason}{_HINTS.get(mapped.errno_name or '', '')}",)
    raise mapped from error


def read_file(path: str | os.PathLike[str]) -> bytes | None:
    """The contents of an image file other than pages, or None when there is no such file.

    :raises BadImage: it is no regular file, or too big to be an image.
    :raises ImagesIOError: it cannot be read.
    """
    try:
        # A FIFO planted under an image's name must not block, so non-blocking.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise_io_error(error, "read", path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_IMAGE_SIZE:
            raise BadImage(f"{os.fspath(path)} is no image: not a regular file, or far too big", path=path)
        with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            return file.readall()
    except OSError as error:
        raise_io_error(error, "read", path)
    finally:
        os.close(fd)


def write_file(
    path: str | os.PathLike[str],
    parts: Iterable[bytes | memoryview],
    *,
    dir_fd: int | None = None,
    shown: Path | None = None,
    owner: int | None = None,
) -> None:
    """Create a file, mode 0600, and write it whole.

    :param path: its name, relative to `dir_fd` when that is given.
    :param parts: what to write, in order.
    :param shown: the path to name in errors, when `path` is relative.
    :param owner: see `create_file`.
    :raises FileExistsError: there is one already, which stays as it is.
    :raises ImagesIOError: it cannot be created or written; an incomplete file may be left.
    """
    named = Path(path) if shown is None else shown
    try:
        fd = create_file(path, dir_fd=dir_fd, owner=owner)
        with os.fdopen(fd, "wb") as file:
            file.writelines(parts)
    except FileExistsError:
        raise
    except OSError as error:
        raise_io_error(error, "write", named)


def create_file(path: str | os.PathLike[str], *, dir_fd: int | None = None, owner: int | None = None) -> int:
    """Create an empty file, mode 0600, and return its descriptor, open for reading and writing.

    :param owner: the user whose file it is to be; None: the caller's.
    :raises FileExistsError: there is one already.
    :raises OSError: it cannot be created, or given away.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=dir_fd)
    if owner is not None:
        try:
            os.fchown(fd, owner, -1)
        except BaseException:
            os.close(fd)
            os.unlink(path, dir_fd=dir_fd)
            raise
    return fd
