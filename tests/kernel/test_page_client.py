"""Dumps whose pages go to a page server: every page is right there, whatever becomes of the connection."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import threading
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest

import incdump
from incdump import (
    BadImage,
    ConnectionLost,
    DumpOptions,
    PageServer,
    PageServerOptions,
    SessionReport,
    TrackerLost,
    XferError,
)
from incdump.engine.dump import DumpRun
from incdump.xfer.page_client import PageClient
from incdump.xfer.wire import Image
from tests import command, oracle
from tests.command import read_until, refused, start, wait
from tests.kernel.support import Chain, Odd, assert_untouched, carry_on, open_fds, require_tracker
from tests.page_client import LONG, PAGE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from incdump.model.options import ProtocolName, TlsFiles, TrackerName
    from tests.targets.build import Target

pytestmark = pytest.mark.kernel

SLOWER = float(os.environ.get("INCDUMP_TEST_SLOWER", "1"))
"""On an emulated machine, which the target shares with both ends, an answer may take long."""

PROTOCOLS: tuple[ProtocolName, ...] = ("auto", "criu")
TRACKERS: tuple[TrackerName, ...] = ("uffd-wp", "soft-dirty", "content")


class Served:
    """A page server in this event loop.

    :ivar path: its images dir.
    :ivar reports: of its sessions so far.
    """

    def __init__(self, path: Path, port: int) -> None:
        self.path = path
        self.port = port
        self.reports: list[SessionReport] = []

    @property
    def newest(self) -> Path:
        """The directory of the last complete session."""
        return max((path for path in self.path.iterdir()), key=lambda path: int(path.name))

    async def told(self, number: int) -> SessionReport:
        """The report of a session, which may end after its client."""
        with anyio.fail_after(30 * SLOWER):
            while len(self.reports) < number:
                await anyio.sleep(0.005)
        return self.reports[number - 1]


@asynccontextmanager
async def page_server(
    path: Path, *, timeout: float = 20 * SLOWER, tls: TlsFiles | None = None
) -> AsyncIterator[Served]:
    """A server that serves any number of sessions."""
    async with (
        PageServer(path, options=PageServerOptions(timeout=timeout, tls=tls)) as server,
        anyio.create_task_group() as tasks,
    ):
        served = Served(path, server.port)
        tasks.start_soon(server.serve, served.reports.append)
        yield served
        tasks.cancel_scope.cancel()


def to(
    port: int, tracker: TrackerName = "auto", page_server_timeout: float = 30 * SLOWER, **options: object
) -> DumpOptions:
    where = ("127.0.0.1", port)
    return DumpOptions(tracker=tracker, page_server=where, page_server_timeout=page_server_timeout, **options)  # type: ignore[arg-type]


async def prove(chain: Chain, served: Served, options: DumpOptions) -> oracle.Report:
    """A last dump to the server, compared with the tree as it stands; then the tree goes on and checks itself."""
    pids = await chain.dump_stopped(options)
    try:
        report = oracle.compare(served.newest, pids, finished=False)
        incdump.check(served.newest)
    finally:
        carry_on(pids.values())
    assert report.ok, report
    assert set(pids.values()) == set(chain.last.pids)
    assert_untouched(chain.target)
    chain.target.check()
    return report


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.asyncio
async def test_a_chain_at_a_page_server_is_exact(
    churn: Callable[..., Target], images_root: Path, tracker: TrackerName, protocol: ProtocolName
) -> None:
    require_tracker(tracker)
    target = churn(seed=71, threads=3, processes=2, mib=8, free_run=True, dirty_rate=20000)
    async with page_server(images_root / "served") as served:
        chain = Chain(target, images_root, to(served.port, tracker, page_server_protocol=protocol))
        for _ in range(4):
            await chain.predump()
        report = await prove(chain, served, chain.options)
        last = await served.told(5)
        assert report.from_parents
        assert all(r.incremental for r in chain.rounds[1:])
        stats = chain.last.stats
        assert last.pages == stats.pages_written + stats.shpages_written
        assert last.holes == stats.pages_skipped_parent + stats.shpages_skipped_parent
        assert stats.bytes_written == sum(p.stat().st_size for p in served.newest.glob("pages-*.img"))
    assert list(images_root.glob("0*/pages-*")) == []


@pytest.mark.asyncio
async def test_the_images_dir_has_the_pagemaps_and_says_where_the_pages_are(
    rewriter: Callable[..., Target], images_root: Path
) -> None:
    target = rewriter(mib=8, vmas=20)
    async with page_server(images_root / "served") as served:
        chain = Chain(target, images_root, to(served.port))
        await chain.predump()
        await chain.predump()
        here = images_root / "002"
        assert json.loads((here / "incdump.json").read_text())["page_server"] == f"127.0.0.1 port {served.port}"
        ours, theirs = incdump.ImagesDir(here), incdump.ImagesDir(served.newest)
        assert np.array_equal(ours.covered(target.pid), theirs.covered(target.pid))
        with pytest.raises(BadImage, match=f"sent to the page server at 127.0.0.1 port {served.port}; put its images"):
            incdump.check(here)
        # Put together, in whichever direction, they are one images dir.
        for pages in theirs.path.glob("pages-*"):
            os.link(pages, here / pages.name)
        first = images_root / "001"
        for pages in (images_root / "served" / "1").glob("pages-*"):
            os.link(pages, first / pages.name)
        assert len(incdump.check(here).levels) == 2


@pytest.mark.asyncio
async def test_a_dump_into_a_directory_goes_on_from_pages_at_a_server(
    rewriter: Callable[..., Target], images_root: Path
) -> None:
    target = rewriter(mib=16)
    async with page_server(images_root / "served") as served:
        chain = Chain(target, images_root, to(served.port))
        await chain.predump()
        target.dirty(10, seed=1)
        await chain.predump()
    target.dirty(5, seed=2)
    await chain.dump(DumpOptions(afterwards="stopped"))
    assert chain.last.incremental
    assert chain.last.stats.pages_skipped_parent > 3000
    for number in (1, 2):  # the pages are fetched now
        for path in (images_root / "served" / str(number)).glob("pages-*"):
            os.link(path, images_root / f"{number:03}" / path.name)
    pids = oracle.tree(target.pid)
    try:
        report = oracle.compare(chain.last.images_dir, pids)
    finally:
        carry_on(pids.values())
    assert report.ok, report
    incdump.check(chain.last.images_dir)


@pytest.mark.asyncio
async def test_what_the_server_does_not_have_is_sent_whole(churn: Callable[..., Target], images_root: Path) -> None:
    target = churn(seed=73, mib=4)
    chain = Chain(target, images_root)
    await chain.predump()  # into a directory
    async with page_server(images_root / "served") as served:
        with pytest.raises(TrackerLost, match="the page server has no parent images"):
            await chain.predump(to(served.port, require_incremental=True))
        await chain.predump(to(served.port))
        assert not chain.last.incremental
        assert (
            f"the page server has no parent images of process {target.pid}: all of it is dumped" in chain.last.warnings
        )
        assert (await served.told(2)).holes == 0
        await prove(chain, served, to(served.port))
        assert chain.last.incremental


# -- connections that break ---------------------------------------------------------------------------------------


class Cutter:
    """Forwards connections to a port, and cuts them all after a number of bytes that went to it, of all together.

    :ivar port: where it listens.
    :ivar passed: the bytes since `begin`.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._after: int | None = None
        self.passed = 0
        threading.Thread(target=self._run, daemon=True).start()

    def begin(self, after: int | None = None) -> None:
        """Cut what comes from now on after so many bytes; None: never."""
        with self._lock:
            self._after, self.passed = after, 0

    def close(self) -> None:
        self._listener.close()
        self._cut()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                with self._lock:
                    self._open |= {client, server}
                threading.Thread(target=self._back, args=(server, client), daemon=True).start()
                threading.Thread(target=self._forth, args=(client, server), daemon=True).start()

    def _forth(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                may_pass = self._may_pass(len(data))
                server.sendall(data[:may_pass])
                if may_pass < len(data):
                    self._cut()
                    return
            server.shutdown(socket.SHUT_WR)

    def _may_pass(self, size: int) -> int:
        with self._lock:
            if self._after is not None:
                size = max(0, min(size, self._after - self.passed))
            self.passed += size
            return size

    def _cut(self) -> None:
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
        with self._lock:
            ends, self._open = self._open & {server, client}, self._open - {server, client}
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def cutter(port: int) -> Iterator[Cutter]:
    found = Cutter(port)
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("tracker", ["uffd-wp", "soft-dirty"])
@pytest.mark.timeout(600)
@pytest.mark.asyncio
async def test_connections_that_are_cut_anywhere_cost_no_write(
    churn: Callable[..., Target], images_root: Path, tracker: TrackerName, protocol: ProtocolName
) -> None:
    require_tracker(tracker)
    dice = random.Random(5)
    target = churn(seed=72, threads=3, processes=2, mib=4, free_run=True, dirty_rate=20000)
    cut, rounds = 0, 0
    async with page_server(images_root / "served") as served:
        with cutter(served.port) as between:
            chain = Chain(target, images_root, to(between.port, tracker, page_server_protocol=protocol))
            await chain.predump()
            whole = between.passed
            while rounds < 50:
                rounds += 1
                # Anywhere in what a round sends, its first and last words more often.
                edge = dice.choice((dice.randrange(200), whole - dice.randrange(60)))
                between.begin(max(0, dice.choice((edge, dice.randrange(whole)))))
                try:
                    await (chain.dump() if rounds % 3 == 0 else chain.predump())
                    whole = between.passed
                except XferError:
                    cut += 1
                    assert not chain.root.joinpath(f"{chain.attempts:03}").exists()
                    assert_untouched(target)
                between.begin()
                if rounds % 10 == 0:
                    await prove(chain, served, chain.options)
                    assert chain.last.incremental
    assert cut > 25
    target.quit()


@pytest.mark.asyncio
async def test_a_process_that_exits_as_the_connection_breaks_leaves_no_descriptor_behind(
    images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of it here, although the server cannot be told to drop its pages image."""
    require_tracker("uffd-wp")
    prepare = DumpRun._prepare_tree
    held: list[int] = []
    with Odd() as odd:
        (child,) = odd.do("fork")

        def prepare_and_break(run: DumpRun) -> None:
            prepare(run)
            held.append(open_fds().count("anon_inode:[userfaultfd]"))
            odd.do(f"reap {child}")
            assert run._sending is not None
            run._sending.break_off()

        monkeypatch.setattr(DumpRun, "_prepare_tree", prepare_and_break)
        async with page_server(images_root / "served") as served:
            with pytest.raises(XferError):
                await incdump.dump(odd.pid, images_root / "1", options=to(served.port, "uffd-wp"))
        assert held == [2]
        assert "anon_inode:[userfaultfd]" not in open_fds()
        assert not (images_root / "1").exists()
        assert_untouched(odd)


@pytest.mark.asyncio
async def test_a_server_that_stalls_is_given_up(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=32)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_take_a_little, args=(listener,), daemon=True).start()
        options = to(listener.getsockname()[1], page_server_timeout=0.5)
        with pytest.raises(ConnectionLost, match=r"took nothing for 0\.5 s"):
            await incdump.dump(target.pid, images_root / "1", options=options)
    assert not (images_root / "1").exists()
    assert_untouched(target)


@pytest.mark.asyncio
async def test_a_dump_that_waits_for_its_server_can_be_cancelled(
    rewriter: Callable[..., Target], images_root: Path
) -> None:
    target = rewriter(mib=32)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_take_a_little, args=(listener,), daemon=True).start()
        options = to(listener.getsockname()[1], page_server_timeout=600)
        began = time.monotonic()
        with anyio.move_on_after(1.5) as scope:
            await incdump.dump(target.pid, images_root / "1", options=options)
        assert scope.cancelled_caught
        assert time.monotonic() - began < 20
    assert not (images_root / "1").exists()
    assert_untouched(target)
    chain = Chain(target, images_root)
    await chain.prove(check=False)


def _take_a_little(listener: socket.socket) -> None:
    """CRIU's server, which opens an image, takes a bit of it, and then nothing any more."""
    connection, _ = listener.accept()
    with connection:
        for answer in (b"\0\0\0\0", b"\0"):
            connection.recv(24, socket.MSG_WAITALL)
            connection.sendall(answer)
        connection.recv(100)
        while not _is_gone(connection):
            time.sleep(0.01)


def _is_gone(connection: socket.socket) -> bool:
    """Whether the other end has gone, though not all that it sent was taken."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


# -- servers of CRIU 4.2 ------------------------------------------------------------------------------------------


def test_a_server_that_wants_long_headers_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("incdump.xfer.page_client._LAYOUT_PATIENCE", 0.2)
    got: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for answer in (b"\1\0\0\0", b"\1", b"", b"", b"\0\0\0\0"):
                got.append(connection.recv(LONG, socket.MSG_WAITALL))
                if got[-1][0] == 6 and got[-1][2] & 4:
                    got.append(connection.recv(PAGE, socket.MSG_WAITALL))
                connection.sendall(answer)

    page = np.full(PAGE, 7, np.uint8)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        client = PageClient("127.0.0.1", listener.getsockname()[1], timeout=20)
        image = Image("pagemap", 42)
        assert client.ask(image)
        assert client.open(image)
        entries = np.array([[0x10000000, 1, 6], [0x10001000, 2, 1]], np.uint64)
        client.send(image, entries, np.array([0, 0]), page)
        client.end()
        client.close()
        server.join(20)
    assert [part.hex() if len(part) == LONG else part for part in got] == [
        "05000000000000000000000000000000" + "012a000000000000" * 2,  # nobody looks at the address
        "04000000000000000000000000000000" + "0000000000000000" + "012a000000000000",
        "06000600000000000100000000000000" + "0000001000000000" + "012a000000000000",
        page.tobytes(),
        "06000100000000000200000000000000" + "0010001000000000" + "012a000000000000",
        "23100000000000000000000000000000" + "0000000000000000" + "0000000000000000",
    ]


# -- the commands -------------------------------------------------------------------------------------------------


def test_the_commands(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=4)
    server = start("page-server", "--json", "-D", images_root / "served", "--rounds", 2)
    try:
        port = json.loads(read_until(server.stdout, b"\n"))["port"]
        where = ("--page-server", "--address", "127.0.0.1", "--port", port)
        first = command.incdump("predump", "-t", target.pid, "-D", images_root / "1", *where, "--json")
        assert first.code == 0, first
        target.dirty(10, seed=1)
        parent = ("--prev-images-dir", "../1", "--leave-stopped")
        last = command.incdump("dump", "-t", target.pid, "-D", images_root / "2", *parent, *where, "--json")
        assert last.code == 0, last
        assert last.json["pages_skipped_parent"] > 800
        assert wait(server).code == 0
        report = oracle.compare(images_root / "served" / "2", {target.pid: target.pid}, finished=False)
        assert report.ok, report
    finally:
        server.kill()
        server.communicate()
        os.kill(target.pid, signal.SIGCONT)


def test_a_page_server_that_cannot_be_had_is_refused(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for options, code, words in (
        (("--page-server", "--port", port), 8, f"no page server at 127.0.0.1 port {port}"),
        (("--page-server",), 2, "needs --port"),
        (("--port", port), 2, "needs --page-server"),
    ):
        refused(command.incdump("predump", "-t", target.pid, "-D", images_root / "1", *options), code, words)
        assert not (images_root / "1").exists()
    assert_untouched(target)
