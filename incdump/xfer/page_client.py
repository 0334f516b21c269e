"""The client of a page server, CRIU's or incdump's.

A server says nothing of the layout of headers that it expects (`incdump.xfer.wire`). So the first message, which every
server answers, is sent in the short layout; when no answer comes, the eight bytes follow that make it a long one.

Runs are sent as they lie in a buffer, many in one system call. Calls block and release the GIL; `break_off`, from
another thread, ends the one that is under way.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from incdump.errors import ConnectionLost, XferError
from incdump.model.runs import PAGE_SHIFT, PE_PRESENT
from incdump.xfer.blocks import OFFER_MESSAGE, SPEAKS
from incdump.xfer.sockets import SILENT, broken_server, connect, hang_up, limit_calls, patiently, send_all
from incdump.xfer.wire import ANSWER, Command, Layout, Message, encode, encode_runs, late_end

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from incdump.model.options import TlsFiles
    from incdump.model.runs import Entries
    from incdump.xfer.wire import Image

_IOV_MAX = 1024
_LAYOUT_PATIENCE = 1.0
"""Seconds, beside 20 round trips, after which a server that has not answered is taken for one of the long layout."""


class PageClient:
    """A connection to a page server.

    Messages may come from several threads, which then take turns.

    :ivar server: where it is, for people.
    """

    def __init__(self, address: str, port: int, *, timeout: float, tls: TlsFiles | None = None) -> None:
        """Connect. Blocks.

        :param timeout: seconds for which the server may take nothing, or not answer.
        :param tls: for an encrypted connection.
        :raises XferError: there is no server, or it is not the one that it should be.
        """
        self.server = f"{address} port {port}"
        self._timeout = timeout
        self._layout: Layout | None = None
        self._lock = threading.Lock()
        began = time.monotonic()
        self._socket = connect(address, port, timeout, tls)
        self._patience = min(timeout, _LAYOUT_PATIENCE + 20 * (time.monotonic() - began))

    def speaks_blocks(self) -> bool:
        """Whether the server speaks `incdump.xfer.blocks` (incdump's own), and goes on in it. To be asked first.

        :raises ConnectionLost: the server has gone, or is silent.
        """
        with self._lock:
            return self._ask(OFFER_MESSAGE, ANSWER.size) == SPEAKS

    def detach(self) -> socket.socket:
        """The connection, which is the caller's from now on."""
        return self._socket

    def ask(self, image: Image) -> bool:
        """Whether the server has parent images of an image.

        :raises ConnectionLost: the server has gone, or is silent.
        """
        with self._lock:
            return bool(self._ask(Message(Command.PARENT, 0, 0, 0, image.dst_id), ANSWER.size))

    def open(self, image: Image) -> bool:
        """Begin an image: what is sent next is of it.

        :returns: whether the server has parent images of it.
        :raises ConnectionLost: the server has gone, or is silent.
        """
        with self._lock:
            return bool(self._ask(Message(Command.OPEN2, 0, 0, 0, image.dst_id), 1))

    def send(self, image: Image, entries: Entries, places: NDArray[np.int64], buffer: NDArray[np.uint8]) -> None:
        """Send runs of the image that was opened last.

        :param entries: shape (n, 3), ascending.
        :param places: where the bytes of each begin in the buffer; of a hole it means nothing. Shape (n,).
        :raises ConnectionLost: the server has gone, takes nothing, or refuses what was sent.
        """
        assert self._layout is not None
        if not len(entries):
            return
        headers = encode_runs(entries, image.dst_id, self._layout)
        with self._lock:
            parts = _parts(headers, entries, places, buffer)
            while batch := list(islice(parts, _IOV_MAX)):
                self._send(batch)

    def end(self) -> None:
        """Say that this was all, and wait until the server has it.

        :raises ConnectionLost: it does not say so.
        """
        with self._lock:
            if self._ask(Message(Command.CLOSE, 0, 0, 0, 0), ANSWER.size):
                raise XferError(f"the page server at {self.server} failed to keep the pages: see its log")

    def break_off(self) -> None:
        """End the connection, and whatever waits for it. Never blocks, never fails."""
        hang_up(self._socket)

    def close(self) -> None:
        """Close the connection; a server that was not told the end drops what it has."""
        self._socket.close()

    # -- bytes ----------------------------------------------------------------------------------------------------

    def _ask(self, message: Message, size: int) -> int:
        if self._layout is None and message.command is not Command.CLOSE:
            return self._ask_first(message, size)
        self._send([memoryview(encode(message, self._layout or Layout.SHORT))])  # of a first CLOSE both would do
        return int.from_bytes(self._receive(size), "little", signed=True)

    def _ask_first(self, message: Message, size: int) -> int:
        self._send([memoryview(encode(message, Layout.SHORT))])
        limit_calls(self._socket, self._patience)
        try:
            answer = self._receive(size, self._socket.recv)
            self._layout = Layout.SHORT
        except _Silence:
            self._send([memoryview(late_end(message))])
            limit_calls(self._socket, self._timeout)
            answer = self._receive(size)
            self._layout = Layout.LONG
        else:
            limit_calls(self._socket, self._timeout)
        return int.from_bytes(answer, "little", signed=True)

    def _receive(self, size: int, receive: Callable[[int], bytes] | None = None) -> bytes:
        receive = receive or partial(patiently, self._socket, self._socket.recv)
        data = b""
        while len(data) < size:
            try:
                more = receive(size - len(data))
            except SILENT:
                raise _Silence(f"the page server at {self.server} did not answer for {self._timeout:g} s") from None
            except OSError as error:
                raise broken_server(self.server, error) from None
            if not more:
                raise ConnectionLost(f"the page server at {self.server} hung up: see its log")
            data += more
        return data

    def _send(self, parts: list[memoryview]) -> None:
        send_all(self._socket, parts, self.server, self._timeout)


class _Silence(ConnectionLost):
    """The server does not answer."""


def _parts(
    headers: NDArray[np.uint8], entries: Entries, places: NDArray[np.int64], buffer: NDArray[np.uint8]
) -> Iterator[memoryview]:
    """Headers, each with the bytes behind it; those of holes that follow one another in one piece."""
    data, heads = buffer.data, headers.data.cast("B")
    size = headers.shape[1]
    present = np.flatnonzero(entries[:, 2] & np.uint64(PE_PRESENT))
    ends = places + (entries[:, 1] << np.uint64(PAGE_SHIFT)).astype(np.int64)
    begin = 0
    for row, start, end in zip(present.tolist(), places[present].tolist(), ends[present].tolist(), strict=True):
        yield heads[begin * size : (row + 1) * size]
        yield data[start:end]
        begin = row + 1
    if begin < len(entries):
        yield heads[begin * size :]
