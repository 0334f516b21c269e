"""Measure incdump, and say which targets it reaches.

    python -m benchmarks                        everything; some 10 GiB of memory, 5 GiB of disk, a few minutes
    python -m benchmarks readers full           only these
    python -m benchmarks --mib 64 --rounds 3    small

Run it from the checkout, on a machine that does nothing else. Every figure is a ratio, or stands beside what it is
compared with; the exit code is 0 whether targets are reached or not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from importlib import import_module
from typing import TYPE_CHECKING, Any

from benchmarks.bench import NotHere, bench, machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.bench import Bench
    from benchmarks.report import Report

NAMES = ("readers", "full", "incremental", "checkpoint", "precopy", "network", "memory", "startup", "slowdown")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; all by default: {', '.join(NAMES)}")
    parser.add_argument("--mib", type=int, default=1024, help="size of the target, MiB; memory takes 4 times that")
    parser.add_argument("--vmas", type=_numbers, default=(1024, 30000), help="mappings of the targets of readers, N,N")
    parser.add_argument("--rounds", type=int, default=7, help="how often each contestant is measured")
    disk = "/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir()
    parser.add_argument("--dir", default=disk, help="where images go: which disk is measured (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    for name in given.names:
        if name not in NAMES:
            parser.error(f"no such benchmark: {name} (there are {', '.join(NAMES)})")
    if given.mib < 1 or given.rounds < 1 or min(given.vmas) < 1:
        parser.error("sizes and rounds must be 1 or more")
    answer: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": machine(given.dir),
        "results": [],
        "skipped": {},
    }
    if not given.json:
        print(f"{answer['date']}: " + ", ".join(f"{key} {value}" for key, value in answer["machine"].items()))
    with bench(given.mib, given.vmas, given.rounds, given.dir) as place:
        for name in given.names or NAMES:
            _run(name, place, answer, show=not given.json)
    if given.json:
        print(json.dumps(answer))
    return 0


def _run(name: str, place: Bench, answer: dict[str, Any], *, show: bool) -> None:
    """Run one benchmark, and add what it found to the answer."""
    try:
        report: Report
        for report in import_module(f"benchmarks.{name}").run(place):
            answer["results"].append(report.as_dict())
            if show:
                print(f"\n{report.text()}", flush=True)
    except NotHere as error:
        answer["skipped"][name] = str(error)
        print(f"\n{name}: skipped: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
