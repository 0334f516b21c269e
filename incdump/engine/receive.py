"""The receiving end of migrations: takes a tree's images as the rounds run, and brings it to life.

Receiver ── listens ──▶ Arrival, one at a time   (`incdump.engine.arrival`)
                          conversation   what it needs · restore · go        (`incdump.xfer.control`)
                          sessions       DIR/1, DIR/2, … DIR/N               (`incdump.engine.page_server`)
"""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from incdump.criu.program import find
from incdump.engine.arrival import Arrival, MigrationReport, ReceiverOptions, unable
from incdump.engine.conversation import conversation
from incdump.engine.listener import Listener
from incdump.engine.page_server import numbered
from incdump.engine.tasks import first_cause
from incdump.engine.threads import in_thread
from incdump.errors import ImagesDirInUse, IncdumpError
from incdump.images.framing import raise_io_error
from incdump.xfer.control import MIGRATE, VERSION, Control

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Self

    from incdump.criu.program import Criu
    from incdump.engine.conversation import Conversation
    from incdump.engine.listener import Client
    from incdump.engine.page_server import SessionReport

_REMEMBERED = 64
"""Arrivals whose outcome can still be asked for."""
_UNASKED_SECONDS = 120.0
"""For which the only arrival's outcome can still be asked for, if the source has not heard of it."""
_CONVERSATIONS = 16
"""At once: one is a migration's, others may ask what has become of theirs."""


class Receiver:
    """A receiver. As an async context manager it listens; `serve` then receives.

    :ivar was_receiving: whether a migration was under way when it was cancelled.
    """

    def __init__(self, images_dir: str | os.PathLike[str], options: ReceiverOptions | None = None) -> None:
        """
        :param images_dir: where to; made if missing.
        """
        self._options = options or ReceiverOptions()
        self._path = Path(os.path.abspath(images_dir))
        self._criu: Criu | None = None
        self._listener = Listener(
            self._options.address, self._options.port, timeout=self._options.timeout, tls=self._options.tls
        )
        self._current: Arrival | None = None
        self._arrivals: OrderedDict[str, Arrival] = OrderedDict()
        self._conversations = 0
        self.was_receiving = False

    @property
    def host(self) -> str:
        """Where it listens."""
        return self._listener.host

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._listener.port

    async def __aenter__(self) -> Self:
        """Begin to listen.

        :raises incdump.errors.CriuError: there is no CRIU to restore with.
        :raises incdump.errors.XferError: it cannot listen there.
        :raises incdump.errors.ImagesError: the images dir cannot be used.
        """
        if self._options.restore:
            self._criu = await in_thread(find, self._options.criu)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            if self._options.once and any(self._path.iterdir()):
                raise ImagesDirInUse(f"{self._path} is not empty: choose another directory", path=self._path)
        except OSError as error:
            raise_io_error(error, "use", self._path)
        await self._listener.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._listener.__aexit__(*exc_info)

    async def serve(
        self,
        on_session: Callable[[SessionReport], None] | None = None,
        on_migration: Callable[[MigrationReport], None] | None = None,
    ) -> MigrationReport:
        """Receive: one migration, or until it is cancelled.

        :param on_session: called with the report of each round.
        :param on_migration: called with the report of each migration.
        :returns: the report of the only one.
        :raises incdump.errors.IncdumpError: why that failed.
        """
        reports: list[MigrationReport] = []
        over = anyio.Event()

        async def converse(client: Client) -> None:
            async with conversation(_control(client, self._options.timeout)) as talk:
                said = await talk.hear()
                if said["say"] == "outcome":
                    await self._tell_outcome(talk, said)
                    return
                report = await self._receive(talk, said, client, on_session)
            if report is not None:
                if on_migration is not None:
                    on_migration(report)
                if self._options.once:  # else nobody will see them, and there may be many
                    reports.append(report)
                over.set()

        async def welcome() -> None:
            async with self._listener.clients() as clients:
                while True:
                    client = await clients.receive()
                    if client.error is not None or client.connection is None:
                        client.close()
                    elif client.first == MIGRATE:
                        if self._conversations < _CONVERSATIONS:
                            tasks.start_soon(self._unless_broken, partial(converse, client))
                        else:
                            client.close()
                    elif self._current is None or not self._current.hand_over(client):
                        client.close()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(welcome)
                await (over.wait() if self._options.once else anyio.sleep_forever())
                await self._until_known()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        if reports[0].error is not None:
            raise reports[0].error
        return reports[0]

    async def _unless_broken(self, job: Callable[[], Awaitable[None]]) -> None:
        """What somebody says who then vanishes, or who makes no sense, is nobody's concern."""
        self._conversations += 1
        try:
            with suppress(IncdumpError):
                await job()
        finally:
            self._conversations -= 1

    async def _until_known(self) -> None:
        """The source may have to ask what has become of the only tree."""
        arrival = next(iter(self._arrivals.values()), None)
        if arrival is not None and arrival.state == "runs":
            with anyio.move_on_after(_UNASKED_SECONDS):
                await arrival.known.wait()

    async def _receive(
        self,
        talk: Conversation,
        said: dict[str, Any],
        client: Client,
        on_session: Callable[[SessionReport], None] | None,
    ) -> MigrationReport | None:
        """A migration, from its beginning to its end; None if it was none."""
        if said["say"] != "migrate" or said.get("version") != VERSION:
            await talk.say("failed", why="the receiver speaks another version of incdump's protocol")
            return None
        if self._current is not None:
            await talk.say("welcome", problems=["it is busy with another migration"])
            return None
        try:
            path = self._next_path()
        except OSError as error:
            await talk.say("failed", why=str(unable(error)))
            return None
        arrival = Arrival(path, self._listener, self._options, self._criu, client.name, on_session)
        self._current = arrival
        self._arrivals[arrival.token] = arrival
        while len(self._arrivals) > _REMEMBERED:
            self._arrivals.popitem(last=False)
        try:
            return await arrival.run(talk, said.get("tree"))
        except BaseException:
            self.was_receiving = arrival.state != "runs"
            raise
        finally:
            self._current = None

    def _next_path(self) -> Path:
        """A directory for a migration, made."""
        if self._options.once:
            return self._path
        while True:
            path = self._path / str(max(map(int, numbered(self._path)), default=0) + 1)
            with suppress(FileExistsError):  # another receiver's, by now
                path.mkdir(mode=0o700)
                return path

    async def _tell_outcome(self, talk: Conversation, said: dict[str, Any]) -> None:
        """A source does not know what has become of its tree: what does not run yet never will."""
        arrival = self._arrivals.get(str(said.get("token")))
        if arrival is None:
            await talk.say("unknown")
            return
        arrival.make_void()
        await arrival.decided.wait()
        await talk.say(arrival.state)
        arrival.known.set()


def _control(client: Client, timeout: float) -> Control:
    assert client.connection is not None
    return Control(client.connection, f"the source at {client.name}", timeout)
