"""One tree on its way here: the receiver's end of a migration (`incdump.engine.migrate` is the source's).

Its images come round by round, then it is restored as far as can be before it is asked whether it may run
(`incdump.engine.restore.HeldRestore`), and runs only when the source has said so. Until then whatever goes wrong, at
either end, is the end of it here. After that it runs, and its images stay. An arrival that fails leaves nothing.
"""

from __future__ import annotations

import hmac
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import anyio

from incdump.engine.hooks import Hook
from incdump.engine.page_server import PageServerOptions, Sessions, numbered
from incdump.engine.requirements import problems, restore_rate, who
from incdump.engine.restore import HeldRestore, prove
from incdump.engine.tasks import first_cause
from incdump.engine.threads import in_thread
from incdump.errors import CannotMigrate, ImagesError, IncdumpError, MigrationError, ProtocolError
from incdump.images.images_dir import ImagesDir
from incdump.images.proved import ProvedChain
from incdump.model.fields import check_count, check_flag, check_seconds, check_text, check_type, check_words
from incdump.model.options import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from incdump.criu.program import Criu
    from incdump.engine.conversation import Conversation
    from incdump.engine.listener import Client, Listener
    from incdump.engine.page_server import Arriving, SessionReport
    from incdump.model.stats import RestoreResult
    from incdump.xfer.control import Json

_PAGES_WAITING = 8
_LAST_WORD_SECONDS = 2.0
"""For the source of a receiver that has been told to end to take the news."""
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
    :ivar hook_timeout: seconds that it may take at each step; then it is killed, and counts as failed.
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
    hook_timeout: float = 30.0
    max_bytes: int | None = None
    timeout: float = 30.0
    tls: TlsFiles | None = None

    def __post_init__(self) -> None:
        """:raises incdump.errors.InvalidOption: a value that its field cannot have."""
        check_text("address", self.address)
        check_count("port", self.port, 0, 65535)
        check_flag("restore", self.restore)
        check_flag("once", self.once)
        check_type("criu", self.criu, str, may_be_none=True)
        check_words("criu_options", self.criu_options)
        check_words("hook", self.hook)
        check_seconds("hook_timeout", self.hook_timeout)
        check_count("max_bytes", self.max_bytes, 0, may_be_none=True)
        check_seconds("timeout", self.timeout)
        check_type("tls", self.tls, TlsFiles, may_be_none=True)


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


def unable(error: OSError) -> MigrationError:
    """A full disk, no descriptors left: of this migration, not of the receiver."""
    return MigrationError(f"the receiver cannot go on: {error.strerror or error}", errno=error.errno)


class Arrival:
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
        self._hook = Hook(options.hook, options.hook_timeout)
        self._criu = criu
        self._source = source
        self._on_session = on_session
        page_options = PageServerOptions(max_bytes=options.max_bytes, timeout=options.timeout)
        self._sessions = Sessions(path, listener.joins, options=page_options)
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

    @property
    def arriving(self) -> Arriving | None:
        """The round that is coming in, and how far it is."""
        return self._sessions.arriving

    def knows(self, client: Client) -> bool:
        """Whether a client has shown the token."""
        token = None if client.said is None else client.said.get("migration")
        return isinstance(token, str) and hmac.compare_digest(token.encode(), self.token.encode())

    def hand_over(self, client: Client) -> bool:
        """Have a client's session served; False if it is none of this migration's, or there is no place for it."""
        with suppress(anyio.WouldBlock, anyio.ClosedResourceError, anyio.BrokenResourceError):
            if self.knows(client):
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

    async def run(self, talk: Conversation, tree: Json) -> MigrationReport:
        """Receive it, and bring it to life."""
        error: IncdumpError | None = None
        try:
            with self._scope:
                await self._receive(talk, tree)
            if self._scope.cancelled_caught:
                error = MigrationError("the source has given it up")
        except (IncdumpError, OSError) as problem:
            error = problem if isinstance(problem, IncdumpError) else unable(problem)
            if self.state == "runs":  # the source is told nothing else
                self._warning, error = str(error), None
            elif not isinstance(error, CannotMigrate):
                with suppress(IncdumpError):
                    await talk.say("failed", why=str(error))
        except BaseException:  # the receiver is to end
            if self.state not in ("runs", "stored"):
                self.state = "void"
                with anyio.move_on_after(_LAST_WORD_SECONDS, shield=True), suppress(IncdumpError):
                    await talk.say("failed", why="the receiver has been told to end")  # it may be just about to say go
                if self._was_begun:
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

    async def _receive(self, talk: Conversation, tree: Json) -> None:
        lacks = await in_thread(problems, tree, self._criu)
        self._pid, self._comm = who(tree)
        about: dict[str, Any] = {"restores": self._criu is not None}
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
            with anyio.move_on_after(_LAST_WORD_SECONDS, shield=True):  # broken off, the connection would be lost
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
        await self._hook.call("restore", self._pid, images)
        await in_thread(prove, images, self._proved)
        await held.until_ready()
        await self._hook.call("ready", self._pid, images)

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
        return await self._hook.tell(step, self._pid, self._rounds[-1] if self._rounds else None)

    def _remove(self) -> None:
        """Nothing is to be left of an arrival that failed. Blocks."""
        if not self._options.once:
            shutil.rmtree(self._path, ignore_errors=True)
            return
        for name in numbered(self._path):  # it was empty; a round may be there that is in no report yet
            shutil.rmtree(self._path / name, ignore_errors=True)
