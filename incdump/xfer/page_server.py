"""One session of a page server: a connected client's messages, and what becomes of them.

The bytes of a big run are spliced from the socket through a pipe into the pages image, and never copied to this
process: a third less time than with a buffer. Small runs are received into one buffer, used again and again, as many as
fit, and written from there in one system call. So a slow disk holds the client back, and memory use does not depend on
what it sends. All these calls release the GIL.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from incdump.errors import ConnectionLost, ProtocolError
from incdump.images.framing import raise_io_error
from incdump.images.page_reads import rest_of
from incdump.xfer.sockets import SILENT, broken, limit_calls
from incdump.xfer.splicing import Splicer, receive
from incdump.xfer.wire import ENDS, LONGEST, Command, Headers, Image, Layout, encode_answer, encode_has_parent

if TYPE_CHECKING:
    import socket

    from incdump.xfer.received import Received, ReceivedImages
    from incdump.xfer.wire import Message

BUFFER = 256 << 10
"""Bytes received at once: what was received is still in the processor's own cache when it is written."""
WORTH_SPLICING = 64 << 10
"""Bytes of a run."""
_IOV_MAX = 1024


class Session:
    """A client's session. Blocks; to end it from outside, shut its socket down."""

    def __init__(
        self, connection: socket.socket, receiver: ReceivedImages, *, timeout: float | None = None, first: bytes = b""
    ) -> None:
        """
        :param connection: connected; stays the caller's to close.
        :param timeout: seconds for which the client may be silent, or not take an answer; None for ever.
        :param first: what was received of it already.
        """
        self._connection = connection
        self._receiver = receiver
        self._timeout = timeout
        self._headers = Headers()
        self._buffer = memoryview(bytearray(BUFFER + LONGEST))
        self._buffer[: len(first)] = first
        self._start, self._end = 0, len(first)  # of what was received, and is not yet understood
        self._pages: list[memoryview] = []  # of the open image, in the buffer, not yet written
        self._splicer = Splicer(connection, timeout)
        self._only_headers = False  # are received into the buffer: the last run was big, so the next one may be
        try:
            limit_calls(connection, timeout)
        except OSError as error:
            raise broken(error) from None

    def run(self) -> Received:
        """Serve the client to its end.

        :returns: what has come; the images dir is finished.
        :raises incdump.errors.XferError: the client has gone, is silent, or says what cannot be.
        :raises incdump.errors.ImagesError: what comes cannot be written.
        """
        try:
            while (message := self._next()).command not in ENDS:
                self._answer(message)
            self._write_pages()
        finally:
            self._splicer.close()
        received = self._receiver.finish()
        with suppress(ConnectionLost):  # the images are whole, whether the client hears of it or not
            self._send(encode_answer(0))
        if message.command is Command.CLOSE:
            self._until_gone()
        return received

    def _answer(self, message: Message) -> None:
        receiver, command = self._receiver, message.command
        if command is Command.GET:
            raise ProtocolError("the client asks for pages: it expects a lazy dump's server, not a page server")
        image = Image.of(message.dst_id)
        if command is Command.PARENT:
            self._send(encode_answer(receiver.has_parent(image)))
            return
        if command in (Command.OPEN, Command.OPEN2) or image != receiver.current:  # old clients open without a word
            self._write_pages()
            has_parent = receiver.open(image)
            if command is Command.OPEN2:
                self._send(encode_has_parent(has_parent))
            if command in (Command.OPEN, Command.OPEN2):
                return
        receiver.add(message)
        if message.bytes_behind:
            self._take(message.bytes_behind)

    # -- bytes ----------------------------------------------------------------------------------------------------

    def _next(self) -> Message:
        while True:
            while self._end - self._start < self._headers.needed:
                self._receive()
            message, size = self._headers.decode(self._buffer, self._start)
            self._start += size
            if message is not None:
                return message

    def _receive(self) -> None:
        """Take what comes, behind what is there."""
        rest = self._end - self._start
        if not rest or len(self._buffer) - self._end < LONGEST:
            self._write_pages()
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        most = self._headers.needed - rest if self._only_headers else len(self._buffer) - self._end
        view = self._buffer[self._end : self._end + most]
        self._end += receive(self._connection.recv_into, self._timeout, view)

    def _take(self, size: int) -> None:
        """The bytes of a run of pages: those that are there wait to be written with what comes."""
        size -= self._take_there(size)
        self._only_headers = size >= WORTH_SPLICING and self._splicer.works
        if self._only_headers:
            self._write_pages()
            self._splicer.move(size, self._receiver.pages_fd, self._receiver.pages_path)
            return
        while size:
            self._receive()
            size -= self._take_there(size)

    def _take_there(self, size: int) -> int:
        there = min(size, self._end - self._start)
        if there:
            self._pages.append(self._buffer[self._start : self._start + there])
            self._start += there
        return there

    def _write_pages(self) -> None:
        """Write what is in the buffer."""
        pages, self._pages = self._pages, []
        fd = self._receiver.pages_fd
        try:
            while pages:
                pages = rest_of(pages, os.writev(fd, pages[:_IOV_MAX]))
        except OSError as error:
            raise_io_error(error, "write", self._receiver.pages_path)

    def _send(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except SILENT:
            raise ConnectionLost(f"the client did not take an answer for {self._timeout:g} s") from None
        except OSError as error:
            raise broken(error) from None

    def _until_gone(self) -> None:
        """Wait until the client has closed. Nothing is to come any more, but for the rest of a long header that could
        not be told from a short one; whatever does changes nothing."""
        with suppress(OSError):
            self._connection.recv(Layout.LONG.value)
