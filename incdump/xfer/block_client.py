"""The client of incdump's own protocol (`incdump.xfer.blocks`).

Pages are copied to the kernel, a whole chunk in one call. To lend it the buffer's own pages instead (sendfile(2) from a
memory file) spares that copy, but each page then arrives as a piece of its own, and the server takes longer for these
than the copy takes. Pages of zeros are not sent. Compression is used where it turns out to be quicker (`CodingChoice`).

Calls block and release the GIL; `break_off`, from another thread, ends all that are under way.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from incdump.errors import ConnectionLost, ProtocolError, XferError
from incdump.model.runs import PAGE_SHIFT, PAGE_SIZE
from incdump.xfer import compression
from incdump.xfer.blocks import (
    ANSWER,
    DONE,
    FAILED,
    JOIN,
    LAST,
    LENGTH,
    MOST_BEHIND,
    MOST_TEXT,
    PACKED,
    VERSION,
    Coding,
    Header,
    Op,
    decode_terms,
    encode_terms,
)
from incdump.xfer.compression import CodingChoice
from incdump.xfer.sockets import SILENT, broken_server, hang_up, patiently, send_all, shut_down

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from incdump.model.options import CompressionName
    from incdump.model.runs import Runs

ON_THEIR_WAY = 4
"""Chunks that a channel may have sent before the first is answered. With 1 MiB each, 100 MiB/s and more up to 40 ms of
round trip."""
ZEROS = 8
"""Pages of zeros in a row for which a message of their own is worth while."""
_PARTS = 512
"""Of one call: fewer than the kernel takes (IOV_MAX)."""
REASON_SECONDS = 1.0
"""For which a channel that broke waits for the server's reason, on the first one."""
_WORDS = PAGE_SIZE // 8


class Channel:
    """One connection; used by one thread at a time."""

    def __init__(self, connection: socket.socket, server: str, timeout: float, choice: CodingChoice) -> None:
        self.connection = connection
        self.choice = choice
        self._server = server
        self._timeout = timeout
        self._unanswered = 0

    def send(self, number: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Send pages. Blocks while as many chunks as there may be are on their way.

        :param number: of the pages image.
        :param offset: where they go there, bytes.
        :param data: the pages, shape (bytes,); one at least, at most `MOST_BEHIND`.
        :raises ConnectionLost: the server has gone, takes nothing, or refuses.
        """
        began = time.perf_counter()
        if self._unanswered == ON_THEIR_WAY:
            self._hear()
        self._unanswered += 1
        coding = self.choice.coding
        parts: list[memoryview] = []
        sent = 0
        for start, end, is_zero in zero_runs(data):
            step = PACKED if coding is Coding.LZ4 and not is_zero else end - start
            for at in range(start, end, step):
                piece = data[at : min(at + step, end)].data
                flags = ANSWER if at + len(piece) == len(data) else 0
                if is_zero:
                    behind, used = memoryview(b""), Coding.ZERO
                else:
                    behind, used = _packed(piece, coding)
                header = Header(Op.BLOCK, used | flags, len(behind), number, offset + at, len(piece))
                parts += (memoryview(header.encode()), behind)
                sent += len(behind)
                if len(parts) >= _PARTS or used is Coding.LZ4:
                    self._send(parts)
                    parts = []
        self._send(parts)
        self.choice.note(len(data), sent, time.perf_counter() - began)

    def send_all(self, data: bytes) -> None:
        """Send bytes.

        :raises ConnectionLost: the server has gone, or takes nothing.
        """
        self._send([memoryview(data)])

    def _send(self, parts: list[memoryview]) -> None:
        send_all(self.connection, parts, self._server, self._timeout)

    def flush(self) -> None:
        """Wait until the server has all that was sent.

        :raises ConnectionLost: it does not say so.
        """
        while self._unanswered:
            self._hear()

    def _hear(self) -> None:
        """Take answers to chunks: at least one."""
        answers = self.receive(self._unanswered)
        for count, answer in enumerate(answers, 1):
            if answer == FAILED:
                raise self._refused(answers[count:])
            if answer != DONE:
                raise self._nonsense()
            self._unanswered -= 1

    def _nonsense(self) -> ProtocolError:
        return ProtocolError(f"the page server at {self._server} answers what cannot be")

    def _refused(self, begun: bytes = b"") -> XferError:
        """The error that the server tells of.

        :param begun: what was received of it already, after its first byte.
        """
        begun = self.receive_all(LENGTH.size, begun)
        (size,) = LENGTH.unpack_from(begun)
        text = self.receive_all(LENGTH.size + min(size, MOST_TEXT), begun)[LENGTH.size :]
        return XferError(f"the page server at {self._server} refuses: {text.decode(errors='replace')}")

    def receive_answer(self) -> None:
        """Wait for the answer to a message.

        :raises XferError: the server refuses.
        """
        answer = self.receive(1)[0]
        if answer == FAILED:
            raise self._refused()
        if answer != DONE:
            raise self._nonsense()

    def receive_all(self, size: int, data: bytes = b"") -> bytes:
        """So many bytes, those included that were received already."""
        while len(data) < size:
            data += self.receive(size - len(data))
        return data

    def receive(self, most: int) -> bytes:
        """What comes.

        :raises ConnectionLost: the server has gone, or is silent.
        """
        try:
            data = patiently(self.connection, self.connection.recv, most)
        except SILENT:
            raise ConnectionLost(f"the page server at {self._server} did not answer for {self._timeout:g} s") from None
        except OSError as error:
            raise broken_server(self._server, error) from None
        if not data:
            raise ConnectionLost(f"the page server at {self._server} hung up: see its log")
        return data

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class BlockClient:
    """A session with a server that has taken the offer.

    :ivar server: where it is, for people.
    :ivar channels: how many there are: more writers do not help.
    :ivar stands_on_parent: whether the server's parent images are those of the parent dump.
    """

    def __init__(
        self,
        connection: socket.socket,
        server: str,
        open_another: Callable[[], socket.socket],
        *,
        channels: int,
        parent: str | None,
        compress: CompressionName,
        timeout: float,
        more: Mapping[str, str | int] | None = None,
    ) -> None:
        """Agree on the terms. Blocks.

        :param connection: on which the server has taken the offer; this session's to close.
        :param open_another: makes another connection to it.
        :param channels: connections that are wanted.
        :param parent: the generation of the parent dump.
        :param timeout: seconds for which the server may take nothing, or not answer.
        :param more: further terms: ``migration``, the token of the migration that this is part of; ``owner``, the
            number of the user whose the images are to be.
        :raises XferError: the server has gone, or speaks another version.
        """
        self.server = server
        self._condition = threading.Condition()
        self._channels = [Channel(connection, server, timeout, CodingChoice("off", ON_THEIR_WAY, agreed=False))]
        try:
            terms = self._agree(channels, parent, compress, more or {})
            self.stands_on_parent = terms.get("parent") is True
            agreed = compression.LZ4 in terms.get("compression", ())
            if compress == "lz4" and not agreed:
                raise XferError("lz4 is not installed at both ends: in incdump's checkout there, pip install '.[lz4]'")
            token = bytes.fromhex(str(terms.get("token", "")))
            for _ in range(min(int(terms["channels"]), channels) - 1):
                other = Channel(open_another(), server, timeout, CodingChoice(compress, ON_THEIR_WAY, agreed=agreed))
                self._channels.append(other)
                other.send_all(JOIN + token)
            self._channels[0].choice = CodingChoice(compress, ON_THEIR_WAY, agreed=agreed)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            self.close()
            raise ProtocolError(f"the page server at {server} offers terms that make no sense") from error
        except BaseException:
            self.close()
            raise
        self.channels = len(self._channels)
        self._idle = list(self._channels)

    def _agree(
        self, channels: int, parent: str | None, compress: CompressionName, more: Mapping[str, str | int]
    ) -> dict[str, Any]:
        codings = [] if compress == "off" else list(compression.available())
        offer = {"version": VERSION, "channels": channels, "parent": parent, "compression": codings, **more}
        first = self._channels[0]
        first.send_all(encode_terms(offer))
        (size,) = LENGTH.unpack(first.receive_all(LENGTH.size))
        if size > MOST_TEXT:
            raise ValueError(size)
        return decode_terms(first.receive_all(size))

    @contextmanager
    def channel(self, which: Channel | None = None) -> Iterator[Channel]:
        """A channel that nobody else uses; waits for it.

        :param which: this one; None: any.
        :raises XferError: with the server's own reason, where it gave one.
        """
        with self._condition:
            while not self._idle or (which is not None and which not in self._idle):
                self._condition.wait()
            channel = which or self._idle[-1]
            self._idle.remove(channel)
        try:
            yield channel
        except ConnectionLost as error:
            raise self._reason() or error from None
        finally:
            with self._condition:
                self._idle.append(channel)
                self._condition.notify_all()

    def _reason(self) -> XferError | None:
        """What the server said on the first channel before it hung up, as far as that can be seen."""
        connection = self._channels[0].connection
        deadline = time.monotonic() + REASON_SECONDS
        with suppress(OSError, ValueError):
            while data := connection.recv(MOST_TEXT + LENGTH.size + MOST_BEHIND, socket.MSG_PEEK):
                reason = data.lstrip(bytes([DONE]))  # answers that nobody has taken yet come before it
                if reason[:1] == bytes([FAILED]):
                    text = reason[1 + LENGTH.size :].decode(errors="replace")
                    return XferError(f"the page server at {self.server} refuses: {text}")
                if reason or time.monotonic() > deadline:
                    break
                time.sleep(REASON_SECONDS / 100)
        return None

    def lay_out(self, number: int, size: int) -> None:
        """Tell how long a pages image is going to be, about.

        :param size: bytes.
        """
        self._say(Header(Op.LAYOUT, 0, 0, number, 0, size))

    def complete(self, number: int, size: int, gaps: Runs) -> None:
        """A pages image was sent whole.

        :param size: bytes, gaps included.
        :param gaps: byte ranges that are to be taken out, a run set.
        :raises XferError: the server does not have it, or refuses.
        """
        self.flush()
        at_once = MOST_BEHIND // 16
        while len(gaps) > at_once:  # from the end: what lies before stays where it is
            last, gaps = gaps[-at_once:], gaps[:-at_once]
            self._say(Header(Op.SIZE, 0, last.nbytes, number, 0, size), last.tobytes())
            size -= int((last[:, 1] - last[:, 0]).sum())
        self._say(Header(Op.SIZE, LAST, gaps.nbytes, number, 0, size), np.ascontiguousarray(gaps, "<u8").tobytes())

    def drop(self, number: int) -> None:
        """A pages image is not needed after all."""
        self.flush()
        self._say(Header(Op.DROP, 0, 0, number))

    def send_file(self, name: str, file: BinaryIO) -> None:
        """Send any other image.

        :param file: what is in it. It may be large, if CRIU wrote it: a deleted file, a tmpfs.
        :raises XferError: the server refuses.
        :raises OSError: it cannot be read.
        """
        encoded = name.encode()
        part = file.read(MOST_BEHIND // 2)
        while True:
            rest = file.read(MOST_BEHIND // 2)
            flags = 0 if rest else LAST
            self._say(Header(Op.FILE, flags, len(encoded) + len(part), len(encoded)), encoded + part)
            if not rest:
                return
            part = rest

    def end(self) -> None:
        """Say that this was all, and wait until the server has it.

        :raises XferError: it does not say so.
        """
        self.flush()
        for other in self._channels[1:]:
            with suppress(OSError):
                shut_down(other.connection, socket.SHUT_WR)
        with self.channel(self._channels[0]) as first:
            first.send_all(Header(Op.FINISH).encode())
            first.receive_answer()

    def _say(self, header: Header, behind: bytes = b"") -> None:
        with self.channel(self._channels[0]) as first:
            first.send_all(header.encode() + behind)

    def flush(self) -> None:
        """Wait until the server has every block. No writer may be at work.

        :raises XferError: it does not say so.
        """
        for each in self._channels:
            with self.channel(each) as channel:
                channel.flush()

    def break_off(self) -> None:
        """End all connections, and whatever waits for them. Never blocks, never fails."""
        for channel in self._channels:
            hang_up(channel.connection)

    def close(self) -> None:
        """Close all connections; a server that was not told the end drops what it has."""
        for channel in self._channels:
            channel.close()


def _packed(data: memoryview, coding: Coding) -> tuple[memoryview, Coding]:
    """What goes over the network for some pages, and how it is coded: as they are, if they do not get smaller."""
    if coding is Coding.LZ4:
        packed = compression.compress(data)
        if len(packed) < len(data):
            return memoryview(packed), Coding.LZ4
    return data, Coding.RAW


def zero_runs(data: NDArray[np.uint8]) -> list[tuple[int, int, bool]]:
    """Cut pages into what is to be sent and what need not be.

    :param data: pages, shape (pages * 4096,).
    :returns: start and end, bytes, and whether all of it is zeros: at least `ZEROS` pages in a row.
    """
    words = data.view(np.uint64).reshape(-1, _WORDS)
    maybe = np.flatnonzero(words[:, 0] == 0)
    if len(maybe) < ZEROS:
        return [(0, len(data), False)]
    zero = np.zeros(len(words) + 2, bool)
    zero[maybe + 1] = ~words[maybe].any(axis=1)
    bounds = np.flatnonzero(zero[1:] != zero[:-1]).reshape(-1, 2)
    runs = bounds[bounds[:, 1] - bounds[:, 0] >= ZEROS]
    pieces: list[tuple[int, int, bool]] = []
    done = 0
    for start, end in (runs << PAGE_SHIFT).tolist():
        if done < start:
            pieces.append((done, start, False))
        pieces.append((start, end, True))
        done = end
    if done < len(data):
        pieces.append((done, len(data), False))
    return pieces
