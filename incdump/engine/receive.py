"""The receiving end of migrations: takes a tree's images as the rounds run, and brings it to life.

    Receiver ── listens ──▶ _Arrival, one at a time
                              conversation   what it needs · restore · go        (`incdump.xfer.control`)
                              sessions       DIR/1, DIR/2, … DIR/N               (`incdump.engine.page_server`)

The tree is restored as far as can be before it is asked whether it may run (`HeldRestore`), and runs only when the
source has said so. Until then whatever goes wrong, at either end, is the end of it here. After that it runs, and its
images stay. An arrival that fails leaves nothing.
"""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import anyio

from incdump.criu.program import find
from incdump.engine.conversation import conversation
from incdump.engine.hooks import call_hook
from incdump.engine.listener import Listener
from incdump.engine.page_server import PageServerOptions, Sessions, numbered
from incdump.engine.requirements import problems, restore_rate, who
from incdump.engine.restore import HeldRestore, prove
from incdump.engine.tasks import first_cause
from incdump.engine.threads import in_thread
from incdump.errors import CannotMigrate, ImagesDirInUse, ImagesError, IncdumpError, MigrationError, ProtocolError
from incdump.images.framing import raise_io_error
from incdump.images.images_dir import ImagesDir
from incdump.images.proved import ProvedChain
from incdump.xfer.control import MIGRATE, VERSION, Control

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Self

    from incdump.criu.program import Criu
    from incdump.engine.conversation import Conversation
    from incdump.engine.listener import Client
    from incdump.engine.page_server import SessionReport
    from incdump.model.options import TlsFiles
    from incdump.model.stats import RestoreResult

_REMEMBERED = 64
"""Arrivals whose outcome can still be asked for."""
_UNASKED_SECONDS = 120.0
"""For which the only arrival's outcome can still be asked for, if the source has not heard of it."""
_PAGES_WAITING = 8
_CONVERSATIONS = 16
"""At once: one is a migration's, others may ask what has become of theirs."""
_LAST_HOOK_SECONDS = 10.0
"""For the hook of a receiver that has been told to end."""

State: TypeAlias = Literal["open", "ready", "going", "runs", "stored", "void"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverOptions:
    """How to receive.

    :ivar address: to listen on; a name or an address. A receiver believes whoever connects, unless there is `tls`.
    :ivar port: 0 for any that is free.
    :ivar restore: bring the tree to life when all of it is there; else its images are kept, and it runs on where it is.
    :ivar once: one migration, into the images dir itself; else each has a directory of its own there, ``1``, ``2``, ….
    :ivar criu: CRIU's program; None: where it is installed.
    :ivar criu_options: further options for ``criu restore``.
    :ivar hook: a program, and its arguments, that is called at each step (`incdump.engine.hooks`): ``restore``, before
        that begins; ``ready``, when the tree stands there complete; ``runs``; ``failed``.
    :ivar max_bytes: of pages in one round; None for as many as the disk holds.
    :ivar timeout: seconds for which the source may be silent.
    :ivar tls: for encrypted connections, from clients with a certificate; None: plain ones.
    """

    address: str = "127.0.0.1"
    port: int = 0
    restore: bool = True
    once: bool = False
    criu: str | None = None
    criu_options: tuple[str, ...] = ()
    hook: tuple[str, ...] = ()
    max_bytes: int | None = None
    timeout: float = 30.0
    tls: TlsFiles | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """One migration, at the receiver.

    :ivar source: address and port.
    :ivar pid: the root of the tree, at the source.
    :ivar comm: its command name.
    :ivar rounds: images dirs that came.
    :ivar images_dir: the last of them; None if nothing is left.
    :ivar outcome: ``"runs"``: the tree runs here; ``"stored"``: its images are here; ``"void"``: neither.
    :ivar restored: how it was brought to life, or None.
    :ivar error: why it failed, or None.
    :ivar warning: what went wrong after the tree ran, or None.
    """

    source: str
    pid: int
    comm: str
    rounds: int
    images_dir: str | None
    outcome: Literal["runs", "stored", "void"]
    restored: RestoreResult | None = None
    error: IncdumpError | None = None
    warning: str | None = None


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
        self._current: _Arrival | None = None
        self._arrivals: OrderedDict[str, _Arrival] = OrderedDict()
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
            await talk.say("failed", why=str(_unable(error)))
            return None
        arrival = _Arrival(path, self._listener, self._options, self._criu, client.name, on_session)
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


def _unable(error: OSError) -> MigrationError:
    """A full disk, no descriptors left: of this migration, not of the receiver."""
    return MigrationError(f"the receiver cannot go on: {error.strerror or error}", errno=error.errno)


class _Arrival:
    """One tree on its way here.

    :ivar token: by which what belongs to it is known.
    :ivar state: how far it has come. Changed without an await between the look at it and the change.
    :ivar decided: set when it is certain whether the tree will run here; nothing is left of it if not.
    :ivar known: set when the source knows that it runs.
    """

    def __init__(
        self,
        path: Path,
        listener: Listener,
        options: ReceiverOptions,
        criu: Criu | None,
        source: str,
        on_session: Callable[[SessionReport], None] | None,
    ) -> None:
        self.token = os.urandom(16).hex()
        self.state: State = "open"
        self.decided, self.known = anyio.Event(), anyio.Event()
        self._path = path
        self._options = options
        self._criu = criu
        self._source = source
        self._on_session = on_session
        page_options = PageServerOptions(max_bytes=options.max_bytes)
        self._sessions = Sessions(path, listener.joins, options=page_options, token=self.token)
        self._put, self._clients = anyio.create_memory_object_stream[Any](_PAGES_WAITING)
        self._scope = anyio.CancelScope()
        self._is_served = anyio.Event()  # no session is under way
        self._is_served.set()
        self._pid, self._comm = 0, ""
        self._rounds: list[str] = []
        self._proved = ProvedChain(elsewhere=False)
        self._restored: RestoreResult | None = None
        self._warning: str | None = None
        self._was_begun = False  # the hook has been called

    def hand_over(self, client: Client) -> bool:
        """Have a client's session served; False if there is no place for it."""
        with suppress(anyio.WouldBlock, anyio.ClosedResourceError, anyio.BrokenResourceError):
            self._put.send_nowait(client)
            return True
        return False

    def _turn_away(self) -> None:
        """No more clients; those that wait are not served."""
        with suppress(anyio.WouldBlock, anyio.EndOfStream):
            while True:
                self._clients.receive_nowait().close()
        self._put.close()
        self._clients.close()

    def make_void(self) -> None:
        """If it is not certain yet that it will run here, it will not."""
        if self.state in ("open", "ready"):
            self.state = "void"
            self._scope.cancel()

    async def run(self, talk: Conversation, tree: object) -> MigrationReport:
        """Receive it, and bring it to life."""
        error: IncdumpError | None = None
        try:
            with self._scope:
                await self._receive(talk, tree)
            if self._scope.cancelled_caught:
                error = MigrationError("the source has given it up")
        except (IncdumpError, OSError) as problem:
            error = problem if isinstance(problem, IncdumpError) else _unable(problem)
            if self.state == "runs":  # the source is told nothing else
                self._warning, error = str(error), None
            elif not isinstance(error, CannotMigrate):
                with suppress(IncdumpError):
                    await talk.say("failed", why=str(error))
        except BaseException:  # the receiver is to end
            if self.state not in ("runs", "stored") and self._was_begun:
                with anyio.move_on_after(_LAST_HOOK_SECONDS, shield=True):
                    await self._hook_after("failed")
            raise
        finally:
            if self.state not in ("runs", "stored"):
                self.state = "void"
                with anyio.CancelScope(shield=True):
                    with suppress(OSError):
                        await in_thread(self._remove)
            self.decided.set()
            self._turn_away()
        if self.state == "void" and self._was_begun:
            self._warning = await self._hook_after("failed")
        last = self._rounds[-1] if self._rounds and self.state != "void" else None
        return MigrationReport(
            source=self._source,
            pid=self._pid,
            comm=self._comm,
            rounds=len(self._rounds),
            images_dir=last,
            outcome="runs" if self.state == "runs" else "stored" if self.state == "stored" else "void",
            restored=self._restored,
            error=error,
            warning=self._warning,
        )

    async def _receive(self, talk: Conversation, tree: object) -> None:
        lacks = await in_thread(problems, tree, self._criu)
        self._pid, self._comm = who(tree)
        about: dict[str, object] = {"restores": self._criu is not None}
        if self._criu is not None:
            about |= {"criu": str(self._criu), "restore_rate": await in_thread(restore_rate)}
        await talk.say("welcome", token=self.token, problems=lacks, **about)
        if lacks:
            raise CannotMigrate("; ".join(lacks), problems=tuple(lacks))
        await in_thread(self._sessions.prepare)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._serve_pages)
                await self._converse(talk)
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_cause(group) from None

    async def _serve_pages(self) -> None:
        async for client in self._clients:
            self._is_served = anyio.Event()
            if self._rounds and self._criu is not None:
                # The last round before the next one comes, so that little is left to prove when the tree stands still.
                with suppress(ImagesError):  # which is raised again when there is need of them
                    await in_thread(self._proved.prove, ImagesDir(self._rounds[-1]))
            report = await self._sessions.serve(client, self._on_session)
            if report.images_dir is not None:
                self._rounds.append(report.images_dir)
            self._is_served.set()

    async def _converse(self, talk: Conversation) -> None:
        said = await talk.hear()
        if said["say"] == "failed":
            raise MigrationError(f"the source has given it up: {said.get('why')}")
        if said.get("number") == len(self._rounds) + 1:  # its client may know sooner than this task that it is through
            await talk.unless_lost(self._is_served.wait)
        if said["say"] != "restore" or not self._rounds or said.get("number") != len(self._rounds):
            raise ProtocolError(f"the source says {said['say']!r} after {len(self._rounds)} rounds")
        if self._criu is None:
            self.state = "stored"
            await talk.say("stored", images_dir=self._rounds[-1])
            return
        held = HeldRestore(Path(self._rounds[-1]), self._criu, self._options.criu_options, self._pid)
        try:
            await talk.unless_lost(partial(self._make_ready, held))
            if self.state == "open":
                self.state = "ready"
            await talk.say("ready")
            said = await talk.hear()
            if said["say"] != "go" or self.state != "ready":
                raise MigrationError(f"the source has given it up: {said.get('why', said['say'])}")
            self.state = "going"
            try:
                self._restored = await held.go()
            finally:
                self.state = "runs" if held.runs else "void"
        finally:
            await held.close()
            if self.state == "runs":
                self.decided.set()
        await self._tell_that_it_runs(talk)

    async def _make_ready(self, held: HeldRestore) -> None:
        images = self._rounds[-1]
        self._was_begun = True
        await call_hook(self._options.hook, "restore", self._pid, images)
        await in_thread(prove, images, self._proved)
        await held.until_ready()
        await call_hook(self._options.hook, "ready", self._pid, images)

    async def _tell_that_it_runs(self, talk: Conversation) -> None:
        """It does, whether the source hears of it or not."""
        with suppress(IncdumpError), anyio.CancelScope(shield=True):  # also if this is being cancelled
            await talk.say("runs")
        self._warning = await self._hook_after("runs")
        with suppress(IncdumpError):
            if (await talk.hear())["say"] == "done":
                self.known.set()

    async def _hook_after(self, step: str) -> str | None:
        """Tell the hook what has come of it; returns what went wrong."""
        images = self._rounds[-1] if self._rounds else None
        try:
            await call_hook(self._options.hook, step, self._pid, images)
        except MigrationError as error:
            return str(error)
        return None

    def _remove(self) -> None:
        """Nothing is to be left of an arrival that failed. Blocks."""
        if not self._options.once:
            shutil.rmtree(self._path, ignore_errors=True)
            return
        for name in numbered(self._path):  # it was empty; a round may be there that is in no report yet
            shutil.rmtree(self._path / name, ignore_errors=True)
