"""Strangers to a receiver: whoever connects, and says nothing, half of something, or what is not asked for."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from incdump.xfer.blocks import JOIN, LENGTH, OFFER, encode_terms
from incdump.xfer.control import MIGRATE, encode_message

if TYPE_CHECKING:
    from typing import Self

_TERMS = {"version": 1, "channels": 4, "parent": None, "compression": []}
WORDS = {
    "nothing": b"",
    "half of the first message": MIGRATE[:7],
    "half of a migration": MIGRATE + LENGTH.pack(1000) + b"{",
    "nothing but that they are there": MIGRATE + encode_message({"say": "wait"}) * 3,
    "an offer": OFFER,
    "an offer and half of the terms": OFFER + encode_terms(_TERMS)[:20],
    "the terms of another migration": OFFER + encode_terms({**_TERMS, "migration": "0" * 32}),
    "half of a token": JOIN + b"0" * 7,
    "a question about another migration": MIGRATE + encode_message({"say": "outcome", "token": "0" * 32}),
    "another protocol": b"\0" * 4096,
}
"""What they say; then they stay, and listen."""


class Strangers:
    """Connections that stay open until the context ends, or the other side hangs up."""

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        self._where = address, port
        self._sockets: list[socket.socket] = []

    def come(self, each: int, *words: str) -> None:
        """So many more of each kind, by `WORDS`; of all kinds if none is given."""
        for text in words or WORDS:
            for _ in range(each):
                connection = socket.create_connection(self._where, 5)
                self._sockets.append(connection)
                with suppress(OSError):
                    connection.sendall(WORDS[text])

    def stay(self) -> int:
        """How many of them have not been hung up on."""
        found = 0
        for connection in self._sockets:
            connection.setblocking(False)
            try:
                while connection.recv(1 << 16):
                    pass
            except BlockingIOError:
                found += 1
            except OSError:
                pass
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._sockets:
            connection.close()
