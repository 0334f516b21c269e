"""The examples do what they say, as they stand."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import ROOT, Done, incdump, is_untouched, run_python

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.targets.build import Target

pytestmark = pytest.mark.kernel


def left_in_tmp() -> set[str]:
    return {name for name in os.listdir("/tmp") if name.startswith("incdump-quickstart-")}


def check_quickstart(done: Done) -> int:
    """Returns the pid of its target."""
    assert done.code == 0, done
    rounds = [line.split() for line in done.out.splitlines() if re.match(r"[123]  ", line)]
    assert [words[:2] for words in rounds] == [["1", "pre-dump"], ["2", "pre-dump"], ["3", "dump"]]
    written = [int(words[3].replace(",", "")) for words in rounds]
    skipped = [int(words[4].replace(",", "")) for words in rounds]
    assert written[0] > 16384 > written[1] > 0 < written[2] < 16384
    assert skipped[0] == 0
    assert min(skipped[1:]) > 10000
    assert re.search(r"^check of every page: 1\d,\d{3} pages compared .* 0 wrong, 0 missing: good$", done.out, re.M)
    match = re.search(r"^target: process (\d+),", done.out)
    assert match
    return int(match[1])


def test_the_quickstart_ends_with_every_page_right_and_cleans_up() -> None:
    before = left_in_tmp()
    done = run_python(ROOT / "examples" / "quickstart.py")
    pid = check_quickstart(done)
    assert done.err == ""
    assert not Path(f"/proc/{pid}").exists()
    assert left_in_tmp() <= before
    assert pid not in incdump("doctor", "--json").json["tracked"]


def test_the_quickstart_works_for_an_ordinary_user(as_nobody: dict[str, Any]) -> None:
    doctor = incdump("doctor", "--json", **as_nobody).json
    if not doctor["works"]:
        pytest.skip(f"needs a kernel that lets ordinary users trace: {doctor['limits']}")
    check_quickstart(run_python("../examples/quickstart.py", **as_nobody))


def test_the_session_example_dumps_and_reads_back(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=8, rate=200)
    done = run_python(ROOT / "examples" / "library_session.py", target.pid, images_root)
    assert done.code == 0, done
    assert "round 1: " in done.out
    assert f"process {target.pid} at 0x" in done.out
    assert is_untouched(target.pid)
    checked = incdump("check", images_root / "final")
    assert checked.code == 0, checked


def test_the_precopy_example_tells_of_its_rounds_and_dumps(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=8, rate=200)
    done = run_python(ROOT / "examples" / "library_precopy.py", target.pid, images_root)
    assert done.code == 0, done
    assert re.search(r"^round 1: \d+ KiB written; ", done.out, re.M)
    last = re.search(r"^dump: (.*), frozen for [\d.]+ ms$", done.out, re.M)
    assert last
    assert is_untouched(target.pid)
    checked = incdump("check", last[1])
    assert checked.code == 0, checked


def test_the_page_server_example_sends_and_receives(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=8, rate=200)
    done = run_python(ROOT / "examples" / "library_page_server.py", target.pid, images_root)
    assert done.code == 0, done
    assert done.out.count("received ") == 3
    assert "3 images dirs" in done.out
    assert is_untouched(target.pid)
    assert not list((images_root / "sent").glob("*/pages-*"))


@pytest.mark.parametrize("name", ["library_session", "library_precopy", "library_page_server"])
def test_an_example_says_in_one_line_what_is_wrong(images_root: Path, name: str) -> None:
    done = run_python(ROOT / "examples" / f"{name}.py", os.getpid(), images_root)
    assert done.code == 1
    assert done.err.startswith(f"{name}: ")
    assert done.err.count("\n") == 1
