"""The client of incdump's own protocol (`incdump.xfer.blocks`).

Each channel has some buffers in a memory file. Pages are read into one of them and leave it by sendfile(2), which lends
the buffer's own pages to the kernel instead of copying them; it is used again when the server has answered. Pages of
zeros are not sent. Compression is used where it turns out to be quicker (`CodingChoice`).

Calls block and release the GIL; `break_off`, from another thread, ends all that are under way.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
from collections import deque
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
from incdump.xfer.sockets import SILENT, hang_up, is_plain, patiently, shut_down

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from incdump.model.options import CompressionName
    from incdump.model.runs import Runs

BUFFERS = 4
"""Of each channel: as many may be on their way. With 1 MiB each, 100 MiB/s and more up to 40 ms of round trip."""
ZEROS = 8
"""Pages of zeros in a row for which a message of their own is worth while."""
REASON_SECONDS = 1.0
"""For which a channel that broke waits for the server's reason, on the first one."""
_WORDS = PAGE_SIZE // 8


class _Buffer:
    """Memory that can be lent to the kernel."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("incdump", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, MOST_BEHIND)
        self._map = mmap.mmap(self.fd, MOST_BEHIND, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.array = np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        os.close(self.fd)


class Channel:
    """One connection; used by one thread at a time."""

    def __init__(self, connection: socket.socket, server: str, timeout: float, choice: CodingChoice) -> None:
        self.connection = connection
        self.choice = choice
        self._server = server
        self._timeout = timeout
        self._lends = is_plain(connection)
        self._free = deque(_Buffer() for _ in range(BUFFERS))
        self._out: deque[_Buffer] = deque()
        self._wanted_at = 0.0
        self._current: _Buffer | None = None

    def buffer(self) -> NDArray[np.uint8]:
        """A buffer for a chunk, shape (1 MiB,); the same one until `send`. Blocks while all are on their way.

        :raises ConnectionLost: the server has gone, or is silent.
        """
        self._wanted_at = time.perf_counter()
        if self._current is None:
            if not self._free:
                self._hear(1)
            self._current = self._free.popleft()
        return self._current.array

    def send(self, number: int, offset: int, nbytes: int) -> None:
        """Send what was put into the buffer.

        :param number: of the pages image.
        :param offset: where it goes there, bytes.
        :raises ConnectionLost: the server has gone, takes nothing, or refuses.
        """
        buffer = self._current
        assert buffer is not None
        self._current = None
        self._out.append(buffer)  # also when it does not get through: `close` has to know it
        pieces = zero_runs(buffer.array[:nbytes])
        sent = 0
        coding = self.choice.coding
        for start, end, is_zero in pieces:
            flags = ANSWER if end == nbytes else 0
            at = offset + start
            if is_zero:
                self._send_header(Header(Op.BLOCK, Coding.ZERO | flags, 0, number, at, end - start), more=not flags)
            elif coding is Coding.LZ4:
                sent += self._send_packed(buffer, number, at, start, end, flags)
            else:
                self._send_raw(buffer, number, at, start, end, flags)
                sent += end - start
        self.choice.note(nbytes, sent, time.perf_counter() - self._wanted_at)

    def _send_packed(self, buffer: _Buffer, number: int, at: int, start: int, end: int, flags: int) -> int:
        sent = 0
        for begin in range(start, end, PACKED):
            stop = min(begin + PACKED, end)
            flag = flags if stop == end else 0
            packed = compression.compress(buffer.array[begin:stop].data)
            place = at + begin - start
            if len(packed) < stop - begin:
                header = Header(Op.BLOCK, Coding.LZ4 | flag, len(packed), number, place, stop - begin)
                self.send_all(header.encode() + packed)
                sent += len(packed)
            else:
                self._send_raw(buffer, number, place, begin, stop, flag)
                sent += stop - begin
        return sent

    def _send_raw(self, buffer: _Buffer, number: int, at: int, start: int, end: int, flags: int) -> None:
        self._send_header(Header(Op.BLOCK, Coding.RAW | flags, end - start, number, at, end - start), more=True)
        if not self._lends:
            self.send_all(buffer.array[start:end].data)
            return
        try:
            while start < end:
                start += patiently(
                    self.connection, os.sendfile, self.connection.fileno(), buffer.fd, start, end - start
                )
        except SILENT:
            raise self._nothing_taken() from None
        except OSError as error:
            raise self._broken(error) from None

    def _send_header(self, header: Header, *, more: bool) -> None:
        self.send_all(header.encode(), socket.MSG_MORE if more and self._lends else 0)

    def send_all(self, data: bytes | memoryview, flags: int = 0) -> None:
        """Send bytes.

        :raises ConnectionLost: the server has gone, or takes nothing.
        """
        left = memoryview(data)
        try:
            while left:
                left = left[patiently(self.connection, self.connection.send, left, flags) :]
        except SILENT:
            raise self._nothing_taken() from None
        except OSError as error:
            raise self._broken(error) from None

    def flush(self) -> None:
        """Wait until the server has all that was sent.

        :raises ConnectionLost: it does not say so.
        """
        while self._out:
            self._hear(len(self._out))

    def _hear(self, most: int) -> None:
        """Take answers: at least one."""
        for answer in self.receive(most):
            if answer == FAILED:
                raise self._refused()
            if answer != DONE or not self._out:
                raise self._nonsense()
            self._free.append(self._out.popleft())

    def _nonsense(self) -> ProtocolError:
        return ProtocolError(f"the page server at {self._server} answers what cannot be")

    def _refused(self) -> XferError:
        (size,) = LENGTH.unpack(self.receive_all(LENGTH.size))
        text = self.receive_all(min(size, MOST_TEXT)).decode(errors="replace")
        return XferError(f"the page server at {self._server} refuses: {text}")

    def receive_answer(self) -> None:
        """Wait for the answer to a message.

        :raises XferError: the server refuses.
        """
        answer = self.receive(1)[0]
        if answer == FAILED:
            raise self._refused()
        if answer != DONE:
            raise self._nonsense()

    def receive_all(self, size: int) -> bytes:
        """So many bytes."""
        data = b""
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
            raise self._broken(error) from None
        if not data:
            raise ConnectionLost(f"the page server at {self._server} hung up: see its log")
        return data

    def _nothing_taken(self) -> ConnectionLost:
        return ConnectionLost(f"the page server at {self._server} took nothing for {self._timeout:g} s")

    def _broken(self, error: OSError) -> ConnectionLost:
        text = f"the connection to the page server at {self._server} broke ({error.strerror}): see its log"
        return ConnectionLost(text, errno=error.errno)

    def close(self) -> None:
        """Close the connection and give up the buffers."""
        self.connection.close()
        for buffer in (*self._free, *self._out, *([self._current] if self._current else [])):
            buffer.close()
        self._free.clear()
        self._out.clear()
        self._current = None


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
        migration: str | None = None,
    ) -> None:
        """Agree on the terms. Blocks.

        :param connection: on which the server has taken the offer; this session's to close.
        :param open_another: makes another connection to it.
        :param channels: connections that are wanted.
        :param parent: the generation of the parent dump.
        :param timeout: seconds for which the server may take nothing, or not answer.
        :param migration: the token of the migration that this is part of.
        :raises XferError: the server has gone, or speaks another version.
        """
        self.server = server
        self._condition = threading.Condition()
        self._channels = [Channel(connection, server, timeout, CodingChoice("off", BUFFERS, agreed=False))]
        try:
            terms = self._agree(channels, parent, compress, migration)
            self.stands_on_parent = terms.get("parent") is True
            agreed = compression.LZ4 in terms.get("compression", ())
            if compress == "lz4" and not agreed:
                raise XferError("compression by lz4 is not installed at both ends: pip install 'incdump[lz4]' there")
            token = bytes.fromhex(str(terms.get("token", "")))
            for _ in range(min(int(terms["channels"]), channels) - 1):
                other = Channel(open_another(), server, timeout, CodingChoice(compress, BUFFERS, agreed=agreed))
                self._channels.append(other)
                other.send_all(JOIN + token)
            self._channels[0].choice = CodingChoice(compress, BUFFERS, agreed=agreed)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            self.close()
            raise ProtocolError(f"the page server at {server} offers terms that make no sense") from error
        except BaseException:
            self.close()
            raise
        self.channels = len(self._channels)
        self._idle = list(self._channels)

    def _agree(
        self, channels: int, parent: str | None, compress: CompressionName, migration: str | None
    ) -> dict[str, Any]:
        codings = [] if compress == "off" else list(compression.available())
        offer = {"version": VERSION, "channels": channels, "parent": parent, "compression": codings}
        if migration is not None:
            offer["migration"] = migration
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
