"""The page server: sessions, one after the other, each into an images dir of its own.

Without ``own_dirs`` the images dir is that of the one session, as with CRIU's page server. With it, it holds one
directory a session, ``1``, ``2`` and so on, each with the one before as its parent: the rounds of a live migration. A
session that breaks leaves nothing, and its number to the next one; a server that is started again goes on counting.

A session runs in a worker thread, on a blocking socket: asyncio's own streams move half as many bytes a second. Other
clients wait meanwhile, to be served next.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from incdump.engine.threads import in_thread
from incdump.errors import ImagesDirInUse, ImagesError, IncdumpError, XferError
from incdump.images.images_dir import ImagesDir
from incdump.images.new_dir import RECEIVED, NewImagesDir
from incdump.xfer.page_server import Session
from incdump.xfer.received import ReceivedImages
from incdump.xfer.sockets import hang_up, why

if TYPE_CHECKING:
    from collections.abc import Callable

    from incdump.xfer.received import Received

_BACKLOG = 8
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
    """

    address: str = "127.0.0.1"
    port: int = 0
    rounds: int | None = None
    own_dirs: bool = True
    auto_dedup: bool = False
    max_bytes: int | None = None
    timeout: float | None = 120.0


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
        while left is None or left > 0:
            report = await self._serve_next(on_session)
            if report.error is None:
                left = None if left is None else left - 1
            if left is not None:  # else nobody will see them, and there may be many
                reports.append(report)
        return reports

    async def _serve_next(self, on_session: Callable[[SessionReport], None] | None) -> SessionReport:
        assert self._listener is not None
        try:
            connection, peer = await asyncio.get_running_loop().sock_accept(self._listener)
        except OSError as error:  # no descriptors left, a network that is down: of this client, not of the server
            report = SessionReport("", None, error=XferError(f"cannot take a client: {error.strerror}"))
            await asyncio.sleep(_AFTER_A_FAILED_ACCEPT)
        else:
            client = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else str(peer)
            ended: list[SessionReport] = []

            def session() -> None:
                ended.append(self._session(connection, self._done + 1, client))

            with connection:
                try:
                    await in_thread(session, break_off=partial(hang_up, connection))
                except asyncio.CancelledError:
                    self.was_serving = not (ended and self._take(ended[0], on_session))
                    raise
            report = ended[0]
        self._take(report, on_session)
        return report

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

    def _session(self, connection: socket.socket, number: int, client: str) -> SessionReport:
        """One session. Blocks."""
        path, parent = self._place(number)
        try:
            images = NewImagesDir.create(path, parent)
            receiver = None
            try:
                above = None if images.parent is None else ImagesDir(images.parent)
                receiver = ReceivedImages(images, above, max_bytes=self._options.max_bytes)
                received = Session(connection, receiver, timeout=self._options.timeout).run()
            except BaseException:
                (receiver or images).discard()
                raise
        except IncdumpError as error:
            return SessionReport(client, None, error=error)
        return _report(client, path, received, self._dedup(receiver))

    def _dedup(self, receiver: ReceivedImages) -> str | None:
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
        return max((int(name) for name in names if (path / name / RECEIVED).exists()), default=0)
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
