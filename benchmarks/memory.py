"""The most memory that an incdump command has at any moment (VmHWM), with a big target.

The commands form a chain, as a user would run them. Some have many small runs to deal with: every fourth page was
written, at random, or every other one, so that holes and pages alternate as often as they can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.bench import MIB
from benchmarks.report import Figures, Report, Verdict
from incdump.errors import CheckError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from benchmarks.bench import Bench, Command
    from tests.targets.build import Target

TIMES = 4
"""The target's size in units of ``bench.mib``."""
LIMIT = 250 * MIB


class Chain:
    """Commands, each on top of the one before it."""

    def __init__(self, bench: Bench, target: Target, *options: str) -> None:
        self._bench = bench
        self._target = target
        self._options = options
        self._last: str | None = None

    def add(self, name: str) -> Command:
        """Run ``incdump NAME``.

        :raises RuntimeError: it failed.
        """
        path = str(self._bench.new_dir())
        parent = [] if self._last is None else ["--prev-images-dir", self._last, "--require-incremental"]
        done = self._run(name, "-t", str(self._target.pid), "-D", path, *parent, "--track-for", "1h", *self._options)
        self._last = path
        return done

    def check(self, *options: str) -> Command:
        """Run ``incdump check``.

        A page that differs is no failure: the target has run on since (the kernel notes in its rseq area where).

        :raises RuntimeError: it failed.
        """
        return self._run("check", str(self._last), *options, good=(0, CheckError.exit_code))

    def _run(self, *arguments: str, good: Container[int] = (0,)) -> Command:
        done = self._bench.command(*arguments)
        if done.code not in good:
            raise RuntimeError(f"incdump {arguments[0]} failed with {done.code}")
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
        target.stripe(2, seed=4)
        figures["predump, every other page written"] = [chain.add("predump").peak]
        target.stripe(2, seed=5)
        figures["dump, every other page written"] = [chain.add("dump").peak]
        figures["check"] = [chain.check().peak]
        figures["check --against"] = [chain.check("--against", str(target.pid)).peak]
        target.dirty(1, seed=3)
        figures["dump, 1% written"] = [chain.add("dump").peak]
        bench.clear()
        figures["dump, full"] = [Chain(bench, target).add("dump").peak]
        bench.clear()
        chain = Chain(bench, target, "--tracker", "content")
        figures["predump, full, by content"] = [chain.add("predump").peak]
        target.stripe(2, seed=6)
        figures["predump, every other page written, by content"] = [chain.add("predump").peak]
    report = Report("memory", f"peak memory of incdump commands with a target of {mib:,} MiB", "B", figures)
    peak = max(value for values in figures.values() for value in values)
    report.verdicts.append(Verdict("the highest", [peak], LIMIT, unit="B"))
    yield report
