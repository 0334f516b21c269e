"""The page server: sessions, one after the other, each into an images dir of its own.

Without ``own_dirs`` the images dir is that of the one session, as with CRIU's page server. With it, it holds one
directory a session, ``1``, ``2`` and so on, each with the one before as its parent: the rounds of a live migration. A
session that breaks leaves nothing, and its number to the next one; a server that is started again goes on counting.

A session runs in worker threads, on blocking sockets: asyncio's own streams move half as many bytes a second. Whoever
connects is heard at once, as far as its first message (`_Client`): it is another channel of the session that is under
way, or a client that is served next.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from incdump.engine.pipeline import first_cause
from incdump.engine.threads import in_thread
from incdump.errors import ConnectionLost, ImagesDirInUse, ImagesError, IncdumpError, XferError
from incdump.images.images_dir import ImagesDir
from incdump.images.new_dir import FINISHED, NewImagesDir
from incdump.xfer.block_server import BlockSession, Joins
from incdump.xfer.blocks import JOIN, OFFER, TOKEN
from incdump.xfer.page_server import Session
from incdump.xfer.received import ReceivedImages
from incdump.xfer.sockets import broken, hang_up, limit_calls, why
from incdump.xfer.splicing import receive_all
from incdump.xfer.stored import StoredImages

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup
    from anyio.streams.memory import MemoryObjectSendStream

    from incdump.model.options import TlsFiles
    from incdump.xfer.received import Received
    from incdump.xfer.sockets import Wrap

_BACKLOG = 8
_WAITING = 32
"""Clients that are heard, or wait, at once."""
_AFTER_A_FAILED_ACCEPT = 0.2


@dataclass(frozen=True, slots=True)
class PageServerOptions:
    """How a page server serves.

    :ivar address: to listen on; a name or an address. The default lets nobody in from elsewhere: a page server believes
        whoever connects.
    :ivar port: 0 for any that is free.
    :ivar rounds: sessions to serve; None: until it is cancelled. Sessions that break do not count.
    :ivar own_dirs: each session has a directory of its own in the images dir; else there is one session, whatever
        comes of it, and the images dir is its.
    :ivar auto_dedup: have the parent images give back the disk space of pages that came again.
    :ivar max_bytes: of pages in one session; None for as many as the disk holds.
    :ivar timeout: seconds for which a client may be silent; None for ever.
    :ivar tls: for encrypted connections, from clients with a certificate; None: plain ones.
    """

    address: str = "127.0.0.1"
    port: int = 0
    rounds: int | None = None
    own_dirs: bool = True
    auto_dedup: bool = False
    max_bytes: int | None = None
    timeout: float | None = 120.0
    tls: TlsFiles | None = None


@dataclass(frozen=True, slots=True)
class SessionReport:
    """One session.

    :ivar client: address and port.
    :ivar images_dir: where its images are; None if it broke.
    :ivar images: processes and segments.
    :ivar pages: pages that came, 4096 bytes each.
    :ivar holes: pages that were left to the parent images.
    :ivar punched: bytes that the parent images gave back.
    :ivar error: why it broke, or None.
    :ivar warning: what went wrong after the images were whole, or None.
    """

    client: str
    images_dir: str | None
    images: int = 0
    pages: int = 0
    holes: int = 0
    punched: int = 0
    error: IncdumpError | None = None
    warning: str | None = None


class _Client:
    """Somebody who has connected.

    :ivar connection: None once it is another channel of a session.
    :ivar first: the beginning of its first message.
    :ivar error: why there is nothing to be served.
    """

    def __init__(self, connection: socket.socket | None, name: str, error: IncdumpError | None = None) -> None:
        self.connection = connection
        self.name = name
        self.error = error
        self.first = b""

    def hear(self, timeout: float | None, joins: Joins, wrap: Wrap | None) -> None:
        """Hear what it begins with. Blocks."""
        assert self.connection is not None
        try:
            if wrap is not None:
                self.connection.settimeout(timeout)
                from incdump.xfer.tls import shake_hands  # was loaded when the server began

                self.connection = wrap(self.connection)
                shake_hands(self.connection)
            limit_calls(self.connection, timeout)
            self.first = self._take(len(OFFER), timeout)
            if self.first == JOIN:
                if joins.add(self._take(TOKEN, timeout), self.connection):
                    self.connection = None
                else:
                    self.error = ConnectionLost("it would join a session that is over")
        except IncdumpError as error:
            self.error = error
        except OSError as error:
            self.error = broken(error)

    def _take(self, size: int, timeout: float | None) -> bytes:
        assert self.connection is not None
        data = bytearray(size)
        receive_all(self.connection, timeout, memoryview(data))
        return bytes(data)

    def hang_up(self) -> None:
        """End the connection. Never blocks, never fails."""
        if self.connection is not None:
            hang_up(self.connection)

    def close(self) -> None:
        """Close the connection."""
        if self.connection is not None:
            self.connection.close()


class PageServer:
    """A page server. As an async context manager it listens; `serve` then serves.

    :ivar host: where it listens.
    :ivar port: where it listens.
    :ivar was_serving: whether a client's session was under way when it was cancelled.
    """

    def __init__(
        self,
        images_dir: str | os.PathLike[str],
        *,
        parent: str | None = None,
        options: PageServerOptions | None = None,
    ) -> None:
        """
        :param images_dir: where to; made if missing, refused if it holds images.
        :param parent: the parent images dir of the first session: relative to `images_dir`, or absolute.
        """
        self._options = options or PageServerOptions()
        self._path = Path(os.path.abspath(images_dir))
        self._parent = parent
        self._done = 0  # sessions that have their directory, those of earlier runs included
        self._listener: socket.socket | None = None
        self._joins = Joins()
        self._wrap: Wrap | None = None
        self.host, self.port = self._options.address, self._options.port
        self.was_serving = False

    async def __aenter__(self) -> PageServer:
        """Begin to listen.

        :raises incdump.errors.XferError: it cannot listen there.
        :raises incdump.errors.ImagesError: the images dir, or the parent, cannot be used.
        """
        if self._options.own_dirs:
            self._done = _last_number(self._path)
            if self._done and self._parent is not None:
                raise ImagesDirInUse(
                    f"{self._path} holds {self._done} sessions already, and the next one stands on the last of them: "
                    "leave --prev-images-dir out, or choose another directory",
                    path=self._path,
                )
            if self._parent is not None and not os.path.isabs(self._parent):
                self._parent = os.path.join("..", self._parent)  # as seen from the first session's directory
        NewImagesDir.create(*self._place(self._done + 1)).discard()  # what is wrong is said now
        if self._options.tls is not None:
            from incdump.xfer.tls import server_side  # not for everybody: it takes its time to load

            self._wrap = await in_thread(server_side, self._options.tls)
        try:
            self._listener = await in_thread(self._listen)
        except (OSError, UnicodeError) as error:
            where = f"{self._options.address} port {self._options.port}"
            reason, number = why(error)
            raise XferError(f"cannot listen on {where}: {reason}", errno=number) from error
        self.host, self.port = self._listener.getsockname()[:2]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._listener is not None:
            self._listener.close()

    def _listen(self) -> socket.socket:
        found = socket.getaddrinfo(self._options.address, self._options.port, type=socket.SOCK_STREAM)
        family, _, _, _, where = found[0]
        listener = socket.create_server(where, family=family, backlog=_BACKLOG)
        listener.setblocking(False)
        return listener

    async def serve(self, on_session: Callable[[SessionReport], None] | None = None) -> list[SessionReport]:
        """Serve clients, one after the other, until all rounds were served, or for ever.

        :param on_session: called with each session's report.
        :returns: the reports of all sessions, if there is an end to them.
        :raises incdump.errors.IncdumpError: the only session broke.
        """
        reports: list[SessionReport] = []
        left = self._options.rounds if self._options.own_dirs else 1
        put, waiting = anyio.create_memory_object_stream[_Client](_WAITING)
        try:
            async with anyio.create_task_group() as tasks, put:
                tasks.start_soon(self._welcome_all, tasks, put)
                while left is None or left > 0:
                    report = await self._serve_next(await waiting.receive(), on_session)
                    if report.error is None:
                        left = None if left is None else left - 1
                    if left is not None:  # else nobody will see them, and there may be many
                        reports.append(report)
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        finally:
            with suppress(anyio.WouldBlock, anyio.EndOfStream):
                while True:
                    waiting.receive_nowait().close()
            waiting.close()
        return reports

    async def _welcome_all(self, tasks: TaskGroup, clients: MemoryObjectSendStream[_Client]) -> None:
        """Hear whoever connects."""
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        places = anyio.Semaphore(_WAITING)
        while True:
            await places.acquire()
            try:
                connection, peer = await loop.sock_accept(self._listener)
            except OSError as error:  # no descriptors left, a network that is down: of this client, not of the server
                places.release()
                problem = XferError(f"cannot take a client: {error.strerror}")
                await clients.send(_Client(None, "", problem))
                await anyio.sleep(_AFTER_A_FAILED_ACCEPT)
            else:
                name = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else str(peer)
                tasks.start_soon(self._welcome, _Client(connection, name), clients, places)

    async def _welcome(
        self, client: _Client, clients: MemoryObjectSendStream[_Client], places: anyio.Semaphore
    ) -> None:
        is_waiting = False
        try:
            await in_thread(client.hear, self._options.timeout, self._joins, self._wrap, break_off=client.hang_up)
            if client.connection is not None:
                await clients.send(client)
            is_waiting = True
        finally:
            places.release()
            if not is_waiting:
                client.close()

    async def _serve_next(self, client: _Client, on_session: Callable[[SessionReport], None] | None) -> SessionReport:
        ended: list[SessionReport] = []

        def session() -> None:
            ended.append(self._session(client, self._done + 1))

        try:
            await in_thread(session, break_off=client.hang_up)
        except asyncio.CancelledError:
            self.was_serving = not (ended and self._take(ended[0], on_session))
            raise
        finally:
            client.close()
        self._take(ended[0], on_session)
        return ended[0]

    def _take(self, report: SessionReport, on_session: Callable[[SessionReport], None] | None) -> bool:
        """Count a session, and tell of it; returns whether it is complete.

        :raises incdump.errors.IncdumpError: the only session broke.
        """
        if report.error is None:
            self._done += 1
        elif not self._options.own_dirs and report.client:
            raise report.error
        if on_session is not None:
            on_session(report)
        return report.error is None

    def _place(self, number: int) -> tuple[Path, str | None]:
        """A session's directory, and its parent as seen from there."""
        if not self._options.own_dirs:
            return self._path, self._parent
        return self._path / str(number), self._parent if number == 1 else f"../{number - 1}"

    def _session(self, client: _Client, number: int) -> SessionReport:
        """One session. Blocks."""
        if client.error is not None or client.connection is None:
            return SessionReport(client.name, None, error=client.error)
        path, parent = self._place(number)
        try:
            images = NewImagesDir.create(path, parent)
            receiver: ReceivedImages | StoredImages | None = None
            try:
                above = None if images.parent is None else ImagesDir(images.parent)
                receiver = self._receiver(client, images, above)
                received = self._run(client, receiver)
            except BaseException:
                (receiver or images).discard()
                raise
        except IncdumpError as error:
            return SessionReport(client.name, None, error=error)
        return _report(client.name, path, received, self._dedup(receiver))

    def _receiver(
        self, client: _Client, images: NewImagesDir, above: ImagesDir | None
    ) -> ReceivedImages | StoredImages:
        kind = StoredImages if client.first == OFFER else ReceivedImages
        return kind(images, above, max_bytes=self._options.max_bytes)

    def _run(self, client: _Client, receiver: ReceivedImages | StoredImages) -> Received:
        assert client.connection is not None
        timeout = self._options.timeout
        if isinstance(receiver, StoredImages):
            return BlockSession(client.connection, receiver, self._joins, timeout=timeout).run()
        return Session(client.connection, receiver, timeout=timeout, first=client.first).run()

    def _dedup(self, receiver: ReceivedImages | StoredImages) -> str | None:
        """Returns what went wrong; the images are whole all the same."""
        if self._options.auto_dedup:
            try:
                receiver.dedup()
            except ImagesError as error:
                return f"the parent images keep their pages: {error}"
        return None


def _last_number(path: Path) -> int:
    """The highest number of a finished session's directory; 0 without one."""
    with suppress(OSError):
        names = [name for name in os.listdir(path) if name.isascii() and name.isdecimal()]
        done = [int(name) for name in names if any((path / name / mark).exists() for mark in FINISHED)]
        return max(done, default=0)
    return 0


def _report(client: str, path: Path, received: Received, warning: str | None) -> SessionReport:
    return SessionReport(
        client,
        str(path),
        images=received.images,
        pages=received.pages,
        holes=received.holes,
        punched=received.punched,
        warning=warning,
    )
