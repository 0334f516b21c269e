"""The benchmark program itself works: tiny sizes, no figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.precopy import goes_on
from benchmarks.report import Report, Verdict, alternate
from incdump import kerndat
from tests.targets import build

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]


def _benchmarks(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "--dir", str(directory), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=540)


def _verdicts(results: Sequence[dict[str, Any]], name: str) -> list[str]:
    return [v["what"] for r in results if r["name"] == name for v in r["verdicts"] if v["limit"] is not None]


def _needs_targets() -> None:
    try:
        build.compiler()
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    for feature in (kerndat.pagemap_scan(), kerndat.uffd_wp_async()):
        if not feature.works:
            pytest.skip(f"{feature.what}: {feature.why}")


@pytest.mark.kernel
@pytest.mark.slow
@pytest.mark.timeout(600)  # for a machine that is busy with other tests
def test_every_benchmark_runs_and_judges_what_it_is_to_judge(images_root: Path) -> None:
    _needs_targets()
    done = _benchmarks(images_root, "--mib", "2", "--rounds", "1", "--vmas", "16,64", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["skipped"] == {}
    results = answer["results"]
    assert _verdicts(results, "readers") == ["plain / cache", "scan / cache"] * 2
    assert len(_verdicts(results, "full")) == 1
    assert _verdicts(results, "incremental") == ["1% written / full"]
    assert _verdicts(results, "precopy")[0] == "criu dump / incdump, checkpoint"
    assert [v.partition(":")[0] for v in _verdicts(results, "precopy")[1:]] == ["checkpoint", "dump"]
    assert _verdicts(results, "memory") == ["the highest"]
    assert _verdicts(results, "startup") == ["until it looks for its target"]
    assert [r["name"] for r in results].count("slowdown") == 1
    assert all(min(f["values"]) > 0 for r in results for f in r["figures"].values())
    assert not list(images_root.iterdir())


@pytest.mark.kernel
def test_what_does_not_fit_is_skipped_by_name_and_is_no_failure(images_root: Path) -> None:
    _needs_targets()
    done = _benchmarks(images_root, "full", "--mib", str(1 << 30))
    assert done.returncode == 0
    assert "full: skipped: needs" in done.stderr


def test_an_unknown_benchmark_is_a_usage_error(tmp_path: Path) -> None:
    done = _benchmarks(tmp_path, "fullest")
    assert done.returncode == 2
    assert "no such benchmark: fullest" in done.stderr


def test_contestants_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def contestant(name: str) -> float:
        order.append(name)
        return float(len(order))

    figures = alternate({"a": lambda: contestant("a"), "b": lambda: contestant("b")}, 2)
    assert "".join(order) == "ababab"
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([], True),
        ([100_000], True),
        ([64], False),
        ([65], True),
        ([1000, 1100], True),
        ([1000, 1101], False),
        ([1000, 500, 551], False),
        ([1000, 64], False),
        ([1000 - n for n in range(7)], True),
        ([1000 - n for n in range(8)], False),
    ],
)
def test_phauls_rule_ends_when_little_is_written_or_more_than_before(written: list[int], expected: bool) -> None:
    assert goes_on(written) is expected


def test_ratios_are_of_the_same_round_and_the_median_is_judged() -> None:
    report = Report("name", "what", figures={"a": [2.0, 9.0, 8.0], "b": [1.0, 3.0, 4.0]})
    report.compare("a", "b", limit=2.0, above=True)
    report.compare("a", "b", limit=2.0)
    assert [v.reached for v in report.verdicts] == [True, False]
    assert report.verdicts[0].values == [2.0, 3.0, 2.0]
    assert "target at least 2.000, reached: yes" in report.text()
    assert Verdict("for information", [1.0]).reached is None
