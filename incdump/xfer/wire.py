"""CRIU's page-server protocol: messages to bytes and back, without any I/O.

A client connects and sends messages. Each is a header; behind that of pages come their bytes. Some are answered::

    PARENT  image      are there pages of this image in your parent images?    i32: 1 or 0
    OPEN2   image      what follows is of this image                            1 byte: the same
    ADD_F   a run      pages, 4096 bytes each, or a hole; its flags say which   -
    CLOSE              that was all                                             i32: 0

A header is in one of two layouts, all little-endian::

    short, 24 bytes    u32 command, u32 pages, u64 vaddr, u64 dst_id                       CRIU up to 4.1
    long,  32 bytes    u32 command, 4 bytes of anything, u64 pages, u64 vaddr, u64 dst_id  CRIU 4.2 and later

Nothing says which; `Headers` finds out from the first message of a connection. The command is in the low 16 bits of
its word, the flags of a pagemap entry (`incdump.model.runs.PE_PRESENT` and so on) are in the high ones. ``dst_id`` is
an image's number times 256, plus what kind of image it is: `Image`.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from incdump.errors import ProtocolError
from incdump.model.runs import PAGE_SIZE, PE_PARENT, PE_PRESENT

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from incdump.images.images_dir import Kind
    from incdump.model.runs import Entries


class Command(IntEnum):
    """What a message says."""

    ADD = 1
    """Pages; as ADD_F with `PE_PRESENT`. Of old clients."""
    HOLE = 2
    """A hole; as ADD_F with `PE_PARENT`. Of old clients."""
    OPEN = 3
    """As OPEN2, but not answered. Of old clients."""
    OPEN2 = 4
    PARENT = 5
    ADD_F = 6
    GET = 7
    """Asks for pages of a lazy dump: nothing that a page server has."""
    CLOSE = 0x1023
    FORCE_CLOSE = 0x1024
    """As CLOSE; the server need not wait until the client has gone."""


ENDS = (Command.CLOSE, Command.FORCE_CLOSE)
OPENING = (Command.PARENT, Command.OPEN, Command.OPEN2, *ENDS)
"""What says nothing of an address: it is 0 there."""


_RUNS = (Command.ADD, Command.HOLE, Command.ADD_F)


class Layout(Enum):
    """How a header is laid out; the value is its size, bytes."""

    SHORT = 24
    LONG = 32


_SHORT = struct.Struct("<IIQQ")
_LONG = struct.Struct("<I4xQQQ")
_U64 = struct.Struct("<Q")
ANSWER = struct.Struct("<i")
"""What PARENT and the two ends are answered with; OPEN2 has one byte."""

_SHORT_RUN = np.dtype([("word", "<u4"), ("pages", "<u4"), ("vaddr", "<u8"), ("dst_id", "<u8")])
_LONG_RUN = np.dtype([("word", "<u4"), ("padding", "<u4"), ("pages", "<u8"), ("vaddr", "<u8"), ("dst_id", "<u8")])

LONGEST = Layout.LONG.value

MOST_PAGES = (1 << 47) // PAGE_SIZE
"""Pages that one message may be about: more than a page table of four levels has."""

_PROCESS, _SEGMENT = 1, 2
_KINDS = {
    **dict.fromkeys((_PROCESS, 10, 11, 16, 17), _PROCESS),
    **dict.fromkeys((_SEGMENT, 27, 28, 29, 32, 33, 34), _SEGMENT),
}
"""Of the low byte of a dst_id; the larger numbers are those of old clients."""


class Image(NamedTuple):
    """What pages are of.

    :ivar kind: ``"pagemap"``, of a process, or ``"pagemap-shmem"``, of a shared memory segment: as in the file's name.
    :ivar number: the pid, or the segment's number.
    """

    kind: Kind
    number: int

    @property
    def dst_id(self) -> int:
        """The image in a message."""
        return self.number << 8 | (_PROCESS if self.kind == "pagemap" else _SEGMENT)

    @classmethod
    def of(cls, dst_id: int) -> Image:
        """The image that a message names.

        :raises ProtocolError: there is no such kind.
        """
        kind = _KINDS.get(dst_id & 0xFF)
        if kind is None:
            raise ProtocolError(f"the client names an image of unknown kind ({dst_id:#x})")
        return cls("pagemap" if kind == _PROCESS else "pagemap-shmem", dst_id >> 8)


class Message(NamedTuple):
    """A header, decoded.

    :ivar flags: of the pagemap entry that a run is to become; those of ADD and HOLE are filled in.
    :ivar nr_pages: the run's pages.
    :ivar vaddr: where it begins, bytes; in a segment from its beginning.
    """

    command: Command
    flags: int
    nr_pages: int
    vaddr: int
    dst_id: int

    @property
    def bytes_behind(self) -> int:
        """How many bytes of pages come behind the header."""
        is_run = self.command not in OPENING
        return self.nr_pages * PAGE_SIZE if is_run and self.flags & PE_PRESENT else 0


def encode(message: Message, layout: Layout) -> bytes:
    """A header's bytes.

    :raises ValueError: more pages than the short layout can say.
    """
    word = message.command | message.flags << 16
    if layout is Layout.LONG:
        return _LONG.pack(word, message.nr_pages, message.vaddr, message.dst_id)
    if message.nr_pages >> 32:
        raise ValueError(f"{message.nr_pages} pages do not fit into a short header")
    return _SHORT.pack(word, message.nr_pages, message.vaddr, message.dst_id)


def encode_runs(entries: Entries, dst_id: int, layout: Layout) -> NDArray[np.uint8]:
    """The headers of runs of an image.

    :param entries: shape (n, 3): vaddr, pages, flags; fewer than 2**32 pages each.
    :returns: shape (n, bytes of a header).
    """
    headers = np.zeros(len(entries), _LONG_RUN if layout is Layout.LONG else _SHORT_RUN)
    headers["word"] = np.uint64(Command.ADD_F) | entries[:, 2] << np.uint64(16)
    headers["pages"] = entries[:, 1]
    headers["vaddr"] = entries[:, 0]
    headers["dst_id"] = dst_id
    return headers.view(np.uint8).reshape(len(entries), layout.value)


def late_end(message: Message) -> bytes:
    """What makes a first message that was sent in the short layout one in the long layout.

    Behind its command it then has no pages, an address that nobody looks at, and the image.
    """
    return _U64.pack(message.dst_id)


def decode(data: Buffer, layout: Layout, offset: int = 0) -> Message:
    """A header.

    :param data: holds it from `offset` on.
    :raises ProtocolError: there is no such command, or it cannot be about so many pages.
    """
    word, pages, vaddr, dst_id = (_LONG if layout is Layout.LONG else _SHORT).unpack_from(data, offset)
    try:
        command = Command(word & 0xFFFF)
    except ValueError:
        raise ProtocolError(f"the client sends an unknown command ({word & 0xFFFF:#x})") from None
    if pages > MOST_PAGES:
        raise ProtocolError(f"the client sends a run of {pages} pages, which is more than there can be")
    flags = {Command.ADD: PE_PRESENT, Command.HOLE: PE_PARENT}.get(command, word >> 16)
    return Message(command, flags, pages, vaddr, dst_id)


class Headers:
    """The headers of one connection, which tells their layout by its first 24 bytes.

    In the short layout the last eight of these are a dst_id, whose low byte is a kind of image, never 0. In the long
    one they are an address: that of a page, or 0 in a message about none.

    A client that has lost patience with a server that was busy has made its first, short message a long one meanwhile
    (`late_end`), and goes on so.

    :ivar layout: the layout, once it is known.
    """

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self._late_end = b""

    @property
    def needed(self) -> int:
        """How many bytes `decode` needs, at least."""
        return Layout.SHORT.value if self.layout is None else self.layout.value

    def decode(self, data: Buffer, offset: int = 0) -> tuple[Message | None, int]:
        """The next header.

        :param data: holds `needed` bytes of it, or more, from `offset` on.
        :returns: the message, or None if there is to be another call, which may need more bytes; and how many bytes
            were used up.
        :raises ProtocolError: it makes no sense.
        """
        if self.layout is None:
            self.layout = self._tell(data, offset)
            if self.layout is None:  # an end, and nothing before it
                return decode(data, Layout.SHORT, offset), Layout.SHORT.value
            if self.layout is Layout.LONG:
                return None, 0
            message = decode(data, Layout.SHORT, offset)
            self._late_end = late_end(message) if message.command in OPENING else b""
            return message, Layout.SHORT.value
        if self._late_end:
            expected, self._late_end = self._late_end, b""
            if memoryview(data)[offset : offset + len(expected)] == expected:
                self.layout = Layout.LONG
                return None, len(expected)
        return decode(data, self.layout, offset), self.layout.value

    @staticmethod
    def _tell(data: Buffer, offset: int) -> Layout | None:
        """The layout of the first header; None: both would do, as all that follows the command is zeros."""
        word, pages, vaddr, last = _SHORT.unpack_from(data, offset)
        command = word & 0xFFFF
        if command in ENDS and not (pages or vaddr or last):
            return None
        is_address = last == 0 if command in OPENING else command in _RUNS and last % PAGE_SIZE == 0
        return Layout.LONG if is_address else Layout.SHORT


def encode_answer(value: int) -> bytes:
    """The answer to PARENT, CLOSE and FORCE_CLOSE."""
    return ANSWER.pack(value)


def encode_has_parent(has_parent: bool) -> bytes:
    """The answer to OPEN2."""
    return bytes([has_parent])
