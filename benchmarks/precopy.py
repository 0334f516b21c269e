"""Downtime and bytes of a move: CRIU alone, CRIU's pre-dumps by p.haul's rule, and incdump's loop with either end.

The target rewrites 0, 1, 5 or 20% of its pages a second, at random and without pause, while all this goes on. Every
contestant leaves it running, so that CRIU's killing of it counts for nobody. The downtime is that of the last dump:
``freezing_time`` and ``frozen_time``; the bytes are those of all pages images.

p.haul's rule (phaul/iters.py of checkpoint-restore/p.haul): no further pre-dump when one wrote at most 64 pages, or
more than 10% more than the one before, or was the eighth. It needs soft-dirty.

The loop stops on an estimate of the downtime, which is compared with the downtime that came of it: as the loop made it,
and as it would have been had the loop been given the freezes of earlier rounds.

Needs root, and CRIU (``$INCDUMP_TEST_CRIU``, or fetched as for the tests).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from benchmarks.bench import MIB, NotHere
from benchmarks.report import Report, Verdict
from incdump.model.precopy import estimate
from incdump.model.runs import PAGE_SIZE
from tests.criu.criu import RestorableTarget, criu, criu_path, dump
from tests.targets.build import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from benchmarks.bench import Bench
    from benchmarks.report import Figures
    from incdump.model.precopy import Final, Freeze, PrecopyPolicy, PrecopyRound

SHARES = (0, 1, 5, 20)
"""Percent of the target's pages that it rewrites in a second."""
JUDGED_SHARE = 1
SHORTER = 5.0
WITHIN = 2.0
OFTEN = 0.9
BUDGET = 0.3
"""Seconds of downtime that the loop is allowed."""
MOST_ROUNDS = 8
FEW_PAGES = 64
GROWS = 1.1
FINALS: tuple[Final, ...] = ("checkpoint", "dump")
ALONE, PHAUL = "criu dump", "criu pre-dumps"


@dataclass(frozen=True, slots=True)
class Moved:
    """What a contestant did.

    :ivar downtime: seconds for which the target stood still for the last dump.
    :ivar size: bytes of all pages images.
    :ivar dumps: how many dumps that took, the last one included.
    """

    downtime: float
    size: int
    dumps: int


@dataclass(slots=True)
class Guesses:
    """Estimates of one kind of last dump, each divided by the downtime that came of it.

    :ivar made: by the loop.
    :ivar taught: of the same rounds, with the freezes of earlier runs.
    :ivar freezes: of the runs so far.
    """

    made: list[float] = field(default_factory=list)
    taught: list[float] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)

    def forget(self) -> None:
        """That was the warm-up; its freeze is one all the same."""
        self.made.clear()
        self.taught.clear()


def run(bench: Bench) -> Iterator[Report]:
    """Measure a target of half of ``bench.mib`` MiB."""
    if os.geteuid():
        raise NotHere("needs root, for CRIU")
    try:
        program = str(criu_path())
    except pytest.skip.Exception as why:
        raise NotHere(str(why)) from None
    not_here = _why_no_pre_dumps(program, bench.directory)
    guesses = {final: Guesses() for final in FINALS}
    moved: dict[int, dict[str, list[Moved]]] = {share: {} for share in SHARES}
    for number in range(-1, bench.rounds):
        for share in SHARES if number >= 0 else (JUDGED_SHARE,):  # first of all the warm-up
            for name, done in _round(bench, program, share, guesses, pre_dumps=not not_here).items():
                moved[share].setdefault(name, []).append(done)
        if number < 0:
            moved[JUDGED_SHARE].clear()
            for guess in guesses.values():
                guess.forget()
    for share in SHARES:
        what = f"{_mib(bench)} MiB, {share}% of it written a second"
        yield _downtime(what, moved[share], not_here, judged=share == JUDGED_SHARE)
        yield _bytes(what, moved[share])
    yield _estimates(guesses, {final: _against_medians(moved, _name(final)) for final in FINALS})


def _mib(bench: Bench) -> int:
    return max(1, bench.mib // 2)


def _why_no_pre_dumps(program: str, directory: Path) -> str:
    """Why CRIU cannot make pre-dumps here; empty if it can."""
    command = [program, "check", "--feature", "mem_dirty_track"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    said = (done.stderr or done.stdout).strip().splitlines()
    # Before the words: how bad it is, and where in CRIU's source.
    return said[-1].rpartition("): ")[2] if said else f"criu check: exit status {done.returncode}"


def _round(
    bench: Bench, program: str, share: int, guesses: dict[Final, Guesses], *, pre_dumps: bool
) -> dict[str, Moved]:
    """All contestants, one after the other, on one target."""
    mib = _mib(bench)
    rate = mib * MIB // PAGE_SIZE * share / 100
    with RestorableTarget([build("rewriter"), f"--mib={mib}", "--vmas=0", f"--rate={rate}"], bench.directory) as target:
        contestants: dict[str, Callable[[Path], Moved]] = {ALONE: partial(_alone, target.pid)}
        if pre_dumps:
            contestants[PHAUL] = partial(_by_phauls_rule, target.pid)
        for final in FINALS:
            contestants[_name(final)] = partial(_loop, bench, target, program, final, guesses[final])
        done: dict[str, Moved] = {}
        for name, contestant in contestants.items():
            path = bench.new_dir()
            path.mkdir()
            done[name] = contestant(path)
            shutil.rmtree(path)
    bench.clear()
    return done


def _name(final: Final) -> str:
    return f"incdump, {final}"


def _alone(pid: int, path: Path) -> Moved:
    dump(pid, path, "--leave-running", "-v0")
    return _of_criu([path])


def _by_phauls_rule(pid: int, path: Path) -> Moved:
    written: list[int] = []
    dumps: list[Path] = []
    while goes_on(written):
        dumps.append(path / str(len(dumps) + 1))
        criu("pre-dump", dumps[-1], "--tree", str(pid), *_on_top_of(dumps[:-1]), "-v0")
        stats = incdump.ImagesDir(dumps[-1]).stats()
        assert stats is not None
        written.append(stats.pages_written)
    dumps.append(path / str(len(dumps) + 1))
    dump(pid, dumps[-1], *_on_top_of(dumps[:-1]), "--leave-running", "-v0")
    return _of_criu(dumps)


def goes_on(written: Sequence[int]) -> bool:
    """p.haul's rule: whether there is to be another pre-dump.

    :param written: pages of each so far.
    """
    if not written:
        return True
    grows = len(written) > 1 and written[-1] > GROWS * written[-2]
    return written[-1] > FEW_PAGES and not grows and len(written) < MOST_ROUNDS


def _on_top_of(dumps: Sequence[Path]) -> list[str]:
    return ["--track-mem", *(["--prev-images-dir", f"../{dumps[-1].name}"] if dumps else [])]


def _of_criu(dumps: Sequence[Path]) -> Moved:
    found = [stats for path in dumps if (stats := incdump.ImagesDir(path).stats()) is not None]
    size = sum(stats.st_size for path in dumps for stats in map(os.stat, path.glob("pages-*.img")))
    return Moved((found[-1].freezing_time + found[-1].frozen_time) / 1e6, size, len(dumps))


def _loop(bench: Bench, target: RestorableTarget, program: str, final: Final, guesses: Guesses, path: Path) -> Moved:
    policy = incdump.PrecopyPolicy(downtime=BUDGET, max_rounds=MOST_ROUNDS, final=final)
    try:
        call = partial(incdump.precopy, target.pid, path, policy=policy, criu=program)
        result = anyio.run(call)
    finally:
        bench.untrack(target)
    assert result.final is not None
    assert result.downtime is not None
    assert result.decision is not None
    guesses.made.append((result.decision.estimate.downtime or 0.0) / result.downtime)
    guesses.taught.append(_taught(result.rounds, policy, guesses.freezes) / result.downtime)
    guesses.freezes.append(incdump.Freeze.of(result.final.stats))
    copied = sum(done.bytes_written for done in result.rounds) + result.final.stats.bytes_written
    return Moved(result.downtime, copied, len(result.rounds) + 1)


def _taught(rounds: Sequence[PrecopyRound], policy: PrecopyPolicy, freezes: Sequence[Freeze]) -> float:
    return estimate(rounds, policy, freezes).downtime or 0.0


def _downtime(what: str, moved: dict[str, list[Moved]], not_here: str, *, judged: bool) -> Report:
    figures: Figures = {name: [done.downtime for done in all_done] for name, all_done in moved.items()}
    report = Report("precopy", f"downtime of {what}", figures=figures)
    for name in moved:
        if name != ALONE:
            limit = SHORTER if judged and name == _name("checkpoint") else None
            report.compare(ALONE, name, limit=limit, above=True)
    dumps = [f"{name} {median(done.dumps for done in all_done):g}" for name, all_done in moved.items()]
    report.notes.append(f"dumps, the last one included: {', '.join(dumps)}")
    if not_here:
        report.notes.append(f"no {PHAUL} by p.haul's rule: {not_here}")
    return report


def _bytes(what: str, moved: dict[str, list[Moved]]) -> Report:
    figures: Figures = {name: [float(done.size) for done in all_done] for name, all_done in moved.items()}
    return Report("precopy", f"bytes of all dumps of {what}", "B", figures=figures)


def _against_medians(moved: dict[int, dict[str, list[Moved]]], name: str) -> list[float]:
    """Each downtime of a contestant, divided by the median of those with the same share."""
    found = []
    for all_done in moved.values():
        times = [done.downtime for done in all_done[name]]
        found += [time / median(times) for time in times]
    return found


def _estimates(guesses: dict[Final, Guesses], spread: dict[Final, list[float]]) -> Report:
    """
    :param spread: how far the downtimes lie apart themselves.
    """
    report = Report("precopy", "the estimate that the loop stopped on, against the downtime that came of it")
    for final, guess in guesses.items():
        report.verdicts.append(Verdict(f"{final}: estimate / downtime", guess.made))
        report.verdicts.append(_often(final, guess.made, OFTEN))
        report.verdicts.append(Verdict(f"{final}, with earlier freezes: estimate / downtime", guess.taught))
        report.verdicts.append(_often(f"{final}, with earlier freezes", guess.taught))
        report.verdicts.append(_often(f"{final}, downtime against the median of its kind", spread[final]))
    return report


def _often(name: str, found: Sequence[float], limit: float | None = None) -> Verdict:
    close = sum(1 / WITHIN <= ratio <= WITHIN for ratio in found)
    what = f"{name}: within a factor of {WITHIN:g} in {close} of {len(found)} runs"
    return Verdict(what, [close / len(found)], limit, above=True)
