"""Measured figures, and what they say about a target.

Contestants take turns (A B C A B C ...), after a warm-up, because these machines are noisy and their first runs slow:
what is compared is always from the same round. A ratio is the median of the rounds' ratios, with the lowest and the
highest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Unit = Literal["s", "B"]
Figures: TypeAlias = "dict[str, list[float]]"
"""By contestant: one figure a round; the same index is the same round."""


def alternate(contestants: Mapping[str, Callable[[], float]], rounds: int, *, warm_ups: int = 1) -> Figures:
    """Let contestants take turns.

    :param contestants: by name, what does one round and returns its figure.
    :param warm_ups: rounds whose figures are thrown away.
    """
    figures: Figures = {name: [] for name in contestants}
    for number in range(-warm_ups, rounds):
        for name, contestant in contestants.items():
            figure = contestant()
            if number >= 0:
                figures[name].append(figure)
    return figures


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a / b, round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A figure, and what it is to reach.

    :ivar what: what the figure is.
    :ivar values: of each round.
    :ivar limit: what the median is to reach; None if this is for information only.
    :ivar above: whether the limit is the least that will do; else it must stay below.
    :ivar unit: ``"s"`` or ``"B"``, or ``""`` for a ratio.
    """

    what: str
    values: Sequence[float]
    limit: float | None = None
    above: bool = False
    unit: Unit | Literal[""] = ""

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the limit; None if there is none."""
        if self.limit is None:
            return None
        return median(self.values) >= self.limit if self.above else median(self.values) < self.limit

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "what": self.what,
            **_summary(self.values),
            "limit": self.limit,
            "limit_is": "at least" if self.above else "below",
            "reached": self.reached,
        }

    def text(self) -> str:
        """One line."""
        line = f"{self.what}: {spread(self.values, self.unit)}"
        if self.limit is None:
            return line
        bound = f"{'at least' if self.above else 'below'} {amount(self.limit, self.unit)}"
        return f"{line}, target {bound}, reached: {'yes' if self.reached else 'no'}"


@dataclass(slots=True)
class Report:
    """What one benchmark found.

    :ivar name: of the benchmark.
    :ivar what: what was measured, on what.
    :ivar unit: of the figures.
    :ivar figures: of each contestant.
    :ivar verdicts: what they come to.
    :ivar notes: what else there is to know.
    """

    name: str
    what: str
    unit: Unit = "s"
    figures: Figures = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(self, a: str, b: str, *, limit: float | None = None, above: bool = False) -> None:
        """Add the ratio of two contestants."""
        self.verdicts.append(Verdict(f"{a} / {b}", ratios(self.figures[a], self.figures[b]), limit, above))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "figures": {name: _summary(values) for name, values in self.figures.items()},
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
            "notes": self.notes,
        }

    def text(self) -> str:
        """Some lines for people."""
        width = max(map(len, self.figures), default=0)
        lines = [f"{self.name}: {self.what}"]
        lines += [f"    {name:<{width}}  {spread(values, self.unit)}" for name, values in self.figures.items()]
        lines += [f"  {verdict.text()}" for verdict in self.verdicts]
        lines += [f"  ({note})" for note in self.notes]
        return "\n".join(lines)


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "values": list(values)}


def spread(values: Sequence[float], unit: str) -> str:
    """Median, lowest and highest."""
    if len(values) == 1:
        return amount(values[0], unit)
    return f"{amount(median(values), unit)} ({amount(min(values), unit)} to {amount(max(values), unit)})"


def amount(value: float, unit: str) -> str:
    """A figure with a unit of a handy size."""
    if unit == "B":
        return f"{value / 2**20:.1f} MiB"
    if unit == "s":
        return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
