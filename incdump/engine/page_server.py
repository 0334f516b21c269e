"""The page server: sessions, one after the other, each into an images dir of its own.

Without ``own_dirs`` the images dir is that of the one session, as with CRIU's page server. With it, it holds one
directory a session, ``1``, ``2`` and so on, each with the one before as its parent: the rounds of a live migration. A
session that breaks leaves nothing, and its number to the next one; a server that is started again goes on counting.

A session runs in worker threads, on blocking sockets: asyncio's own streams move half as many bytes a second. Whoever
connects is heard at once, as far as its first message (`incdump.engine.listener`): it is another channel of the session
that is under way, or a client that is served next.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from incdump.engine.listener import Listener
from incdump.engine.threads import in_thread
from incdump.errors import ImagesDirInUse, ImagesError, IncdumpError, ProtocolError
from incdump.images import messages
from incdump.images.images_dir import ImagesDir
from incdump.images.new_dir import FINISHED, NewImagesDir
from incdump.model.fields import check_count, check_flag, check_path, check_seconds, check_text, check_type
from incdump.model.options import TlsFiles
from incdump.model.owner import NOBODY
from incdump.proc.identity import check_page_size
from incdump.xfer import compression
from incdump.xfer.block_server import BlockSession, hear_terms, tell
from incdump.xfer.blocks import OFFER
from incdump.xfer.page_server import Session
from incdump.xfer.received import ReceivedImages
from incdump.xfer.stored import StoredImages

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from incdump.engine.listener import Client
    from incdump.xfer.block_server import Joins
    from incdump.xfer.received import Received


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

    def __post_init__(self) -> None:
        """:raises incdump.errors.InvalidOption: a value that its field cannot have."""
        check_text("address", self.address)
        check_count("port", self.port, 0, 65535)
        check_count("rounds", self.rounds, 1, may_be_none=True)
        check_flag("own_dirs", self.own_dirs)
        check_flag("auto_dedup", self.auto_dedup)
        check_count("max_bytes", self.max_bytes, 0, may_be_none=True)
        check_seconds("timeout", self.timeout, may_be_none=True)
        check_type("tls", self.tls, TlsFiles, may_be_none=True)


@dataclass(frozen=True, slots=True)
class SessionReport:
    """One session.

    :ivar client: address and port.
    :ivar images_dir: where its images are; None if it broke.
    :ivar images: processes and segments.
    :ivar pages: pages that came, 4096 bytes each.
    :ivar holes: pages that were left to the parent images.
    :ivar punched: bytes that the parent images gave back.
    :ivar seconds: how long it took.
    :ivar error: why it broke, or None.
    :ivar warning: what went wrong after the images were whole, or None.
    """

    client: str
    images_dir: str | None
    images: int = 0
    pages: int = 0
    holes: int = 0
    punched: int = 0
    seconds: float = 0.0
    error: IncdumpError | None = None
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Arriving:
    """A session that is under way.

    :ivar client: address and port.
    :ivar images_dir: where its images go.
    :ivar bytes: that have come so far, as they were sent.
    """

    client: str
    images_dir: str
    bytes: int


class Sessions:
    """Sessions into one images dir, one after the other.

    :ivar was_serving: whether a client's session was under way when it was cancelled.
    """

    def __init__(
        self,
        images_dir: str | os.PathLike[str],
        joins: Joins,
        *,
        parent: str | None = None,
        options: PageServerOptions,
    ) -> None:
        """
        :param images_dir: where to; made if missing, refused if it holds images.
        :param joins: where the other channels of sessions arrive.
        :param parent: the parent images dir of the first session: relative to `images_dir`, or absolute.
        """
        self._options = options
        self._path = Path(os.path.abspath(images_dir))
        self._parent = parent
        self._joins = joins
        messages.load()  # a client with a frozen tree would wait for these imports
        compression.available()
        self._done = 0  # sessions that have their directory, those of earlier runs included
        self.was_serving = False
        self._under_way: tuple[str, Path, ReceivedImages | StoredImages] | None = None

    @property
    def arriving(self) -> Arriving | None:
        """The session that is under way, and how far it is."""
        if self._under_way is None:
            return None
        client, path, receiver = self._under_way
        return Arriving(client, str(path), receiver.bytes_arrived)

    def prepare(self) -> None:
        """Find out how far earlier sessions have come, and whether there can be more. Blocks.

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

    async def serve(self, client: Client, on_session: Callable[[SessionReport], None] | None = None) -> SessionReport:
        """Serve a client, and close its connection.

        :raises incdump.errors.IncdumpError: the only session broke.
        """
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

    def _session(self, client: Client, number: int) -> SessionReport:
        """One session. Blocks."""
        if client.error is not None or client.connection is None:
            return SessionReport(client.name, None, error=client.error)
        path, parent = self._place(number)
        began = time.monotonic()
        try:
            images = self._new_dir(client, path, parent)
            receiver: ReceivedImages | StoredImages | None = None
            try:
                above = None if images.parent is None else ImagesDir(images.parent)
                receiver = self._receiver(client, images, above)
                self._under_way = client.name, path, receiver
                received = self._run(client, receiver)
            except BaseException:
                (receiver or images).discard()
                raise
        except IncdumpError as error:
            return SessionReport(client.name, None, error=error)
        finally:
            self._under_way = None
        return _report(client.name, path, received, self._dedup(receiver), time.monotonic() - began)

    def _new_dir(self, client: Client, path: Path, parent: str | None) -> NewImagesDir:
        """A session's directory: the user's whom the client's terms name, where it says any."""
        if client.first != OFFER:
            return NewImagesDir.create(path, parent)
        assert client.connection is not None
        try:
            if client.said is None:
                client.said = hear_terms(client.connection, self._options.timeout)
            owner = client.said.get("owner")
            if owner is not None and (type(owner) is not int or not 0 <= owner < NOBODY):
                raise ProtocolError("the client names an owner that there cannot be")
            return NewImagesDir.create_if_possible_for(path, parent, owner)
        except IncdumpError as error:
            tell(client.connection, error)
            raise

    def _receiver(self, client: Client, images: NewImagesDir, above: ImagesDir | None) -> ReceivedImages | StoredImages:
        kind = StoredImages if client.first == OFFER else ReceivedImages
        return kind(images, above, max_bytes=self._options.max_bytes)

    def _run(self, client: Client, receiver: ReceivedImages | StoredImages) -> Received:
        assert client.connection is not None
        timeout = self._options.timeout
        if isinstance(receiver, StoredImages):
            return BlockSession(client.connection, receiver, self._joins, timeout=timeout, offer=client.said).run()
        return Session(client.connection, receiver, timeout=timeout, first=client.first).run()

    def _dedup(self, receiver: ReceivedImages | StoredImages) -> str | None:
        """Returns what went wrong; the images are whole all the same."""
        if self._options.auto_dedup:
            try:
                receiver.dedup()
            except ImagesError as error:
                return f"the parent images keep their pages: {error}"
        return None


class PageServer:
    """A page server. As an async context manager it listens; `serve` then serves."""

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
        :raises incdump.InvalidOption: an argument is of another type.
        """
        check_path("images_dir", images_dir)
        check_path("parent", parent, may_be_none=True)
        check_type("options", options, PageServerOptions, may_be_none=True)
        self._options = options or PageServerOptions()
        self._listener = Listener(
            self._options.address, self._options.port, timeout=self._options.timeout, tls=self._options.tls
        )
        self._sessions = Sessions(images_dir, self._listener.joins, parent=parent, options=self._options)

    @property
    def host(self) -> str:
        """Where it listens."""
        return self._listener.host

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._listener.port

    @property
    def was_serving(self) -> bool:
        """Whether a client's session was under way when it was cancelled."""
        return self._sessions.was_serving

    @property
    def arriving(self) -> Arriving | None:
        """The session that is under way, and how far it is; None without one."""
        return self._sessions.arriving

    async def __aenter__(self) -> Self:
        """Begin to listen.

        :raises incdump.errors.XferError: it cannot listen there.
        :raises incdump.errors.ImagesError: the images dir, or the parent, cannot be used.
        """
        check_page_size()
        self._sessions.prepare()
        await self._listener.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._listener.__aexit__(kind, error, trace)

    async def serve(self, on_session: Callable[[SessionReport], None] | None = None) -> list[SessionReport]:
        """Serve clients, one after the other, until all rounds were served, or for ever.

        :param on_session: called with each session's report.
        :returns: the reports of all sessions, if there is an end to them.
        :raises incdump.errors.IncdumpError: the only session broke.
        """
        reports: list[SessionReport] = []
        left = self._options.rounds if self._options.own_dirs else 1
        async with self._listener.clients() as clients:
            while left is None or left > 0:
                report = await self._sessions.serve(await clients.receive(), on_session)
                if report.error is None:
                    left = None if left is None else left - 1
                if left is not None:  # else nobody will see them, and there may be many
                    reports.append(report)
        return reports


def _last_number(path: Path) -> int:
    """The highest number of a finished session's directory; 0 without one."""
    with suppress(OSError):
        names = numbered(path)
        done = [int(name) for name in names if any((path / name / mark).exists() for mark in FINISHED)]
        return max(done, default=0)
    return 0


def numbered(path: Path) -> list[str]:
    """The names in a directory that are numbers.

    :raises OSError: it cannot be read.
    """
    return [name for name in os.listdir(path) if name.isascii() and name.isdecimal()]


def _report(client: str, path: Path, received: Received, warning: str | None, seconds: float) -> SessionReport:
    return SessionReport(
        client,
        str(path),
        images=received.images,
        pages=received.pages,
        holes=received.holes,
        punched=received.punched,
        seconds=seconds,
        warning=warning,
    )
