"""A page-server client for tests: it packs its own messages, and sends whatever it is told to."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from types import TracebackType
    from typing import Self

PAGE = 4096
ADD, HOLE, OPEN, OPEN2, PARENT, ADD_F, GET, CLOSE, FORCE_CLOSE = 1, 2, 3, 4, 5, 6, 7, 0x1023, 0x1024
PRESENT, IN_PARENT = 6, 1
SHORT, LONG = 24, 32


def header(layout: int, command: int, *, flags: int = 0, pages: int = 0, vaddr: int = 0, dst_id: int = 0) -> bytes:
    """A header's bytes, as CRIU lays them out; what stands in its padding means nothing."""
    word = command | flags << 16
    if layout == SHORT:
        return struct.pack("=IIQQ", word, pages, vaddr, dst_id)
    return struct.pack("=IIQQQ", word, 0x7FFC, pages, vaddr, dst_id)


def process(pid: int) -> int:
    """The dst_id of a process."""
    return pid << 8 | 1


def segment(number: int) -> int:
    """The dst_id of a shared memory segment."""
    return number << 8 | 2


class PageClient:
    """A connected client.

    :ivar sock: its end.
    """

    def __init__(self, sock: socket.socket, layout: int = SHORT) -> None:
        self.sock = sock
        self.layout = layout
        self._dst_id = 0

    @classmethod
    def connect(cls, port: int, layout: int = SHORT) -> PageClient:
        return cls(socket.create_connection(("127.0.0.1", port), timeout=30), layout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()

    def say(self, command: int, *, flags: int = 0, pages: int = 0, vaddr: int = 0, dst_id: int = 0) -> None:
        """Send a message."""
        self.sock.sendall(header(self.layout, command, flags=flags, pages=pages, vaddr=vaddr, dst_id=dst_id))

    def hear(self, size: int) -> bytes:
        """An answer; less than that of it if the server has closed."""
        data = b""
        while len(data) < size and (more := self.sock.recv(size - len(data))):
            data += more
        return data

    def ask(self, dst_id: int) -> int:
        """Whether the server has a parent of this image."""
        self.say(PARENT, dst_id=dst_id)
        return int.from_bytes(self.hear(4), "little")

    def open(self, dst_id: int) -> int:
        """Begin an image; returns whether it has a parent."""
        self.say(OPEN2, dst_id=dst_id)
        self._dst_id = dst_id
        return self.hear(1)[0]

    def pages(self, vaddr: int, data: bytes, flags: int = PRESENT) -> None:
        """Send pages."""
        self.say(ADD_F, flags=flags, pages=len(data) // PAGE, vaddr=vaddr, dst_id=self._dst_id)
        self.sock.sendall(data)

    def hole(self, vaddr: int, pages: int) -> None:
        """Leave pages to the parent images."""
        self.say(ADD_F, flags=IN_PARENT, pages=pages, vaddr=vaddr, dst_id=self._dst_id)

    def end(self) -> bytes:
        """Say that this was all; returns the answer."""
        self.say(CLOSE)
        answer = self.hear(4)
        self.sock.close()
        return answer


def noise(pages: int) -> bytes:
    """Pages that are like no others."""
    return os.urandom(pages * PAGE)


def damage(stream: bytearray, dice: random.Random) -> None:
    """Have something in a recorded stream be other than a client says it, wherever that is."""
    at = dice.randrange(len(stream))
    match dice.randrange(4):
        case 0:
            stream[at] ^= 1 << dice.randrange(8)
        case 1:
            del stream[at : at + dice.randint(1, 64)]
        case 2:
            stream[at:at] = stream[: dice.randint(1, 64)]
        case 3:
            small = dice.randrange(min(64, len(stream)))
            stream[small] = dice.randrange(256)
