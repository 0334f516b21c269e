"""A session of incdump's own protocol, against a client that says whatever a network may say."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import resource
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import lz4.block
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import incdump
from incdump.engine.page_server import PageServer, PageServerOptions, SessionReport
from incdump.errors import BadImage, ConnectionLost, ImagesError, IncdumpError, ProtocolError, XferError
from incdump.images.images_dir import ImagesDir
from incdump.images.inventory import encode_pre_dump_inventory
from incdump.images.new_dir import NewImagesDir
from incdump.images.pagemap import encode_pagemap
from incdump.model.runs import empty_runs
from incdump.xfer.block_client import BlockClient
from incdump.xfer.block_server import BlockSession, Joins
from incdump.xfer.blocks import JOIN, OFFER, Header, Op
from incdump.xfer.received import MOST_RUNS, Received
from incdump.xfer.sockets import limit_calls
from incdump.xfer.stored import StoredImages
from tests.page_client import IN_PARENT, PAGE, PRESENT, damage, noise
from tests.unit.images_kit import BASE, PID, write_level

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

BLOCK, LAYOUT, SIZE, DROP, FILE, FINISH = 1, 2, 3, 4, 5, 6
RAW, ZERO, LZ4 = 0, 1, 2
ANSWER, LAST = 0x100, 0x200
DONE, FAILED = b"\x06", b"\x15"
MIB = 1 << 20
INVENTORY = encode_pre_dump_inventory(1_000_000)


def message(
    op: int,
    flags: int = 0,
    behind: bytes = b"",
    *,
    size: int | None = None,
    number: int = 0,
    offset: int = 0,
    length: int = 0,
) -> bytes:
    """A message's bytes, `size` being what it says of the bytes behind it."""
    return struct.pack("<HHIQQQ", op, flags, len(behind) if size is None else size, number, offset, length) + behind


def raw(number: int, page: int, data: bytes, flags: int = 0) -> bytes:
    return message(BLOCK, RAW | flags, data, number=number, offset=page * PAGE, length=len(data))


def zeros(number: int, page: int, pages: int, flags: int = 0) -> bytes:
    return message(BLOCK, ZERO | flags, number=number, offset=page * PAGE, length=pages * PAGE)


def packed(number: int, page: int, data: bytes, flags: int = 0, *, length: int | None = None) -> bytes:
    behind = lz4.block.compress(data, store_size=False)
    size = len(data) if length is None else length
    return message(BLOCK, LZ4 | flags, behind, number=number, offset=page * PAGE, length=size)


def size(number: int, pages: int, *gaps: tuple[int, int], flags: int = LAST) -> bytes:
    behind = b"".join(struct.pack("<QQ", start * PAGE, end * PAGE) for start, end in gaps)
    return message(SIZE, flags, behind, number=number, length=pages * PAGE)


def file(name: str, data: bytes, flags: int = LAST) -> bytes:
    return message(FILE, flags, name.encode() + data, number=len(name))


def pagemap(pages_id: int, *rows: tuple[int, int, int], name: str = f"pagemap-{PID}.img") -> bytes:
    """A pagemap, from (page number, pages, flags)."""
    table = [(BASE + page * PAGE, count, flags) for page, count, flags in rows]
    return file(name, encode_pagemap(pages_id, np.array(table, np.uint64).reshape(-1, 3)))


def text(pages: int) -> bytes:
    """Pages that can be compressed, and are like no others."""
    return b"".join(os.urandom(64) * (PAGE // 64) for _ in range(pages))


END = message(FINISH)


class Server:
    """A session in a thread of its own.

    :ivar path: its images dir.
    :ivar sock: the client's end of the first connection.
    """

    def __init__(
        self,
        path: Path,
        parent: str | None = None,
        *,
        max_bytes: int | None = None,
        timeout: float | None = 20,
        tcp: bool = False,
    ) -> None:
        self.path = path
        self._parent, self._max_bytes, self._timeout, self._tcp = parent, max_bytes, timeout, tcp
        self._joins = Joins()
        self._threads: list[threading.Thread] = []
        self._outcome: Received | BaseException | None = None
        self.sock, theirs = self._pair()
        self._start(self._run, theirs)

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        if self._tcp:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                ours = socket.create_connection(listener.getsockname())
                theirs, _ = listener.accept()
        else:
            ours, theirs = socket.socketpair()
        ours.settimeout(30)
        limit_calls(theirs, self._timeout)
        return ours, theirs

    def _start(self, function: Callable[[socket.socket], None], connection: socket.socket) -> None:
        self._threads.append(threading.Thread(target=function, args=(connection,)))
        self._threads[-1].start()

    def _run(self, connection: socket.socket) -> None:
        stored = None
        try:
            with connection:
                images = NewImagesDir.create(self.path, self._parent)
                above = None if images.parent is None else ImagesDir(images.parent)
                stored = StoredImages(images, above, max_bytes=self._max_bytes)
                self._outcome = BlockSession(connection, stored, self._joins, timeout=self._timeout).run()
        except BaseException as error:
            self._outcome = error
            if stored is not None:
                stored.discard()

    def connect(self) -> socket.socket:
        """Another connection, on which JOIN and the token are to be sent."""
        ours, theirs = self._pair()
        self._start(self._welcome, theirs)
        return ours

    def _welcome(self, connection: socket.socket) -> None:
        with suppress(OSError):
            if connection.recv(24, socket.MSG_WAITALL) == JOIN and self._joins.add(connection.recv(16), connection):
                return
        connection.close()

    def outcome(self) -> Received:
        """What has come; raises what the session raised."""
        self.sock.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class Client:
    """A client that packs its own messages.

    :ivar terms: the server's.
    :ivar channels: its connections.
    """

    def __init__(self, server: Server, *, channels: object = 1, join: int | None = None, **terms: Any) -> None:
        self.channels = [server.sock]
        try:
            self._agree(server, channels, join, terms)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _agree(self, server: Server, channels: object, join: int | None, terms: dict[str, Any]) -> None:
        assert self.hear(4) == struct.pack("<i", 0x69646D70)
        offer = {"version": 1, "channels": channels, "compression": ["lz4"], "parent": None, **terms}
        self.send(_terms(offer))
        (length,) = struct.unpack("<I", self.hear(4))
        self.terms: dict[str, Any] = json.loads(self.hear(length))
        for _ in range(self.terms["channels"] - 1 if join is None else join):
            self.channels.append(server.connect())
            self.send(JOIN + bytes.fromhex(self.terms["token"]), channel=-1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self.channels:
            channel.close()

    def send(self, *messages: bytes, channel: int = 0) -> None:
        self.channels[channel].sendall(b"".join(messages))

    def hear(self, length: int, channel: int = 0) -> bytes:
        """An answer; less than that of it if the server has closed."""
        data = b""
        with suppress(ConnectionError):
            while len(data) < length and (more := self.channels[channel].recv(length - len(data))):
                data += more
        return data

    def is_done(self, *messages: bytes, channel: int = 0) -> bool:
        """Send messages, the last of which is to be answered; whether it was done."""
        self.send(*messages, channel=channel)
        return self.hear(1, channel) == DONE

    def end(self, *messages: bytes) -> bytes:
        """Send what is left to be sent; returns the answer."""
        for channel in self.channels[1:]:
            channel.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            self.send(*messages, END)
        return self.hear(1)

    def reason(self) -> str:
        """Why the server ends the session."""
        answer = self.hear(1 << 20).lstrip(DONE)
        assert answer[:1] == FAILED
        assert struct.unpack("<I", answer[1:5]) == (len(answer) - 5,)
        return answer[5:].decode()


def everything(connection: socket.socket) -> bytes:
    """What comes until the other end has closed."""
    data = b""
    while more := connection.recv(MIB):
        data += more
    return data


def _terms(terms: object) -> bytes:
    encoded = json.dumps(terms).encode()
    return struct.pack("<I", len(encoded)) + encoded


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Descriptors and threads are what they were before the test."""
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # anyio's end by themselves, soon after their loop
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


@contextmanager
def refused(
    path: Path, match: str, kind: type[IncdumpError] = ProtocolError, *, channels: int = 1, **options: Any
) -> Iterator[Client]:
    """A session that is to fail, to say why, and to leave nothing."""
    server = Server(path, **options)
    with Client(server, channels=channels) as client:
        with suppress(ConnectionError):  # the server may close while the client still speaks
            yield client
        reason = client.reason()
        with pytest.raises(kind, match=match) as error:
            server.outcome()
    assert reason == str(error.value)
    assert not path.exists()


def store(path: Path, *messages: bytes, parent: str | None = None) -> Received:
    """A session that is to succeed."""
    server = Server(path, parent)
    with Client(server) as client:
        assert client.end(*messages) == DONE
        return server.outcome()


def pages(path: Path, number: int = 1) -> bytes:
    return (path / f"pages-{number}.img").read_bytes()


# -- bytes --------------------------------------------------------------------------------------------------------


def test_headers_are_laid_out_as_they_always_were() -> None:
    golden = bytes.fromhex("0100020300001000070000000000000000500000000000000000200000000000")
    header = Header(Op.BLOCK, 0x302, 1 << 20, 7, 0x5000, 0x200000)
    assert header.encode() == golden
    assert Header.decode(Header(Op.SIZE, LAST, 32, 7, 0, 0x5000).encode()) == (3, 0x200, 32, 7, 0, 0x5000)


def test_the_offer_and_join_are_questions_that_crius_server_answers_with_no() -> None:
    assert OFFER.hex() == "05000000" + "00000000" + "00" * 8 + "01706d6469000000"
    assert JOIN.hex() == "05000000" + "00000000" + "00" * 8 + "01716d6469000000"


# -- what is to work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tcp", [False, True])
def test_pages_are_where_the_client_said_however_they_came(tmp_path: Path, tcp: bool) -> None:
    one, two, three, shared = noise(256), text(64), noise(3), text(5)
    server = Server(tmp_path / "1", tcp=tcp)
    with Client(server, channels=2) as client:
        assert client.terms["channels"] == 2
        assert client.terms["compression"] == ["lz4"]
        assert client.terms["parent"] is False
        client.send(message(LAYOUT, number=1, length=1000 * PAGE))
        client.send(packed(1, 300, two), raw(2, 0, shared), channel=1)
        client.send(raw(1, 0, one), zeros(1, 256, 44))
        assert client.is_done(raw(1, 364, three, ANSWER), channel=1)
        assert client.is_done(zeros(1, 367, 8, ANSWER))
        client.send(size(1, 375), size(2, 5))
        client.send(pagemap(1, (0, 300, PRESENT), (500, 75, PRESENT)))
        client.send(pagemap(2, (0, 5, PRESENT), name="pagemap-shmem-0.img"))
        assert client.end() == DONE
        assert server.outcome() == Received(images=2, pages=380)
    assert pages(tmp_path / "1") == one + bytes(44 * PAGE) + two + three + bytes(8 * PAGE)
    assert pages(tmp_path / "1", 2) == shared
    assert len(incdump.check(tmp_path / "1").levels) == 1
    assert ImagesDir(tmp_path / "1").read(PID, BASE + 500 * PAGE, 64 * PAGE) == two
    assert json.loads((tmp_path / "1" / "incdump-received.json").read_text()) == {
        "version": 1,
        "images": 2,
        "pages": 380,
    }


def test_an_inventory_is_what_makes_the_images_complete(tmp_path: Path) -> None:
    data = noise(2)
    store(
        tmp_path / "1",
        file("inventory.img", INVENTORY[:7], 0),
        file("inventory.img", INVENTORY[7:]),
        raw(1, 0, data),
        size(1, 2),
        pagemap(1, (0, 2, PRESENT)),
        file("incdump.json", b'{"generation": "abc"}'),
    )
    assert (tmp_path / "1" / "inventory.img").read_bytes() == INVENTORY
    assert not (tmp_path / "1" / "incdump-received.json").exists()
    assert len(incdump.check(tmp_path / "1").levels) == 1
    for generation, stands in (("abc", True), ("abd", False), (None, False), (7, False)):
        server = Server(tmp_path / "2", "../1")
        with Client(server, parent=generation) as client:
            assert client.terms["parent"] is stands
            with pytest.raises(ConnectionLost):
                server.outcome()


def test_a_client_with_nothing_to_say_but_that_it_is_through_is_complete(tmp_path: Path) -> None:
    assert store(tmp_path / "1") == Received()
    assert os.listdir(tmp_path / "1") == ["incdump-received.json"]


def test_files_come_in_parts_and_side_by_side(tmp_path: Path) -> None:
    one, two = os.urandom(MIB - 100), os.urandom(MIB // 2)
    store(
        tmp_path / "1",
        file("mm-42.img", one, 0),
        file("core-42.img", two, 0),
        file("mm-42.img", two, 0),
        file("core-42.img", b""),
        file("mm-42.img", one),
        file("incdump-hashes-x7", b""),
        file("stats-dump", b"\0"),
    )
    assert (tmp_path / "1" / "mm-42.img").read_bytes() == one + two + one
    assert (tmp_path / "1" / "core-42.img").read_bytes() == two
    assert (tmp_path / "1" / "incdump-hashes-x7").read_bytes() == b""
    assert (tmp_path / "1" / "mm-42.img").stat().st_mode & 0o777 == 0o600


def test_the_same_place_may_be_written_again_and_zeros_are_zeros_there(tmp_path: Path) -> None:
    data, new = noise(300), text(20)
    store(
        tmp_path / "1",
        raw(1, 0, data[: 250 * PAGE]),
        raw(1, 250, data[250 * PAGE :]),
        packed(1, 10, new),
        zeros(1, 20, 5),
        zeros(1, 298, 1 << 20),
        raw(1, 22, new[:PAGE]),
        zeros(1, 400, 10),
        size(1, 302),
        pagemap(1, (0, 302, PRESENT)),
    )
    expected = bytearray(data) + bytes(2 * PAGE)
    expected[10 * PAGE : 30 * PAGE] = new
    expected[20 * PAGE : 25 * PAGE] = bytes(5 * PAGE)
    expected[22 * PAGE : 23 * PAGE] = new[:PAGE]
    expected[298 * PAGE :] = bytes(4 * PAGE)
    assert pages(tmp_path / "1") == expected


def test_gaps_are_closed_up(tmp_path: Path) -> None:
    data = noise(20)
    store(
        tmp_path / "1",
        raw(1, 0, data),
        size(1, 20, (15, 16), (18, 20), flags=0),
        size(1, 17, (0, 2), (5, 6), (7, 10)),
        raw(2, 0, data),
        size(2, 20, (0, 20)),
        pagemap(1, (0, 11, PRESENT)),
    )
    kept = [2, 3, 4, 6, 10, 11, 12, 13, 14, 16, 17]
    assert pages(tmp_path / "1") == b"".join(data[number * PAGE :][:PAGE] for number in kept)
    assert pages(tmp_path / "1", 2) == b""


def test_what_is_dropped_is_gone_and_may_be_begun_anew(tmp_path: Path) -> None:
    data = noise(1)
    store(
        tmp_path / "1",
        raw(1, 0, noise(4)),
        message(DROP, number=1),
        message(DROP, number=2),
        raw(3, 0, noise(4)),
        message(DROP, number=3),
        raw(3, 0, data),
        size(3, 1),
        pagemap(3, (0, 1, PRESENT)),
    )
    assert sorted(os.listdir(tmp_path / "1")) == ["incdump-received.json", "pagemap-42.img", "pages-3.img"]
    assert pages(tmp_path / "1", 3) == data


def test_an_image_without_pages_has_a_pages_image_all_the_same(tmp_path: Path) -> None:
    message_of_drop = message(DROP, number=5)
    assert store(tmp_path / "1", message_of_drop, pagemap(5)) == Received(images=1)
    assert pages(tmp_path / "1", 5) == b""
    assert len(incdump.check(tmp_path / "1").levels) == 1


def test_holes_are_filled_by_the_parent(tmp_path: Path) -> None:
    old, new = noise(6), noise(2)
    store(tmp_path / "1", raw(1, 0, old), size(1, 6), pagemap(1, (0, 6, PRESENT)))
    rows = (0, 2, IN_PARENT), (2, 2, PRESENT), (4, 2, IN_PARENT)
    received = store(tmp_path / "2", raw(1, 0, new), size(1, 2), pagemap(1, *rows), parent="../1")
    assert received == Received(images=1, pages=2, holes=4)
    assert len(incdump.check(tmp_path / "2").levels) == 2
    assert ImagesDir(tmp_path / "2").read(PID, BASE, 6 * PAGE) == old[: 2 * PAGE] + new + old[4 * PAGE :]


def test_what_is_there_already_is_given_back_by_the_parent(tmp_path: Path) -> None:
    store(tmp_path / "1", raw(1, 0, noise(64)), size(1, 64), pagemap(1, (0, 64, PRESENT)))
    stored = StoredImages(NewImagesDir.create(tmp_path / "2", "../1"), ImagesDir(tmp_path / "1"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(_terms({"version": 1}))
        ours.sendall(raw(1, 0, noise(16)) + size(1, 16) + pagemap(1, (8, 16, PRESENT)) + END)
        BlockSession(theirs, stored, Joins()).run()
    stored.dedup()
    assert stored.received.punched == 16 * PAGE


def test_a_message_may_come_byte_by_byte(tmp_path: Path) -> None:
    data = text(1)
    server = Server(tmp_path / "1", tcp=True)
    with Client(server) as client:
        stream = packed(1, 0, data) + raw(1, 1, data) + size(1, 2) + pagemap(1, (0, 2, PRESENT)) + END
        for byte in stream:
            client.send(bytes([byte]))
        assert client.hear(1) == DONE
        server.outcome()
    assert pages(tmp_path / "1") == data + data


def test_every_message_is_answered_that_is_to_be(tmp_path: Path) -> None:
    server = Server(tmp_path / "1")
    with Client(server) as client:
        assert client.is_done(message(LAYOUT, ANSWER, number=1, length=PAGE))
        assert client.is_done(zeros(1, 0, 1, ANSWER))
        assert client.is_done(size(1, 1, (0, 1), flags=LAST | ANSWER))
        assert client.is_done(file("mm-1.img", b"", LAST | ANSWER))
        assert client.is_done(message(DROP, ANSWER, number=2))
        assert client.end() == DONE
        server.outcome()


def test_disk_space_is_reserved_no_more_than_may_come(tmp_path: Path) -> None:
    server = Server(tmp_path / "1", max_bytes=100 * PAGE)
    with Client(server) as client:
        client.send(message(LAYOUT, number=1, length=1 << 46), message(LAYOUT, number=2, length=60 * PAGE))
        assert client.is_done(message(LAYOUT, ANSWER, number=3, length=60 * PAGE))
        sizes = [(tmp_path / "1" / f"pages-{number}.img").stat().st_blocks * 512 // PAGE for number in (1, 2, 3)]
        with pytest.raises(ConnectionLost):
            server.outcome()
    assert sizes[0] == sizes[2] == 0
    assert sizes[1] in (0, 60)


def test_one_channel_may_be_idle_while_another_is_not(tmp_path: Path) -> None:
    server = Server(tmp_path / "1", timeout=0.3)
    with Client(server, channels=3) as client:
        for page in range(12):
            assert client.is_done(raw(1, page, noise(1), ANSWER), channel=1)
            time.sleep(0.1)
        assert client.end(size(1, 12), pagemap(1, (0, 12, PRESENT))) == DONE
        assert server.outcome().pages == 12


# -- what is to be refused ----------------------------------------------------------------------------------------

TEXT = text(4)
GOOD = raw(1, 0, noise(4)) + size(1, 4)
FULL = lz4.block.compress(bytes(64 * PAGE), store_size=False)

BAD_MESSAGES = {
    "an unknown message (0x0, 0x0)": message(0),
    "an unknown message (0x7, 0x0)": message(7),
    "an unknown message (0x1, 0x3)": message(BLOCK, 3, bytes(PAGE), number=1, length=PAGE),
    "an unknown message (0x6, 0xff)": message(FINISH, 0xFF),
    "FINISH message that cannot be": message(FINISH, 0x400),
    "FILE message that cannot be": message(FILE, LAST, size=MIB + 1),
    "FINISH message with something behind it": message(FINISH, 0, b"x"),
    "FILE message whose name is longer than itself": message(FILE, LAST, b"mm-1.img", number=9),
    "BLOCK message about a pages image that cannot be": raw(0, 0, bytes(PAGE)),
    "DROP message about a pages image that cannot be": message(DROP, number=1 << 31),
    "SIZE message about a pages image that cannot be": message(SIZE, number=2**64 - 1),
    "BLOCK message about pages that cannot be": message(BLOCK, ZERO, number=1, offset=1 << 47, length=PAGE),
    "BLOCK message about pages": message(BLOCK, ZERO, number=1, offset=2**64 - PAGE, length=2 * PAGE),
    "BLOCK message about": message(BLOCK, ZERO, number=1, offset=1, length=PAGE),
    "BLOCK message about pages that": message(BLOCK, ZERO, number=1, length=PAGE + 1),
    "SIZE message about pages that cannot be": message(SIZE, LAST, number=1, length=2**64 - PAGE),
    "LAYOUT message about pages that cannot be": message(LAYOUT, number=1, length=(1 << 47) + PAGE),
    "SIZE message whose gaps cannot be": message(SIZE, LAST, bytes(24), number=1, length=PAGE),
    "DROP message with something behind it": message(DROP, 0, b"x", number=1),
    "LAYOUT message with something behind it": message(LAYOUT, 0, b"x", number=1),
    "BLOCK message of a size that cannot be": message(BLOCK, ZERO, number=1),
    "BLOCK message of a size": message(BLOCK, LZ4, FULL, number=1, length=65 * PAGE),
    "with other bytes behind it than it says": message(BLOCK, RAW, bytes(PAGE), number=1, length=2 * PAGE),
    "with other bytes behind it": message(BLOCK, ZERO, bytes(PAGE), number=1, length=PAGE),
    "no smaller for its compression": message(BLOCK, LZ4, bytes(PAGE), number=1, length=PAGE),
    "that is no smaller for": message(BLOCK, LZ4, number=1, length=PAGE),
    "compressed block that is damaged": message(BLOCK, LZ4, os.urandom(100), number=1, length=PAGE),
    "compressed block that is": packed(1, 0, bytes(64 * PAGE), length=PAGE),
    "compressed block": message(BLOCK, LZ4, FULL[: len(FULL) // 2], number=1, length=64 * PAGE),
    "of another size than it says": packed(1, 0, TEXT, length=5 * PAGE),
    "takes out of pages-1.img what cannot be": raw(1, 0, TEXT) + size(1, 4, (0, 2), (1, 3)),
    "takes out of pages-1.img": raw(1, 0, TEXT) + size(1, 4, (2, 3), (0, 1)),
    "takes out of pages-1": raw(1, 0, TEXT) + size(1, 4, (0, 1), (1, 2)),
    "takes out of": raw(1, 0, TEXT) + size(1, 4, (2, 2)),
    "takes out": raw(1, 0, TEXT) + size(1, 4, (3, 5)),
    "client takes out": raw(1, 0, TEXT) + size(1, 4, (3, 2)),
    "the client takes out": raw(1, 0, TEXT)
    + message(SIZE, LAST, struct.pack("<QQ", 1, PAGE), number=1, length=4 * PAGE),
    "longer than what it sent of it": raw(1, 0, TEXT) + size(1, 5),
    "longer than what it sent": size(1, 1 << 30, (0, 1)),
    "pages for pages-1.img after it was complete": GOOD + raw(1, 0, TEXT),
    "for pages-1.img after it was complete": GOOD + size(1, 4),
    "pages-1.img after it was complete": GOOD + message(DROP, number=1),
    "sends mm-42.img twice": file("mm-42.img", b"x") + file("mm-42.img", b"y"),
    "sends inventory.img twice": file("inventory.img", INVENTORY) + file("inventory.img", b""),
    "an inventory that is larger than": file("inventory.img", bytes(MIB - 13), 0) + file("inventory.img", bytes(14)),
    "pagemap-0.img, which cannot be": pagemap(1, name="pagemap-0.img"),
    "pagemap-042.img, which cannot be": pagemap(1, name="pagemap-042.img"),
    "pagemap-shmem-x.img, which cannot be": pagemap(1, name="pagemap-shmem-x.img"),
}


@pytest.mark.parametrize("why", BAD_MESSAGES)
def test_what_the_protocol_does_not_have_is_refused(tmp_path: Path, why: str) -> None:
    with refused(tmp_path / "1", _literally(why)) as client:
        client.send(BAD_MESSAGES[why])


BAD_NAMES = [
    "",
    "../mm-1.img",
    "/etc/x.img",
    "a/b.img",
    "..",
    "pages-1.img",
    "parent",
    "incdump-received.json",
    "inventory.img.unfinished",
    "incdump-hashes-",
    "incdump-hashes-../x",
    "mm-1.img\n",
    "mm\0.img",
    "mé.img",
    "x" * 82 + ".img",
    "Mm.img",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, name: str) -> None:
    with refused(tmp_path / "1", "a file that is no image") as client:
        encoded = name.encode()
        client.send(message(FILE, LAST, encoded + b"data", number=len(encoded)))
    assert os.listdir(tmp_path) == []


IMPOSSIBLE = {
    "before it has sent all": raw(1, 0, TEXT),
    "before it has sent all of": GOOD + file("mm-42.img", b"x", 0),
    "before it has sent all of what": file("inventory.img", INVENTORY[:-1], 0),
    "before it has sent all of what it": message(LAYOUT, number=1, length=PAGE),
    "before it has sent all of what it began": raw(1, 0, TEXT) + size(1, 4, flags=0),
    "pages that are in no pagemap": GOOD,
    "pagemap-42.img has 3 pages, pages-1.img has not": GOOD + pagemap(1, (0, 3, PRESENT)),
    "has 5 pages, pages-1.img has not": GOOD + pagemap(1, (0, 5, PRESENT)),
    "has 4 pages, pages-2.img has not": GOOD + pagemap(2, (0, 4, PRESENT)),
    "or is another one's": GOOD + pagemap(1, (0, 4, PRESENT)) + pagemap(1, (0, 4, PRESENT), name="pagemap-shmem-1.img"),
    "another one's": GOOD + pagemap(1, (0, 4, PRESENT)) + pagemap(1, name="pagemap-43.img"),
    "entries with impossible flags": GOOD + pagemap(1, (0, 4, PRESENT), (9, 1, 2)),
    "to parent images that do not have it": GOOD + pagemap(1, (0, 4, PRESENT), (9, 1, IN_PARENT)),
}
DAMAGED = {
    "pagemap-42.img is not a pagemap": file("pagemap-42.img", b"nonsense"),
    "pagemap-42.img is cut short": file("pagemap-42.img", encode_pagemap(1, np.array([[BASE, 1, 4]], np.uint64))[:-1]),
    "pagemap-42.img is damaged": GOOD + pagemap(1, (0, 2, PRESENT), (1, 2, PRESENT)),
    "inventory.img is not a": file("inventory.img", b""),
    "inventory.img has": file("inventory.img", INVENTORY + INVENTORY[4:]),
    "incdump.json is damaged": file("incdump.json", b"[]"),
    "incdump.json is": file("incdump.json", b"[" * 100_000),
}


@pytest.mark.parametrize("why", IMPOSSIBLE)
def test_what_makes_no_sense_as_a_whole_is_refused(tmp_path: Path, why: str) -> None:
    with refused(tmp_path / "1", _literally(why)) as client:
        client.send(IMPOSSIBLE[why], END)


@pytest.mark.parametrize("why", DAMAGED)
def test_an_image_that_nobody_could_read_is_refused(tmp_path: Path, why: str) -> None:
    with refused(tmp_path / "1", _literally(why), BadImage) as client:
        client.send(DAMAGED[why], END)


def _literally(why: str) -> str:
    return why.replace("(", r"\(").replace(")", r"\)")


def test_a_hole_that_no_parent_has_is_refused(tmp_path: Path) -> None:
    store(tmp_path / "1", raw(1, 0, noise(4)), size(1, 4), pagemap(1, (0, 4, PRESENT)))
    with refused(tmp_path / "2", f"leaves page {BASE + 4 * PAGE:#x} to parent images", parent="../1") as client:
        client.send(pagemap(1, (0, 5, IN_PARENT)), END)
    assert len(incdump.check(tmp_path / "1").levels) == 1


def test_a_damaged_parent_is_told_of(tmp_path: Path) -> None:
    write_level(tmp_path / "1", 0, {f"pagemap-{PID}": [(0, 4, 6)]}, meta=b"nonsense")
    server = Server(tmp_path / "2", "../1")
    with server.sock:
        server.sock.sendall(_terms({"version": 1, "channels": 1, "parent": "abc"}))
        assert b"incdump.json is damaged" in everything(server.sock)
        with pytest.raises(BadImage):
            server.outcome()
    assert not (tmp_path / "2").exists()


ALLOWED = 100 * PAGE
TOO_MUCH = {
    "pages": raw(1, 0, noise(100)) + raw(1, 0, noise(1)),
    "zeros": zeros(1, 0, 1 << 34),
    "compressed": packed(1, 0, text(50)) + packed(1, 0, text(51)),
    "files": file("mm-42.img", bytes(ALLOWED), 0) + file("mm-43.img", b"x"),
    "inventory": file("inventory.img", bytes(ALLOWED + 1)),
    "dropped": raw(1, 0, noise(100)) + message(DROP, number=1) + raw(1, 0, noise(1)),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_more_bytes_than_allowed_are_refused(tmp_path: Path, what: str) -> None:
    with refused(tmp_path / "1", "more than --max-bytes allows", XferError, max_bytes=ALLOWED) as client:
        client.send(TOO_MUCH[what])


def test_more_names_than_there_may_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("incdump.xfer.stored.MOST_NAMES", 10)
    with refused(tmp_path / "1", "more than 10 pages images") as client:
        client.send(*(zeros(number, 0, 1) + size(number, 1) for number in range(1, 12)))
    with refused(tmp_path / "1", "too many files") as client:
        client.send(*(file(f"mm-{number}.img", b"") for number in range(161)))


def test_a_pagemap_that_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_RUNS == 1 << 24
    monkeypatch.setattr("incdump.xfer.stored._MOST_PAGEMAP", 1000)
    with refused(tmp_path / "1", "more of pagemap-42.img than there can be") as client:
        client.send(file("pagemap-42.img", bytes(999), 0), file("pagemap-42.img", bytes(2)))


BAD_TERMS = {
    "longer than there can be": struct.pack("<I", (1 << 16) + 1),
    "another version": _terms({"version": 2}),
    "another version of": _terms([1]),
    "another version of incdump's": struct.pack("<I", 4) + b"\xff\xff\xff\xff",
    "another version of incdump's protocol": struct.pack("<I", 60000) + b"[" * 60000,
    "speaks another version": struct.pack("<I", 0),
}


@pytest.mark.parametrize("why", BAD_TERMS)
def test_terms_that_make_no_sense_are_refused(tmp_path: Path, why: str) -> None:
    server = Server(tmp_path / "1")
    with server.sock:
        server.sock.sendall(BAD_TERMS[why])
        assert why.encode() in everything(server.sock)
        with pytest.raises(ProtocolError, match=why):
            server.outcome()
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("channels", [0, -1, "7", None, 2.5, True, [], {}])
def test_a_number_of_channels_that_cannot_be_is_one(tmp_path: Path, channels: object) -> None:
    server = Server(tmp_path / "1")
    with Client(server, compression=channels, parent=channels) as client:
        assert client.terms["compression"] == []
        assert client.end() == DONE
        server.outcome()
    server = Server(tmp_path / "2")
    with Client(server, channels=channels, join=0) as client:
        assert client.terms["channels"] == 1
        assert client.end() == DONE
        server.outcome()


def test_there_are_no_more_channels_than_there_may_be(tmp_path: Path) -> None:
    server = Server(tmp_path / "1")
    with Client(server, channels=1 << 70) as client:
        assert client.terms["channels"] == 16
        for channel in range(16):
            assert client.is_done(raw(1, channel, noise(1), ANSWER), channel=channel)
        assert client.end(size(1, 16), pagemap(1, (0, 16, PRESENT))) == DONE
        server.outcome()


# -- several channels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [LAYOUT, SIZE, DROP, FILE])
def test_only_blocks_may_come_on_other_channels(tmp_path: Path, what: int) -> None:
    with refused(tmp_path / "1", "on a channel that is for blocks", channels=3, timeout=60) as client:
        client.send(message(what, number=0 if what == FILE else 1), channel=1)


def test_what_is_wrong_on_one_channel_is_told_at_once_whatever_the_others_do(tmp_path: Path) -> None:
    began = time.monotonic()
    with refused(tmp_path / "1", r"unknown message \(0x63, 0x0\)", channels=4, timeout=None) as client:
        client.send(raw(1, 0, noise(1)), raw(1, 1, noise(9))[:5000], channel=2)
        client.send(message(99), channel=1)
    with refused(tmp_path / "2", r"unknown message \(0x63, 0x0\)", channels=4, timeout=None) as client:
        for channel in (1, 2):
            client.send(raw(1, 0, noise(9))[:5000], channel=channel)
        client.send(message(99))
    assert time.monotonic() - began < 5


def test_an_image_may_not_end_while_another_channel_sends_it(tmp_path: Path) -> None:
    for number, end in enumerate((size(1, 1), size(1, 1, flags=0), message(DROP, number=1))):
        with refused(tmp_path / str(number), "ends pages-1.img while it sends it", channels=2) as client:
            assert client.is_done(raw(1, 0, noise(1), ANSWER))
            client.send(raw(1, 1, noise(200))[: 100 * PAGE], channel=1)
            time.sleep(0.1)
            client.send(end)


def test_an_image_that_another_channel_still_sends_is_not_complete(tmp_path: Path) -> None:
    server = Server(tmp_path / "1")
    with Client(server, channels=2) as client:
        client.send(raw(1, 0, noise(9))[:5000], channel=1)
        assert client.end() == b""
        with pytest.raises(ConnectionLost, match="went before it had said"):
            server.outcome()
    assert not (tmp_path / "1").exists()


def test_a_channel_that_does_not_end_ends_the_session(tmp_path: Path) -> None:
    server = Server(tmp_path / "1", timeout=0.2)
    with Client(server, channels=2) as client:
        client.send(END)
        assert client.hear(1) == b""
        with pytest.raises(ConnectionLost, match=r"silent for 0\.2 s"):
            server.outcome()
    assert not (tmp_path / "1").exists()


def test_too_few_channels_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    server = Server(tmp_path / "1", timeout=0.3)
    with Client(server, channels=4, join=1) as client:
        assert client.hear(1) == b""
        with pytest.raises(ConnectionLost, match=r"did not open all channels within 0\.3 s"):
            server.outcome()
    assert not (tmp_path / "1").exists()


def test_a_client_that_goes_before_it_has_opened_all_channels_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    server = Server(tmp_path / "1", timeout=None)
    with Client(server, channels=4, join=2), pytest.raises(ConnectionLost, match="before it had opened all"):
        server.outcome()
    assert time.monotonic() - began < 5
    assert not (tmp_path / "1").exists()


def test_more_connections_than_agreed_are_closed(tmp_path: Path) -> None:
    server = Server(tmp_path / "1")
    with Client(server, channels=2, join=3) as client:
        assert client.is_done(zeros(1, 0, 1, ANSWER))
        assert client.end(message(DROP, number=1)) == DONE
        assert [client.hear(1, channel) for channel in (1, 2, 3)] == [b"", b"", b""]
        server.outcome()


def test_a_token_that_no_session_has_is_refused(tmp_path: Path) -> None:
    reports: list[SessionReport] = []

    async def serve() -> None:
        options = PageServerOptions(rounds=1, timeout=5)
        async with PageServer(tmp_path / "all", options=options) as server:
            serving = asyncio.create_task(server.serve(reports.append))
            await asyncio.to_thread(speak, server.port)
            await serving

    def speak(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), 30) as other:
            other.sendall(JOIN + os.urandom(16))
            assert other.recv(1) == b""
        with socket.create_connection(("127.0.0.1", port), 30) as first:
            first.sendall(OFFER + _terms({"version": 1}) + END)
            assert everything(first).endswith(b"}" + DONE)

    asyncio.run(serve())
    assert [str(report.error) for report in reports] == ["it would join a session that is over", "None"]
    assert os.listdir(tmp_path / "all") == ["1"]


# -- clients and disks that fail ----------------------------------------------------------------------------------


def _good_stream() -> tuple[bytes, list[int]]:
    """A whole session's messages but the last, and where each ends."""
    parts = [
        message(LAYOUT, number=1, length=8 * PAGE),
        raw(1, 0, noise(2)),
        packed(1, 2, text(2)),
        zeros(1, 4, 4),
        size(1, 8, (1, 2)),
        pagemap(1, (0, 7, PRESENT)),
        file("mm-42.img", b"x" * 100, 0),
        file("mm-42.img", b"y" * 100),
        file("inventory.img", INVENTORY),
    ]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return b"".join(parts), ends


@pytest.mark.parametrize("tcp", [False, True])
def test_a_client_that_goes_leaves_nothing(tmp_path: Path, tcp: bool) -> None:
    stream, ends = _good_stream()
    for cut in {0, 1, 39, 40, *ends, *(end - 1 for end in ends), *(end + 20 for end in ends)}:
        server = Server(tmp_path / "1", tcp=tcp)
        with Client(server) as client:
            client.send((stream + END)[:cut])
        with pytest.raises(ConnectionLost, match="went before it had"):
            server.outcome()
        assert not (tmp_path / "1").exists()


def test_a_client_that_is_gone_with_all_its_channels_leaves_nothing(tmp_path: Path) -> None:
    stream, _ = _good_stream()
    server = Server(tmp_path / "1", tcp=True)
    with Client(server, channels=3) as client:
        client.send(stream)
    with pytest.raises(ConnectionLost):
        server.outcome()
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("cut", [0, 39, 40, 40 + 5 * PAGE])
def test_a_silent_client_is_given_up(tmp_path: Path, cut: int) -> None:
    server = Server(tmp_path / "1", timeout=0.2, tcp=True)
    with Client(server, channels=2) as client:
        client.send(raw(1, 0, noise(10))[:cut], channel=1)
        began = time.monotonic()
        assert client.hear(1) == b""
        assert time.monotonic() - began < 2
        with pytest.raises(ConnectionLost, match=r"silent for 0\.2 s"):
            server.outcome()
    assert not (tmp_path / "1").exists()


def test_a_client_that_takes_no_answers_is_given_up(tmp_path: Path) -> None:
    server = Server(tmp_path / "1", timeout=0.2)
    with Client(server) as client:
        client.channels[0].settimeout(5)
        with suppress(ConnectionError):
            while True:
                client.send(zeros(1, 0, 1, ANSWER) * 1000)
        with pytest.raises(ConnectionLost, match="did not take an answer in time"):
            server.outcome()
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize("kind", ["raw", "spliced", "compressed", "size", "file"])
def test_a_disk_that_takes_no_more_ends_the_session(tmp_path: Path, kind: str) -> None:
    stream = {
        "raw": raw(1, 10, noise(1)),
        "spliced": raw(1, 0, noise(200)),
        "compressed": packed(1, 0, text(20)),
        "size": zeros(1, 0, 20) + size(1, 20),
        "file": file("mm-42.img", bytes(9 * PAGE)),
    }[kind]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * PAGE, hard))
    try:
        with refused(tmp_path / "1", "File too large", ImagesError, tcp=True) as client:
            client.send(stream)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_zeros_for_more_than_there_can_be_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr("incdump.xfer.block_server.punch_hole", cannot)
    data = noise(3)
    store(
        tmp_path / "1",
        raw(1, 0, data),
        zeros(1, 1, 1),
        zeros(1, 2, (1 << 35) - 2),
        size(1, 4),
        pagemap(1, (0, 4, PRESENT)),
    )
    assert pages(tmp_path / "1") == data[:PAGE] + bytes(3 * PAGE)


def test_a_file_that_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    server = Server(tmp_path / "1")
    with Client(server) as client:
        (tmp_path / "1" / "mm-42.img").write_bytes(b"somebody else's")
        client.send(file("mm-42.img", b"x"))
        assert "another dump writes there" in client.reason()
        with pytest.raises(ImagesError):
            server.outcome()
    assert (tmp_path / "1" / "mm-42.img").read_bytes() == b"somebody else's"


# -- incdump's own client -----------------------------------------------------------------------------------------


@contextmanager
def own_client(server: Server, **options: Any) -> Iterator[BlockClient]:
    terms = {"channels": 3, "parent": None, "compress": "auto", "timeout": 20.0} | options
    connection, server.sock = server.sock, socket.socket()
    server.sock.close()
    assert len(connection.recv(4)) == 4
    limit_calls(connection, terms["timeout"])

    def another() -> socket.socket:
        ours = server.connect()
        limit_calls(ours, terms["timeout"])
        return ours

    client = BlockClient(connection, "here", another, **terms)
    try:
        yield client
    finally:
        client.close()


def put(client: BlockClient, number: int, offset: int, data: bytes, *, times: int = 1) -> None:
    for _ in range(times):
        with client.channel() as channel:
            channel.send(number, offset, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("compress", ["off", "lz4", "auto"])
def test_what_the_client_sends_from_several_threads_is_there(tmp_path: Path, compress: str) -> None:
    data = b"".join((noise(70), bytes(20 * PAGE), text(100), bytes(3 * PAGE), noise(63), text(256))) * 8
    server = Server(tmp_path / "1", tcp=True)
    with own_client(server, compress=compress) as client:
        assert client.channels == 3
        assert not client.stands_on_parent
        client.lay_out(1, len(data))

        def write(first: int) -> None:
            for offset in range(first * MIB, len(data), 3 * MIB):
                put(client, 1, offset, data[offset : offset + MIB])

        writers = [threading.Thread(target=write, args=(first,)) for first in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        client.complete(1, len(data), np.array([[0, PAGE], [4 * PAGE, 9 * PAGE]], np.uint64))
        put(client, 2, 0, data[:PAGE])
        client.drop(2)
        entries = np.array([[BASE, len(data) // PAGE - 6, PRESENT]], np.uint64)
        client.send_file("pagemap-42.img", io.BytesIO(encode_pagemap(1, entries)))
        client.send_file("mm-42.img", io.BytesIO(data[: 2 * MIB + 5]))
        client.send_file("incdump.json", io.BytesIO(b"{}"))
        client.send_file("core-42.img", io.BytesIO(b""))
        client.send_file("inventory.img", io.BytesIO(INVENTORY))
        client.end()
    assert server.outcome() == Received(images=1, pages=len(data) // PAGE - 6)
    assert pages(tmp_path / "1") == data[PAGE : 4 * PAGE] + data[9 * PAGE :]
    assert (tmp_path / "1" / "mm-42.img").read_bytes() == data[: 2 * MIB + 5]
    assert len(incdump.check(tmp_path / "1").levels) == 1


def test_gaps_that_do_not_fit_into_a_message_go_in_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(40)
    server = Server(tmp_path / "1")
    with own_client(server) as client:
        put(client, 1, 0, data)
        monkeypatch.setattr("incdump.xfer.block_client.MOST_BEHIND", 64)
        gaps = np.array([[page * PAGE, (page + 1) * PAGE] for page in range(0, 40, 2)], np.uint64)
        client.complete(1, 40 * PAGE, gaps)
        monkeypatch.undo()
        client.send_file("pagemap-42.img", io.BytesIO(encode_pagemap(1, np.array([[BASE, 20, PRESENT]], np.uint64))))
        client.end()
    server.outcome()
    assert pages(tmp_path / "1") == b"".join(data[page * PAGE :][:PAGE] for page in range(1, 40, 2))


def test_the_client_hears_why_it_is_refused(tmp_path: Path) -> None:
    for number, channels in enumerate((1, 2, 4)):
        server = Server(tmp_path / str(number), max_bytes=20 * MIB, tcp=True)
        with (
            own_client(server, channels=channels, compress="off") as client,
            pytest.raises(XferError, match="refuses: the client sends more than --max-bytes"),
        ):
            put(client, 1, 0, noise(256), times=200)
        with pytest.raises(XferError, match="--max-bytes"):
            server.outcome()
        assert not (tmp_path / str(number)).exists()


def test_the_client_hears_at_the_end_what_was_wrong(tmp_path: Path) -> None:
    server = Server(tmp_path / "1")
    with own_client(server) as client:
        put(client, 1, 0, noise(1))
        client.complete(1, PAGE, empty_runs())
        with pytest.raises(XferError, match="refuses: the client sends pages that are in no pagemap"):
            client.end()
    with pytest.raises(ProtocolError):
        server.outcome()


def test_a_client_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path / "1", tcp=True)
    with own_client(server) as client:
        put(client, 1, 0, noise(200))
        client.flush()
        client.break_off()
        with pytest.raises(ConnectionLost):
            put(client, 1, 0, noise(200))
    with pytest.raises(ConnectionLost):
        server.outcome()
    assert not (tmp_path / "1").exists()


BAD_SERVERS = {
    "no terms": b"\x02\0\0\0[]",
    "far too long": b"\xff\xff\xff\xff",
    "no channels": _terms({"version": 1}),
    "endless channels": struct.pack("<I", 36) + b'{"version": 1, "channels": Infinity}',
    "no token": _terms({"version": 1, "channels": 2, "token": "x"}),
    "no list": _terms({"version": 1, "channels": 2, "compression": 5}),
}


@pytest.mark.parametrize("what", BAD_SERVERS)
def test_a_server_whose_terms_make_no_sense_is_left(what: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(BAD_SERVERS[what])
        with pytest.raises(ProtocolError):
            BlockClient(ours, "here", lambda: ours, channels=2, parent=None, compress="auto", timeout=5)


def test_an_answer_that_cannot_be_is_no_success() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(_terms({"version": 1, "channels": 1, "token": "00"}) + b"\0")
        client = BlockClient(ours, "here", lambda: ours, channels=1, parent=None, compress="off", timeout=5)
        with pytest.raises(ProtocolError, match="answers what cannot be"):
            client.end()
        client.close()


# -- whatever comes -----------------------------------------------------------------------------------------------

PAGES = 24
places = st.tuples(st.integers(1, 3), st.integers(0, PAGES - 1), st.integers(1, 6))
gap_lists = st.lists(st.integers(0, PAGES), max_size=4, unique=True).map(sorted)
actions = st.one_of(
    st.tuples(st.sampled_from(["raw", "raw", "packed", "zeros"]), st.integers(0, 1), places),
    st.tuples(st.just("layout"), st.just(0), places),
    st.tuples(st.sampled_from(["size", "size", "end"]), st.just(0), st.tuples(st.integers(1, 3), gap_lists)),
    st.tuples(st.just("drop"), st.just(0), st.tuples(st.integers(1, 3))),
)


class Model:
    """What the pages images are to hold."""

    def __init__(self) -> None:
        self.begun: dict[int, bytearray] = {}
        self.came: dict[int, int] = {}
        self.complete: dict[int, bytes] = {}

    def take(self, what: str, number: int, rest: tuple[Any, ...], data: bytes) -> bytes | None:
        """Do what a message says; returns the message, or None if it may be refused and is not sent."""
        if number in self.complete:
            return None
        image = self.begun.setdefault(number, bytearray(2 * PAGES * PAGE))
        came = self.came.setdefault(number, 0)
        if what == "drop":
            del self.begun[number], self.came[number]
            return message(DROP, ANSWER, number=number)
        if what in ("size", "end"):
            marks: list[int] = rest[0]
            gaps = list(zip(marks[::2], marks[1::2], strict=False))
            length = min(came, PAGES)
            gaps = [gap for gap in gaps if gap[1] <= length]
            left = bytearray(image[: length * PAGE])
            for start, end in reversed(gaps):
                del left[start * PAGE : end * PAGE]
            self.begun[number] = left + bytes(2 * PAGES * PAGE - len(left))
            if what == "end":
                self.complete[number] = bytes(left)
                del self.begun[number]
            return size(number, length, *gaps, flags=ANSWER | (LAST if what == "end" else 0))
        page, count = rest
        if what == "layout":
            return message(LAYOUT, ANSWER, number=number, length=count * PAGE)
        self.came[number] += count
        content = bytes(count * PAGE) if what == "zeros" else data
        image[page * PAGE : (page + count) * PAGE] = content
        if what == "zeros":
            return zeros(number, page, count, ANSWER)
        return (packed if what == "packed" else raw)(number, page, content, ANSWER)


@settings(max_examples=75, deadline=None)
@given(todo=st.lists(actions, max_size=25), seed=st.integers(0, 999))
def test_pages_images_hold_what_a_model_of_them_holds(
    tmp_path_factory: pytest.TempPathFactory, todo: list[tuple[str, int, tuple[Any, ...]]], seed: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "1"
    dice, model = random.Random(seed), Model()
    server = Server(path)
    with Client(server, channels=2) as client:
        for what, channel, (number, *rest) in todo:
            data = b"".join(dice.randbytes(32) * (PAGE // 32) for _ in range(rest[-1] if len(rest) == 2 else 0))
            sent = model.take(what, number, tuple(rest), data)
            assert sent is None or client.is_done(sent, channel=channel)
        for number in list(model.begun):
            sent = model.take("end", number, ([],), b"")
            assert sent is not None
            assert client.is_done(sent)
        for number, image in model.complete.items():
            rows = [(0, len(image) // PAGE, PRESENT)] if image else []
            client.send(pagemap(number, *rows, name=f"pagemap-{number}.img"))
        assert client.end() == DONE
        server.outcome()
    assert {name: pages(path, name) for name in model.complete} == model.complete
    assert len(list(path.glob("pages-*"))) == len(model.complete)
    assert len(incdump.check(path).levels) == 1


def test_any_damage_to_a_session_is_noticed_or_harmless(tmp_path: Path) -> None:
    """A short run of what was run for long."""
    dice = random.Random(5)
    write_level(tmp_path / "parent", 0, {f"pagemap-{PID}": [(0, 40, 6)]}, meta=b'{"generation": "abc"}')
    complete = 0
    for number in range(300):
        path = tmp_path / str(number)
        server = Server(path, "../parent", timeout=0.05)
        first, second = _any_session(dice)
        for _ in range(dice.randint(0, 3)):
            damage(dice.choice((first, second)), dice)
        # On a busy machine the server may find this client silent at any moment.
        with suppress(OSError, struct.error), Client(server, channels=2, parent="abc") as client:
            client.channels[0].settimeout(0.5)
            client.channels[1].settimeout(0.1)
            client.send(bytes(second), channel=1)
            client.hear(1, channel=1)
            client.channels[1].shutdown(socket.SHUT_WR)
            client.send(bytes(first))
            client.channels[0].shutdown(socket.SHUT_WR)
            client.hear(1)
        try:
            server.outcome()
        except IncdumpError:
            assert not path.exists()
        else:
            complete += 1
            assert len(incdump.check(path).levels) == 2
    assert complete > 50


def _any_session(dice: random.Random) -> tuple[bytearray, bytearray]:
    """A good session's messages, of two channels."""
    sent: tuple[list[bytes], list[bytes]] = ([], [])
    count = dice.randint(1, 8)
    for page in range(count):
        block = dice.choice((raw(1, page, noise(1)), packed(1, page, text(1)), zeros(1, page, 1)))
        sent[dice.randrange(2)].append(block)
    sent[1].append(zeros(1, count, 1, ANSWER))
    rows = [(0, count, PRESENT), (count, 3, IN_PARENT)]
    sent[0].extend((size(1, count + 1, (count, count + 1)), pagemap(1, *rows), file("mm-42.img", b"x")))
    if dice.random() < 0.5:
        sent[0].append(file("inventory.img", INVENTORY))
    sent[0].append(END)
    return bytearray(b"".join(sent[0])), bytearray(b"".join(sent[1]))
