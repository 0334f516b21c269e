"""One session of a page server: a connected client's messages, and what becomes of them.

Bytes are received into one buffer, used again and again, and written from there to the pages image: big runs 256 KiB at
a time, of small ones as many as fit, in one system call. So a slow disk holds the client back, and memory use does not
depend on what it sends. Both calls release the GIL.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from incdump.errors import ConnectionLost, ProtocolError
from incdump.images.framing import raise_io_error
from incdump.images.page_reads import rest_of
from incdump.model.runs import PAGE_SIZE
from incdump.xfer.sockets import limit_calls
from incdump.xfer.wire import ENDS, LONGEST, Command, Headers, Image, Layout, encode_answer, encode_has_parent

if TYPE_CHECKING:
    from incdump.xfer.received import Received, ReceivedImages
    from incdump.xfer.wire import Message

BUFFER = 256 << 10
"""Bytes received at once: what was received is still in the processor's own cache when it is written."""
_IOV_MAX = 1024


class Session:
    """A client's session. Blocks; to end it from outside, shut its socket down."""

    def __init__(self, connection: socket.socket, receiver: ReceivedImages, *, timeout: float | None = None) -> None:
        """
        :param connection: connected; stays the caller's to close.
        :param timeout: seconds for which the client may be silent, or not take an answer; None for ever.
        """
        self._connection = connection
        self._receiver = receiver
        self._timeout = timeout
        self._headers = Headers()
        self._buffer = memoryview(bytearray(BUFFER + LONGEST))
        self._start = self._end = 0  # of what was received, and is not yet understood
        self._pages: list[memoryview] = []  # of the open image, in the buffer, not yet written
        try:
            limit_calls(connection, timeout)
        except OSError as error:
            raise _broken(error) from None

    @property
    def layout(self) -> Layout | None:
        """How the client lays out its headers, once it has sent one."""
        return self._headers.layout

    def run(self) -> Received:
        """Serve the client to its end.

        :returns: what has come; the images dir is finished.
        :raises incdump.errors.XferError: the client has gone, is silent, or says what cannot be.
        :raises incdump.errors.ImagesError: what comes cannot be written.
        """
        while True:
            message = self._next()
            if message.command in ENDS:
                break
            self._answer(message)
        self._write_pages()
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
        if self._start == self._end or len(self._buffer) - self._end < LONGEST:
            self._write_pages()
            rest = self._end - self._start
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        self._end += self._recv_into(self._buffer[self._end :])

    def _take(self, size: int) -> None:
        """The bytes of pages: those that are there wait to be written with what comes; others are written at once."""
        there = min(size, self._end - self._start)
        if there:
            self._pages.append(self._buffer[self._start : self._start + there])
            self._start += there
            size -= there
        while size >= PAGE_SIZE and size > len(self._buffer) - self._end:
            self._write_pages()
            got = self._recv_into(self._buffer[: min(size, BUFFER)], whole=True)
            self._pages.append(self._buffer[:got])
            self._start = self._end = got
            size -= got
        while size:
            self._receive()
            there = min(size, self._end - self._start)
            self._pages.append(self._buffer[self._start : self._start + there])
            self._start += there
            size -= there

    def _write_pages(self) -> None:
        pages, self._pages = self._pages, []
        fd = self._receiver.pages_fd
        try:
            while pages:
                pages = rest_of(pages, os.writev(fd, pages[:_IOV_MAX]))
        except OSError as error:
            raise_io_error(error, "write", self._receiver.pages_path)

    def _recv_into(self, view: memoryview, *, whole: bool = False) -> int:
        try:
            got = self._connection.recv_into(view, 0, socket.MSG_WAITALL if whole else 0)
        except BlockingIOError:
            raise ConnectionLost(f"the client was silent for {self._timeout:g} s") from None
        except OSError as error:
            raise _broken(error) from None
        if not got:
            raise ConnectionLost("the client went before it had said that it was through")
        return got

    def _send(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except BlockingIOError:
            raise ConnectionLost(f"the client did not take an answer for {self._timeout:g} s") from None
        except OSError as error:
            raise _broken(error) from None

    def _until_gone(self) -> None:
        """Wait until the client has closed. Nothing is to come any more, but for the rest of a long header that could
        not be told from a short one; whatever does changes nothing."""
        with suppress(OSError):
            self._connection.recv(Layout.LONG.value)


def _broken(error: OSError) -> ConnectionLost:
    return ConnectionLost(f"the connection broke: {error.strerror}", errno=error.errno)
