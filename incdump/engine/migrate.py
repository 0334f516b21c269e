"""Moving a running process tree to another host: the source's end (`incdump.engine.receive` is the other).

    conversation          what it needs · problems?                         before anything is done
    the pre-copy loop     pre-dumps to the receiver, until the rest is small
    the checkpoint        the tree stands still; all that is left goes over
      at CRIU's gate        restore ▶ ready · go ▶ runs                     it stands here, and there
    CRIU kills it here

The tree here stands at CRIU's gate while it is restored over there, and is killed when the receiver has said that it
runs. Whatever fails before that, and whoever is killed, it goes on here, as after any checkpoint that failed. There is
one moment in which this end cannot know: when it has said ``go``, and the connection dies before the answer. Then it
asks, on new connections, for as long as it was told to. If it cannot find out, the tree is left stopped here
(`incdump.errors.OutcomeUnknown`), since it may run over there; or, if that was asked for, goes on.
"""

from __future__ import annotations

import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio

from incdump.criu.program import find
from incdump.engine.conversation import conversation
from incdump.engine.hooks import Hook
from incdump.engine.precopy import Loop
from incdump.engine.requirements import describe
from incdump.engine.threads import in_thread, unbroken
from incdump.errors import (
    CannotMigrate,
    ConnectionLost,
    IncdumpError,
    MigrationError,
    OutcomeUnknown,
    ProtocolError,
    XferError,
)
from incdump.model.arguments import check_arguments
from incdump.model.options import DumpOptions
from incdump.model.precopy import Freeze, PrecopyPolicy, should_stop
from incdump.model.stats import FreezePart, freeze_parts
from incdump.proc.identity import signal_same
from incdump.proc.limits import names_limits
from incdump.proc.tree import check_target
from incdump.xfer.control import MIGRATE, VERSION, Control
from incdump.xfer.sockets import connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from incdump.engine.checkpoint import AtGate, CheckpointRun
    from incdump.engine.conversation import Conversation
    from incdump.model.options import WayName
    from incdump.model.precopy import Decision, IfUnknown, MappingWrites, PrecopyRound, Rule
    from incdump.model.stats import DumpResult, DumpStats
    from incdump.proc.tree import Task

_ASK_AGAIN = 0.5
_ASK_TIMEOUT = 5.0


@dataclass(slots=True)
class MigrateResult:
    """The outcome of a migration.

    :ivar pid: the root of the tree: here, and over there.
    :ivar receiver: address and port.
    :ivar outcome: ``"runs"``: the tree runs over there, and is gone here; ``"stored"``: the receiver does not restore,
        has a checkpoint, and the tree runs on here.
    :ivar rounds: the pre-dumps.
    :ivar decision: the last one.
    :ivar final: the checkpoint; None if CRIU failed here after the tree ran over there (a warning says so).
    :ivar downtime: seconds, by the clock of this host, from the moment when CRIU began to stop the tree until the news
        came that it runs over there (or, stored only, until it ran on here).
    :ivar frozen_at: when that was, seconds since the pre-copy loop began; None without a checkpoint.
    :ivar parts: how the downtime divides; they add up to it. Those of a checkpoint (`incdump.freeze_parts`), of which
        in_place is until all images were over there; restore: until the tree stood there, complete; switch: until it
        ran.
    :ivar hottest: the mappings that were written most in the last round, if the rounds no longer shrank, for people.
    :ivar seconds: in all.
    """

    pid: int
    receiver: str
    outcome: Literal["runs", "stored"] = "stored"
    rounds: list[PrecopyRound] = field(default_factory=list)
    decision: Decision | None = None
    final: DumpResult | None = None
    downtime: float | None = None
    frozen_at: float | None = None
    parts: list[FreezePart] = field(default_factory=list)
    hottest: list[str] = field(default_factory=list)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def why(self) -> str:
        """Why the loop ended, as one line; empty before its first decision."""
        return "" if self.decision is None else self.decision.why


@names_limits
async def migrate(
    pid: int,
    address: str,
    port: int,
    *,
    policy: PrecopyPolicy | None = None,
    options: DumpOptions | None = None,
    rule: Rule = should_stop,
    freezes: Sequence[Freeze] = (),
    on_round: Callable[[PrecopyRound, Decision], None] | None = None,
    on_written: Callable[[DumpResult, list[MappingWrites]], None] | None = None,
    on_step: Callable[[str], None] | None = None,
    progress: Callable[[str, DumpStats], None] | None = None,
    criu: str | None = None,
    criu_options: Sequence[str] = (),
    hook: Sequence[str] = (),
    hook_timeout: float = 30.0,
    if_unknown: IfUnknown = "stop",
    asking: float = 60.0,
    way: WayName = "auto",
) -> MigrateResult:
    """Move a process tree to where an `incdump.Receiver` listens.

    :param pid: the root of the tree.
    :param address: of the receiver's host, or its name.
    :param port: where the receiver listens.
    :param policy: when to stop it, as for `incdump.precopy`.
    :param options: for every dump; ``options.tls`` is used for all connections.
    :param rule: decides after each round.
    :param freezes: earlier migrations of such a tree.
    :param on_round: called with each round, and what was decided.
    :param on_written: as for `incdump.precopy`.
    :param progress: as for `incdump.precopy`.
    :param on_step: called with a word for each step of the end: ``"stopped"``, ``"restore"``, ``"go"``, ``"runs"``,
        ``"asking"``.
    :param criu: CRIU's program; None: where it is installed.
    :param criu_options: further options for ``criu dump``, for example ``--tcp-established``.
    :param hook: a program, and its arguments, that is called at each step (`incdump.engine.hooks`): ``stopped``, when
        all images are over there and the tree stands still; ``moved``; ``failed``, if it goes on here after all.
    :param hook_timeout: seconds that it may take at each step; then it is killed, and counts as failed.
    :param if_unknown: what becomes of the tree here when it cannot be found out whether it runs over there.
    :param asking: seconds for which it is tried to find out, the tree standing still.
    :param way: how CRIU is kept from the memory, as for `incdump.checkpoint`.
    :raises incdump.InvalidOption: an argument cannot be; nothing was begun.
    :raises incdump.errors.CannotMigrate: the receiver's host lacks something: nothing was begun.
    :raises incdump.errors.MigrationError: it failed over there; the tree goes on here.
    :raises incdump.errors.HookTimeout: the hook took too long at ``stopped``; the tree goes on here.
    :raises incdump.errors.OutcomeUnknown: see `if_unknown`.
    :raises incdump.errors.DidNotConverge: as for `incdump.precopy`.
    :raises incdump.errors.IncdumpError: as for `incdump.checkpoint`; the tree goes on here.
    """
    began = time.monotonic()
    check_arguments(pid=pid, address=address, port=port, policy=policy, options=options, rule=rule, freezes=freezes)
    check_arguments(on_round=on_round, on_written=on_written, on_step=on_step, progress=progress)
    check_arguments(criu=criu, criu_options=criu_options, way=way)
    check_arguments(hook=hook, hook_timeout=hook_timeout, if_unknown=if_unknown, asking=asking)
    options = options or DumpOptions()
    source = _Source(
        pid, address, port, options, Hook(tuple(hook), hook_timeout), on_step or _tell_nobody, if_unknown, asking
    )
    await in_thread(check_target, pid)
    program = await in_thread(find, criu)
    tree = await in_thread(describe, pid, program)
    control = await in_thread(source.connect, options.page_server_timeout)
    async with conversation(control) as talk:
        await source.introduce(talk, tree)
        with tempfile.TemporaryDirectory(prefix="incdump-migrate-") as place:
            loop = _Loop(
                pid,
                Path(place),
                replace(policy or PrecopyPolicy(), final="checkpoint", restore_rate=source.restore_rate),
                replace(
                    options,
                    page_server=(address, port),
                    migration=source.token,
                    afterwards="killed" if source.restores else "running",
                ),
                rule,
                freezes,
                on_round,
                on_written,
                progress,
            )
            loop.switch = partial(source.switch, talk)
            loop.way = way
            try:
                await loop.run(program.path, criu_options)
            except BaseException as error:
                with anyio.CancelScope(shield=True):
                    await source.conclude(talk, error)
                if not (source.is_there and isinstance(error, IncdumpError)):
                    raise
            else:
                await source.conclude(talk, None)
    result, final = loop.result, loop.result.final
    downtime = result.downtime if source.downtime is None else source.downtime
    return MigrateResult(
        pid=pid,
        receiver=source.receiver,
        outcome="runs" if source.restores else "stored",
        rounds=result.rounds,
        decision=result.decision,
        final=final,
        downtime=downtime,
        frozen_at=result.frozen_at,
        parts=[] if final is None else _parts(final, downtime, source.switched),
        hottest=result.hottest,
        seconds=time.monotonic() - began,
        warnings=[*result.warnings, *([] if final is None else final.warnings), *source.warnings],
    )


def _parts(final: DumpResult, downtime: float | None, switched: list[FreezePart]) -> list[FreezePart]:
    """How the downtime divides; what is nobody else's is CRIU's."""
    parts = [part for part in freeze_parts(final) if part.name != "criu"]
    if downtime is None or not parts:
        return []
    parts += switched
    rest = int(downtime * 1e6) - sum(part.microseconds for part in parts)
    return [*parts, FreezePart("criu", max(0, rest))]


def _tell_nobody(_: str) -> None:
    pass


class _Loop(Loop):
    """The pre-copy loop, with a last dump that ends over there."""

    switch: Callable[[int, CheckpointRun, float], Awaitable[None]]

    def _at_gate(self, number: int) -> AtGate:
        return partial(self.switch, number)


class _Source:
    """This end of the migration.

    :ivar is_there: whether the tree runs over there, and is to end here.
    :ivar token: by which the receiver knows what belongs to it.
    :ivar restores: whether the receiver restores.
    :ivar restore_rate: bytes that it restores in a second; None: not known.
    :ivar downtime: see `MigrateResult`.
    :ivar switched: the parts of it that are no checkpoint's.
    """

    def __init__(
        self,
        pid: int,
        address: str,
        port: int,
        options: DumpOptions,
        hook: Hook,
        on_step: Callable[[str], None],
        if_unknown: IfUnknown,
        asking: float,
    ) -> None:
        self._pid = pid
        self._where = address, port
        self._options = options
        self._hook = hook
        self._tell = on_step
        self._if_unknown = if_unknown
        self._asking = asking
        self.is_there = False
        self._raised: BaseException | None = None  # what is to be raised when the tree is in one place
        self._was_stopped = False
        self._tasks: list[Task] = []
        self.receiver = f"{address} port {port}"
        self.token = ""
        self.restores = False
        self.restore_rate: float | None = None
        self.downtime: float | None = None
        self.switched: list[FreezePart] = []
        self.warnings: list[str] = []

    def connect(self, timeout: float) -> Control:
        """Begin a conversation. Blocks.

        :raises incdump.errors.XferError: there is no receiver.
        """
        connection = connect(*self._where, timeout, self._options.tls, server="receiver")
        control = Control(connection, f"the receiver at {self.receiver}", timeout)
        try:
            connection.sendall(MIGRATE)
        except OSError as error:
            control.close()
            raise ConnectionLost(f"the receiver at {self.receiver} hung up: {error.strerror}") from error
        return control

    async def introduce(self, talk: Conversation, tree: dict[str, Any]) -> None:
        """Say what is to come, at once, and hear whether it can be taken.

        :param tree: see `incdump.engine.requirements.describe`.
        :raises incdump.errors.CannotMigrate: it cannot.
        """
        await talk.say("migrate", version=VERSION, tree=tree)
        try:
            answer = await talk.hear()
        except (ProtocolError, ConnectionLost) as error:
            raise XferError(f"{error}: is it incdump receive that listens at {self.receiver}?") from error
        if answer["say"] == "failed":
            raise CannotMigrate(f"the receiver at {self.receiver} refuses: {answer.get('why')}", pid=self._pid)
        problems = tuple(map(str, answer.get("problems") or ()))
        if problems:
            raise CannotMigrate(
                f"process {self._pid} cannot be moved to {self.receiver}: {'; '.join(problems)}",
                pid=self._pid,
                problems=problems,
            )
        self.token, self.restores = str(answer.get("token")), answer.get("restores") is True
        rate = answer.get("restore_rate")
        if self.restores and isinstance(rate, float) and rate > 0:
            self.restore_rate = rate

    # -- the switch ------------------------------------------------------------------------------------------------

    async def switch(self, talk: Conversation, number: int, run: CheckpointRun, begun: float) -> None:
        """Everything is over there, and the tree stands here: have it run there.

        :param number: of the images dir.
        :param begun: when CRIU began to stop it, as `time.time` has it.
        :raises incdump.errors.MigrationError: it does not run there.
        """
        # From the word "go" until CRIU has been told what is to be, nothing may be raised but what keeps the tree here.
        sent = time.time()
        self._tasks = run.tasks()
        self._was_stopped = True
        self._tell("stopped")
        await self._hook.call("stopped", self._pid)
        self._tell("restore")
        await talk.say("restore", number=number)
        answer = await talk.hear()
        if not self.restores:
            self._expect(answer, "stored")
            return
        self._expect(answer, "ready")
        ready = time.time()
        self._tell("go")
        if not await in_thread(run.stands):
            raise MigrationError(
                f"process {self._pid} goes on here: CRIU, which was to hold it, has ended", pid=self._pid
            )
        _, self._raised = await unbroken(partial(self._go, talk))
        runs = time.time()
        self.is_there = True
        if not run.stands():
            self._end_here()
        self.downtime = runs - begun
        self.switched = [
            FreezePart("restore", int((ready - sent) * 1e6)),
            FreezePart("switch", int((runs - ready) * 1e6)),
        ]

    def _expect(self, answer: dict[str, Any], what: str) -> None:
        if answer["say"] == "failed":
            raise MigrationError(
                f"process {self._pid} cannot run at {self.receiver}, and goes on here: {answer.get('why')}",
                pid=self._pid,
            )
        if answer["say"] != what:
            raise ProtocolError(f"the receiver at {self.receiver} says {answer['say']!r} instead of {what!r}")

    async def _go(self, talk: Conversation) -> None:
        try:
            await talk.say("go")
            self._expect(await talk.hear(), "runs")
        except XferError as error:
            if not await self._ask(error):
                raise MigrationError(
                    f"process {self._pid} goes on here, and does not run at {self.receiver}: {error}", pid=self._pid
                ) from error

    async def _ask(self, why: XferError) -> bool:
        """Whether it runs over there; it never will if not.

        :raises incdump.errors.OutcomeUnknown: that cannot be found out.
        """
        with suppress(Exception):  # whoever cannot be told
            self._tell("asking")
        with anyio.move_on_after(self._asking):
            while True:
                with suppress(XferError):
                    control = await in_thread(self.connect, min(_ASK_TIMEOUT, self._options.page_server_timeout))
                    async with conversation(control) as talk:
                        await talk.say("outcome", token=self.token)
                        answer = await talk.hear()
                    if answer["say"] in ("runs", "void"):
                        return bool(answer["say"] == "runs")
                    break  # another receiver by now, which does not know
                await anyio.sleep(_ASK_AGAIN)
        raise self._unknown(why)

    def _unknown(self, why: XferError) -> OutcomeUnknown:
        text = f"it is not known whether process {self._pid} runs at {self.receiver} ({why}); here it "
        if self._if_unknown == "run":
            return OutcomeUnknown(text + "goes on: make sure that it does not run twice", pid=self._pid)
        self._signal(signal.SIGSTOP)
        pids = " ".join(str(task.pid) for task in self._tasks)
        text += f"is left stopped. If it runs there: kill -KILL {pids}; if not: kill -CONT {pids}"
        return OutcomeUnknown(text, pid=self._pid)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def conclude(self, talk: Conversation, error: BaseException | None) -> None:
        """Tell the receiver, and the hook, what has come of it here."""
        if self.is_there:
            self._end_here()
            if isinstance(error, IncdumpError):
                self.warnings.append(f"it runs at {self.receiver}, and has been ended here after this: {error}")
            with suppress(IncdumpError):
                await talk.say("done")
            try:
                self._tell("runs")
            except Exception as problem:
                self._raised = self._raised or problem
        elif error is not None:
            with suppress(IncdumpError):
                await talk.say("failed", why=str(error) or type(error).__name__)
        step = "moved" if self.is_there else "failed" if error is not None and self._was_stopped else None
        if step is not None and not isinstance(error, OutcomeUnknown):
            wrong = await self._hook.tell(step, self._pid)
            self.warnings += [] if wrong is None else [wrong]
        if self._raised is not None:
            raise self._raised

    def _end_here(self) -> None:
        """CRIU has killed the tree. Make sure of it, at once: it runs over there."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for task in self._tasks:
            signal_same(task.identity, number)
