"""Reading pages back through a chain, held against a slow model of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incdump.errors import BadImage, BrokenChain, ImagesIOError, NotInImages, UnfinishedImages
from incdump.images import images_dir, page_reads
from incdump.images._pb import pagemap_pb2 as pb
from incdump.images.framing import Magic, frame
from incdump.images.images_dir import ImagesDir
from incdump.images.inventory import encode_dump_inventory
from incdump.images.stats import encode_stats
from incdump.model.runs import PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT, page_addresses, page_count
from incdump.model.stats import DumpStats
from tests.unit.images_kit import BASE, PID, UP, P, page, runs, table, write_chain, write_level

ZERO = bytes(PAGE_SIZE)


def read(images: ImagesDir, wanted: np.ndarray) -> tuple[list[bytes], list[int]]:
    """The pages of a run set, and the numbers of those that are absent."""
    out = np.full(page_count(wanted) * PAGE_SIZE, 0xEE, np.uint8)
    absent = images.read_pages(PID, wanted, out)
    numbers = ((page_addresses(absent) - np.uint64(BASE)) // np.uint64(PAGE_SIZE)).tolist()
    return [out[i : i + PAGE_SIZE].tobytes() for i in range(0, len(out), PAGE_SIZE)], numbers


class TestOneLevel:
    def test_pages_come_back(self, tmp_path: Path) -> None:
        images = ImagesDir(write_chain(tmp_path, [(0, 3, P), (5, 1, 4), (6, 1, P)]))
        pages, absent = read(images, runs((0, 8)))
        assert pages == [page(0, 0), page(0, 1), page(0, 2), ZERO, ZERO, page(0, 5), page(0, 6), ZERO]
        assert absent == [3, 4, 7]

    def test_any_bytes_come_back(self, tmp_path: Path) -> None:
        images = ImagesDir(write_chain(tmp_path, [(0, 3, P)]))
        whole = page(0, 0) + page(0, 1) + page(0, 2) + ZERO
        for first, length in ((0, 1), (4095, 2), (100, 8192), (3 * 4096 - 1, 4097), (0, 4 * 4096), (17, 0)):
            assert images.read(PID, BASE + first, length) == whole[first : first + length]

    def test_what_is_not_in_it_is_an_error_never_zeros(self, tmp_path: Path) -> None:
        images = ImagesDir(write_chain(tmp_path, [(0, 3, P)]))
        assert images.pagemap(7) is None
        asks = (
            lambda: images.covered(7),
            lambda: images.read(7, BASE, 10),
            lambda: images.read(7, BASE, 0),
            lambda: images.read_pages(7, runs((0, 1)), np.empty(4096, np.uint8)),
        )
        for ask in asks:
            with pytest.raises(NotInImages, match=f"holds nothing of process 7 .there are {PID}") as raised:
                ask()
            assert raised.value.pid == 7
        with pytest.raises(NotInImages, match="shared memory 7"):
            images.read_shmem_pages(7, runs((0, 1)), np.empty(4096, np.uint8))

    def test_no_runs_are_no_pages(self, tmp_path: Path) -> None:
        images = ImagesDir(write_chain(tmp_path, [(0, 3, P)]))
        assert read(images, runs()) == ([], [])

    def test_covered_pages_are_present_ones_and_holes(self, tmp_path: Path) -> None:
        images = ImagesDir(write_chain(tmp_path, [(0, 9, P)], [(0, 3, P), (3, 2, UP), (7, 1, UP)]))
        assert np.array_equal(images.covered(PID), runs((0, 5), (7, 8)))

    def test_a_buffer_of_the_wrong_size_is_refused(self, tmp_path: Path) -> None:
        images = ImagesDir(write_chain(tmp_path, [(0, 3, P)]))
        with pytest.raises(ValueError, match="bytes of room"):
            images.read_pages(PID, runs((0, 2)), np.empty(PAGE_SIZE, np.uint8))

    def test_more_neighbours_than_one_call_takes_are_read(self, tmp_path: Path) -> None:
        count = 2 * page_reads._IOV_MAX + 3
        images = ImagesDir(write_chain(tmp_path, [(2 * i, 1, P) for i in range(count)]))
        pages, absent = read(images, runs((0, 2 * count)))
        assert pages[::2] == [page(0, 2 * i) for i in range(count)]
        assert absent == list(range(1, 2 * count, 2))

    def test_short_reads_are_carried_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        images = ImagesDir(write_chain(tmp_path, [(0, 3, P), (5, 4, P)]))
        real = os.preadv

        def short(fd: int, buffers: list[memoryview], offset: int) -> int:
            return real(fd, [buffers[0][:1001]], offset)

        monkeypatch.setattr(os, "preadv", short)
        assert read(images, runs((0, 9)))[0] == [page(0, i) if i not in (3, 4) else ZERO for i in range(9)]

    def test_shared_memory_is_read_by_offset(self, tmp_path: Path) -> None:
        write_level(tmp_path / "0", 0, {"pagemap-shmem-9": [(0, 2, 4)], f"pagemap-{PID}": [(1, 1, 4)]})
        images = ImagesDir(tmp_path / "0")
        assert (images.pids(), images.shmem_ids()) == ([PID], [9])
        assert images.shmem_pagemap(9) is not None
        assert images.shmem_pagemap(PID) is None
        out = np.empty(PAGE_SIZE, np.uint8)
        assert len(images.read_shmem_pages(9, runs((1, 2)), out)) == 0
        assert out.tobytes() == page(0, 1)

    def test_pages_left_to_a_lazy_server_are_no_pages(self, tmp_path: Path) -> None:
        images = ImagesDir(write_chain(tmp_path, [(0, 2, P), (2, 1, PE_LAZY)]))
        with pytest.raises(UnfinishedImages, match="lazy-pages") as caught:
            images.read(PID, BASE, 3 * PAGE_SIZE)
        assert caught.value.vaddr == BASE + 2 * PAGE_SIZE


class TestCriuWroteIt:
    def test_a_directory_with_its_own_numbers_and_old_entries(self, tmp_path: Path) -> None:
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "inventory.img").write_bytes(encode_dump_inventory(1))
        records = [
            pb.pagemap_head(pages_id=65537),
            pb.pagemap_entry(vaddr=BASE, compat_nr_pages=2),
            pb.pagemap_entry(vaddr=BASE + 3 * PAGE_SIZE, compat_nr_pages=0, nr_pages=1, flags=4),
        ]
        data = frame(Magic.PAGEMAP, [record.SerializeToString() for record in records])
        (tmp_path / "0" / f"pagemap-{PID}.img").write_bytes(data)
        (tmp_path / "0" / "pages-65537.img").write_bytes(b"".join(page(0, n) for n in (0, 1, 3)))
        images = ImagesDir(tmp_path / "0")
        assert images.meta() is None
        assert images.stats() is None
        assert read(images, runs((0, 4))) == ([page(0, 0), page(0, 1), ZERO, page(0, 3)], [2])

    def test_an_old_style_hole_is_followed(self, tmp_path: Path) -> None:
        write_chain(tmp_path, [(0, 4, P)], [(0, 1, P)])
        records = [
            pb.pagemap_head(pages_id=1),
            pb.pagemap_entry(vaddr=BASE, compat_nr_pages=1),
            pb.pagemap_entry(vaddr=BASE + PAGE_SIZE, compat_nr_pages=2, in_parent=True),
        ]
        data = frame(Magic.PAGEMAP, [record.SerializeToString() for record in records])
        (tmp_path / "1" / f"pagemap-{PID}.img").write_bytes(data)
        assert read(ImagesDir(tmp_path / "1"), runs((0, 3)))[0] == [page(1, 0), page(0, 1), page(0, 2)]

    def test_a_parent_without_an_inventory_is_read_when_that_is_asked_for(self, tmp_path: Path) -> None:
        newest = write_chain(tmp_path, [(0, 4, P)], [(0, 4, UP)])
        (tmp_path / "0" / "inventory.img").unlink()
        with pytest.raises(UnfinishedImages):
            ImagesDir(newest).read(PID, BASE, 1)
        assert ImagesDir(newest, must_be_complete=False).read(PID, BASE, PAGE_SIZE) == page(0, 0)


class TestChain:
    def test_each_page_is_read_where_it_was_last_written(self, tmp_path: Path) -> None:
        newest = write_chain(
            tmp_path,
            [(0, 8, P)],
            [(0, 2, UP), (2, 2, P), (4, 4, UP)],
            [(0, 1, P), (1, 2, UP), (3, 1, P), (6, 2, UP)],
        )
        pages, absent = read(ImagesDir(newest), runs((0, 8)))
        assert pages == [page(2, 0), page(0, 1), page(1, 2), page(2, 3), ZERO, ZERO, page(0, 6), page(0, 7)]
        assert absent == [4, 5]

    def test_the_newest_pagemap_alone_says_what_exists(self, tmp_path: Path) -> None:
        newest = write_chain(tmp_path, [(0, 8, P)], [(3, 1, UP)])
        assert read(ImagesDir(newest), runs((0, 5))) == ([ZERO, ZERO, ZERO, page(0, 3), ZERO], [0, 1, 2, 4])

    def test_a_missing_page_in_a_parent_is_an_error_with_its_address(self, tmp_path: Path) -> None:
        newest = write_chain(tmp_path, [(0, 3, P), (4, 4, P)], [(0, 8, UP)], [(0, 8, UP)])
        with pytest.raises(BrokenChain, match="lacks the page at") as caught:
            ImagesDir(newest).read(PID, BASE, 8 * PAGE_SIZE)
        assert caught.value.vaddr == BASE + 3 * PAGE_SIZE
        assert caught.value.pid == PID
        assert caught.value.path == str(tmp_path / "0" / f"pagemap-{PID}.img")
        assert ImagesDir(newest).read(PID, BASE, PAGE_SIZE) == page(0, 0)

    def test_a_parent_without_that_process_is_an_error(self, tmp_path: Path) -> None:
        write_level(tmp_path / "0", 0, {"pagemap-7": [(0, 8, P)]})
        write_level(tmp_path / "1", 1, {f"pagemap-{PID}": [(0, 8, UP)]}, "../0")
        with pytest.raises(BrokenChain, match=f"has no pagemap-{PID}.img"):
            ImagesDir(tmp_path / "1").read(PID, BASE, 1)

    def test_a_hole_without_a_parent_is_an_error(self, tmp_path: Path) -> None:
        images = ImagesDir(write_chain(tmp_path, [(0, 2, P), (2, 1, UP)]))
        assert images.read(PID, BASE, 2 * PAGE_SIZE) == page(0, 0) + page(0, 1)
        with pytest.raises(BrokenChain, match="there is no parent link") as caught:
            images.read(PID, BASE + 2 * PAGE_SIZE, 1)
        assert caught.value.vaddr == BASE + 2 * PAGE_SIZE

    def test_a_circle_of_parents_ends(self, tmp_path: Path) -> None:
        newest = write_chain(tmp_path, [(0, 8, UP)], [(0, 8, UP)])
        (tmp_path / "0" / "parent").symlink_to("../1")
        with pytest.raises(BrokenChain, match="lead back"):
            ImagesDir(newest).read(PID, BASE, 1)

    def test_a_parent_that_is_gone_is_an_error(self, tmp_path: Path) -> None:
        newest = write_chain(tmp_path, [(0, 8, P)], [(0, 8, UP)])
        (tmp_path / "0").rename(tmp_path / "elsewhere")
        with pytest.raises(BrokenChain, match=r"leads to \.\./0, which is no images dir") as caught:
            ImagesDir(newest).read(PID, BASE, 1)
        assert caught.value.path == str(tmp_path / "1" / "parent")

    def test_a_pages_image_that_is_cut_short_is_an_error(self, tmp_path: Path) -> None:
        newest = write_chain(tmp_path, [(0, 8, P)], [(0, 8, UP)])
        os.truncate(tmp_path / "0" / "pages-1.img", 5 * PAGE_SIZE + 1)
        assert ImagesDir(newest).read(PID, BASE, 5 * PAGE_SIZE)[:PAGE_SIZE] == page(0, 0)
        with pytest.raises(BadImage, match="cut short") as caught:
            ImagesDir(newest).read(PID, BASE, 6 * PAGE_SIZE)
        assert caught.value.path == str(tmp_path / "0" / "pages-1.img")

    def test_a_pages_image_that_is_gone_is_an_error(self, tmp_path: Path) -> None:
        newest = write_chain(tmp_path, [(0, 8, P)], [(0, 8, UP)])
        (tmp_path / "0" / "pages-1.img").unlink()
        with pytest.raises(BadImage, match="is missing"):
            ImagesDir(newest).read(PID, BASE, 1)


@st.composite
def chains(draw: st.DrawFn) -> list[dict[int, int]]:
    """Chains of levels, each page number -> flags, every hole with a page below."""
    levels: list[dict[int, int]] = []
    for _ in range(draw(st.integers(1, 4))):
        below = levels[-1] if levels else {}
        kinds = draw(st.lists(st.sampled_from(["", "P", "P4", "UP"]), min_size=24, max_size=24))
        flags = {"P": P, "P4": PE_PRESENT, "UP": UP}
        levels.append(
            {n: flags[kind] for n, kind in enumerate(kinds) if kind and (kind != "UP" or n in below)},
        )
    return levels


def rows_of(level: dict[int, int]) -> list[tuple[int, int, int]]:
    """Rows (page number, pages, flags) of a level, neighbours of the same flags merged."""
    rows: list[tuple[int, int, int]] = []
    for number, flags in sorted(level.items()):
        if rows and rows[-1][2] == flags and rows[-1][0] + rows[-1][1] == number:
            rows[-1] = (rows[-1][0], rows[-1][1] + 1, flags)
        else:
            rows.append((number, 1, flags))
    return rows


@settings(max_examples=80, deadline=None)
@given(chains(), st.lists(st.booleans(), min_size=26, max_size=26))
def test_any_chain_reads_as_page_by_page_lookups_do(levels: list[dict[int, int]], chosen: list[bool]) -> None:
    def look_up(depth: int, number: int) -> bytes | None:
        flags = levels[depth].get(number)
        if flags is None:
            return None
        return look_up(depth - 1, number) if flags & PE_PARENT else page(depth, number)

    numbers = [number for number, wanted in enumerate(chosen) if wanted]
    with tempfile.TemporaryDirectory() as name:
        images = ImagesDir(write_chain(Path(name), *map(rows_of, levels)))
        spans = [(row[0], row[0] + row[1]) for row in rows_of(dict.fromkeys(numbers, 0))]
        pages, absent = read(images, runs(*spans))
    expected = [look_up(len(levels) - 1, number) for number in numbers]
    assert pages == [ZERO if found is None else found for found in expected]
    assert absent == [number for number, found in zip(numbers, expected, strict=True) if found is None]


class TestTheDirectory:
    def test_one_without_an_inventory_is_unfinished(self, tmp_path: Path) -> None:
        (tmp_path / "pages-1.img").touch()
        with pytest.raises(UnfinishedImages, match=r"no inventory\.img\): remove it"):
            ImagesDir(tmp_path)
        assert ImagesDir(tmp_path, must_be_complete=False).pids() == []

    def test_what_is_no_images_dir_is_never_to_be_deleted(self, tmp_path: Path) -> None:
        (tmp_path / "passwd").touch()
        with pytest.raises(UnfinishedImages, match=r"nor any images: give the directory of a dump") as raised:
            ImagesDir(tmp_path)
        assert "remove it" not in str(raised.value)

    def test_one_that_does_not_exist_is_an_io_error(self, tmp_path: Path) -> None:
        with pytest.raises(ImagesIOError, match="No such file or directory; check the path"):
            ImagesDir(tmp_path / "none")

    def test_a_file_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ImagesIOError, match="Not a directory"):
            ImagesDir(tmp_path / "file")

    def test_only_pagemaps_give_numbers(self, tmp_path: Path) -> None:
        write_level(tmp_path / "0", 0, {"pagemap-10": [], "pagemap-9": [], "pagemap-shmem-3": []})
        for name in ("pagemap-x.img", "pagemap-1.img.bak", "xpagemap-1.img", "pagemap-shmem-.img", "pages-77.img"):
            (tmp_path / "0" / name).touch()
        images = ImagesDir(tmp_path / "0")
        assert (images.pids(), images.shmem_ids()) == ([9, 10], [3])
        assert repr(images) == f"<ImagesDir {tmp_path}/0, pids [9, 10], shared memory [3]>"

    def test_what_it_says_of_itself(self, tmp_path: Path) -> None:
        write_level(tmp_path / "0", 0, {}, meta=b'{"version": 1}')
        (tmp_path / "0" / "stats-dump").write_bytes(encode_stats(DumpStats(pages_written=5)))
        images = ImagesDir(tmp_path / "0")
        assert images.inventory().is_pre_dump
        assert images.meta() == {"version": 1}
        stats = images.stats()
        assert stats is not None
        assert stats.pages_written == 5

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000])
    def test_a_damaged_sidecar_is_a_bad_image(self, tmp_path: Path, text: bytes) -> None:
        write_level(tmp_path / "0", 0, {}, meta=text)
        with pytest.raises(BadImage, match=r"incdump\.json is damaged") as caught:
            ImagesDir(tmp_path / "0").meta()
        assert caught.value.path == str(tmp_path / "0" / "incdump.json")

    def test_pagemaps_are_decoded_once_and_few_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        count = images_dir._CACHED_PAGEMAPS + 5
        write_level(tmp_path / "0", 0, {f"pagemap-{pid}": [(pid, 1, P)] for pid in range(1, count + 1)})
        decoded: list[str] = []
        real = images_dir.decode_pagemap
        monkeypatch.setattr(
            images_dir, "decode_pagemap", lambda data, path: (decoded.append(path.name), real(data, path))[1]
        )
        images = ImagesDir(tmp_path / "0")
        for _ in range(3):
            assert np.array_equal(images.pagemap(1), table([(1, 1, P)]))
        assert decoded == ["pagemap-1.img"]
        for pid in range(1, count + 1):
            assert np.array_equal(images.pagemap(pid), table([(pid, 1, P)]))
        assert len(images._pagemaps) == images_dir._CACHED_PAGEMAPS
