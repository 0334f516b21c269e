"""The pre-copy loop: pre-dump again and again while the target runs on, and stop it when the rest is small enough.

    predump DIR/1 ─▶ predump DIR/2 ─▶ … ─▶ enough? (`incdump.model.precopy.should_stop`) ─▶ dump or checkpoint DIR/N

Each images dir has the one before as its parent, and DIR/latest is a link to the newest that is complete. The loop
decides, and nothing else: the rounds are ordinary dumps. Whatever ends it, by an error or a cancellation, the target
runs on, throttled no more, and the rounds that are complete stay.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from incdump.engine.dump import DumpRun, dump
from incdump.engine.mappings import WrittenMappings
from incdump.engine.pipeline import first_cause
from incdump.engine.threads import in_thread
from incdump.engine.throttle import Throttle
from incdump.errors import DidNotConverge, IncdumpError, XferError
from incdump.holder.client import HolderKeeper
from incdump.model.options import DumpOptions
from incdump.model.precopy import Decision, Freeze, PrecopyPolicy, PrecopyRound, estimate, should_stop
from incdump.tracking import soft_dirty

if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import Callable, Sequence

    from incdump.holder.client import Lease
    from incdump.model.precopy import MappingWrites, Rule
    from incdump.model.stats import DumpResult, DumpStats

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
) -> PrecopyResult:
    """Pre-dump a process tree until the rest is small enough, then make the last dump.

    :param pid: the root of the tree.
    :param images_dir: the rounds go to 1, 2, … in it; made if missing, refused if one of these holds images.
    :param policy: when to stop, and what comes last.
    :param options: for every dump; ``options.afterwards`` says what becomes of the tree after the last one. Left out,
        it runs on.
    :param rule: decides after each round, as `incdump.model.precopy.should_stop` does.
    :param freezes: earlier last dumps of such a tree, which tell what one costs that copies nothing.
    :param on_round: called with each round, and what was decided.
    :param on_written: called with each dump before that, the last one included, and with the mappings that it wrote
        most of. To find these takes some milliseconds, while the target runs.
    :param progress: as for `incdump.predump`, of every dump.
    :param criu: for a checkpoint: CRIU's program.
    :param criu_options: for a checkpoint: further options for ``criu dump``.
    :raises incdump.errors.DidNotConverge: the rest did not become small enough in time, and ``on_timeout`` is
        ``"cancel"``. The tree runs on; the rounds stay.
    :raises incdump.errors.IncdumpError: as for `incdump.predump`, `incdump.dump` and `incdump.checkpoint`.
    """
    options = options or DumpOptions()
    if options.page_server is not None:
        raise XferError("the rounds of precopy go to directories: use predump and dump with a page server")
    run = Loop(
        pid, Path.cwd() / images_dir, policy or PrecopyPolicy(), options, rule, freezes, on_round, on_written, progress
    )
    return await run.run(criu, criu_options)


class _Keeper(HolderKeeper):
    """Traces a process only while it is not traced to be slowed down."""

    def __init__(self, turn: threading.Lock) -> None:
        super().__init__()
        self._turn = turn

    def acquire(self, pid: int, start_time: int, *, renew: bool = False) -> Lease:
        with self._turn:
            return super().acquire(pid, start_time, renew=renew)


class Loop:
    """One run of the loop."""

    def __init__(
        self,
        pid: int,
        path: Path,
        policy: PrecopyPolicy,
        options: DumpOptions,
        rule: Rule,
        freezes: Sequence[Freeze],
        on_round: Callable[[PrecopyRound, Decision], None] | None,
        on_written: Callable[[DumpResult, list[MappingWrites]], None] | None,
        progress: Callable[[str, DumpStats], None] | None,
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
        self._result = PrecopyResult(str(path))
        self._began = time.monotonic()
        self._last: DumpResult | None = None

    async def run(self, criu: str | None, criu_options: Sequence[str]) -> PrecopyResult:
        try:
            async with self._throttle.at_work():
                decision = await self._rounds()
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        self._result.decision = decision
        if not decision.converges and self._last is not None:
            with suppress(IncdumpError, OSError):
                self._result.hottest = await in_thread(hottest, self._last)
        if decision.verdict == "cancel":
            self._result.seconds = time.monotonic() - self._began
            raise self._did_not_converge(decision)
        if self._policy.final != "none":
            await self._finish(criu, criu_options)
        self._result.seconds = time.monotonic() - self._began
        return self._result

    async def _rounds(self) -> Decision:
        """Pre-dump until it is decided that there are to be no more."""
        rounds = self._result.rounds
        while True:
            left = self._policy.timeout - (time.monotonic() - self._began)
            may_break_off = bool(rounds) and self._policy.on_timeout != "throttle"
            with anyio.move_on_after(max(0.0, left) if may_break_off else None) as limit:
                await self._round(len(rounds) + 1)
            if limit.cancelled_caught:
                verdict: Any = "cancel" if self._policy.on_timeout == "cancel" else "stop"
                why = f"{self._policy.timeout:g} s are over"
                return Decision(verdict=verdict, why=why, estimate=estimate(rounds, self._policy), converges=False)
            await self._tell_written(self._last)
            throttled = 1.0 if self._throttle.is_at_its_end else self._throttle.part
            decision = self._rule(rounds, self._policy, self._freezes, throttled)
            if self._on_round is not None:
                self._on_round(rounds[-1], decision)
            if decision.verdict in ("stop", "cancel"):
                return decision
            if decision.verdict == "throttle":
                self._tighten()

    def _tighten(self) -> None:
        assert self._last is not None
        if self._last.tracker == soft_dirty.NAME:
            self._result.warnings.append("the tree is not throttled: a pre-dump by soft-dirty stops it itself")
            return
        self._throttle.tighten()

    async def _round(self, number: int) -> None:
        started = time.monotonic() - self._began
        parent = f"../{number - 1}" if number > 1 else None
        options = replace(self._options, afterwards="running")
        keeper = self._make_keeper()
        try:
            run = DumpRun("pre-dump", self._pid, self._path / str(number), parent, options, keeper, self._progress)
            self._last = await run.run()
        finally:
            keeper.close()
        self._note(self._last)
        self._result.rounds.append(PrecopyRound.of(number, started, self._last.stats, self._throttle.part))

    async def _tell_written(self, result: DumpResult | None) -> None:
        if self._on_written is not None and result is not None:
            written: list[MappingWrites] = []
            with suppress(IncdumpError, OSError):
                written = await in_thread(self._mappings.of, result, _MAPPINGS_TOLD)
            self._on_written(result, written)

    def _note(self, result: DumpResult) -> None:
        """A round is complete."""
        self._result.warnings.extend(line for line in result.warnings if line not in self._result.warnings)
        temporary = self._path / f".{LATEST}"
        with suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(Path(result.images_dir).name)
        temporary.rename(self._path / LATEST)

    async def _finish(self, criu: str | None, criu_options: Sequence[str]) -> None:
        number = len(self._result.rounds) + 1
        parent = f"../{number - 1}" if number > 1 else None
        final = await self._last_dump(self._path / str(number), parent, criu, criu_options)
        self._note(final)
        self._result.final = final
        self._result.downtime = (final.stats.freezing_time + final.stats.frozen_time) / 1e6
        await self._tell_written(final)

    def _make_keeper(self) -> HolderKeeper:
        return _Keeper(self._throttle.turn)

    async def _last_dump(
        self, images_dir: Path, parent: str | None, criu: str | None, criu_options: Sequence[str]
    ) -> DumpResult:
        call: Any = dump
        if self._policy.final == "checkpoint":
            from incdump.engine.checkpoint import checkpoint  # only where there is CRIU

            call = partial(checkpoint, criu=criu, criu_options=criu_options)
        result: DumpResult = await call(
            self._pid, images_dir, parent=parent, options=self._options, progress=self._note_freezing
        )
        return result

    def _note_freezing(self, step: str, stats: DumpStats) -> None:
        """Progress of the last dump."""
        if step == "freezing":
            self._result.frozen_at = time.monotonic() - self._began
        if self._progress is not None:
            self._progress(step, stats)

    def _did_not_converge(self, decision: Decision) -> DidNotConverge:
        now = decision.estimate
        rest = "" if now.downtime is None else f"; stopped now, it would stand still for {now.downtime:.2f} s"
        most = f"; most is written to {', '.join(self._result.hottest)}" if self._result.hottest else ""
        return DidNotConverge(
            f"process {self._pid} writes too fast: after {len(self._result.rounds)} rounds {decision.why}{rest}, "
            f"{self._policy.downtime:g} s are allowed{most}. It runs on as before; see --on-timeout",
            pid=self._pid,
            path=self._path,
        )


def hottest(result: DumpResult) -> list[str]:
    """The mappings of which a dump wrote most, for people. Blocks.

    :raises incdump.errors.IncdumpError: the images are gone.
    """
    return [
        f"{m.start:x}-{m.end:x} {m.name}".rstrip() + f" of process {m.pid} ({m.pages:,} pages)"
        for m in WrittenMappings().of(result, _HOTTEST)
    ]
