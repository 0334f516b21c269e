"""One session of incdump's own protocol (`incdump.xfer.blocks`), at the server.

Each channel has a thread. The first one, on the connection that the client made the offer on, has the caller's, and the
session ends with it. The bytes of a block go from the socket to their place in the pages image without a copy in this
process; compressed ones, and those of TLS, through a buffer. So memory use does not depend on what comes, and a slow
disk holds the client back.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from incdump._uapi.fallocate import punch_hole
from incdump.errors import ConnectionLost, IncdumpError, ProtocolError
from incdump.images.framing import raise_io_error
from incdump.xfer import compression
from incdump.xfer.blocks import (
    ANSWER,
    DONE,
    FAILED,
    HEADER,
    LAST,
    LENGTH,
    MOST_BEHIND,
    MOST_CHANNELS,
    MOST_TEXT,
    SPEAKS,
    TOKEN,
    VERSION,
    Coding,
    Header,
    Op,
    check_name,
    decode_terms,
    encode_terms,
)
from incdump.xfer.sockets import SILENT, broken, farewell, hang_up, shut_down, silence
from incdump.xfer.splicing import Splicer, receive_all
from incdump.xfer.wire import encode_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from incdump.xfer.received import Received
    from incdump.xfer.stored import StoredImages

_JOIN_SECONDS = 30.0
_LOOK_SECONDS = 0.1


class Joins:
    """Connections that are to be channels of a session, by the session's token."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[bytes, queue.SimpleQueue[socket.socket]] = {}

    def expect(self, token: bytes) -> queue.SimpleQueue[socket.socket]:
        """Where the connections that show this token come, until `forget`."""
        with self._lock:
            return self._waiting.setdefault(token, queue.SimpleQueue())

    def forget(self, token: bytes) -> None:
        """No more connections; those that nobody took are closed."""
        with self._lock:
            found = self._waiting.pop(token, None)
        while found is not None:
            try:
                found.get_nowait().close()
            except queue.Empty:
                return

    def add(self, token: bytes, connection: socket.socket) -> bool:
        """Hand over a connection; False if no session has this token."""
        with self._lock:
            found = self._waiting.get(token)
            if found is not None:
                found.put(connection)
            return found is not None


class _Activity:
    """What a client does, on whichever channel: one that has nothing to do is silent while others are at work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages = 0  # that are being received, or done
        self._last = time.monotonic()

    def begin(self) -> None:
        """A message has begun."""
        with self._lock:
            self._messages += 1

    def end(self) -> None:
        """It is done."""
        with self._lock:
            self._messages -= 1
            self._last = time.monotonic()

    def was_within(self, seconds: float | None) -> bool:
        """Whether something was being done in the last so many seconds."""
        with self._lock:
            return seconds is None or self._messages > 0 or time.monotonic() - self._last < seconds


class BlockSession:
    """A client's session. Blocks; to end it from outside, hang up the connection."""

    def __init__(
        self,
        connection: socket.socket,
        images: StoredImages,
        joins: Joins,
        *,
        timeout: float | None = None,
        offer: dict[str, Any] | None = None,
    ) -> None:
        """
        :param connection: on which the offer came; stays the caller's to close.
        :param joins: where the client's other connections arrive.
        :param timeout: seconds for which the client may be silent, or not take an answer; None for ever.
        :param offer: the client's terms; None: they have not been heard yet.
        """
        self._offer = offer
        self._connection = connection
        self._images = images
        self._joins = joins
        self._timeout = timeout
        self._activity = _Activity()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._others: list[tuple[_Channel, threading.Thread]] = []

    def run(self) -> Received:
        """Serve the client to its end.

        :returns: what has come; the images dir is finished.
        :raises incdump.errors.XferError: the client has gone, is silent, or says what cannot be.
        :raises incdump.errors.ImagesError: what comes cannot be written.
        """
        first = _Channel(self._connection, self._images, self._timeout, self._activity)
        try:
            self._agree(first, self._offer or hear_terms(self._connection, self._timeout))
            if not first.serve(self._control):
                raise ConnectionLost("the client went before it had said that it was through")
            self._end_others(wait=True)
            if self._error is not None:
                raise self._error
            received = self._images.finish()
        except BaseException as error:
            cause = self._error or error  # not what ending the others has them say
            self._end_others(wait=False)
            tell(self._connection, cause)
            if cause is error:
                raise
            raise cause from None
        finally:
            first.close()
        with suppress(ConnectionLost):  # the images are whole, whether the client hears of it or not
            first.send(bytes([DONE]))
        return received

    def _agree(self, first: _Channel, offer: dict[str, Any]) -> None:
        """Tell the client what may be, and wait until its channels are there."""
        wanted, parent, codings = offer.get("channels"), offer.get("parent"), offer.get("compression")
        channels = min(wanted, MOST_CHANNELS) if isinstance(wanted, int) and wanted > 0 else 1
        both = [name for name in compression.available() if isinstance(codings, list) and name in codings]
        stands_on = self._images.stands_on(parent if isinstance(parent, str) else None)
        token = os.urandom(TOKEN)
        expected = self._joins.expect(token)
        try:
            terms = {"version": VERSION, "channels": channels, "compression": both, "parent": stands_on}
            first.send(encode_terms({**terms, "token": token.hex()}))
            deadline = time.monotonic() + self._patience
            for _ in range(channels - 1):
                self._add(self._next_join(expected, deadline))
        finally:
            self._joins.forget(token)

    @property
    def _patience(self) -> float:
        return _JOIN_SECONDS if self._timeout is None else min(_JOIN_SECONDS, self._timeout)

    def _next_join(self, expected: queue.SimpleQueue[socket.socket], deadline: float) -> socket.socket:
        while (left := deadline - time.monotonic()) > 0:
            with suppress(queue.Empty):
                return expected.get(timeout=min(left, _LOOK_SECONDS))
            if _is_over(self._connection):
                raise ConnectionLost("the client went before it had opened all channels")
        raise ConnectionLost(f"the client did not open all channels within {self._patience:g} s")

    def _add(self, connection: socket.socket) -> None:
        channel = _Channel(connection, self._images, self._timeout, self._activity)
        thread = threading.Thread(target=self._serve, args=(channel,), name="page-server channel")
        self._others.append((channel, thread))
        thread.start()

    def _serve(self, channel: _Channel) -> None:
        try:
            channel.serve(self._not_here)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            with suppress(OSError):
                shut_down(self._connection, socket.SHUT_RD)  # the first channel waits for what will not come

    def _end_others(self, *, wait: bool) -> None:
        """End all other channels.

        :param wait: they are to end by themselves: the client has closed them.
        """
        for channel, thread in self._others:
            if not wait:
                hang_up(channel.connection)
            thread.join(None if self._timeout is None else 2 * self._timeout + 1)
            if thread.is_alive():
                hang_up(channel.connection)
                thread.join()
                self._error = self._error or ConnectionLost("the client did not close all channels when it was through")
            channel.close()
            channel.connection.close()
        self._others.clear()

    def _not_here(self, header: Header, _: memoryview) -> None:
        raise ProtocolError(f"the client sends a {header.op.name} message on a channel that is for blocks")

    def _control(self, header: Header, behind: memoryview) -> None:
        """What is no block."""
        if header.op is Op.LAYOUT:
            self._images.lay_out(header.number, header.length)
        elif header.op is Op.SIZE:
            gaps = np.frombuffer(behind, "<u8").astype(np.uint64).reshape(-1, 2)
            self._images.resize(header.number, header.length, gaps, is_last=bool(header.flags & LAST))
        elif header.op is Op.DROP:
            self._images.drop(header.number)
        elif header.op is Op.FILE:
            name = check_name(bytes(behind[: header.number]))
            self._images.add_to_file(name, behind[header.number :], is_last=bool(header.flags & LAST))


class _Channel:
    """One connection's messages."""

    def __init__(
        self, connection: socket.socket, images: StoredImages, timeout: float | None, activity: _Activity
    ) -> None:
        self.connection = connection
        self._images = images
        self._timeout = timeout
        self._activity = activity
        self._header = bytearray(HEADER)
        self._buffer = memoryview(bytearray(MOST_BEHIND))
        self._splicer = Splicer(connection, timeout)

    def serve(self, other: Callable[[Header, memoryview], None]) -> bool:
        """Do what comes, until FINISH or, between two messages, the end of the connection.

        :param other: does what is no block.
        :returns: whether it was FINISH.
        """
        while got := self._wait():
            self._activity.begin()
            try:
                header = self._rest_of_header(got)
                if header.op is Op.FINISH:
                    return True
                self._do(header, other)
            finally:
                self._activity.end()
        return False

    def _do(self, header: Header, other: Callable[[Header, memoryview], None]) -> None:
        if header.op is Op.BLOCK:
            self._images.claim(header.length)
            with self._images.pages(header.number, header.length) as (fd, path):
                self._block(header, fd, path)
        else:
            other(header, self.take(header.behind))
        if header.flags & ANSWER:
            self.send(bytes([DONE]))

    def _wait(self) -> int:
        """Wait for a message; returns how much of its header is there, 0 at the end of the connection."""
        while True:
            try:
                return self.connection.recv_into(self._header)
            except SILENT:
                if not self._activity.was_within(self._timeout):
                    raise silence(self._timeout) from None
            except OSError as error:
                raise broken(error) from None

    def _rest_of_header(self, got: int) -> Header:
        receive_all(self.connection, self._timeout, memoryview(self._header)[got:])
        return Header.decode(self._header)

    def _block(self, header: Header, fd: int, path: str) -> None:
        offset, left = header.offset, header.length
        try:
            if header.coding is Coding.ZERO:
                _make_zeros(fd, offset, left)
                return
            if header.coding is Coding.RAW:
                if self._splicer.works:
                    self._splicer.move(left, fd, path, offset)
                    return
                data = self.take(left)
            else:
                data = compression.decompress(self.take(header.behind), header.length)
            while data:
                written = os.pwrite(fd, data, offset)
                data = data[written:]
                offset += written
        except OSError as error:
            raise_io_error(error, "write", path)

    def take(self, size: int) -> memoryview:
        """Bytes that are to come; good until the next call."""
        receive_all(self.connection, self._timeout, self._buffer[:size])
        return self._buffer[:size]

    def send(self, data: bytes) -> None:
        """Send an answer."""
        _send(self.connection, data)

    def close(self) -> None:
        """Give up what it holds; the connection stays open."""
        self._splicer.close()


def hear_terms(connection: socket.socket, timeout: float | None, *, most: int = MOST_TEXT) -> dict[str, Any]:
    """Tell a client that has made the offer that it may go on, and hear its terms. Blocks.

    :param timeout: seconds for which it may be silent; None for ever.
    :param most: bytes that it may say.
    :raises ConnectionLost: it has gone, or is silent.
    :raises ProtocolError: what it says is not that.
    """
    _send(connection, encode_answer(SPEAKS))
    length = bytearray(LENGTH.size)
    receive_all(connection, timeout, memoryview(length))
    (size,) = LENGTH.unpack(length)
    if size > most:
        raise ProtocolError("the client's terms are longer than there can be")
    text = bytearray(size)
    receive_all(connection, timeout, memoryview(text))
    return decode_terms(bytes(text))


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except SILENT:
        raise ConnectionLost("the client did not take an answer in time") from None
    except OSError as error:
        raise broken(error) from None


def _make_zeros(fd: int, offset: int, length: int) -> None:
    """Have a range of a file be zeros, also if something was written there before."""
    length = min(length, os.fstat(fd).st_size - offset)
    if length <= 0:
        return
    try:
        punch_hole(fd, offset, length)
    except OSError:
        zeros = memoryview(bytes(MOST_BEHIND))
        while length:
            written = os.pwrite(fd, zeros[: min(length, MOST_BEHIND)], offset)
            offset += written
            length -= written


def _is_over(connection: socket.socket) -> bool:
    """Whether the client has closed a connection, or it was hung up here."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def tell(connection: socket.socket, error: BaseException) -> None:
    """Tell the client why its session ends, if it still listens. Never fails."""
    if not isinstance(error, ConnectionLost):
        text = (str(error) if isinstance(error, IncdumpError) else "internal error").encode()[: MOST_TEXT - 1]
        farewell(connection, bytes([FAILED]) + LENGTH.pack(len(text)) + text)
