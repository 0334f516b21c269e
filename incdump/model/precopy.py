"""The pre-copy loop's rule: when the rest is small enough to stop the target. Pure functions of what was measured.

Pre-dumps run one after the other while the target runs on. Each tells how much was written since the one before, so how
fast the target writes; and how fast that was copied. If the target were stopped now, it would stand still for

    a fixed cost  +  the longer of  the scan  and  (bytes deferred + bytes written since the last scan) / bandwidth

where deferred is what the last round left out because it is written in every round (`incdump.model.hot`): it has to be
copied in any case. That is `estimate`: scan and copy go on side by side. `should_stop` compares it with the budget.

No number of seconds is known beforehand. The fixed cost is what earlier freezes took, or, as long as there are none, so
many times what a round takes beside copying: that too grows with the tree, and on a machine that is slower or busy. The
first round copies everything, one page after the other, the later ones pages here and there, as the last dump does: it
counts for the best bandwidth only, as long as there is another.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from incdump.model.fields import check_choice, check_count, check_seconds
from incdump.model.runs import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from incdump.model.stats import DumpStats

OnTimeout: TypeAlias = Literal["cancel", "force", "throttle"]
Final: TypeAlias = Literal["dump", "checkpoint", "none"]
IfUnknown: TypeAlias = Literal["stop", "run"]
Verdict: TypeAlias = Literal["go on", "stop", "cancel", "throttle"]

ON_TIMEOUT: tuple[OnTimeout, ...] = ("cancel", "force", "throttle")
FINALS: tuple[Final, ...] = ("dump", "checkpoint", "none")
VERDICTS: tuple[Verdict, ...] = ("go on", "stop", "cancel", "throttle")
IF_UNKNOWN: tuple[IfUnknown, ...] = ("stop", "run")

_WEIGHT = 0.5
"""Of the newest round in the weighted means: three rounds ago counts an eighth."""
_WORTH_MEASURING = 1 << 20
"""Bytes of a round that tell of bandwidth; what is less takes as long as its system calls do."""
_STOPPED = {"dump": 0.7, "none": 0.7, "checkpoint": 1.0}
"""What a last dump that copies nothing stops the target for, in terms of what a round takes beside its memory (see
`_beside_memory`). Ratios, measured on trees of 1 to 17 processes of 16 to 512 MiB, on a more or less busy machine. A
checkpoint of small processes, whose smaps CRIU reads, takes up to 1.4, one of big ones hardly 0.8."""
_UNTIL_SCAN = {"dump": 1.0, "none": 1.0, "checkpoint": 2.5}
"""In the same terms: from the decision until it scans, while which the target writes on."""
_LATELY = 3
"""Rounds whose scans count."""
_SHRINKS = 0.9
"""Of the least that was dirty in an earlier round; more, twice in a row, and the rounds no longer shrink."""
_STALLED_ROUNDS = 8
_STALLED_SECONDS = 2.0
"""Rounds that do not shrink for so many in a row, and for so long, end the loop: a burst of writes may be shorter."""
_MOST_ROUNDS = 200
"""Each has a directory of its own."""
_CERTAIN = 0.5
"""Of the estimated floor of a stop: it was not seen to be wrong by more than a factor of two."""
_AMPLE = 1.25
"""Of what a stop is estimated to take: advised as the downtime to allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecopyPolicy:
    """When to stop, and what to do when that moment does not come.

    :ivar downtime: seconds for which the target may stand still.
    :ivar timeout: seconds after which the loop has to end.
    :ivar on_timeout: ``"cancel"``: leave the target as it is, without a final dump; ``"force"``: stop it, however long
        it takes; ``"throttle"``: slow it down, step by step, until the rest is small enough.
    :ivar max_rounds: pre-dumps after which it is stopped in any case; None for any number.
    :ivar final: what comes last.
    :ivar restore_rate: of a migration: bytes of memory that are brought back in a second over there, while the target
        stands still; None: nothing is.
    """

    downtime: float = 0.3
    timeout: float = 600.0
    on_timeout: OnTimeout = "cancel"
    max_rounds: int | None = None
    final: Final = "dump"
    restore_rate: float | None = None

    def __post_init__(self) -> None:
        """:raises incdump.errors.InvalidOption: a value that its field cannot have."""
        check_seconds("downtime", self.downtime)
        check_seconds("timeout", self.timeout)
        check_choice("on_timeout", self.on_timeout, ON_TIMEOUT)
        check_count("max_rounds", self.max_rounds, 1, may_be_none=True)
        check_choice("final", self.final, FINALS)
        check_seconds("restore_rate", self.restore_rate, may_be_none=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecopyRound:
    """A pre-dump of the loop.

    :ivar number: from 1; its images dir has that name.
    :ivar started: when, seconds since the loop began.
    :ivar seconds: how long it took.
    :ivar scan_seconds: of these, reading and classifying the pagemap.
    :ivar write_seconds: from the first page copied to the last.
    :ivar pages_scanned: populated pages.
    :ivar bytes_written: pages copied, bytes.
    :ivar throttled: how much of the time the target was kept stopped meanwhile, 0 to 1.
    :ivar memory_seconds: preparing the processes, scan and copy, which go on side by side; None: not known.
    :ivar bytes_deferred: pages that were written, but not copied, because they are written in every round.
    """

    number: int
    started: float
    seconds: float
    scan_seconds: float
    write_seconds: float
    pages_scanned: int
    bytes_written: int
    throttled: float = 0.0
    memory_seconds: float | None = None
    bytes_deferred: int = 0

    @property
    def bytes_dirty(self) -> int:
        """What was found to be dirty, copied or not."""
        return self.bytes_written + self.bytes_deferred

    @property
    def ended(self) -> float:
        """When it ended, seconds since the loop began."""
        return self.started + self.seconds

    @classmethod
    def of(cls, number: int, started: float, stats: DumpStats, throttled: float = 0.0) -> PrecopyRound:
        """A round from the counters of its pre-dump."""
        return cls(
            number=number,
            started=started,
            seconds=stats.total_time / 1e6,
            scan_seconds=stats.scan_time / 1e6,
            write_seconds=stats.memwrite_time / 1e6,
            pages_scanned=stats.pages_scanned + stats.shpages_scanned,
            bytes_written=(stats.pages_written + stats.shpages_written) * PAGE_SIZE,
            throttled=throttled,
            memory_seconds=stats.memdump_time / 1e6,
            bytes_deferred=stats.pages_deferred * PAGE_SIZE,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingWrites:
    """How much of a mapping a dump wrote.

    :ivar pid: the process; of memory that several share, one of them.
    :ivar comm: its command name.
    :ivar start: first address, bytes.
    :ivar end: one past the last byte.
    :ivar name: as in /proc/PID/maps; ``""`` for memory without one.
    :ivar pages: that were written to the images.
    """

    pid: int
    comm: str
    start: int
    end: int
    name: str
    pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze:
    """A final dump that was seen: what of its time is neither scan nor copying is the fixed cost of the next one.

    `of` makes it of the counters of a dump or checkpoint.

    :ivar seconds: from the first thread that stood to the moment when all ran again, or were gone.
    :ivar scan_seconds: reading and classifying the pagemap.
    :ivar write_seconds: from the first page copied to the last.
    """

    seconds: float
    scan_seconds: float
    write_seconds: float

    @classmethod
    def of(cls, stats: DumpStats) -> Freeze:
        """A freeze from the counters of its dump."""
        return cls(
            seconds=(stats.freezing_time + stats.frozen_time) / 1e6,
            scan_seconds=stats.scan_time / 1e6,
            write_seconds=stats.memwrite_time / 1e6,
        )

    @property
    def fixed(self) -> float:
        """What it took beside scan and copy."""
        return max(0.0, self.seconds - max(self.scan_seconds, self.write_seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What would happen if the target were stopped now.

    :ivar dirty_rate: bytes that it writes in a second, each page counted once a round, deferred ones too; None before
        the second round.
    :ivar bandwidth: bytes copied in a second; None before anything was copied.
    :ivar dirty_bytes: to be copied; None when the rate is not known.
    :ivar downtime: seconds for which it would stand still; None when something of this is not known.
    :ivar floor: of these, what it would take with nothing left to copy; None before the second round.
    :ivar restoring: of the floor, filling the memory over there.
    """

    dirty_rate: float | None
    bandwidth: float | None
    dirty_bytes: int | None
    downtime: float | None
    floor: float | None = None
    restoring: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do after a round.

    :ivar verdict: ``"go on"``, ``"stop"`` (the final dump is next), ``"cancel"`` or ``"throttle"`` (and go on).
    :ivar why: one line for people.
    :ivar converges: whether the rounds still shrink.
    :ivar allow: where `why` is that the allowed downtime cannot be reached: seconds that would have to be allowed.
    """

    verdict: Verdict
    why: str
    estimate: Estimate
    converges: bool = True
    allow: float | None = None

    def __post_init__(self) -> None:
        """:raises incdump.errors.InvalidOption: there is no such verdict."""
        check_choice("verdict", self.verdict, VERDICTS)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        flat = asdict(self)
        flat.update(flat.pop("estimate"))
        return flat


def _mean(values: Sequence[float]) -> float | None:
    """Exponentially weighted, the last one most."""
    mean: float | None = None
    for value in values:
        mean = value if mean is None else _WEIGHT * value + (1 - _WEIGHT) * mean
    return mean


def estimate(history: Sequence[PrecopyRound], policy: PrecopyPolicy, freezes: Sequence[Freeze] = ()) -> Estimate:
    """What stopping the target now would cost.

    :param history: the rounds so far, at least one.
    :param freezes: earlier final dumps of such a target.
    """
    apart = [max(later.started - earlier.started, 1e-6) for earlier, later in pairwise(history)]
    rate = _mean([r.bytes_dirty / seconds for r, seconds in zip(history[1:], apart, strict=True)])
    # What was deferred is dirty already, so it is not counted by this rate.
    others = _mean([r.bytes_written / seconds for r, seconds in zip(history[1:], apart, strict=True)])
    bandwidth = _bandwidth(history)
    beside = _beside_memory(history, policy.final)
    fixed, restoring = _mean([freeze.fixed for freeze in freezes]), 0.0
    if fixed is None:
        restoring = _restoring(history, policy)
        fixed = _STOPPED[policy.final] * beside + restoring
    last = history[-1]
    dirty: float | None = None
    if not last.bytes_dirty:
        dirty = 0.0
    elif others is not None:
        # What the target writes again and again counts once, so no more than all there is.
        until_scan = last.seconds + _UNTIL_SCAN[policy.final] * beside
        dirty = min(last.bytes_deferred + others * until_scan, float(last.pages_scanned * PAGE_SIZE))
    copying = None if dirty is None else _copying(history, dirty, bandwidth)
    downtime = None if dirty is None or copying is None else fixed + max(_scanning(history, dirty), copying)
    dirty_bytes = None if dirty is None else int(dirty)
    return Estimate(
        dirty_rate=rate,
        bandwidth=bandwidth,
        dirty_bytes=dirty_bytes,
        downtime=downtime,
        floor=fixed if len(history) > 1 else None,
        restoring=restoring,
    )


def _restoring(history: Sequence[PrecopyRound], policy: PrecopyPolicy) -> float:
    """Seconds that it takes to fill all memory over there: of that it has none before."""
    return 0.0 if policy.restore_rate is None else history[-1].pages_scanned * PAGE_SIZE / policy.restore_rate


def _later(history: Sequence[PrecopyRound]) -> Sequence[PrecopyRound]:
    """The rounds that resemble the last dump, if there are any yet: all but the first, which copies everything."""
    return history[1:] or history


def _bandwidth(history: Sequence[PrecopyRound]) -> float | None:
    """Between what there was lately, while the target ran and wrote beside it, and the best that was seen.

    What is to be said is how fast pages that lie apart are copied from a target that stands still: that is no slower
    than the one and hardly quicker than the other.
    """

    def speeds(rounds: Sequence[PrecopyRound]) -> list[float]:
        return [
            r.bytes_written / r.write_seconds for r in rounds if r.bytes_written >= _WORTH_MEASURING and r.write_seconds
        ]

    lately = _mean(speeds(_later(history)) or speeds(history))
    return None if lately is None else (lately + max(speeds(history))) / 2


def _beside_memory(history: Sequence[PrecopyRound], final: Final) -> float:
    """Seconds that a round takes beside what a last dump does with the memory: the least of them, for it grows with the
    chain.

    A dump has prepared itself when it stops the tree. CRIU finds out about the tree only then, as a round does beside
    copying.
    """

    def of(done: PrecopyRound) -> float:
        memory = done.write_seconds
        if final != "checkpoint":
            either = max(done.scan_seconds, done.write_seconds)
            memory = either if done.memory_seconds is None else done.memory_seconds
        return max(0.0, done.seconds - memory)

    return min(map(of, _later(history)))


def _scanning(history: Sequence[PrecopyRound], dirty: float) -> float:
    """Seconds that it takes to find so many bytes.

    Part of a scan grows with what it finds, part does not, and which is which was not measured: so the geometric mean
    of the two extremes.
    """
    seconds = _mean([r.scan_seconds for r in _later(history)[-_LATELY:]]) or 0.0
    found = history[-1].bytes_dirty
    return seconds * sqrt(min(1.0, dirty / found)) if found else seconds


def _copying(history: Sequence[PrecopyRound], dirty: float, bandwidth: float | None) -> float | None:
    """Seconds that it takes to copy so many bytes; None when that cannot be said."""
    last = history[-1]
    if not dirty:
        return 0.0
    if bandwidth is None:
        return last.write_seconds if dirty < _WORTH_MEASURING else None
    if last.bytes_written >= _WORTH_MEASURING:
        return dirty / bandwidth
    return last.write_seconds + max(0.0, dirty - last.bytes_written) / bandwidth


def converges(history: Sequence[PrecopyRound]) -> bool:
    """Whether the rounds still shrink; the first two say nothing."""
    sizes = [r.bytes_dirty for r in history[1:]]
    return len(sizes) < 3 or min(sizes[-2:]) < _SHRINKS * min(sizes[:-2])


def has_stalled(history: Sequence[PrecopyRound]) -> bool:
    """Whether the rounds have not shrunk for so long that they cannot be expected to any more."""
    low, since = history[0].bytes_dirty, history[0]
    for done in history[1:]:
        if done is history[1] or done.bytes_dirty < _SHRINKS * low:
            low, since = done.bytes_dirty, done
    last = history[-1]
    return last.number - since.number >= _STALLED_ROUNDS and last.ended - since.ended >= _STALLED_SECONDS


def _downtime_to_allow(now: Estimate, policy: PrecopyPolicy) -> float | None:
    """Seconds that would have to be allowed where a stop that copies nothing takes longer than what is; else None."""
    if now.floor is None or policy.final == "none" or _CERTAIN * now.floor <= policy.downtime:
        return None
    return _AMPLE * max(now.floor, now.downtime or 0.0)


def _out_of_reach(now: Estimate, allow: float) -> str:
    """Why the allowed downtime cannot be reached, and what to allow."""
    restoring = f", {seconds_text(now.restoring)} of it to fill the memory over there" if now.restoring else ""
    floor = seconds_text(now.floor or 0.0)
    return (
        f"a stop takes about {floor} even with nothing left to copy{restoring}: allow --downtime {seconds_text(allow)}"
    )


def seconds_text(seconds: float) -> str:
    """Seconds as --downtime takes them, two digits: ``"85ms"``, ``"1.5s"``."""
    return f"{float(f'{seconds:.2g}'):g}s" if seconds >= 0.995 else f"{max(1, round(float(f'{seconds * 1e3:.2g}')))}ms"


def should_stop(
    history: Sequence[PrecopyRound], policy: PrecopyPolicy, freezes: Sequence[Freeze] = (), throttled: float = 0.0
) -> Decision:
    """What to do after a round.

    :param history: the rounds so far, at least one.
    :param throttled: how much the target is being slowed down, 0 to 1.
    """
    now = estimate(history, policy, freezes)
    shrinks, stalled = converges(history), has_stalled(history)
    allow = _downtime_to_allow(now, policy)

    def decide(verdict: Verdict, why: str, allow: float | None = None) -> Decision:
        return Decision(verdict=verdict, why=why, estimate=now, converges=shrinks, allow=allow)

    def give_up(why: str) -> Decision:
        if policy.on_timeout == "cancel":
            return decide("cancel", why)
        return decide("stop" if policy.on_timeout == "force" or throttled >= 1 else "throttle", why)

    last = history[-1]
    if not last.bytes_dirty:
        return decide("stop", "nothing was written since the last round")
    if now.downtime is not None and now.downtime <= policy.downtime:
        return decide("stop", f"the rest takes about {now.downtime * 1e3:.0f} ms")
    if policy.max_rounds is not None and len(history) >= policy.max_rounds:
        return decide("stop", f"{policy.max_rounds} rounds are over")
    if allow is not None and policy.max_rounds is None and (policy.on_timeout == "cancel" or stalled):
        # To slow the target down, or to go on until the time is over, would not help.
        return decide("cancel" if policy.on_timeout == "cancel" else "stop", _out_of_reach(now, allow), allow)
    if last.ended >= policy.timeout:
        return give_up(f"{policy.timeout:g} s are over")
    if len(history) >= _MOST_ROUNDS:
        return give_up(f"{_MOST_ROUNDS} rounds are over")
    if stalled:
        return give_up("the rounds no longer shrink")
    if not shrinks:
        return decide("throttle" if policy.on_timeout == "throttle" else "go on", "the rounds no longer shrink")
    return decide("go on", "the rest is too much yet" if allow is None else _out_of_reach(now, allow), allow)


Rule: TypeAlias = "Callable[[Sequence[PrecopyRound], PrecopyPolicy, Sequence[Freeze], float], Decision]"
"""`should_stop`, or one's own."""
