"""What tracking costs a target that writes.

The target rewrites a fifth of its pages, chosen at random, each once, with incompressible bytes: when nobody tracks it;
when every page is write-protected, so that each write takes one fault; and while a pre-dump of all its pages is under
way, on the same processors.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import anyio

import incdump
from benchmarks.report import Report, alternate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.bench import Bench
    from tests.targets.build import Target

SHARE = 20
"""Percent of all pages that are rewritten."""


def run(bench: Bench) -> Iterator[Report]:
    """Measure a target of a quarter of ``bench.mib`` MiB."""
    mib = max(1, bench.mib // 4)
    with bench.target(mib=mib) as target:
        writes = Writes(bench, target)
        contestants = {
            "untracked": writes.untracked,
            "tracked": writes.tracked,
            "being pre-dumped": writes.being_predumped,
        }
        figures = alternate(contestants, bench.rounds)
    pages = mib * 256 * SHARE // 100
    report = Report("slowdown", f"time to rewrite {pages:,} of {mib * 256:,} pages at random", figures=figures)
    report.compare("tracked", "untracked")
    report.compare("being pre-dumped", "untracked")
    yield report


class Writes:
    """The three states in which the target writes; each returns the seconds that it took."""

    def __init__(self, bench: Bench, target: Target) -> None:
        self._bench = bench
        self._target = target
        self._seed = 0

    def _write(self) -> float:
        self._seed += 1
        began = time.perf_counter()
        self._target.dirty(SHARE, self._seed)
        return time.perf_counter() - began

    def untracked(self) -> float:
        """Nobody tracks it."""
        self._bench.untrack(self._target)
        return self._write()

    def tracked(self) -> float:
        """A pre-dump has just write-protected every page."""
        self._bench.predump(self._target)
        self._bench.clear()
        return self._write()

    def being_predumped(self) -> float:
        """A pre-dump is copying."""
        copying = threading.Event()

        def progress(step: str, stats: incdump.DumpStats) -> None:
            if step == "dumping" and stats.pages_written:
                copying.set()

        def job() -> None:
            try:
                path = self._bench.new_dir()
                anyio.run(partial(incdump.predump, self._target.pid, path, progress=progress))
            finally:
                copying.set()

        thread = threading.Thread(target=job)
        thread.start()
        copying.wait()
        took = self._write()
        thread.join()
        self._bench.clear()
        return took
