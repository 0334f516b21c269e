"""The conversation of a migration: what both ends say to each other beside the sessions in which the images go.

It is a connection of its own, which begins with `MIGRATE`. Then both send messages, a length and JSON, each an object
that says something::

    source                                      receiver
    {"say": "migrate", "version": 1, "tree": …}
                                                {"say": "welcome", "token": …, "problems": […], "restores": true, …}
    (the rounds: sessions of incdump.xfer.blocks, each of which shows the token)
    {"say": "restore", "number": 7}
                                                {"say": "ready"}      the tree stands there, complete; or "stored"
    {"say": "go"}
                                                {"say": "runs"}       the source's tree may be killed
    {"say": "done"}

    {"say": "outcome", "token": …}              {"say": "runs"}, or "void": it does not run, and never will

``failed``, with ``why``, is the receiver's answer when something went wrong; ``wait`` says nothing but that one is
still there, and both say it all the time, so that silence means that the other is gone. What ends before ``go`` is void
at the receiver. An end after it leaves the source not knowing, which it cures by a new connection that asks for the
``outcome``: that makes void what had not gone by then. See docs/architecture.md, "A migration".
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from incdump.errors import ConnectionLost, ProtocolError
from incdump.xfer.blocks import LENGTH
from incdump.xfer.sockets import SILENT, hang_up, is_plain
from incdump.xfer.wire import Command, Image, Layout, Message, encode

if TYPE_CHECKING:
    import socket

VERSION = 1
MIGRATE = encode(Message(Command.PARENT, 0, 0, 0, Image("pagemap", 0x69646D72).dst_id), Layout.SHORT)
MOST_MESSAGE = 8 << 20
"""The most bytes of a message: a tree may have many files."""
MOST_UNKNOWN = 64 << 10
"""The most bytes of a message from whom one does not know: trees are hardly ever more."""


def encode_message(message: dict[str, Any]) -> bytes:
    """A message, with its length before it."""
    text = json.dumps(message).encode()
    return LENGTH.pack(len(text)) + text


def decode_message(text: bytes) -> dict[str, Any]:
    """A message.

    :raises ProtocolError: it is none.
    """
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("say"), str):
        raise ProtocolError("the other end says what is no message of a migration")
    return message


class TooMuch(ProtocolError):
    """A message that is longer than it may be."""


Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
"""What the other end has said, of which nothing is known yet."""


class Control:
    """One end. Calls block; messages may be sent by any thread, and are heard by one.

    :ivar other: the other end, for people.
    :ivar timeout: seconds after which silence means that the other is gone.
    :ivar most: bytes of a message.
    """

    def __init__(self, connection: socket.socket, other: str, timeout: float) -> None:
        """
        :param connection: this object's to close; its calls are limited (`incdump.xfer.sockets.limit_calls`).
        """
        self.connection = connection
        self.other = other
        self.timeout = timeout
        self.most = MOST_MESSAGE
        self._lock = threading.Lock()  # TLS does not read and write at once

    def say(self, message: dict[str, Any]) -> None:
        """Send a message.

        :raises ConnectionLost: the other is gone, or takes nothing.
        """
        with self._lock:
            try:
                self.connection.sendall(encode_message(message))
            except SILENT:
                raise ConnectionLost(f"{self.other} took nothing for {self.timeout:g} s") from None
            except (OSError, ValueError) as error:
                raise self._broken(error) from None

    def hear(self) -> dict[str, Any]:
        """The next message, which has begun to come.

        :raises ConnectionLost: the other is gone, or silent.
        :raises ProtocolError: it makes no sense.
        """
        with self._lock:
            (size,) = LENGTH.unpack(self._take(LENGTH.size))
            if size > self.most:
                raise TooMuch(f"{self.other} says more than there can be to say")
            return decode_message(self._take(size))

    def _take(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                got = self.connection.recv(min(size - len(data), 1 << 20))
            except SILENT:
                raise self.silence() from None
            except (OSError, ValueError) as error:
                raise self._broken(error) from None
            if not got:
                raise ConnectionLost(f"{self.other} hung up")
            data += got
        return bytes(data)

    def has_more(self) -> bool:
        """Whether a message has begun to come that the socket does not tell of any more: TLS has it already."""
        return not is_plain(self.connection) and bool(self.connection.pending())  # type: ignore[attr-defined]

    def silence(self) -> ConnectionLost:
        """The error for one that is silent."""
        return ConnectionLost(f"{self.other} was silent for {self.timeout:g} s")

    def _broken(self, error: OSError | ValueError) -> ConnectionLost:
        reason = getattr(error, "strerror", None) or str(error)
        return ConnectionLost(f"the connection to {self.other} broke: {reason}", errno=getattr(error, "errno", None))

    def hang_up(self) -> None:
        """End the connection. Never blocks, never fails."""
        hang_up(self.connection)

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self.connection.close()
