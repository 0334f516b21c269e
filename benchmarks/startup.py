"""The processor time that a command takes before it touches its target.

A pid that cannot exist is the measure: the command reads its options, looks for the process, and gives up. Beside it
stand a parent dump that does not exist, for which the engine has to be loaded too, the whole of a pre-dump of a tiny
process, and Python itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.report import Report, Verdict, alternate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.bench import Bench

NO_SUCH_PID = (1 << 22) + 1
"""Beyond the highest pid that Linux can be told to use."""
LIMIT = 0.200
ROUNDS = 9


def run(bench: Bench) -> Iterator[Report]:
    """Measure 9 times, whatever ``bench.rounds`` says; once if it says once."""
    with bench.target(mib=1) as target:

        def refused(pid: int, *options: str) -> float:
            done = bench.command("predump", "-t", str(pid), "-D", str(bench.new_dir()), *options)
            if done.code == 0:
                raise RuntimeError("incdump predump did what cannot be done")
            return done.cpu

        def whole() -> float:
            done = bench.command("predump", "-t", str(target.pid), "-D", str(bench.new_dir()))
            bench.clear()
            if done.code:
                raise RuntimeError(f"incdump predump failed with {done.code}")
            return done.cpu

        contestants = {
            "Python alone": lambda: bench.python("-c", "").cpu,
            "no such process": lambda: refused(NO_SUCH_PID),
            "no such parent": lambda: refused(target.pid, "--prev-images-dir", "not-there"),
            "1 MiB": whole,
        }
        figures = alternate(contestants, ROUNDS if bench.rounds > 1 else 1)
    report = Report("startup", "user and system time of `incdump predump`", figures=figures)
    report.verdicts.append(Verdict("until it looks for its target", figures["no such process"], LIMIT, unit="s"))
    yield report
