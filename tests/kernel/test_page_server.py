"""``incdump page-server`` as a command: where it listens, what it says, what a session leaves, how it ends."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import incdump
from incdump.images.images_dir import ImagesDir
from tests import command
from tests.command import read_until, refused, start, wait
from tests.page_client import PAGE, PageClient, noise, process

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel

PID = 42
BASE = 0x7F00_0000_0000


@contextmanager
def serving(*options: object) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A page server and its port."""
    server = start("page-server", "--json", *options)
    try:
        told = json.loads(read_until(server.stdout, b"\n"))
        assert told["event"] == "listening"
        assert told["address"] == "127.0.0.1"
        yield server, told["port"]
    finally:
        server.kill()
        server.communicate()


def session(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What the server says of its next session."""
    told: dict[str, Any] = json.loads(read_until(server.stdout, b"\n"))
    assert told.pop("event") == "session"
    return told


def send(port: int, data: bytes, *, holes: int = 0) -> None:
    """A whole session."""
    with PageClient.connect(port) as client:
        client.open(process(PID))
        client.pages(BASE, data)
        if holes:
            client.hole(BASE + len(data), holes)
        assert client.end() == bytes(4)


def test_once_is_one_session_into_the_directory_itself(images_root: Path) -> None:
    data = noise(300)
    with serving("-D", images_root / "1", "--once") as (server, port):
        send(port, data)
        told = session(server)
        assert told["images_dir"] == str(images_root / "1")
        assert (told["pages"], told["holes"], told["images"], told["error"]) == (300, 0, 1, None)
        assert wait(server).code == 0
    assert len(incdump.check(images_root / "1").levels) == 1
    assert ImagesDir(images_root / "1").read(PID, BASE, len(data)) == data


def test_for_people_it_says_where_it_listens_and_what_came(images_root: Path) -> None:
    server = start("page-server", "-D", images_root / "1", "--once")
    words = read_until(server.stdout, b"\n").split()
    assert words[:-1] == b"listening on 127.0.0.1 port".split()
    send(int(words[-1]), noise(3))
    done = wait(server)
    assert done.code == 0
    assert f"complete: 3 pages of 1 image into {images_root / '1'}" in done.out
    assert done.err == ""


def test_rounds_are_a_chain_and_a_session_that_breaks_is_none(images_root: Path) -> None:
    old, new = noise(6), noise(2)
    with serving("-D", images_root / "all", "--rounds", 2) as (server, port):
        send(port, old)
        assert session(server)["images_dir"] == str(images_root / "all" / "1")
        with PageClient.connect(port) as client:
            client.open(process(PID))
            client.pages(BASE, noise(100))
        told = session(server)
        assert told["images_dir"] is None
        assert told["kind"] == "ConnectionLost"
        assert "went before" in told["error"]
        assert os.listdir(images_root / "all") == ["1"]
        send(port, new, holes=4)
        assert session(server)["holes"] == 4
        assert wait(server).code == 0
    newest = images_root / "all" / "2"
    assert len(incdump.check(newest).levels) == 2
    assert ImagesDir(newest).read(PID, BASE, 6 * PAGE) == new + old[2 * PAGE :]


def test_a_server_that_is_started_again_goes_on_with_the_chain(images_root: Path) -> None:
    for number, pages in ((1, 5), (2, 2), (3, 1)):
        with serving("-D", images_root, "--rounds", 1) as (server, port):
            send(port, noise(pages), holes=5 - pages)
            assert session(server)["images_dir"] == str(images_root / str(number))
            assert wait(server).code == 0
    assert len(incdump.check(images_root / "3").levels) == 3


def test_a_server_that_is_started_again_takes_no_other_parent(images_root: Path) -> None:
    """Its next round would else have holes that are filled from before the rounds that came since."""
    with serving("-D", images_root / "base", "--once") as (server, port):
        send(port, noise(4))
        wait(server)
    options = ("-D", images_root / "rounds", "--rounds", 1, "--prev-images-dir", "../base")
    with serving(*options) as (server, port):
        send(port, noise(2), holes=2)
        wait(server)
    refused(command.incdump("page-server", *options), 4, "holds 1 sessions already", "leave --prev-images-dir out")


def test_what_a_killed_server_left_is_said_when_it_is_started_again(images_root: Path) -> None:
    with serving("-D", images_root) as (server, port), PageClient.connect(port) as client:
        client.open(process(PID))
        server.kill()
        server.wait()
    refused(command.incdump("page-server", "-D", images_root), 4, "holds an unfinished dump")


def test_a_client_is_hung_up_on_when_the_server_ends(images_root: Path) -> None:
    for _ in range(5):
        with serving("-D", images_root) as (server, port), PageClient.connect(port) as client:
            client.open(process(PID))
            streaming = threading.Thread(target=_stream, args=(client,))
            streaming.start()
            time.sleep(0.05)
            server.send_signal(signal.SIGTERM)
            streaming.join(5)
            assert not streaming.is_alive()
            assert wait(server).code == 128 + signal.SIGTERM


def _stream(client: PageClient) -> None:
    data = noise(1000)
    with suppress(OSError):
        for number in range(100_000):
            client.pages(BASE + number * len(data), data)


def test_the_first_session_stands_on_the_parent_images_that_were_named(images_root: Path) -> None:
    with serving("-D", images_root / "first", "--once") as (server, port):
        send(port, noise(4))
        assert session(server)["error"] is None
    with serving("-D", images_root / "second", "--prev-images-dir", "../first") as (server, port):
        send(port, noise(2), holes=2)
        assert session(server)["error"] is None
    assert len(incdump.check(images_root / "second/1").levels) == 2


def test_clients_are_served_one_after_the_other(images_root: Path) -> None:
    with serving("-D", images_root) as (server, port):
        with PageClient.connect(port) as first, PageClient.connect(port) as second:
            first.open(process(PID))  # before the other says a word: who is heard first is served first
            second.say(4, dst_id=process(PID))
            first.pages(BASE, noise(1))
            assert first.end() == bytes(4)
            assert session(server)["images_dir"] == str(images_root / "1")
            assert second.hear(1) == b"\1"
            assert second.end() == bytes(4)
        assert session(server)["images_dir"] == str(images_root / "2")


def test_a_client_that_stalls_is_given_up_and_the_next_one_served(images_root: Path) -> None:
    with serving("-D", images_root, "--timeout", 0.3) as (server, port), PageClient.connect(port) as stalling:
        stalling.open(process(PID))
        told = session(server)
        assert "silent for 0.3 s" in told["error"]
        assert os.listdir(images_root) == []
        send(port, noise(1))
        assert session(server)["error"] is None


def test_a_full_disk_ends_the_session_and_not_the_server(tiny_tmpfs: Path) -> None:
    with serving("-D", tiny_tmpfs) as (server, port):
        with PageClient.connect(port) as client:
            client.open(process(PID))
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                client.pages(BASE, noise(20_000))
        told = session(server)
        assert (told["errno"], told["images_dir"]) == ("ENOSPC", None)
        assert os.listdir(tiny_tmpfs) == []
        send(port, noise(10))
        assert session(server)["images_dir"] == str(tiny_tmpfs / "1")


def test_the_only_session_that_breaks_is_the_servers_failure(images_root: Path) -> None:
    with serving("-D", images_root / "1", "--once") as (server, port):
        with PageClient.connect(port) as client:
            client.say(99, dst_id=process(PID))
            assert client.hear(1) == b""
        done = wait(server)
        assert done.code == 8
        assert "unknown command" in done.error
        assert done.json["kind"] == "ProtocolError"
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_waits_may_be_told_to_end(images_root: Path, number: int) -> None:
    with serving("-D", images_root) as (server, port):
        send(port, noise(1))
        session(server)
        server.send_signal(number)
        assert wait(server) == command.Done(0, "", "")
    assert os.listdir(images_root) == ["1"]


def test_a_session_that_a_signal_ends_leaves_nothing(images_root: Path) -> None:
    with serving("-D", images_root) as (server, port), PageClient.connect(port) as client:
        client.open(process(PID))
        client.pages(BASE, noise(500))
        server.send_signal(signal.SIGTERM)
        assert wait(server).code == 128 + signal.SIGTERM
        assert os.listdir(images_root) == []


def test_a_server_that_is_killed_leaves_nothing_that_passes_for_images(images_root: Path) -> None:
    with serving("-D", images_root) as (server, port), PageClient.connect(port) as client:
        client.open(process(PID))
        client.pages(BASE, noise(500))
        assert client.ask(process(PID)) == 0  # so that all has come
        server.kill()
        server.wait()
    with pytest.raises(incdump.UnfinishedImages):
        incdump.check(images_root / "1")


def test_it_says_on_a_descriptor_that_it_listens(images_root: Path) -> None:
    reader, writer = os.pipe()
    server = start("page-server", "-D", images_root, "--status-fd", writer, pass_fds=[writer])
    os.close(writer)
    with open(reader, "rb") as status:
        assert status.read() == b"\0"
    server.send_signal(signal.SIGTERM)
    assert wait(server).code == 0


def test_memory_does_not_grow_with_what_comes(images_root: Path) -> None:
    def peak(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    with serving("-D", images_root) as (server, port):
        send(port, noise(10))
        session(server)
        before = peak(server.pid)
        data = noise(4096)
        with PageClient.connect(port) as client:
            client.open(process(PID))
            for number in range(16):
                client.pages(BASE + number * 2 * len(data), data)
            assert client.end() == bytes(4)
        assert session(server)["pages"] == 16 * 4096
        assert peak(server.pid) - before < 4 << 20


def test_what_cannot_be_served_is_refused_at_once(images_root: Path) -> None:
    with serving("-D", images_root / "1", "--once") as (server, port):
        send(port, noise(1))
        wait(server)
    for words, code, options in (
        (("already holds a dump",), 4, ("-D", images_root / "1", "--once")),
        (("does not exist",), 4, ("-D", images_root / "2", "--once", "--prev-images-dir", "../none")),
        (("cannot listen on 192.0.2.1",), 8, ("-D", images_root / "2", "--address", "192.0.2.1")),
        (("cannot listen on no.such.host.invalid",), 8, ("-D", images_root / "2", "--address", "no.such.host.invalid")),
        (("does not exist",), 4, ("-D", images_root / "2", "--prev-images-dir", "../none")),
        (("is no time",), 2, ("-D", images_root / "2", "--timeout", "nan")),
        (("is no time",), 2, ("-D", images_root / "2", "--timeout", "inf")),
        (("cannot listen on",), 8, ("-D", images_root / "2", "--address", "a" * 70 + ".b")),
        (("either --once or --rounds",), 2, ("-D", images_root / "2", "--once", "--rounds", 3)),
    ):
        refused(command.incdump("page-server", *options), code, *words)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(command.incdump("page-server", "-D", images_root / "2", "--port", port), 8, f"port {port}", "in use")
    assert not (images_root / "2").exists()


@contextmanager
def on_a_terminal(*options: object) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """A page server whose stderr is a terminal; it, its port, and the terminal's other end."""
    ours, theirs = os.openpty()
    server = command.start("page-server", *options, stderr=theirs)
    os.close(theirs)
    try:
        yield server, int(read_until(server.stdout, b"\n").split()[-1]), ours
    finally:
        server.kill()
        server.communicate()
        os.close(ours)


def read_terminal(fd: int, seconds: float) -> bytes:
    """What comes on a terminal within so long."""
    got, until = b"", time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            try:
                got += os.read(fd, 4096)
            except OSError:  # the other end is closed
                return got
    return got


def test_what_is_coming_in_is_shown_on_a_terminal(images_root: Path) -> None:
    with on_a_terminal("-D", images_root, "--rounds", 1) as (server, port, terminal):
        with PageClient.connect(port) as client:
            client.open(process(PID))
            client.pages(BASE, noise(512))
            client.pages(BASE + 4096 * PAGE, noise(512))
            shown = read_terminal(terminal, 1.5).decode()
            lines = shown.split("\r\x1b[2K")
            assert re.match(r"4\.0 MiB of 127\.0\.0\.1:\d+, [\d.]+ MiB/s, [\d.]+ s, into .*", lines[-1])
            assert client.end() == bytes(4)
        done = wait(server)
        assert re.search(r"complete: 1,024 pages of 1 image into .*/1 \(4\.0 MiB in [\d.]+ s\)", done.out)
        assert read_terminal(terminal, 0.5).decode().endswith("\r\x1b[2K")


def test_who_wants_quiet_has_it(images_root: Path) -> None:
    ours, theirs = os.openpty()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ready, told = os.pipe()
    options = ("-q", "-D", images_root, "--rounds", 1, "--port", port, "--status-fd", told)
    server = command.start("page-server", *options, stderr=theirs, pass_fds=[told])
    os.close(theirs)
    os.close(told)
    assert os.read(ready, 1) == b"\0"
    with PageClient.connect(port) as client:
        client.open(process(PID))
        client.pages(BASE, noise(512))
        assert read_terminal(ours, 1.2) == b""
        assert client.end() == bytes(4)
    done = wait(server)
    assert (done.code, done.out) == (0, "")
    assert read_terminal(ours, 0.2) == b""
    assert len(incdump.check(images_root / "1").levels) == 1
    os.close(ours)
    os.close(ready)
