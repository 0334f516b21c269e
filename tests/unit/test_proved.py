"""What of a chain was proved is not read again, and whatever has changed of it is noticed."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest

from incdump.errors import BadImage, BrokenChain, ImagesError, UnfinishedImages
from incdump.images import proved
from incdump.images.images_dir import ImagesDir
from incdump.images.pagemap import encode_pagemap
from incdump.images.proved import ProvedChain
from incdump.model.runs import PAGE_SIZE
from tests.unit.images_kit import PID, UP, P, runs, table, write_level

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from incdump.images.images_dir import Kind

HOUR = 3_600_000_000_000
KEY: tuple[Kind, int] = ("pagemap", PID)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a pagemap of each level was read."""
    counted: Counter[str] = Counter()
    summary = ImagesDir.summary

    def count(self: ImagesDir, kind: str, number: int) -> object:
        counted[self.path.name] += 1
        return summary(self, kind, number)  # type: ignore[arg-type]

    monkeypatch.setattr(ImagesDir, "summary", count)
    return counted


@pytest.fixture
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every level counts as old enough."""
    monkeypatch.setattr(proved, "_TICK", -HOUR)


def level(base: Path, number: int, below: int | None = None) -> Path:
    """A level that writes one page of eight, and leaves the others to the one before; 0 writes all."""
    rows = [(0, 8, P)] if number == 0 else [(0, number % 8, UP), (number % 8, 1, P), (number % 8 + 1, 7, UP)]
    rows = [(first, min(count, 8 - first), flags) for first, count, flags in rows if count and first < 8]
    below = number - 1 if below is None else below
    write_level(base / str(number), number, {f"pagemap-{PID}": rows}, f"../{below}" if number else None)
    return base / str(number)


def grow(base: Path, chain: ProvedChain, numbers: range) -> None:
    for number in numbers:
        covered = chain.prove(ImagesDir(level(base, number)))
        assert list(covered) == [KEY]
        assert np.array_equal(covered[KEY], runs((0, 8)))


@pytest.mark.usefixtures("_settled")
def test_each_level_is_read_once(tmp_path: Path, reads: Counter[str]) -> None:
    chain = ProvedChain()
    grow(tmp_path, chain, range(30))
    assert reads == {str(number): 1 for number in range(30)}
    assert "29, 30 levels" in repr(chain)
    assert np.array_equal(chain.prove(ImagesDir(tmp_path / "29"))[KEY], runs((0, 8)))
    assert sum(reads.values()) == 30


def test_a_level_that_was_only_just_written_is_read_once_more(
    tmp_path: Path, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proved, "_TICK", HOUR)
    chain = ProvedChain()
    grow(tmp_path, chain, range(3))
    assert reads == {"0": 3, "1": 2, "2": 1}
    assert repr(chain) == "<ProvedChain>"
    monkeypatch.setattr(proved, "_TICK", -HOUR)
    grow(tmp_path, chain, range(3, 4))
    monkeypatch.setattr(proved, "_TICK", HOUR)
    reads.clear()
    grow(tmp_path, chain, range(4, 7))
    assert reads == {"4": 3, "5": 2, "6": 1}


def rewrite(path: Path) -> None:
    """The same bytes, at another time: within a tick of the clock the file would look as before."""
    time.sleep(0.02)
    pagemap = path / f"pagemap-{PID}.img"
    pagemap.write_bytes(pagemap.read_bytes())


def replace(path: Path) -> None:
    pagemap = path / f"pagemap-{PID}.img"
    shutil.copy2(pagemap, path / "copy")
    (path / "copy").rename(pagemap)


def move(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    shutil.copytree(path.parent / "elsewhere", path, symlinks=True)


@pytest.mark.usefixtures("_settled")
@pytest.mark.parametrize("change", [rewrite, replace, move])
@pytest.mark.parametrize("where", [0, 3, 5])
def test_what_has_changed_is_read_anew_with_all_else(
    tmp_path: Path, reads: Counter[str], change: Callable[[Path], None], where: int
) -> None:
    chain = ProvedChain()
    grow(tmp_path, chain, range(6))
    reads.clear()
    change(tmp_path / str(where))
    grow(tmp_path, chain, range(6, 8))
    assert reads == {str(number): 1 for number in range(8)}


def lose_a_page(path: Path) -> None:
    pages = os.stat(path / "pages-1.img").st_size // PAGE_SIZE
    (path / f"pagemap-{PID}.img").write_bytes(encode_pagemap(1, table([(0, pages, P)])))


def lose_the_pagemap(path: Path) -> None:
    (path / f"pagemap-{PID}.img").unlink()


def lose_pages(path: Path) -> None:
    os.truncate(path / "pages-1.img", 0)


def lose_all_pages(path: Path) -> None:
    (path / "pages-1.img").unlink()


def lose_the_inventory(path: Path) -> None:
    (path / "inventory.img").unlink()


def lose_everything(path: Path) -> None:
    shutil.rmtree(path)


def damage(path: Path) -> None:
    """By as many bytes as there were."""
    time.sleep(0.02)
    pagemap = path / f"pagemap-{PID}.img"
    pagemap.write_bytes(bytes(pagemap.stat().st_size))


@pytest.mark.usefixtures("_settled")
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lose_a_page, BrokenChain),
        (lose_the_pagemap, BrokenChain),
        (lose_pages, BadImage),
        (lose_all_pages, BadImage),
        (lose_the_inventory, UnfinishedImages),
        (lose_everything, BrokenChain),
        (damage, BadImage),
    ],
)
@pytest.mark.parametrize("where", [1, 4, 5])
def test_damage_is_noticed_at_whatever_level(
    tmp_path: Path, change: Callable[[Path], None], error: type[ImagesError], where: int
) -> None:
    chain = ProvedChain()
    grow(tmp_path, chain, range(6))
    newest = level(tmp_path, 6)
    change(tmp_path / str(where))
    for _ in range(2):
        with pytest.raises(error):
            chain.prove(ImagesDir(newest))


@pytest.mark.usefixtures("_settled")
def test_a_parent_link_that_leads_elsewhere_is_noticed(tmp_path: Path) -> None:
    chain = ProvedChain()
    grow(tmp_path, chain, range(4))
    write_level(tmp_path / "other", 0, {f"pagemap-{PID}": [(0, 2, P)]})
    (tmp_path / "2" / "parent").unlink()
    (tmp_path / "2" / "parent").symlink_to("../other")
    with pytest.raises(BrokenChain, match="lacks the page"):
        chain.prove(ImagesDir(level(tmp_path, 4)))


@pytest.mark.usefixtures("_settled")
def test_links_in_a_circle_are_noticed(tmp_path: Path) -> None:
    chain = ProvedChain()
    grow(tmp_path, chain, range(4))
    (tmp_path / "0" / "parent").symlink_to("../4")
    with pytest.raises(BrokenChain, match="lead back"):
        chain.prove(ImagesDir(level(tmp_path, 4)))


@pytest.mark.usefixtures("_settled")
def test_a_new_level_is_proved_against_what_is_remembered(tmp_path: Path, reads: Counter[str]) -> None:
    chain = ProvedChain()
    grow(tmp_path, chain, range(4))
    write_level(tmp_path / "4", 4, {f"pagemap-{PID}": [(0, 9, UP)]}, "../3")
    with pytest.raises(BrokenChain, match="lacks the page") as caught:
        chain.prove(ImagesDir(tmp_path / "4"))
    assert caught.value.path == str(tmp_path / "3" / f"pagemap-{PID}.img")
    assert reads == {str(number): 1 for number in range(5)}


@pytest.mark.usefixtures("_settled")
def test_another_chain_is_read_and_then_known(tmp_path: Path, reads: Counter[str]) -> None:
    chain = ProvedChain()
    grow(tmp_path, chain, range(4))
    reads.clear()
    chain.prove(ImagesDir(level(tmp_path, 7, below=1)))  # another branch
    chain.prove(ImagesDir(level(tmp_path, 8)))
    assert reads == {"0": 1, "1": 1, "7": 1, "8": 1}
    (tmp_path / "other").mkdir()
    assert list(chain.prove(ImagesDir(level(tmp_path / "other", 0)))) == [KEY]


@pytest.mark.usefixtures("_settled")
def test_a_page_server_may_give_back_pages_of_what_is_known(tmp_path: Path, reads: Counter[str]) -> None:
    chain = ProvedChain()
    grow(tmp_path, chain, range(4))
    pages = tmp_path / "0" / "pages-1.img"
    pages.write_bytes(bytes(pages.stat().st_size))
    grow(tmp_path, chain, range(4, 6))
    assert reads == {str(number): 1 for number in range(6)}


@pytest.mark.usefixtures("_settled")
def test_a_level_without_pagemaps_covers_nothing(tmp_path: Path) -> None:
    write_level(tmp_path / "0", 0, {f"pagemap-{PID}": [(0, 2, P)]})
    write_level(tmp_path / "1", 1, {}, "../0")
    chain = ProvedChain()
    assert chain.prove(ImagesDir(tmp_path / "1")) == {}
    write_level(tmp_path / "2", 2, {f"pagemap-{PID}": [(0, 2, UP)]}, "../1")
    with pytest.raises(BrokenChain, match="has no pagemap"):
        chain.prove(ImagesDir(tmp_path / "2"))


@pytest.mark.usefixtures("_settled")
@pytest.mark.parametrize("elsewhere", [True, False])
def test_pages_that_were_sent_elsewhere_may_be_missing_only_where_that_was_said(
    tmp_path: Path, elsewhere: bool
) -> None:
    chain = ProvedChain(elsewhere=elsewhere)
    rows = {f"pagemap-{PID}": [(0, 2, P)]}
    write_level(tmp_path / "0", 0, rows, meta=b'{"page_server": "192.0.2.1 port 1"}')
    (tmp_path / "0" / "pages-1.img").unlink()
    if elsewhere:
        assert np.array_equal(chain.prove(ImagesDir(tmp_path / "0"))[KEY], runs((0, 2)))
    else:
        with pytest.raises(BadImage, match="put its images here"):
            chain.prove(ImagesDir(tmp_path / "0"))
