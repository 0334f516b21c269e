"""The frozen time of an incremental dump against that of a full dump, by how much was written in between.

Each round is a chain of its own: a full dump, then for every share a pre-dump, the writing of that share of all pages,
chosen at random, and a dump. What is compared is frozen_time: from the moment when every thread is stopped until the
tree is let go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.report import Figures, Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.bench import Bench
    from tests.targets.build import Target

SHARES = (0, 1, 5, 20)
"""Percent of all pages."""
JUDGED = 1
FROZEN_SHARE = 0.10


def run(bench: Bench) -> Iterator[Report]:
    """Measure a target of ``bench.mib`` MiB."""
    names = ["full", *(_name(share) for share in SHARES)]
    frozen: Figures = {name: [] for name in names}
    total: Figures = {name: [] for name in names}
    with bench.target(mib=bench.mib) as target:
        for number in range(-1, bench.rounds):
            measured = _round(bench, target, number)
            bench.clear()
            for name, (frozen_time, total_time) in measured.items():
                if number >= 0:  # before that it is the warm-up
                    frozen[name].append(frozen_time)
                    total[name].append(total_time)
    what = f"of a dump of {bench.mib:,} MiB on a pre-dump, with a share of its pages written in between, at random"
    report = Report("incremental", f"frozen_time {what}", figures=frozen)
    for share in SHARES:
        report.compare(_name(share), "full", limit=FROZEN_SHARE if share == JUDGED else None)
    yield report
    report = Report("incremental", f"total_time {what}", figures=total)
    for share in SHARES:
        report.compare(_name(share), "full")
    yield report


def _name(share: int) -> str:
    return f"{share}% written"


def _round(bench: Bench, target: Target, number: int) -> dict[str, tuple[float, float]]:
    """One chain; returns frozen_time and total_time of each dump, seconds."""
    last = bench.dump(target)
    measured = {"full": (last.stats.frozen_time / 1e6, last.stats.total_time / 1e6)}
    for share in SHARES:
        last = bench.predump(target, last)
        if share:
            target.dirty(share, seed=100 * (number + 2) + share)
        last = bench.dump(target, last)
        if not last.incremental:
            raise RuntimeError(f"the dump was not incremental: {last.warnings}")
        measured[_name(share)] = last.stats.frozen_time / 1e6, last.stats.total_time / 1e6
    return measured
