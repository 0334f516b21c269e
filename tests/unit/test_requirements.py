"""What a host lacks is said, each thing in a line; what makes no sense is refused."""

from __future__ import annotations

import os
import platform
import stat
from pathlib import Path
from typing import Any

import pytest

from incdump.criu.program import Criu
from incdump.engine.requirements import problems, restore_rate
from incdump.errors import ProtocolError
from incdump.model.runs import PAGE_SIZE


@pytest.fixture
def criu(tmp_path: Path) -> Criu:
    """A program that finds nothing wrong."""
    path = tmp_path / "criu"
    path.write_text("#!/bin/sh\nexit 0\n")
    path.chmod(0o755)
    return Criu(str(path), (4, 1))


def tree(**other: Any) -> dict[str, Any]:
    fits = {
        "pid": 7,
        "comm": "somebody",
        "machine": platform.machine(),
        "page_size": PAGE_SIZE,
        "criu": [4, 1],
        "processor": None,
        "pids": [],
        "files": {},
    }
    return {**fits, **other}


def test_what_fits_has_no_problems(criu: Criu, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert problems(tree(files={str(tmp_path / "file"): {"size": 5, "build_id": ""}}), criu) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"machine": "pdp11"}, "pdp11"),
        ({"page_size": 512}, "512"),
        ({"criu": [99]}, "older than the one that will dump the tree, 99"),
        ({"pids": [1]}, "in use there: 1 ("),
        ({"files": {"/nowhere": {"size": 1, "build_id": ""}}}, "/nowhere (missing)"),
        ({"files": {"/dev/null": {"size": 0, "build_id": ""}}}, "/dev/null (missing)"),
        ({"files": {"/bin/sh": {"size": 1, "build_id": "00"}}}, "/bin/sh (another build)"),
        ({"files": {"/etc/passwd": {"size": 1 << 40, "build_id": ""}}}, "/etc/passwd (another size)"),
        ({"files": {f"/nowhere/{n}": {"size": 1, "build_id": ""} for n in range(9)}}, "and 4 more"),
    ],
)
def test_what_does_not_fit_is_named(criu: Criu, other: dict[str, Any], words: str) -> None:
    (found,) = problems(tree(**other), criu)
    assert words in found


def test_what_criu_complains_about_is_said(criu: Criu) -> None:
    Path(criu.path).write_text(
        "#!/bin/sh\nwhile [ $1 != --log-file ]; do [ $1 = --work-dir ] && cd $2; shift; done\n"
        'echo "(00.1) Error (a.c:1): no such thing" > $2\nexit 1\n'
    )
    found = problems(tree(processor=""), criu)
    assert ["no such thing" in line for line in found] == [True, True]


@pytest.mark.parametrize(
    "nonsense",
    [
        None, 7, [], {}, {"pid": 7}, tree(pid="7"), tree(pids=7), tree(pids=["x"]), tree(files=[]),
        tree(files={"/bin/sh": 1}), tree(criu="x"), tree(criu=None), tree(processor=7),
    ],
)  # fmt: skip
def test_nonsense_is_refused(criu: Criu, nonsense: object) -> None:
    with pytest.raises(ProtocolError):
        problems(nonsense, criu)


def test_what_is_no_regular_file_is_not_opened(criu: Criu, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (found,) = problems(tree(files={str(pipe): {"size": 0, "build_id": ""}}), criu)
    assert "(missing)" in found


def test_how_fast_memory_is_filled_is_measured() -> None:
    assert 1e6 < restore_rate() < 1e12
