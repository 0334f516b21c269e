"""The pre-copy loop: pre-dump again and again while the target runs on, and stop it when the rest is small enough.

    predump DIR/1 ─▶ predump DIR/2 ─▶ … ─▶ enough? (`incdump.model.precopy.should_stop`) ─▶ dump or checkpoint DIR/N

Each images dir has the one before as its parent, and DIR/latest is a link to the newest that is complete. The loop
decides, and nothing else: the rounds are ordinary dumps, but that pages which are written in every round are left to
the last one (`incdump.model.hot`). Whatever ends it, by an error or a cancellation, the target runs on, throttled no
more, and the rounds that are complete stay.

Between two rounds nothing is under way: no task, no cancel scope, nobody who stops the target. So the loop can be an
async generator (`Loop.rounds`), and whoever drives it may leave it alone at any time.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from incdump.criu.options import refuse_scripts_in_files
from incdump.criu.program import find
from incdump.engine.dump import DumpRun
from incdump.engine.mappings import WrittenMappings
from incdump.engine.reach import refuse_shut
from incdump.engine.tasks import first_cause
from incdump.engine.threads import in_thread, surely_in_thread
from incdump.engine.throttle import Throttle
from incdump.errors import DidNotConverge, IncdumpError, XferError
from incdump.holder.client import HolderKeeper, forget
from incdump.images.proved import ProvedChain
from incdump.model.arguments import check_arguments
from incdump.model.hot import HotPages
from incdump.model.options import DumpOptions
from incdump.model.precopy import Decision, Freeze, PrecopyPolicy, PrecopyRound, estimate, should_stop
from incdump.proc.limits import names_limits
from incdump.proc.user_namespace import mapped_root
from incdump.tracking import soft_dirty

if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from incdump.engine.checkpoint import AtGate
    from incdump.holder.client import Keeper, Lease
    from incdump.model.options import WayName
    from incdump.model.precopy import MappingWrites, Rule
    from incdump.model.runs import Runs
    from incdump.model.stats import DumpResult, DumpStats
    from incdump.proc.identity import Identity

LATEST = "latest"
_HOTTEST = 3
_MAPPINGS_TOLD = 100
"""Of each dump at most: a loop may make many, and they are kept by whoever asked for them."""


@dataclass(slots=True)
class PrecopyResult:
    """The outcome of a pre-copy loop.

    :ivar images_dir: the directory that the rounds' directories are in.
    :ivar rounds: the pre-dumps.
    :ivar decision: the last one.
    :ivar final: the last dump; None if there is none.
    :ivar downtime: seconds for which the tree stood still for it, in all; None without one.
    :ivar frozen_at: when that began, seconds since the loop began (of a checkpoint: when CRIU was started, which takes
        some milliseconds until it stops the tree); None without one.
    :ivar hottest: the mappings that were written most in the last round, if the rounds no longer shrank, for people.
    :ivar seconds: in all.
    :ivar warnings: of all dumps, each once.
    """

    images_dir: str
    rounds: list[PrecopyRound] = field(default_factory=list)
    decision: Decision | None = None
    final: DumpResult | None = None
    downtime: float | None = None
    frozen_at: float | None = None
    hottest: list[str] = field(default_factory=list)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def why(self) -> str:
        """Why the loop ended, as one line; empty before its first decision."""
        return "" if self.decision is None else self.decision.why


@names_limits
async def precopy(
    pid: int,
    images_dir: str | os.PathLike[str],
    *,
    policy: PrecopyPolicy | None = None,
    options: DumpOptions | None = None,
    rule: Rule = should_stop,
    freezes: Sequence[Freeze] = (),
    on_round: Callable[[PrecopyRound, Decision], None] | None = None,
    on_written: Callable[[DumpResult, list[MappingWrites]], None] | None = None,
    progress: Callable[[str, DumpStats], None] | None = None,
    criu: str | None = None,
    criu_options: Sequence[str] = (),
    way: WayName = "auto",
) -> PrecopyResult:
    """Pre-dump a process tree until the rest is small enough, then make the last dump.

    :param pid: the root of the tree.
    :param images_dir: the rounds go to 1, 2, … in it; made if missing, refused if one of these holds images.
    :param policy: when to stop, and what comes last.
    :param options: for every dump; ``options.afterwards`` says what becomes of the tree after the last one. Left out,
        it runs on.
    :param rule: decides after each round, as `incdump.should_stop` does.
    :param freezes: earlier last dumps of such a tree, which tell what one costs that copies nothing.
    :param on_round: called with each round, and what was decided.
    :param on_written: called with each dump before that, the last one included, and with the mappings that were written
        most before it. To find these takes some milliseconds, while the target runs.
    :param progress: as for `incdump.predump`, of every dump.
    :param criu: for a checkpoint: CRIU's program.
    :param criu_options: for a checkpoint: further options for ``criu dump``.
    :param way: for a checkpoint: how CRIU is kept from the memory, as for `incdump.checkpoint`.
    :raises incdump.InvalidOption: an argument cannot be; nothing was begun.
    :raises incdump.errors.DidNotConverge: the rest did not become small enough in time, and ``on_timeout`` is
        ``"cancel"``. The tree runs on; the rounds stay.
    :raises incdump.errors.IncdumpError: as for `incdump.predump`, `incdump.dump` and `incdump.checkpoint`.
    """
    check_arguments(pid=pid, images_dir=images_dir, policy=policy, options=options, rule=rule, freezes=freezes)
    check_arguments(on_round=on_round, on_written=on_written, progress=progress)
    check_arguments(criu=criu, criu_options=criu_options, way=way)
    options = options or DumpOptions()
    refuse_page_server(options)
    run = Loop(
        pid, Path.cwd() / images_dir, policy or PrecopyPolicy(), options, rule, freezes, on_round, on_written, progress
    )
    run.way = way
    return await run.run(criu, criu_options)


def refuse_page_server(options: DumpOptions) -> None:
    """:raises incdump.errors.XferError: the options name one."""
    if options.page_server is not None:
        raise XferError("the rounds of precopy go to directories: use predump and dump with a page server")


class _InTurn:
    """A keeper that traces a process only while it is not traced to be slowed down."""

    def __init__(self, keeper: Keeper, turn: threading.Lock) -> None:
        self._keeper = keeper
        self._turn = turn
        self.commit, self.close, self.lasts = keeper.commit, keeper.close, keeper.lasts

    @property
    def holder(self) -> Identity | None:
        """See `incdump.holder.client.Keeper`."""
        return self._keeper.holder

    def acquire(self, pid: int, start_time: int, *, renew: bool = False) -> Lease:
        """See `incdump.holder.client.Keeper`."""
        with self._turn:
            return self._keeper.acquire(pid, start_time, renew=renew)


class Loop:
    """One run of the loop.

    :ivar result: what there is of it so far.
    :ivar way: of a last checkpoint: how CRIU is kept from the memory.
    """

    def __init__(
        self,
        pid: int,
        path: Path,
        policy: PrecopyPolicy,
        options: DumpOptions,
        rule: Rule,
        freezes: Sequence[Freeze],
        on_round: Callable[[PrecopyRound, Decision], None] | None = None,
        on_written: Callable[[DumpResult, list[MappingWrites]], None] | None = None,
        progress: Callable[[str, DumpStats], None] | None = None,
    ) -> None:
        self._pid = pid
        self._path = path
        self._policy = policy
        self._options = options
        self._rule = rule
        self._freezes = freezes
        self._on_round = on_round
        self._on_written = on_written
        self._progress = progress
        self._mappings = WrittenMappings()
        self._throttle = Throttle(pid, timeout=options.freeze_timeout)
        self._hot = HotPages()
        self._proved = ProvedChain()
        self.result = PrecopyResult(str(path))
        self.way: WayName = "auto"
        self._began = 0.0
        self._last: DumpResult | None = None

    @property
    def ends_in_checkpoint(self) -> bool:
        """Whether CRIU is needed at the end."""
        return self._policy.final == "checkpoint"

    async def run(self, criu: str | None, criu_options: Sequence[str]) -> PrecopyResult:
        async for done, decision in self.rounds(criu, criu_options):
            if self._on_round is not None:
                self._on_round(done, decision)
        return self.result

    async def rounds(
        self, criu: str | None, criu_options: Sequence[str]
    ) -> AsyncGenerator[tuple[PrecopyRound, Decision], None]:
        """Each round, and what was decided after it; then the last dump is made.

        :raises incdump.errors.CriuError: the last dump wants CRIU, and there is none, or it would run an action script
            too early: no round is made.
        :raises incdump.errors.ImagesOutOfReach: nor could be restored what it makes.
        """
        if self.ends_in_checkpoint:
            await in_thread(find, criu)
            await in_thread(refuse_scripts_in_files, criu_options)
            await in_thread(self._refuse_shut)
        self._began = time.monotonic()
        decision = None
        is_to_go_on = False
        try:
            while decision is None or decision.verdict not in ("stop", "cancel"):
                before = len(self.result.rounds)
                decision = await self._step()
                self._took()
                if len(self.result.rounds) > before:
                    yield self.result.rounds[-1], decision
            await self._conclude(decision, criu, criu_options)
            is_to_go_on = self._policy.final == "none"
        finally:
            if not is_to_go_on and self._options.track_for is None:
                await surely_in_thread(self._end_tracking)
        self._took()

    def _refuse_shut(self) -> None:
        """:raises incdump.errors.IncdumpError: the checkpoint that comes last could not be restored."""
        root = mapped_root(self._pid)
        if root is not None and self._options.page_server is None:
            refuse_shut(self._path, root, self._pid)

    def _end_tracking(self) -> None:
        """The loop is over, and nobody has asked for more. Blocks."""
        if self._last is not None:
            with suppress(IncdumpError):
                forget(self._last.pids)

    async def _step(self) -> Decision:
        """The next round, if there is time for it, and what is to be done after it."""
        rounds = self.result.rounds
        left = self._policy.timeout - (time.monotonic() - self._began)
        may_break_off = bool(rounds) and self._policy.on_timeout != "throttle"
        with anyio.move_on_after(max(0.0, left) if may_break_off else None) as limit:
            await self._round(len(rounds) + 1)
        if limit.cancelled_caught:
            verdict: Any = "cancel" if self._policy.on_timeout == "cancel" else "stop"
            why = f"{self._policy.timeout:g} s are over"
            decision = Decision(verdict=verdict, why=why, estimate=estimate(rounds, self._policy), converges=False)
        else:
            await self._tell_written(self._last)
            throttled = 1.0 if self._throttle.is_at_its_end else self._throttle.part
            decision = self._rule(rounds, self._policy, self._freezes, throttled)
            if decision.verdict == "throttle":
                self._tighten()
        self.result.decision = decision
        return decision

    async def _conclude(self, decision: Decision, criu: str | None, criu_options: Sequence[str]) -> None:
        """The rounds are over.

        :raises incdump.errors.DidNotConverge: and there is to be no last dump.
        """
        if not decision.converges and self._last is not None:
            with suppress(IncdumpError, OSError):
                self.result.hottest = await in_thread(hottest, self._last, self._written(self._last))
        if decision.verdict == "cancel":
            raise self._did_not_converge(decision)
        if self._policy.final != "none":
            await self._finish(criu, criu_options)

    def _took(self) -> None:
        self.result.seconds = time.monotonic() - self._began

    def _tighten(self) -> None:
        if self._last_is_soft_dirty():
            self.result.warnings.append("the tree is not throttled: a pre-dump by soft-dirty stops it itself")
            return
        self._throttle.tighten()

    async def _round(self, number: int) -> None:
        started = time.monotonic() - self._began
        try:
            async with self._throttle.at_work():
                last = await self._predump(number, replace(self._options, afterwards="running"))
                # Here, not after the block: a cancellation at its end does not make the round undone.
                self._last = last
                self._note(last)
                self.result.rounds.append(PrecopyRound.of(number, started, last.stats, self._throttle.part))
        except BaseExceptionGroup as group:
            raise first_cause(group) from None

    async def _predump(self, number: int, options: DumpOptions) -> DumpResult:
        keeper = self._in_turn(HolderKeeper(self._pid))
        try:
            path = self._path / str(number)
            parent, hot, proved = self._parent(number), self._to_defer(), self._proved
            run = DumpRun("pre-dump", self._pid, path, parent, options, keeper, self._progress, hot=hot, proved=proved)
            return await run.run()
        finally:
            keeper.close()

    def _in_turn(self, keeper: Keeper) -> Keeper:
        return _InTurn(keeper, self._throttle.turn)

    def _to_defer(self) -> HotPages | None:
        """What a round is to know of those before it. CRIU, which can go on from the last one if that was made by
        soft-dirty, would miss what is not in it."""
        return None if self._policy.final == "none" and self._last_is_soft_dirty() else self._hot

    def _last_is_soft_dirty(self) -> bool:
        return self._last is not None and self._last.tracker == soft_dirty.NAME

    def _parent(self, number: int) -> str | None:
        return f"../{number - 1}" if number > 1 else None

    async def _tell_written(self, result: DumpResult | None) -> None:
        if self._on_written is not None and result is not None:
            written: list[MappingWrites] = []
            with suppress(IncdumpError, OSError):
                written = await in_thread(self._mappings.of, result, _MAPPINGS_TOLD, self._written(result))
            self._on_written(result, written)

    def _written(self, result: DumpResult) -> dict[int, Runs]:
        """What the tracker called written in a round, by process; nothing of the last dump, which copies all of it."""
        return {} if result is not self._last else {pid: self._hot.written(pid) for pid in result.pids}

    def _note(self, result: DumpResult) -> None:
        """A round is complete."""
        self.result.warnings.extend(line for line in result.warnings if line not in self.result.warnings)
        temporary = self._path / f".{LATEST}"
        with suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(Path(result.images_dir).name)
        temporary.rename(self._path / LATEST)

    async def _finish(self, criu: str | None, criu_options: Sequence[str]) -> None:
        final = await self._last_dump(len(self.result.rounds) + 1, criu, criu_options)
        self._note(final)
        self.result.final = final
        self.result.downtime = (final.stats.freezing_time + final.stats.frozen_time) / 1e6
        await self._tell_written(final)

    async def _last_dump(self, number: int, criu: str | None, criu_options: Sequence[str]) -> DumpResult:
        path, parent, keeper = self._path / str(number), self._parent(number), HolderKeeper(self._pid)
        arguments = (self._pid, path, parent, self._options, keeper, self._note_freezing)
        try:
            if self._policy.final == "checkpoint":
                from incdump.engine.checkpoint import CheckpointRun  # only where there is CRIU

                run = CheckpointRun(*arguments, self._at_gate(number), self._hot, self._proved)
                return await run.with_criu(criu, criu_options, self.way)
            return await DumpRun("dump", *arguments, self._hot, self._proved).run()
        finally:
            keeper.close()

    def _at_gate(self, number: int) -> AtGate | None:
        """What is to be done when a last dump of this number is complete, and the tree still stands."""
        return None

    def _note_freezing(self, step: str, stats: DumpStats) -> None:
        """Progress of the last dump."""
        if step == "freezing":
            self.result.frozen_at = time.monotonic() - self._began
        if self._progress is not None:
            self._progress(step, stats)

    def _did_not_converge(self, decision: Decision) -> DidNotConverge:
        now = decision.estimate
        if decision.allow is not None:
            return DidNotConverge(
                f"process {self._pid} cannot stand still for only {self._policy.downtime:g} s: {decision.why}. It runs "
                "on as before",
                pid=self._pid,
                path=self._path,
            )
        rest = "" if now.downtime is None else f"; stopped now, it would stand still for {now.downtime:.2f} s"
        most = f"; most is written to {', '.join(self.result.hottest)}" if self.result.hottest else ""
        return DidNotConverge(
            f"process {self._pid} writes too fast: after {len(self.result.rounds)} rounds {decision.why}{rest}, "
            f"{self._policy.downtime:g} s are allowed{most}. It runs on as before; see --on-timeout",
            pid=self._pid,
            path=self._path,
        )


def hottest(result: DumpResult, written: Mapping[int, Runs]) -> list[str]:
    """The mappings that were written most before a dump, for people. Blocks.

    :param written: of each process, what the tracker said; beside it counts what the dump has copied.
    :raises incdump.errors.IncdumpError: the images are gone.
    """
    return [
        f"{m.start:x}-{m.end:x} {m.name}".rstrip() + f" of process {m.pid} ({m.pages:,} pages)"
        for m in WrittenMappings().of(result, _HOTTEST, written)
    ]
