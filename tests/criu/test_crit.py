"""What CRIU's own tool shows of a dump: CRIT, which comes with pycriu."""

from __future__ import annotations

import json
import os
import re
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import anyio
import pytest

import incdump
from tests import oracle
from tests.criu.criu import CriuFailed, restorable_churn, restore
from tests.criu.namespaces import in_own_namespaces
from tests.targets.build import churn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.criu.pycriu import Pycriu

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]

CRIT = "import sys; sys.argv[0] = 'crit'; from pycriu.cli import main; main()"


Dumped: TypeAlias = tuple[Path, dict[int, list[str]]]


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Dumped:
    """A dump on a pre-dump of three processes with all kinds of mappings, and what /proc/PID/maps said of each."""
    root = tmp_path_factory.mktemp("images")
    with churn(seed=5, threads=3, processes=3) as target:
        target.step(300)
        anyio.run(partial(incdump.predump, target.pid, root / "1"))
        target.step(100)
        stopped = incdump.DumpOptions(afterwards="stopped")
        anyio.run(partial(incdump.dump, target.pid, root / "2", parent="../1", options=stopped))
        maps = {pid: Path(f"/proc/{pid}/maps").read_text().splitlines() for pid in oracle.tree(target.pid).values()}
        anyio.run(incdump.untrack, target.pid)
        for pid in maps:
            os.kill(pid, signal.SIGCONT)
    return root / "2", maps


def test_every_image_is_decoded(pycriu: Pycriu, dumped: Dumped) -> None:
    directory, _ = dumped
    images = [path for path in sorted(directory.glob("*.img")) if not path.name.startswith("pages-")]
    kinds = {re.split(r"[-.]", path.name)[0] for path in images}
    assert kinds >= {"core", "files", "inventory", "mm", "pagemap", "pstree"}
    for image in images:
        shown = json.loads(pycriu.run(CRIT, "show", image))
        assert shown["magic"]
        assert shown["entries"] or image.name == "memfd.img"


def test_ps_shows_the_tree(pycriu: Pycriu, dumped: Dumped) -> None:
    directory, maps = dumped
    lines = pycriu.run(CRIT, "x", directory, "ps").splitlines()[1:]
    assert {int(line.split()[0]) for line in lines if line} == set(maps)
    assert all("churn" in line for line in lines if line)


def joined(spans: Iterable[str]) -> list[tuple[int, int]]:
    """Spans ``start-end`` in order, those that touch or overlap as one: where mappings are cut is a matter of taste."""
    out: list[tuple[int, int]] = []
    for lo, hi in sorted(tuple(int(text, 16) for text in span.split("-")) for span in spans):
        if out and lo <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], hi))
        else:
            out.append((lo, hi))
    return out


def test_mems_shows_every_mapping(pycriu: Pycriu, dumped: Dumped) -> None:
    directory, maps = dumped
    shown: dict[int, list[str]] = {}
    for line in pycriu.run(CRIT, "x", directory, "mems").splitlines():
        if re.fullmatch(r"\d+", line):
            spans = shown.setdefault(int(line), [])
        elif found := re.match(r"\t([0-9a-f]+-[0-9a-f]+)\s", line):
            spans.append(found[1])
    assert set(shown) == set(maps)
    for pid, lines in maps.items():
        assert joined(shown[pid]) == joined(line.split()[0] for line in lines)


def test_rss_shows_the_pages_of_each_mapping(pycriu: Pycriu, dumped: Dumped) -> None:
    directory, maps = dumped
    shown = pycriu.run(CRIT, "x", directory, "rss")
    for pid in maps:
        assert re.search(rf"^{pid}$", shown, re.MULTILINE)
    assert len(re.findall(r"[0-9a-f]+ / \d+", shown)) > 100


@in_own_namespaces
def test_criu_refuses_to_restore_memory_alone(images_root: Path) -> None:
    with restorable_churn(images_root, seed=36) as target:
        options = incdump.DumpOptions(afterwards="killed")
        anyio.run(partial(incdump.dump, target.pid, images_root / "1", options=options))
        target.reap()
        with pytest.raises(CriuFailed):
            restore(images_root / "1")
        assert not target.alive()
