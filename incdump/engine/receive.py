"""The receiving end of migrations: takes a tree's images as the rounds run, and brings it to life.

Receiver ── listens ──▶ Arrival, one at a time   (`incdump.engine.arrival`)
                          conversation   what it needs · restore · go        (`incdump.xfer.control`)
                          sessions       DIR/1, DIR/2, … DIR/N               (`incdump.engine.page_server`)
"""

from __future__ import annotations

import os
import threading
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
from incdump.errors import ImagesDirInUse, IncdumpError, ProtocolError
from incdump.images.framing import raise_io_error
from incdump.model.fields import check_path, check_type
from incdump.proc.identity import check_own_proc, check_page_size
from incdump.proc.limits import names_limits
from incdump.xfer.block_server import hear_terms, tell
from incdump.xfer.blocks import OFFER
from incdump.xfer.control import MIGRATE, MOST_MESSAGE, MOST_UNKNOWN, VERSION, Control, TooMuch, encode_message
from incdump.xfer.sockets import farewell

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self

    from incdump.criu.program import Criu
    from incdump.engine.conversation import Conversation
    from incdump.engine.listener import Client
    from incdump.engine.page_server import Arriving, SessionReport

_REMEMBERED = 64
"""Arrivals whose outcome can still be asked for."""
_UNASKED_SECONDS = 120.0
"""For which the only arrival's outcome can still be asked for, if the source has not heard of it."""
_CONVERSATIONS = 16
"""At once: one is a migration's, others may ask what has become of theirs."""
_PATIENCE = 5.0
"""Seconds within which whoever connects has to have said what it is here for."""
_OPEN = 0o711
"""Of a directory with images dirs in it: whoever may look into these has to find a parent."""
_BUSY = "it is busy with another migration"


class Receiver:
    """A receiver. As an async context manager it listens; `serve` then receives.

    :ivar was_receiving: whether a migration was under way when it was cancelled.
    """

    def __init__(self, images_dir: str | os.PathLike[str], options: ReceiverOptions | None = None) -> None:
        """
        :param images_dir: where to; made if missing.
        :raises incdump.InvalidOption: an argument is of another type.
        """
        check_path("images_dir", images_dir)
        check_type("options", options, ReceiverOptions, may_be_none=True)
        self._options = options or ReceiverOptions()
        self._path = Path(os.path.abspath(images_dir))
        self._criu: Criu | None = None
        self._listener = Listener(
            *(self._options.address, self._options.port),
            timeout=self._options.timeout,
            tls=self._options.tls,
            patience=min(_PATIENCE, self._options.timeout),
            more=self._introduce,
        )
        self._long = threading.Lock()  # held while a long message is heard of somebody who is not known yet
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

    @property
    def arriving(self) -> Arriving | None:
        """The round that is coming in, and how far it is; None without one."""
        return None if self._current is None else self._current.arriving

    async def __aenter__(self) -> Self:
        """Begin to listen.

        :raises incdump.errors.CriuError: there is no CRIU to restore with.
        :raises incdump.errors.ProcMismatch: /proc is another pid namespace's, and it is to restore.
        :raises incdump.errors.XferError: it cannot listen there.
        :raises incdump.errors.ImagesError: the images dir cannot be used.
        """
        check_page_size()
        if self._options.restore:
            check_own_proc()
            self._criu = await in_thread(find, self._options.criu)
        try:
            if not self._path.exists():
                self._path.mkdir(parents=True, exist_ok=True)
                self._path.chmod(_OPEN)
            if self._options.once and any(self._path.iterdir()):
                raise ImagesDirInUse(f"{self._path} is not empty: choose another directory", path=self._path)
        except OSError as error:
            raise_io_error(error, "use", self._path)
        await self._listener.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._listener.__aexit__(kind, error, trace)

    @names_limits
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

        async def converse(client: Client, said: dict[str, Any]) -> None:
            async with conversation(self._control(client)) as talk:
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
                    if client.error is not None or client.said is None:
                        client.close()
                    elif client.first == MIGRATE:
                        if self._conversations < _CONVERSATIONS:
                            tasks.start_soon(self._unless_broken, partial(converse, client, client.said))
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

    def _introduce(self, client: Client) -> None:
        """Hear what a client is here for. It is not known yet, so it may not say much. Blocks, for `_PATIENCE` at most.

        :raises incdump.errors.XferError: it is none of a migration's.
        """
        assert client.connection is not None
        if client.first == MIGRATE:
            client.said = self._hear_first(self._control(client))
            return
        arrival = self._current
        if arrival is None or client.first != OFFER:
            raise ProtocolError("it speaks another protocol than a migration does, or there is none")
        client.said = hear_terms(client.connection, self._options.timeout, most=MOST_UNKNOWN)
        if not arrival.knows(client):
            error = ProtocolError("the client is not of the migration that is under way")
            tell(client.connection, error)
            raise error

    def _hear_first(self, control: Control) -> dict[str, Any]:
        """The first message. A long one is heard of one at a time, and of nobody while a migration is under way."""
        may_be_long = self._current is None and self._long.acquire(blocking=False)
        control.most = MOST_MESSAGE if may_be_long else MOST_UNKNOWN
        try:
            while True:
                said = control.hear()
                if said["say"] != "wait":
                    return said
        except TooMuch:
            if not may_be_long:
                farewell(control.connection, encode_message({"say": "failed", "why": _BUSY}))
            raise
        finally:
            if may_be_long:
                self._long.release()

    def _control(self, client: Client) -> Control:
        assert client.connection is not None
        control = Control(client.connection, f"the source at {client.name}", self._options.timeout)
        control.most = MOST_UNKNOWN
        return control

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
            await talk.say("welcome", problems=[_BUSY])
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
                path.chmod(_OPEN)
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
