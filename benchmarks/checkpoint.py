"""How long a checkpoint stops its target: ``incdump checkpoint`` on a pre-dump against a plain ``criu dump``.

Both leave the tree running, so that CRIU's killing of it counts for neither; both times are CRIU's own ``frozen_time``.
A share of 1% of all pages is written between the pre-dump and the checkpoint. Targets a quarter and twice as big, with
as many pages written, show whether the stop grows with what was not written. A tree of many small processes shows what
each of them costs. A target that has a seccomp filter shows what each way costs by which CRIU is kept from its memory.

Needs root, and CRIU (``$INCDUMP_TEST_CRIU``, or fetched as for the tests).
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from benchmarks.bench import NotHere
from benchmarks.report import Report, Verdict, ratios
from tests import criu as tests_criu
from tests.criu.criu import RestorableTarget, criu_path, dump, restorable_churn
from tests.targets.build import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.bench import Bench
    from benchmarks.report import Figures
    from incdump.model.options import WayName

SHARE = 1
"""Percent of the bigger target's pages."""
STOPPED_SHARE = 0.25
GROWTH = 2.0
"""Of the stop, from the smallest target to the biggest, which is eight times as big."""
FILTERED_SHARE = 10
"""Percent that is written of the target that has a seccomp filter."""
MANY = 16
"""Processes, each of about as many MiB as it has to have."""


def run(bench: Bench) -> Iterator[Report]:
    """Measure targets of twice ``bench.mib`` MiB, of half of it, and of four times."""
    if os.geteuid():
        raise NotHere("needs root, for CRIU")
    try:
        criu = str(criu_path())
    except pytest.skip.Exception as why:
        raise NotHere(str(why)) from None
    big, small, huge = 2 * bench.mib, bench.mib // 2, 4 * bench.mib
    figures: Figures = {"criu dump": [], "checkpoint": [], "checkpoint, a quarter": [], "checkpoint, twice": []}
    memory: list[float] = []
    for number in range(-1, bench.rounds):
        _, quarter, _ = _round(bench, criu, small, 4 * SHARE, number)
        _, twice, _ = _round(bench, criu, huge, SHARE / 2, number, plain=False)
        plain, incremental, last = _round(bench, criu, big, SHARE, number)
        if number >= 0:  # before that it is the warm-up
            figures["criu dump"].append(plain)
            figures["checkpoint"].append(incremental)
            figures["checkpoint, a quarter"].append(quarter)
            figures["checkpoint, twice"].append(twice)
            assert last.checkpoint is not None
            memory.append(last.checkpoint.memory / 1e6)
    what = (
        f"frozen_time, {big:,} MiB, {SHARE}% written since the pre-dump; as many pages of {small:,} and of {huge:,} MiB"
    )
    report = Report("checkpoint", what, figures=figures)
    report.compare("checkpoint", "criu dump", limit=STOPPED_SHARE)
    report.compare("checkpoint", "checkpoint, a quarter")
    report.compare("checkpoint, twice", "checkpoint, a quarter", limit=GROWTH)
    report.verdicts.append(Verdict("incdump's scan and copy / frozen_time", ratios(memory, figures["checkpoint"])))
    assert last.checkpoint is not None
    report.notes.append(
        f"{last.criu}; {last.stats.pages_written:,} pages written in the last checkpoint; mappings: "
        f"{last.checkpoint.mappings}"
    )
    yield report
    yield _many_processes(bench, criu)
    yield _filtered(bench, criu)


def _many_processes(bench: Bench, criu: str) -> Report:
    figures: Figures = {"criu dump": [], "checkpoint": []}
    for number in range(-1, bench.rounds):
        with restorable_churn(bench.directory, threads=1, processes=MANY, mib=MANY) as target:
            plain, incremental, last = _compare(bench, criu, target, lambda: None)
        bench.clear()
        if number >= 0:
            figures["criu dump"].append(plain)
            figures["checkpoint"].append(incremental)
    report = Report("checkpoint", f"frozen_time of a tree of {len(last.pids)} small processes at rest", figures=figures)
    report.compare("checkpoint", "criu dump")
    return report


def _filtered(bench: Bench, criu: str) -> Report:
    """By each way that there is for a process with a seccomp filter, and by the leash for one without."""
    ways: dict[str, WayName] = {"leash, no filter": "leash", "preload": "preload", "lazy-pages": "lazy-pages"}
    figures: Figures = {name: [] for name in ways}
    mib = bench.mib // 2
    for number in range(-1, bench.rounds):
        for name, way in ways.items():
            _, frozen, last = _round(bench, criu, mib, FILTERED_SHARE, number, plain=False, way=way)
            assert last.checkpoint is not None
            if number >= 0:
                figures[name].append(frozen)
    what = f"frozen_time, {mib:,} MiB with a seccomp filter, {FILTERED_SHARE}% written since the pre-dump"
    report = Report("checkpoint", what, figures=figures)
    report.compare("preload", "leash, no filter")
    report.compare("lazy-pages", "preload")
    return report


def _round(
    bench: Bench,
    criu: str,
    mib: int,
    share: float,
    number: int,
    *,
    plain: bool = True,
    way: WayName = "auto",
) -> tuple[float, float, incdump.DumpResult]:
    """One chain on a fresh target; see `_compare`. It has a seccomp filter for the ways that are for such."""
    (place,) = tests_criu.__path__
    under = [sys.executable, str(Path(place, "filtered.py")), "no-scan"] if way in ("preload", "lazy-pages") else []
    with RestorableTarget([*under, build("rewriter"), f"--mib={mib}", "--vmas=0"], bench.directory) as target:
        figures = _compare(bench, criu, target, lambda: target.dirty(share, seed=number + 2), plain=plain, way=way)
    bench.clear()
    return figures


def _compare(
    bench: Bench,
    criu: str,
    target: RestorableTarget,
    write: Callable[[], object],
    *,
    plain: bool = True,
    way: WayName = "auto",
) -> tuple[float, float, incdump.DumpResult]:
    """The frozen_time of a plain dump and of a checkpoint, seconds, and the checkpoint's result.

    :param write: called between pre-dump and checkpoint.
    :param plain: False leaves the plain dump out; it counts as none at all.
    """
    frozen = 0.0
    if plain:
        images_of_all = bench.new_dir()
        dump(target.pid, images_of_all, "--leave-running", "-v0")
        stats = incdump.ImagesDir(images_of_all).stats()
        assert stats is not None
        frozen = stats.frozen_time / 1e6
    first = bench.predump(target)
    try:
        write()
        options = incdump.DumpOptions(afterwards="running", track_for=3600)
        images = bench.new_dir()
        call = partial(incdump.checkpoint, target.pid, images, parent=first.images_dir, options=options)
        result = anyio.run(partial(call, criu=criu, way=way))
        if not result.incremental:
            raise RuntimeError(f"the checkpoint was not incremental: {result.warnings}")
    finally:
        bench.untrack(target)
    return frozen, result.stats.frozen_time / 1e6, result
