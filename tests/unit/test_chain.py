"""A chain that holds is reported; one damaged in any way is refused, with what and where."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from incdump.errors import BadImage, BrokenChain, ImagesError, ParentMismatch, UnfinishedImages
from incdump.images.chain import check_chain
from incdump.images.images_dir import ImagesDir
from incdump.images.pagemap import encode_pagemap
from incdump.model.runs import PAGE_SIZE, PE_LAZY
from tests.unit.images_kit import BASE, PID, UP, P, table, write_chain, write_level

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """The newest of three levels: 0 <- 1 <- 2."""
    return write_chain(
        tmp_path,
        [(0, 8, P), (10, 2, 4)],
        [(0, 2, UP), (2, 2, P), (4, 4, UP), (10, 2, UP)],
        [(0, 1, P), (1, 3, UP), (6, 2, UP), (11, 1, UP)],
    )


def refused(newest: Path, kind: type[ImagesError], match: str) -> ImagesError:
    with pytest.raises(kind, match=match) as caught:
        check_chain(ImagesDir(newest))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert caught.value.path is not None
    return caught.value


def rewrite(level: Path, rows: list[tuple[int, int, int]], pages_id: int = 1) -> None:
    (level / f"pagemap-{PID}.img").write_bytes(encode_pagemap(pages_id, table(rows)))


def test_a_chain_that_holds_is_reported(chain: Path) -> None:
    report = check_chain(ImagesDir(chain))
    assert [level.path.name for level in report.levels] == ["2", "1", "0"]
    assert [level.pids for level in report.levels] == [(PID,)] * 3
    assert [level.pages_present for level in report.levels] == [1, 2, 10]
    assert [level.pages_in_parent for level in report.levels] == [6, 8, 0]
    assert [level.bytes for level in report.levels] == [PAGE_SIZE, 2 * PAGE_SIZE, 10 * PAGE_SIZE]
    assert report.warnings == ()


def test_processes_and_segments_are_all_checked(tmp_path: Path) -> None:
    write_level(tmp_path / "0", 0, {"pagemap-1": [(0, 1, P)], "pagemap-2": [(0, 1, P)], "pagemap-shmem-1": [(0, 3, 4)]})
    maps = {"pagemap-1": [(0, 1, UP)], "pagemap-3": [(0, 2, P)], "pagemap-shmem-1": [(1, 2, UP)]}
    write_level(tmp_path / "1", 1, maps, "../0")
    newest, oldest = check_chain(ImagesDir(tmp_path / "1")).levels
    assert (newest.pids, newest.shmem_ids, newest.pages_present, newest.pages_in_parent) == ((1, 3), (1,), 2, 3)
    assert (oldest.pids, oldest.shmem_ids, oldest.pages_present) == ((1, 2), (1,), 5)


def test_a_hole_may_be_covered_by_several_entries_of_any_kind(tmp_path: Path) -> None:
    newest = write_chain(tmp_path, [(0, 9, P)], [(0, 2, P), (2, 2, UP), (4, 1, 4)], [(1, 4, UP)])
    assert len(check_chain(ImagesDir(newest)).levels) == 3


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_without_an_inventory_is_unfinished(chain: Path, level: int) -> None:
    (chain.parent / str(level) / "inventory.img").unlink()
    error = refused(chain, UnfinishedImages, "no inventory.img")
    assert error.path == str(chain.parent / str(level))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_damaged_inventory_is_bad(chain: Path, level: int) -> None:
    path = chain.parent / str(level) / "inventory.img"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(chain, BadImage, "cut short").path == str(path)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("size", [-1, -PAGE_SIZE, 1, PAGE_SIZE])
def test_a_pages_image_of_another_size_is_bad(chain: Path, level: int, size: int) -> None:
    path = chain.parent / str(level) / "pages-1.img"
    os.truncate(path, path.stat().st_size + size)
    error = refused(chain, BadImage, "bytes where")
    assert (error.path, error.pid) == (str(path), PID)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_missing_pages_image_is_bad(chain: Path, level: int) -> None:
    path = chain.parent / str(level) / "pages-1.img"
    path.unlink()
    assert refused(chain, BadImage, "is missing").path == str(path)


def test_a_pages_image_may_be_missing_when_it_would_be_empty(tmp_path: Path) -> None:
    newest = write_chain(tmp_path, [(0, 8, P)], [(0, 8, UP)])
    (newest / "pages-1.img").unlink()
    assert check_chain(ImagesDir(newest)).levels[0].bytes == 0


def test_a_directory_for_a_pages_image_is_bad(chain: Path) -> None:
    (chain / "pages-1.img").unlink()
    (chain / "pages-1.img").mkdir()
    refused(chain, BadImage, "bytes where")


@pytest.mark.parametrize("level", [0, 1])
def test_a_missing_pagemap_in_a_parent_breaks_the_chain(chain: Path, level: int) -> None:
    path = chain.parent / str(level) / f"pagemap-{PID}.img"
    path.unlink()
    error = refused(chain, BrokenChain, f"has no pagemap-{PID}.img")
    assert (error.path, error.pid, error.vaddr) == (str(path), PID, BASE + PAGE_SIZE if level == 1 else BASE)


@pytest.mark.parametrize(
    ("rows", "missing"),
    [
        ([(0, 7, P), (10, 2, P)], 7),
        ([(1, 7, P), (10, 2, P)], 0),
        ([(0, 5, P), (6, 2, P), (10, 2, P)], 5),
        ([(0, 8, P), (10, 1, P)], 11),
        ([(0, 8, P)], 10),
        ([], 0),
        ([(0x80000, 1, P)], 0),
    ],
)
def test_a_page_that_a_parent_lacks_breaks_the_chain(
    chain: Path, rows: list[tuple[int, int, int]], missing: int
) -> None:
    rewrite(chain.parent / "0", rows)
    os.truncate(chain.parent / "0" / "pages-1.img", sum(row[1] for row in rows) * PAGE_SIZE)
    error = refused(chain, BrokenChain, "lacks the page at")
    assert (error.vaddr, error.pid) == (BASE + missing * PAGE_SIZE, PID)
    assert error.path == str(chain.parent / "0" / f"pagemap-{PID}.img")


def test_a_page_missing_for_a_level_in_the_middle_is_found_though_nobody_needs_it(tmp_path: Path) -> None:
    newest = write_chain(tmp_path, [(0, 2, P)], [(0, 3, UP)], [(0, 1, UP)])
    assert refused(newest, BrokenChain, "lacks the page at").vaddr == BASE + 2 * PAGE_SIZE


def test_a_segment_that_a_parent_lacks_breaks_the_chain(tmp_path: Path) -> None:
    write_level(tmp_path / "0", 0, {"pagemap-5": [(0, 8, P)]})
    write_level(tmp_path / "1", 1, {"pagemap-shmem-5": [(0, 8, UP)]}, "../0")
    error = refused(tmp_path / "1", BrokenChain, "has no pagemap-shmem-5.img")
    assert error.pid is None


def test_a_hole_without_a_parent_breaks_the_chain(chain: Path) -> None:
    (chain.parent / "1" / "parent").unlink()
    error = refused(chain, BrokenChain, "there is no parent link")
    assert (error.path, error.vaddr) == (str(chain.parent / "1" / f"pagemap-{PID}.img"), BASE)


def _delete(base: Path) -> None:
    shutil.rmtree(base / "1")


def _replace_by_a_file(base: Path) -> None:
    shutil.rmtree(base / "1")
    (base / "1").touch()


def _dangle(base: Path) -> None:
    (base / "2" / "parent").unlink()
    (base / "2" / "parent").symlink_to("/nowhere/at/all")


def _replace_link_by_a_file(base: Path) -> None:
    (base / "2" / "parent").unlink()
    (base / "2" / "parent").touch()


@pytest.mark.parametrize("damage", [_delete, _replace_by_a_file, _dangle, _replace_link_by_a_file])
def test_a_parent_link_that_leads_nowhere_breaks_the_chain(chain: Path, damage: Callable[[Path], None]) -> None:
    damage(chain.parent)
    assert refused(chain, BrokenChain, "which is no images dir").path == str(chain / "parent")


@pytest.mark.parametrize("target", ["../0", "../1", "../2", "."])
def test_a_circle_of_parent_links_breaks_the_chain(chain: Path, target: str) -> None:
    (chain.parent / "0" / "parent").symlink_to(target)
    refused(chain, BrokenChain, "lead back")


@pytest.mark.parametrize("name", [f"pagemap-{PID}.img", "inventory.img"])
def test_a_wrong_magic_is_bad(chain: Path, name: str) -> None:
    path = chain.parent / "1" / name
    path.write_bytes(b"\0\0\0\0" + path.read_bytes()[4:])
    assert refused(chain, BadImage, "its magic is wrong").path == str(path)


@pytest.mark.parametrize(
    "rows", [[(0, 8, P), (7, 5, P)], [(10, 2, P), (0, 8, P)], [(0, 8, 5)], [(0, 0, 4)], [(0, 8, 16)]]
)
def test_impossible_entries_are_bad(chain: Path, rows: list[tuple[int, int, int]]) -> None:
    rewrite(chain.parent / "1", rows)
    assert refused(chain, BadImage, "is damaged").path == str(chain.parent / "1" / f"pagemap-{PID}.img")


def test_two_pagemaps_of_one_pages_image_are_bad(tmp_path: Path) -> None:
    write_level(tmp_path / "0", 0, {"pagemap-1": [(0, 1, P)], "pagemap-2": [(0, 1, P)]})
    (tmp_path / "0" / "pagemap-2.img").write_bytes(encode_pagemap(1, table([(0, 1, P)])))
    refused(tmp_path / "0", BadImage, "uses the pages image of pagemap-1.img")


def test_pages_left_to_a_lazy_server_are_unfinished(tmp_path: Path) -> None:
    newest = write_chain(tmp_path, [(0, 1, P), (1, 1, PE_LAZY)])
    assert refused(newest, UnfinishedImages, "lazy-pages").vaddr == BASE + PAGE_SIZE


def meta(start_time: int, boot_id: str = "b") -> bytes:
    return json.dumps({"boot_id": boot_id, "processes": {str(PID): {"start_time": start_time}}}).encode()


@pytest.mark.parametrize("parent_meta", [meta(6), meta(5, "c")])
def test_a_parent_of_an_earlier_process_is_a_mismatch(tmp_path: Path, parent_meta: bytes) -> None:
    write_level(tmp_path / "0", 0, {f"pagemap-{PID}": [(0, 8, P)]}, meta=parent_meta)
    write_level(tmp_path / "1", 1, {f"pagemap-{PID}": [(0, 8, UP)]}, "../0", meta=meta(5))
    error = refused(tmp_path / "1", ParentMismatch, "of an earlier process")
    assert (error.pid, error.path) == (PID, str(tmp_path / "0"))


def test_a_process_dumped_whole_may_have_the_pid_of_an_earlier_one(tmp_path: Path) -> None:
    write_level(tmp_path / "0", 0, {f"pagemap-{PID}": [(0, 8, P)]}, meta=meta(6))
    write_level(tmp_path / "1", 1, {f"pagemap-{PID}": [(0, 8, P)]}, "../0", meta=meta(5))
    assert len(check_chain(ImagesDir(tmp_path / "1")).levels) == 2


@pytest.mark.parametrize("parent_meta", [None, b"{}", b'{"processes": 5}', b'{"processes": {"42": 5}}', meta(5)])
def test_a_sidecar_that_does_not_say_is_no_mismatch(tmp_path: Path, parent_meta: bytes | None) -> None:
    write_level(tmp_path / "0", 0, {f"pagemap-{PID}": [(0, 8, P)]}, meta=parent_meta)
    write_level(tmp_path / "1", 1, {f"pagemap-{PID}": [(0, 8, UP)]}, "../0", meta=meta(5))
    assert len(check_chain(ImagesDir(tmp_path / "1")).levels) == 2


def test_what_is_odd_but_harmless_is_a_warning(tmp_path: Path) -> None:
    write_level(tmp_path / "0", 0, {})
    write_level(tmp_path / "1", 1, {"pagemap-1": [(0, 1, P)]}, "../0")
    (tmp_path / "1" / "pages-9.img").touch()
    report = check_chain(ImagesDir(tmp_path / "1"))
    assert report.warnings == (
        f"{tmp_path}/1/pages-9.img belongs to no pagemap",
        f"{tmp_path}/0 holds no pagemap at all",
    )


def test_a_long_chain_of_many_runs_is_checked(tmp_path: Path) -> None:
    """Fifty levels; the time limit of the suite would notice a quadratic check."""
    first = np.arange(20_000) * 2
    rng = np.random.default_rng(0)
    for level in range(50):
        flags = np.full(len(first), P) if level == 0 else np.where(rng.random(len(first)) < 0.01, P, UP)
        entries = table(zip(first.tolist(), [1] * len(first), flags.tolist(), strict=True))
        write_level(tmp_path / str(level), level, {}, f"../{level - 1}" if level else None)
        path = tmp_path / str(level)
        (path / f"pagemap-{PID}.img").write_bytes(encode_pagemap(1, entries))
        (path / "pages-1.img").touch()
        os.truncate(path / "pages-1.img", int((flags == P).sum()) * PAGE_SIZE)
    report = check_chain(ImagesDir(tmp_path / "49"))
    assert len(report.levels) == 50
    assert all(level.pages_present + level.pages_in_parent == len(first) for level in report.levels)
