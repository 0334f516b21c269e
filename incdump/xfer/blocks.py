"""incdump's own protocol between its client and its page server: messages to bytes and back, without any I/O.

A client that speaks it asks, as its very first message, whether the server has parent images of a process that cannot
be (`OFFER`, of `incdump.xfer.wire`). CRIU's server says no, and the client goes on in CRIU's protocol. incdump's server
answers `SPEAKS`, and both send their terms, a length and JSON::

    client    {"version": 1, "channels": 4, "compression": ["lz4"], "parent": "generation of the parent dump", or null}
    server    {"version": 1, "channels": 2, "compression": ["lz4"], "parent": true or false, "token": "hex"}

A client whose tree is in a user namespace says there as ``owner`` the number of the user whose the images are to be.
One that is part of a migration (`incdump.xfer.control`) also shows its token there, as ``migration``. The server's
``parent`` says whether the images on which the server puts this session are those very ones. Then the client makes as
many more connections as there are to be channels, each of which begins with `JOIN` and the token. From there on every
channel has messages of a header and what it says is behind it::

    BLOCK    pages, to any place of any pages image; in any order, on any channel, the same place again if need be
    LAYOUT   how long a pages image is going to be, about
    SIZE     how long it is, no longer than all its blocks together; behind it gaps, to be taken out and closed up. With
             `LAST` it is complete then
    DROP     a pages image is not needed after all
    FILE     a part of any other image, by name; the parts in order, the last one with `LAST`
    FINISH   that was all; the answer is DONE. What ends without it is broken, and dropped

A message with the flag `ANSWER` is answered with a byte when all that came before it on that channel is in the images;
`FAILED` is that byte, with a length and a text behind it, when something went wrong, whatever it was.

The client may not send anything about the length of a pages image before all blocks of it are answered.
"""

from __future__ import annotations

import json
import re
import struct
from enum import IntEnum
from typing import Any, NamedTuple

from incdump.errors import ProtocolError
from incdump.model.runs import PAGE_SIZE
from incdump.xfer.wire import Command, Image, Layout, Message, encode

VERSION = 1
OFFER_MESSAGE = Message(Command.PARENT, 0, 0, 0, Image("pagemap", 0x69646D70).dst_id)
OFFER = encode(OFFER_MESSAGE, Layout.SHORT)
JOIN = encode(Message(Command.PARENT, 0, 0, 0, Image("pagemap", 0x69646D71).dst_id), Layout.SHORT)
SPEAKS = 0x69646D70
"""The answer to `OFFER`: neither yes nor no."""
TOKEN = 16
"""Bytes."""
MOST_CHANNELS = 16
PACKED = 256 << 10
"""The most bytes of pages in one compressed block."""
MOST_BEHIND = 1 << 20
"""The most bytes behind any header."""
MOST_NAMES = 1 << 16
MOST_PAGES_ID = 1 << 31
MOST_OFFSET = 1 << 47
DONE, FAILED = 0x06, 0x15  # ACK and NAK of ASCII
LENGTH = struct.Struct("<I")
MOST_TEXT = 1 << 16
"""The most bytes of terms, or of what an error says."""
_HEADER = struct.Struct("<HHIQQQ")
HEADER = _HEADER.size
_NAME = re.compile(r"[a-z][A-Za-z0-9_-]{0,80}(\.tar\.gz)?\.img|stats-dump|incdump\.json|incdump-hashes-[a-z0-9-]{1,40}")
_PAGES_NAME = re.compile(r"pages-(\d+)\.img")


class Op(IntEnum):
    """What a message is about."""

    BLOCK = 1
    LAYOUT = 2
    SIZE = 3
    DROP = 4
    FILE = 5
    FINISH = 6


class Coding(IntEnum):
    """How the pages of a block are sent."""

    RAW = 0
    ZERO = 1
    """Not at all: they are zeros."""
    LZ4 = 2


ANSWER, LAST = 0x100, 0x200
"""Of a message's flags: it is to be answered; nothing more of that comes. The low byte is a block's `Coding`."""


class Header(NamedTuple):
    """A header.

    :ivar op: what it is about.
    :ivar flags: `Coding`, `ANSWER`, `LAST`.
    :ivar behind: bytes behind the header.
    :ivar number: of the pages image; of a file, the bytes of its name.
    :ivar offset: of a block in the pages image, bytes.
    :ivar length: of the block or of the pages image, bytes.
    """

    op: Op
    flags: int = 0
    behind: int = 0
    number: int = 0
    offset: int = 0
    length: int = 0

    @property
    def coding(self) -> Coding:
        """How a block's pages are sent."""
        return Coding(self.flags & 0xFF)

    def encode(self) -> bytes:
        """The header's bytes."""
        return _HEADER.pack(*self)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Header:
        """A header from its bytes.

        :raises ProtocolError: it makes no sense, or is about more than there can be.
        """
        op, flags, behind, number, offset, length = _HEADER.unpack_from(data)
        try:
            header = cls(Op(op), flags, behind, number, offset, length)
            _ = header.coding
        except ValueError:
            raise ProtocolError(f"the client sends an unknown message ({op:#x}, {flags:#x})") from None
        if problem := _problem(header):
            raise ProtocolError(f"the client sends a {header.op.name} message {problem}")
        return header


def _problem(header: Header) -> str | None:
    """What is wrong with a header."""
    if header.flags & ~(ANSWER | LAST | 0xFF) or header.behind > MOST_BEHIND:
        return "that cannot be"
    if header.op is Op.FILE:
        return None if header.number <= header.behind else "whose name is longer than itself"
    if header.op is Op.FINISH:
        return "with something behind it" if header.behind else None
    if not 0 < header.number < MOST_PAGES_ID:
        return "about a pages image that cannot be"
    if header.length % PAGE_SIZE or header.offset % PAGE_SIZE or header.offset + header.length > MOST_OFFSET:
        return "about pages that cannot be"
    if header.op is Op.SIZE:
        return "whose gaps cannot be" if header.behind % 16 else None
    if header.op is not Op.BLOCK:
        return "with something behind it" if header.behind else None
    if not header.length or (header.coding is Coding.LZ4 and header.length > PACKED):
        return "of a size that cannot be"
    if header.coding is Coding.LZ4:
        return None if 0 < header.behind < header.length else "that is no smaller for its compression"
    expected = header.length if header.coding is Coding.RAW else 0
    return None if header.behind == expected else "with other bytes behind it than it says"


def encode_terms(terms: dict[str, Any]) -> bytes:
    """Terms, with their length before them."""
    text = json.dumps(terms).encode()
    return LENGTH.pack(len(text)) + text


def decode_terms(text: bytes) -> dict[str, Any]:
    """Terms.

    :raises ProtocolError: they are none, or of another version.
    """
    try:
        terms = json.loads(text)
    except (ValueError, RecursionError):
        terms = None
    if not isinstance(terms, dict) or terms.get("version") != VERSION:
        raise ProtocolError("the other end speaks another version of incdump's protocol")
    return terms


def check_name(name: bytes) -> str:
    """The name of a file that a client may send.

    :raises ProtocolError: it is none.
    """
    text = name.decode("ascii", "replace")
    if not _NAME.fullmatch(text) or _PAGES_NAME.fullmatch(text):
        raise ProtocolError(f"the client sends a file that is no image: {text[:80]!r}")
    return text


def pages_id_of(name: str) -> int | None:
    """The number of a pages image, by its file's name; None for any other file."""
    match = _PAGES_NAME.fullmatch(name)
    return int(match[1]) if match else None
