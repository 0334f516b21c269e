"""The most memory that an incdump command has at any moment (VmHWM), with a big target.

The commands form a chain, as a user would run them. The last pre-dump has many small runs to deal with: every fourth
page was written, at random, so that holes and pages alternate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.bench import MIB
from benchmarks.report import Figures, Report, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.bench import Bench, Command
    from tests.targets.build import Target

TIMES = 4
"""The target's size in units of ``bench.mib``."""
LIMIT = 250 * MIB


class Chain:
    """Commands, each on top of the one before it."""

    def __init__(self, bench: Bench, target: Target) -> None:
        self._bench = bench
        self._target = target
        self._last: str | None = None

    def add(self, name: str) -> Command:
        """Run ``incdump NAME``.

        :raises RuntimeError: it failed.
        """
        path = str(self._bench.new_dir())
        parent = [] if self._last is None else ["--prev-images-dir", self._last, "--require-incremental"]
        done = self._bench.command(name, "-t", str(self._target.pid), "-D", path, *parent)
        if done.code:
            raise RuntimeError(f"incdump {name} failed with {done.code}")
        self._last = path
        return done


def run(bench: Bench) -> Iterator[Report]:
    """Measure a target of 4 times ``bench.mib`` MiB, once: peaks do not vary."""
    mib = TIMES * bench.mib
    with bench.target(mib=mib) as target:
        figures: Figures = {}
        chain = Chain(bench, target)
        figures["predump, full"] = [chain.add("predump").peak]
        target.dirty(1, seed=1)
        figures["predump, 1% written"] = [chain.add("predump").peak]
        target.dirty(25, seed=2)
        figures["predump, 25% written"] = [chain.add("predump").peak]
        target.dirty(1, seed=3)
        figures["dump, 1% written"] = [chain.add("dump").peak]
        bench.clear()
        figures["dump, full"] = [Chain(bench, target).add("dump").peak]
    report = Report("memory", f"peak memory of incdump commands with a target of {mib:,} MiB", "B", figures)
    peak = max(value for values in figures.values() for value in values)
    report.verdicts.append(Verdict("the highest", [peak], LIMIT, unit="B"))
    yield report
