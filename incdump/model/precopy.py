"""The pre-copy loop's rule: when the rest is small enough to stop the target. Pure functions of what was measured.

Pre-dumps run one after the other while the target runs on. Each tells how much was written since the one before, so how
fast the target writes; and how fast that was copied. If the target were stopped now, it would stand still for

    a fixed cost  +  the scan  +  (bytes written since the last scan) / bandwidth

which is `estimate`. `should_stop` compares it with the budget.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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
IF_UNKNOWN: tuple[IfUnknown, ...] = ("stop", "run")

_WEIGHT = 0.5
"""Of the newest round in the weighted means: three rounds ago counts an eighth."""
_WORTH_MEASURING = 1 << 20
"""Bytes of a round that tell of bandwidth; what is less takes as long as its system calls do."""
_FIXED = {"dump": 0.010, "checkpoint": 0.100, "none": 0.010}
"""Seconds that a final dump of nothing takes, until one was seen: a small tree's on the machines that this was written
on."""
_SHRINKS = 0.9
"""Of the least that was written in an earlier round; more, twice in a row, and the rounds no longer shrink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecopyPolicy:
    """When to stop, and what to do when that moment does not come.

    :ivar downtime: seconds for which the target may stand still.
    :ivar timeout: seconds after which the loop has to end.
    :ivar on_timeout: ``"cancel"``: leave the target as it is, without a final dump; ``"force"``: stop it, however long
        it takes; ``"throttle"``: slow it down, step by step, until the rest is small enough.
    :ivar max_rounds: pre-dumps after which it is stopped in any case; None for any number.
    :ivar final: what comes last.
    """

    downtime: float = 0.3
    timeout: float = 600.0
    on_timeout: OnTimeout = "cancel"
    max_rounds: int | None = None
    final: Final = "dump"


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
    """

    number: int
    started: float
    seconds: float
    scan_seconds: float
    write_seconds: float
    pages_scanned: int
    bytes_written: int
    throttled: float = 0.0

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

    :ivar seconds: from the first thread that stood to the moment when all ran again, or were gone.
    :ivar scan_seconds: reading and classifying the pagemap.
    :ivar write_seconds: from the first page copied to the last.
    """

    seconds: float
    scan_seconds: float
    write_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What would happen if the target were stopped now.

    :ivar dirty_rate: bytes that it writes in a second, each page counted once a round; None before the second round.
    :ivar bandwidth: bytes copied in a second; None before anything was copied.
    :ivar dirty_bytes: to be copied; None when the rate is not known.
    :ivar downtime: seconds for which it would stand still; None when something of this is not known.
    """

    dirty_rate: float | None
    bandwidth: float | None
    dirty_bytes: int | None
    downtime: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do after a round.

    :ivar verdict: ``"go on"``, ``"stop"`` (the final dump is next), ``"cancel"`` or ``"throttle"`` (and go on).
    :ivar why: one line for people.
    :ivar converges: whether the rounds still shrink.
    """

    verdict: Verdict
    why: str
    estimate: Estimate
    converges: bool = True

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
    rates = [later.bytes_written / max(later.started - earlier.started, 1e-6) for earlier, later in pairwise(history)]
    speeds = [
        r.bytes_written / r.write_seconds for r in history if r.bytes_written >= _WORTH_MEASURING and r.write_seconds
    ]
    last = history[-1]
    rate, bandwidth = _mean(rates), _mean(speeds)
    if not last.bytes_written:
        return Estimate(
            dirty_rate=rate, bandwidth=bandwidth, dirty_bytes=0, downtime=_fixed(policy, freezes) + last.scan_seconds
        )
    if rate is None:
        return Estimate(dirty_rate=None, bandwidth=bandwidth, dirty_bytes=None, downtime=None)
    # What the target writes again and again counts once, so no more than all there is.
    dirty = min(rate * last.seconds, float(last.pages_scanned * PAGE_SIZE))
    fixed = _fixed(policy, freezes) + (_mean([r.scan_seconds for r in history[-3:]]) or 0.0)
    downtime = None if bandwidth is None else fixed + dirty / bandwidth
    if bandwidth is None and dirty < _WORTH_MEASURING:
        downtime = fixed + last.write_seconds
    return Estimate(dirty_rate=rate, bandwidth=bandwidth, dirty_bytes=int(dirty), downtime=downtime)


def _fixed(policy: PrecopyPolicy, freezes: Sequence[Freeze]) -> float:
    seen = _mean([max(0.0, f.seconds - f.scan_seconds - f.write_seconds) for f in freezes])
    return _FIXED[policy.final] if seen is None else seen


def converges(history: Sequence[PrecopyRound]) -> bool:
    """Whether the rounds still shrink; the first two say nothing."""
    sizes = [r.bytes_written for r in history[1:]]
    return len(sizes) < 3 or min(sizes[-2:]) < _SHRINKS * min(sizes[:-2])


def should_stop(
    history: Sequence[PrecopyRound], policy: PrecopyPolicy, freezes: Sequence[Freeze] = (), throttled: float = 0.0
) -> Decision:
    """What to do after a round.

    :param history: the rounds so far, at least one.
    :param throttled: how much the target is being slowed down, 0 to 1.
    """
    now = estimate(history, policy, freezes)
    shrinks = converges(history)

    def decide(verdict: Verdict, why: str) -> Decision:
        return Decision(verdict=verdict, why=why, estimate=now, converges=shrinks)

    last = history[-1]
    if not last.bytes_written:
        return decide("stop", "nothing was written since the last round")
    if now.downtime is not None and now.downtime <= policy.downtime:
        return decide("stop", f"the rest takes about {now.downtime * 1e3:.0f} ms")
    if policy.max_rounds is not None and len(history) >= policy.max_rounds:
        return decide("stop", f"{policy.max_rounds} rounds are over")
    if last.ended >= policy.timeout:
        if policy.on_timeout == "cancel":
            return decide("cancel", f"{policy.timeout:g} s are over")
        if policy.on_timeout == "force" or throttled >= 1:
            return decide("stop", f"{policy.timeout:g} s are over")
        return decide("throttle", f"{policy.timeout:g} s are over")
    if not shrinks:
        return decide("throttle" if policy.on_timeout == "throttle" else "go on", "the rounds no longer shrink")
    return decide("go on", "the rest is too much yet")


Rule: TypeAlias = "Callable[[Sequence[PrecopyRound], PrecopyPolicy, Sequence[Freeze], float], Decision]"
"""`should_stop`, or one's own."""
