"""A page server's session, against a client that says whatever a network may say."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

import incdump
from incdump.errors import BadImage, ConnectionLost, ImagesError, IncdumpError, ProtocolError, XferError
from incdump.images.images_dir import ImagesDir
from incdump.images.new_dir import NewImagesDir
from incdump.xfer.page_server import BUFFER, Session
from incdump.xfer.received import MOST_IMAGES, MOST_RUNS, RUNS_AT_ONCE, Received, ReceivedImages
from incdump.xfer.wire import Image
from tests.page_client import (
    ADD,
    ADD_F,
    CLOSE,
    FORCE_CLOSE,
    GET,
    HOLE,
    IN_PARENT,
    LONG,
    OPEN,
    PAGE,
    PRESENT,
    SHORT,
    PageClient,
    damage,
    header,
    noise,
    process,
    segment,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LAYOUTS = pytest.mark.parametrize("layout", [SHORT, LONG])
PID = 42
BASE = 0x7F00_0000_0000


class Server:
    """A session in a thread of its own.

    :ivar path: its images dir.
    """

    def __init__(
        self, path: Path, parent: str | None = None, *, max_bytes: int | None = None, timeout: float | None = 20
    ) -> None:
        self.path = path
        ours, self._theirs = socket.socketpair()
        ours.settimeout(30)
        self.sock = ours
        self._parent = parent
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._outcome: Received | BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        receiver = None
        try:
            with self._theirs:
                images = NewImagesDir.create(self.path, self._parent)
                above = None if images.parent is None else ImagesDir(images.parent)
                receiver = ReceivedImages(images, above, max_bytes=self._max_bytes)
                self._outcome = Session(self._theirs, receiver, timeout=self._timeout).run()
        except BaseException as error:
            self._outcome = error
            if receiver is not None:
                receiver.discard()

    def outcome(self) -> Received:
        """What has come; raises what the session raised."""
        self.sock.close()
        self._thread.join(60)
        assert not self._thread.is_alive()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


@contextmanager
def refused(
    path: Path, match: str, kind: type[IncdumpError] = ProtocolError, *, max_bytes: int | None = None
) -> Iterator[PageClient]:
    """A session that is to fail, leave nothing, and have been told from a complete one."""
    server = Server(path, max_bytes=max_bytes)
    with PageClient(server.sock) as client:
        with suppress(OSError):  # the server may close while the client still speaks
            yield client
        with pytest.raises(kind, match=match):
            server.outcome()
    assert not path.exists()


def write_parent(path: Path, images: dict[int, list[tuple[int, bytes]]]) -> None:
    """A finished parent: the pages of processes."""
    server = Server(path)
    client = PageClient(server.sock)
    for pid, runs in images.items():
        client.open(process(pid))
        for vaddr, data in runs:
            client.pages(vaddr, data)
    assert client.end() == bytes(4)
    server.outcome()


# -- what is to work ----------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("number", [77, 0])
def test_pages_are_where_the_client_said(tmp_path: Path, layout: int, number: int) -> None:
    sent = {BASE: noise(3), BASE + 3 * PAGE: noise(1), BASE + 100 * PAGE: noise(200), BASE + 900 * PAGE: noise(1)}
    shared = noise(7)
    server = Server(tmp_path / "1")
    client = PageClient(server.sock, layout)
    assert client.ask(process(PID)) == 0
    assert client.open(process(PID)) == 0
    for vaddr, data in sent.items():
        client.pages(vaddr, data)
    assert client.open(segment(number)) == 0
    client.pages(0, shared)
    assert client.end() == bytes(4)
    assert server.outcome() == Received(images=2, pages=212)

    assert len(incdump.check(tmp_path / "1").levels) == 1
    images = ImagesDir(tmp_path / "1")
    assert images.pids() == [PID]
    for vaddr, data in sent.items():
        assert images.read(PID, vaddr, len(data)) == data
    out = np.empty(len(shared), np.uint8)
    images.read_shmem_pages(number, np.array([[0, len(shared)]], np.uint64), out)
    assert out.tobytes() == shared
    assert json.loads((tmp_path / "1" / "incdump-received.json").read_text()) == {
        "version": 1,
        "images": 2,
        "pages": 212,
    }


def test_pages_images_are_numbered_as_crius_server_does(tmp_path: Path) -> None:
    write_parent(tmp_path / "1", {PID: [(BASE, noise(1))], 43: [(BASE, noise(1))]})
    names = sorted(path.name for path in (tmp_path / "1").glob("pages-*"))
    assert names == ["pages-65537.img", "pages-65538.img"]


@LAYOUTS
def test_it_makes_no_difference_how_the_bytes_come(tmp_path: Path, layout: int) -> None:
    dice = random.Random(layout)
    runs, vaddr = [], BASE
    for _ in range(120):
        vaddr += dice.randrange(3) * PAGE
        data = noise(dice.choice((1, 1, 1, 2, 5, 64, 130)))
        runs.append((vaddr, data))
        vaddr += len(data)
    stream = b"".join(
        header(layout, ADD_F, flags=PRESENT, pages=len(data) // PAGE, vaddr=vaddr, dst_id=process(PID)) + data
        for vaddr, data in runs
    )
    stream = header(layout, OPEN, dst_id=process(PID)) + stream + header(layout, FORCE_CLOSE)
    for number, most in enumerate((len(stream), 1 << 20, BUFFER, 5000, 700)):
        server = Server(tmp_path / str(number))
        at = 0
        while at < len(stream):
            size = dice.randint(1, most)
            server.sock.sendall(stream[at : at + size])
            at += size
        assert server.sock.recv(4) == bytes(4)
        assert server.outcome().pages == sum(len(data) for _, data in runs) // PAGE
        images = ImagesDir(tmp_path / str(number))
        for vaddr, data in runs:
            assert images.read(PID, vaddr, len(data)) == data


def test_a_message_may_come_byte_by_byte(tmp_path: Path) -> None:
    for layout in (SHORT, LONG):
        server = Server(tmp_path / str(layout))
        data = noise(1)
        stream = header(layout, OPEN, dst_id=process(PID))
        stream += header(layout, ADD_F, flags=PRESENT, pages=1, vaddr=BASE, dst_id=process(PID)) + data
        for byte in stream + header(layout, FORCE_CLOSE):
            server.sock.sendall(bytes([byte]))
        assert server.outcome().pages == 1
        assert ImagesDir(tmp_path / str(layout)).read(PID, BASE, PAGE) == data


def test_holes_are_filled_by_the_parent(tmp_path: Path) -> None:
    old, new = noise(6), noise(2)
    write_parent(tmp_path / "1", {PID: [(BASE, old)]})
    server = Server(tmp_path / "2", "../1")
    client = PageClient(server.sock)
    assert client.ask(process(PID)) == 1
    assert client.ask(process(43)) == 0
    assert client.open(process(PID)) == 1
    client.hole(BASE, 2)
    client.pages(BASE + 2 * PAGE, new)
    client.hole(BASE + 4 * PAGE, 2)
    assert client.open(process(43)) == 0
    client.pages(BASE, new)
    assert client.end() == bytes(4)
    assert server.outcome() == Received(images=2, pages=4, holes=4)
    assert len(incdump.check(tmp_path / "2").levels) == 2
    assert ImagesDir(tmp_path / "2").read(PID, BASE, 6 * PAGE) == old[: 2 * PAGE] + new + old[4 * PAGE :]


def test_old_clients_need_not_open_and_say_pages_and_holes_in_other_words(tmp_path: Path) -> None:
    old, new = noise(2), noise(1)
    write_parent(tmp_path / "1", {PID: [(BASE, old)]})
    server = Server(tmp_path / "2", "../1")
    with PageClient(server.sock) as client:
        client.say(ADD, pages=1, vaddr=BASE, dst_id=PID << 8 | 11)
        server.sock.sendall(new)
        client.say(HOLE, pages=1, vaddr=BASE + PAGE, dst_id=PID << 8 | 11)
        assert client.end() == bytes(4)
        assert server.outcome() == Received(images=1, pages=1, holes=1)
    assert ImagesDir(tmp_path / "2").read(PID, BASE, 2 * PAGE) == new + old[PAGE:]


@LAYOUTS
def test_a_client_with_nothing_to_say_is_complete(tmp_path: Path, layout: int) -> None:
    server = Server(tmp_path / "1")
    assert PageClient(server.sock, layout).end() == bytes(4)
    assert server.outcome() == Received()
    assert (tmp_path / "1" / "incdump-received.json").exists()


def test_more_runs_than_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RUNS_AT_ONCE == 32768
    monkeypatch.setattr("incdump.xfer.received.RUNS_AT_ONCE", 7)
    sent = [(BASE + 2 * number * PAGE, noise(1)) for number in range(100)]
    write_parent(tmp_path / "1", {PID: sent})
    images = ImagesDir(tmp_path / "1")
    for vaddr, data in sent:
        assert images.read(PID, vaddr, PAGE) == data


def test_what_is_there_already_is_given_back_by_the_parents(tmp_path: Path) -> None:
    def blocks(name: str) -> int:
        return (tmp_path / name / "pages-65537.img").stat().st_blocks

    write_parent(tmp_path / "1", {PID: [(BASE, noise(64))]})
    server = Server(tmp_path / "2", "../1")
    client = PageClient(server.sock)
    client.open(process(PID))
    client.pages(BASE, noise(16))
    client.hole(BASE + 16 * PAGE, 48)
    client.end()
    server.outcome()
    images = NewImagesDir.create(tmp_path / "3", "../2")
    receiver = ReceivedImages(images, ImagesDir(tmp_path / "2"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        kept = noise(24)
        open_and_send = header(SHORT, OPEN, dst_id=process(PID))
        open_and_send += (
            header(SHORT, ADD_F, flags=PRESENT, pages=24, vaddr=BASE + 8 * PAGE, dst_id=process(PID)) + kept
        )
        ours.sendall(open_and_send + header(SHORT, FORCE_CLOSE))
        before = blocks("1"), blocks("2")
        received = Session(theirs, receiver).run()
    assert (blocks("1"), blocks("2")) == before  # nothing before everything has come
    receiver.dedup()
    assert received.punched == (8 + 24) * PAGE  # pages 8 to 15 of the second; 8 to 31 of the first
    assert before[0] - blocks("1") == 24 * PAGE // 512
    assert before[1] - blocks("2") == 8 * PAGE // 512
    assert ImagesDir(tmp_path / "3").read(PID, BASE + 8 * PAGE, 24 * PAGE) == kept
    assert len(incdump.check(tmp_path / "3").levels) == 3


# -- what is to be refused ----------------------------------------------------------------------------------------

BAD_RUNS = {
    "is not page aligned": [(BASE + 1, 1, PRESENT)],
    "has no pages": [(BASE, 0, PRESENT)],
    "ends beyond the address space": [(2**64 - PAGE, 1, PRESENT)],
    "impossible flags": [(BASE, 1, 0)],
    "is left to a lazy-pages server": [(BASE, 1, 2)],
    "has impossible flags": [(BASE, 1, IN_PARENT | PRESENT)],
    "flags": [(BASE, 1, 0x8001)],
    "begins before the end": [(BASE, 5, PRESENT), (BASE + 4 * PAGE, 1, PRESENT)],
    "before the end of the run before it": [(BASE + PAGE, 1, PRESENT), (BASE, 1, PRESENT)],
}


@pytest.mark.parametrize("why", BAD_RUNS)
def test_a_run_that_no_pagemap_may_have_is_refused(tmp_path: Path, why: str) -> None:
    with refused(tmp_path / "1", why) as client:
        client.open(process(PID))
        for vaddr, pages, flags in BAD_RUNS[why]:
            client.say(ADD_F, flags=flags, pages=pages, vaddr=vaddr, dst_id=process(PID))
            client.sock.sendall(bytes(PAGE * pages) if flags & 4 else b"")
        client.end()


OPENED = header(SHORT, OPEN, dst_id=process(PID))
BAD_WORDS = {
    "unknown command": header(SHORT, 99, dst_id=process(PID)),
    "unknown kind": OPENED + header(SHORT, OPEN, dst_id=PID << 8 | 3),
    "asks for pages": OPENED + header(SHORT, GET, pages=1, vaddr=BASE, dst_id=process(PID)),
    "sends pagemap-42 twice": OPENED + header(SHORT, OPEN, dst_id=process(43)) + OPENED,
    "pagemap-42 twice": OPENED + OPENED,
    "pagemap-0, which cannot be": header(SHORT, OPEN, dst_id=process(0)),
    "pagemap-2147483648, which cannot be": header(SHORT, OPEN, dst_id=process(1 << 31)),
    "more than there can be": header(LONG, OPEN, dst_id=process(PID))
    + header(LONG, ADD_F, flags=PRESENT, pages=1 << 60, vaddr=BASE, dst_id=process(PID)),
    "parent images that are not here": OPENED
    + header(SHORT, ADD_F, flags=IN_PARENT, pages=1, vaddr=BASE, dst_id=process(PID))
    + header(SHORT, CLOSE),
}


@pytest.mark.parametrize("why", BAD_WORDS)
def test_what_the_protocol_does_not_have_is_refused(tmp_path: Path, why: str) -> None:
    with refused(tmp_path / "1", why) as client:
        client.sock.sendall(BAD_WORDS[why])
        client.hear(1)


def test_a_hole_that_the_parent_does_not_fill_is_refused(tmp_path: Path) -> None:
    write_parent(tmp_path / "1", {PID: [(BASE, noise(4))]})
    server = Server(tmp_path / "2", "../1")
    with PageClient(server.sock) as client:
        client.open(process(PID))
        client.hole(BASE, 5)
        assert client.end() == b""
        with pytest.raises(ProtocolError, match=f"the page at {BASE + 4 * PAGE:#x}"):
            server.outcome()
    assert not (tmp_path / "2").exists()
    assert len(incdump.check(tmp_path / "1").levels) == 1


def test_a_damaged_parent_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    write_parent(tmp_path / "1", {PID: [(BASE, noise(4))]})
    (tmp_path / "1" / "pagemap-42.img").write_bytes(b"nonsense")
    server = Server(tmp_path / "2", "../1")
    with PageClient(server.sock) as client:
        client.say(OPEN, dst_id=process(PID))
        assert client.hear(1) == b""
        with pytest.raises(BadImage):
            server.outcome()
    assert not (tmp_path / "2").exists()


def test_more_images_than_there_may_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_IMAGES == 65536
    monkeypatch.setattr("incdump.xfer.received.MOST_IMAGES", 20)
    with refused(tmp_path / "1", "more than 20 images") as client:
        for pid in range(1, 22):
            client.say(OPEN, dst_id=process(pid))
        client.hear(1)


def test_more_runs_than_there_may_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_RUNS == 1 << 24
    monkeypatch.setattr("incdump.xfer.received.MOST_RUNS", 20)
    with refused(tmp_path / "1", "more of pagemap-42.img than there can be") as client:
        client.open(process(PID))
        for number in range(21):
            client.pages(BASE + 2 * number * PAGE, noise(1))
        client.end()


def test_a_full_disk_when_an_image_is_opened_costs_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    images = NewImagesDir.create(tmp_path / "1")
    receiver = ReceivedImages(images, None)
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr("incdump.xfer.received.os.write", full)
        with pytest.raises(ImagesError, match="No space left"):
            receiver.open(Image("pagemap", PID))
    assert len(os.listdir("/proc/self/fd")) == before
    receiver.discard()
    assert not (tmp_path / "1").exists()


def test_more_bytes_than_allowed_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with refused(tmp_path / "1", "--max-bytes", XferError, max_bytes=10 * PAGE) as client:
        client.open(process(PID))
        client.pages(BASE, noise(10))
        client.say(ADD_F, flags=PRESENT, pages=1, vaddr=BASE + 10 * PAGE, dst_id=process(PID))
        client.hear(1)


@pytest.mark.parametrize("at", range(8))
def test_a_client_that_goes_leaves_nothing(tmp_path: Path, at: int) -> None:
    stream = header(SHORT, OPEN, dst_id=process(PID))
    stream += header(SHORT, ADD_F, flags=PRESENT, pages=100, vaddr=BASE, dst_id=process(PID)) + noise(100)
    stream += header(SHORT, CLOSE)
    cut = [0, 1, 23, 24, 47, 48, 48 + 50 * PAGE + 7, len(stream) - 1][at]
    with refused(tmp_path / "1", "went before it had said", ConnectionLost) as client:
        client.sock.sendall(stream[:cut])


def test_a_silent_client_is_given_up(tmp_path: Path) -> None:
    server = Server(tmp_path / "1", timeout=0.2)
    with PageClient(server.sock) as client:
        client.open(process(PID))
        client.say(ADD_F, flags=PRESENT, pages=1000, vaddr=BASE, dst_id=process(PID))
        client.sock.sendall(noise(3))
        assert client.hear(1) == b""
        with pytest.raises(ConnectionLost, match=r"silent for 0\.2 s"):
            server.outcome()
    assert not (tmp_path / "1").exists()


def test_a_full_disk_ends_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.writev", full)
    for number, call in enumerate(("writev", "splice")):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{call}", full if call == "writev" else _spliced_to_a(full))
            with refused(tmp_path / str(number), "No space left", ImagesError) as client:
                client.open(process(PID))
                client.pages(BASE, noise(100 if call == "splice" else 5))
                client.end()


def test_a_file_system_that_cannot_be_spliced_to_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> int:
        raise OSError(22, os.strerror(22))

    monkeypatch.setattr("os.splice", _spliced_to_a(cannot))
    sent = [(BASE, noise(100)), (BASE + 200 * PAGE, noise(700)), (BASE + 1000 * PAGE, noise(1))]
    write_parent(tmp_path / "1", {PID: sent})
    images = ImagesDir(tmp_path / "1")
    for vaddr, data in sent:
        assert images.read(PID, vaddr, len(data)) == data


def _spliced_to_a(file: Callable[..., int]) -> Callable[..., int]:
    """splice(2), to a file of some kind; from a socket it works."""
    real = os.splice

    def splice(source: int, to: int, size: int, **_: object) -> int:
        return real(source, to, size) if stat.S_ISSOCK(os.fstat(source).st_mode) else file()

    return splice


def test_any_damage_to_a_session_is_noticed_or_harmless(tmp_path: Path) -> None:
    """A short run of what was run for long; the long run's figure is in docs/architecture.md."""
    dice = random.Random(8)
    write_parent(tmp_path / "parent", {PID: [(BASE, noise(40))]})
    complete = 0
    for number in range(150):
        layout = dice.choice((SHORT, LONG))
        parts = [header(layout, OPEN, dst_id=process(PID))]
        vaddr = BASE
        for _ in range(dice.randint(0, 12)):
            pages = dice.randint(1, 3)
            is_hole = dice.random() < 0.4
            flags = IN_PARENT if is_hole else PRESENT
            parts.append(header(layout, ADD_F, flags=flags, pages=pages, vaddr=vaddr, dst_id=process(PID)))
            parts.append(b"" if is_hole else noise(pages))
            vaddr += pages * PAGE
        stream = bytearray(b"".join([*parts, header(layout, FORCE_CLOSE)]))
        for _ in range(dice.randint(0, 3)):
            damage(stream, dice)
        path = tmp_path / str(number)
        server = Server(path, "../parent", timeout=0.05)
        with suppress(OSError):
            server.sock.sendall(stream)
            server.sock.shutdown(socket.SHUT_WR)
        try:
            server.outcome()
        except IncdumpError:
            assert not path.exists()
        else:
            complete += 1
            assert len(incdump.check(path).levels) == 2
    assert complete > 20
