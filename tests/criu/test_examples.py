"""The examples that need CRIU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.command import ROOT, run_python
from tests.criu.criu import criu_path
from tests.criu.namespaces import in_own_namespaces

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300), pytest.mark.usefixtures("real_criu")]


@in_own_namespaces
def test_a_computation_that_is_killed_goes_on_from_its_newest_checkpoint() -> None:
    before = set(Path("/var/tmp").glob("keep-restorable-*"))
    example = ROOT / "examples" / "keep_restorable.py"
    done = run_python(example, "--every", "2", "--keep", "2", "--criu", criu_path())
    assert done.code == 0, done.err
    rows = re.findall(r"chain-(\d)/(\d) +([\d,]+) +([\d,]+) .* ms   (\d+) numbers", done.out)
    assert [(chain, nth) for chain, nth, *_ in rows] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"), ("2", "0")]
    scanned, written, at = ([int(row[column].replace(",", "")) for row in rows] for column in range(2, 5))
    assert all(written[increment] < scanned[increment] / 4 for increment in (1, 3))
    assert at == sorted(at)
    killed = re.search(r"it was killed at (\d+) numbers", done.out)
    now = re.search(r"and now it is at (\d+) numbers", done.out)
    assert killed
    assert now
    assert at[-1] <= int(killed[1])
    assert at[-1] < int(now[1]) != int(killed[1])  # which stood there until it went on
    assert set(Path("/var/tmp").glob("keep-restorable-*")) == before
