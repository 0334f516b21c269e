"""The three pagemap readers: `plain`, `cache` and `scan`, on many small mappings.

*Bare* is the reader alone: its windows are drawn, one after the other, and dropped. *Whole* is the `scan_time` of
complete pre-dumps: all that finds out what to write (mappings, tracker, reader, classification). They form one chain,
with nothing written in between, so that hardly a page is copied beside the scanning.

With the uffd-wp tracker a pre-dump always scans once to get and clear what was written; `plain` and `cache` read the
pagemap beside that, `scan` needs nothing else.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import incdump
from benchmarks.report import Report, alternate
from incdump.model.vmas import VmaKind
from incdump.proc.maps import read_vmas
from incdump.proc.pagemap import make_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.bench import Bench
    from incdump.model.options import PagemapName
    from tests.targets.build import Target

READERS: tuple[PagemapName, ...] = ("plain", "cache", "scan")
FASTER_THAN_PLAIN = 2.5
VMA_KIB = 40
PASSES = 5
"""Passes of a bare reader in each round: one takes about a millisecond."""


def run(bench: Bench) -> Iterator[Report]:
    """Measure on each of ``bench.vmas`` mappings; the targets are about the first."""
    for vmas in bench.vmas:
        judged = vmas == bench.vmas[0]
        with bench.target(vmas=vmas, vma_kib=VMA_KIB) as target:
            yield _bare(bench, target, vmas, judged=judged)
            yield _whole(bench, target, vmas, judged=judged)


def _judge(report: Report, *, judged: bool) -> None:
    report.compare("plain", "cache", limit=FASTER_THAN_PLAIN if judged else None, above=True)
    report.compare("scan", "cache", limit=1.0 if judged else None)


def _bare(bench: Bench, target: Target, vmas: int, *, judged: bool) -> Report:
    table = read_vmas(target.pid, flags=False)
    table = table.select(table.of_kind(VmaKind.ANON, VmaKind.FILE_PRIVATE))
    fd = os.open(f"/proc/{target.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def contestant(name: PagemapName) -> Callable[[], float]:
        reader = make_reader(name)

        def one_pass() -> float:
            began = time.perf_counter()
            for _ in reader.windows(fd, table):
                pass
            return time.perf_counter() - began

        return one_pass

    try:
        figures = alternate({name: contestant(name) for name in READERS}, bench.rounds * PASSES, warm_ups=3)
    finally:
        os.close(fd)
    what = f"bare readers, one pass over the pagemap of {vmas:,} VMAs of {VMA_KIB} KiB, all populated, apart"
    report = Report("readers", what, figures=figures)
    _judge(report, judged=judged)
    return report


def _whole(bench: Bench, target: Target, vmas: int, *, judged: bool) -> Report:
    last = bench.predump(target)
    tracker = last.tracker

    def contestant(name: PagemapName) -> Callable[[], float]:
        options = incdump.DumpOptions(pagemap=name)

        def one_predump() -> float:
            nonlocal last
            last = bench.predump(target, last, options)
            return last.stats.scan_time / 1e6

        return one_predump

    figures = alternate({name: contestant(name) for name in READERS}, bench.rounds)
    what = (
        f"scan_time of whole pre-dumps --pagemap NAME (tracker {tracker}), {vmas:,} VMAs of {VMA_KIB} KiB, on a parent"
    )
    report = Report("readers", what, figures=figures)
    _judge(report, judged=judged)
    report.notes += last.warnings
    return report
