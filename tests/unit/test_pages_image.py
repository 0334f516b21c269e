"""A pages image holds what its pagemap says, page for page, also when pages vanished on the way."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.engine.pages_image import PagesImage, merge_entries, without
from incdump.images.new_dir import NewImagesDir
from incdump.images.pagemap import decode_pagemap, page_offsets
from incdump.page_pipe import CHUNK_PAGES
from incdump.tracking.content import HashCollector, hash_pages
from incdump.xfer.local import make_buffer
from tests.unit.pagesets import (
    PAGE,
    Memory,
    entries_of,
    entry_tables,
    flags_of,
    moderately,
    page_dicts,
    page_sets,
    pages_of,
    runs_of,
    seldom,
    thoroughly,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from incdump.model.runs import Entries

NAME = "pagemap-7.img"
flags = st.sampled_from((1, 4, 6))
tables = entry_tables(flags)


def write_image(
    directory: Path,
    windows: list[Entries],
    memory: Memory,
    order: Random,
    hashes: HashCollector | None = None,
    ready: Callable[[PagesImage], None] = lambda _image: None,
) -> tuple[bytes, bytes]:
    """Write an image, its chunks in some order; the bytes of the pagemap and of the pages.

    :param ready: done with it before the first page comes.
    """
    buffer = make_buffer(CHUNK_PAGES)
    wanted = runs_of({page for entries in windows for page in flags_of(entries)})
    with NewImagesDir.create(directory) as images:
        image = PagesImage(images, NAME)
        ready(image)
        chunks = [chunk for entries in windows for chunk in image.append(entries)]
        order.shuffle(chunks)
        for chunk in chunks:
            image.write(chunk, memory, buffer, None if hashes is None else (hashes, wanted))
        nr_pages = image.finish()
        image.close()
        pagemap, pages = (directory / NAME).read_bytes(), (directory / "pages-1.img").read_bytes()
        used = (directory / "pages-1.img").stat().st_blocks * 512
        assert used <= len(pages) + PAGE  # what was laid out in excess is given back
    assert nr_pages == image.nr_pages == len(pages) // PAGE
    return pagemap, pages


def contents(pagemap: bytes, pages: bytes) -> tuple[dict[int, bytes], set[int]]:
    """What an image says: the bytes of the pages it has, and the pages left to the parent."""
    pages_id, entries = decode_pagemap(pagemap, NAME)
    assert pages_id == 1
    offsets = page_offsets(entries).tolist()
    assert offsets[-1] == len(pages)
    have, holes = {}, set()
    for (vaddr, nr_pages, bits), offset in zip(entries.tolist(), offsets, strict=False):
        for n in range(nr_pages):
            if bits & 4:
                have[vaddr // PAGE + n] = pages[offset + n * PAGE : offset + (n + 1) * PAGE]
            else:
                holes.add(vaddr // PAGE + n)
    return have, holes


def windows_of(pages: dict[int, int], splits: set[int], bounds: set[int]) -> list[Entries]:
    """Entries in several tables, as they come window by window."""
    edges = sorted({-1, *bounds, 1 << 50})
    parts = [{p: f for p, f in pages.items() if lo < p <= hi} for lo, hi in pairwise(edges)]
    return [entries_of(part, splits) for part in parts if part]


@seldom
@given(page_dicts(flags), page_sets, page_sets, st.randoms(use_true_random=False))
def test_every_present_page_has_its_bytes_and_every_hole_has_none(
    pages: dict[int, int], splits: set[int], bounds: set[int], order: Random
) -> None:
    with tempfile.TemporaryDirectory() as root:
        written = write_image(Path(root, "1"), windows_of(pages, splits, bounds), Memory(), order)
    have, holes = contents(*written)
    assert have == {p: Memory().content(p).tobytes() for p, f in pages.items() if f & 4}
    assert holes == {p for p, f in pages.items() if not f & 4}


@moderately
@given(page_dicts(flags), page_sets, page_sets, page_sets, st.randoms(use_true_random=False))
def test_an_image_whose_pages_failed_is_the_image_that_never_had_them(
    pages: dict[int, int], splits: set[int], bounds: set[int], failing: set[int], order: Random
) -> None:
    rest = {p: f for p, f in pages.items() if p not in failing or not f & 4}
    with tempfile.TemporaryDirectory() as root:
        failed = write_image(Path(root, "1"), windows_of(pages, splits, bounds), Memory(failing), order)
        clean = write_image(Path(root, "2"), [entries_of(rest)], Memory(), Random(0))
    assert failed == clean


getting_ready = pytest.mark.parametrize("get_ready", [PagesImage.lay_out, PagesImage.make_room])


@getting_ready
@pytest.mark.parametrize("room", [0, 1, 255, 256, 700, 2000])
@pytest.mark.parametrize("failed", [set(), {3}, set(range(100, 400))], ids=len)
def test_room_that_was_made_is_not_seen_in_the_image(
    tmp_path: Path, get_ready: Callable[[PagesImage, int], None], room: int, failed: set[int]
) -> None:
    windows = [entries_of(dict.fromkeys(range(600), 4))]
    plain = write_image(tmp_path / "1", windows, Memory(failed), Random(1))
    ready = write_image(tmp_path / "2", windows, Memory(failed), Random(2), ready=lambda i: get_ready(i, room))
    assert ready == plain


def test_a_file_that_is_laid_out_has_its_blocks_before_the_first_page_comes(tmp_path: Path) -> None:
    with NewImagesDir.create(tmp_path / "1") as images:
        image = PagesImage(images, NAME)
        image.lay_out(700)
        assert (tmp_path / "1" / "pages-1.img").stat().st_blocks * 512 >= 700 * PAGE
        image.close()


@getting_ready
def test_a_disk_is_not_filled_up_for_pages_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, get_ready: Callable[[PagesImage, int], None]
) -> None:
    small = os.statvfs_result((4096, 4096, 1000, 600, 500, 9, 9, 9, 0, 255))
    monkeypatch.setattr(os, "fstatvfs", lambda _fd: small)
    with NewImagesDir.create(tmp_path / "1") as images:
        image = PagesImage(images, NAME)
        get_ready(image, 500)
        assert (tmp_path / "1" / "pages-1.img").stat().st_blocks == 0
        get_ready(image, 499)
        assert (tmp_path / "1" / "pages-1.img").stat().st_blocks > 0
        image.close()


@getting_ready
def test_a_file_system_that_lays_nothing_out_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, get_ready: Callable[[PagesImage, int], None]
) -> None:
    def refuse(_fd: int, _size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    windows = [entries_of(dict.fromkeys(range(600), 4))]
    plain = write_image(tmp_path / "1", windows, Memory(), Random(1))
    monkeypatch.setattr("incdump.engine.pages_image.fallocate", refuse)
    assert write_image(tmp_path / "2", windows, Memory(), Random(2), ready=lambda i: get_ready(i, 700)) == plain


@getting_ready
def test_where_there_is_no_room_nothing_is_said_before_the_pages_come(
    tmp_path: Path, get_ready: Callable[[PagesImage, int], None]
) -> None:
    with NewImagesDir.create(tmp_path / "1") as images:
        image = PagesImage(images, NAME)
        path = tmp_path / "1" / "pages-1.img"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 * PAGE, before[1]))
        try:
            get_ready(image, 700)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.stat().st_size == 0
        image.close()


def test_pages_that_fail_in_an_image_of_many_chunks(tmp_path: Path) -> None:
    pages = dict.fromkeys(range(100, 100 + 3 * CHUNK_PAGES), 4)
    failing = {100, *range(1000, 2500), 100 + 3 * CHUNK_PAGES - 1}
    rest = {p: f for p, f in pages.items() if p not in failing}
    failed = write_image(tmp_path / "1", [entries_of(pages)], Memory(failing), Random(1))
    assert failed == write_image(tmp_path / "2", [entries_of(rest)], Memory(), Random(2))


@seldom
@given(page_dicts(flags), page_sets, st.randoms(use_true_random=False))
def test_the_hashes_noted_are_those_of_the_bytes_in_the_image(
    pages: dict[int, int], failing: set[int], order: Random
) -> None:
    collector = HashCollector(99)
    with tempfile.TemporaryDirectory() as root:
        written = write_image(Path(root, "1"), [entries_of(pages)], Memory(failing), order, collector)
    have, _ = contents(*written)
    noted = collector.table(drop=runs_of(failing)).rows
    assert noted["vaddr"].tolist() == [page * PAGE for page in sorted(have)]
    for page, row in zip(sorted(have), noted, strict=True):
        expected = hash_pages(np.frombuffer(have[page], np.uint8), 99)[0]
        assert (row["low"], row["high"]) == tuple(expected)


def test_hashes_are_noted_of_just_the_pages_wanted(tmp_path: Path) -> None:
    collector = HashCollector(99)
    with NewImagesDir.create(tmp_path / "1") as images:
        image = PagesImage(images, NAME)
        for chunk in image.append(entries_of(dict.fromkeys(range(10), 4))):
            image.write(chunk, Memory(), make_buffer(16), (collector, runs_of({2, 3, 8})))
        image.close()
    table = collector.table()
    assert pages_of(table.known()) == {2, 3, 8}
    expected = hash_pages(np.concatenate([Memory().content(p) for p in (2, 3, 8)]), 99)
    assert table.equal(table.rows["vaddr"], expected).all()


@thoroughly
@given(tables, page_sets)
def test_taking_pages_out_of_entries(entries: Entries, failed: set[int]) -> None:
    rest, gaps = without(entries, runs_of(failed))
    before = flags_of(entries)
    assert flags_of(rest) == {p: f for p, f in before.items() if p not in failed or not f & 4}
    present = [p for p, f in before.items() if f & 4]
    assert pages_of(gaps) == {place for place, p in enumerate(present) if p in failed}


@thoroughly
@given(tables)
def test_merging_entries_changes_no_page_and_leaves_none_to_be_merged(entries: Entries) -> None:
    merged = merge_entries(entries)
    assert np.array_equal(merged, entries_of(flags_of(entries)))


def test_an_image_of_nothing_is_a_pagemap_without_entries(tmp_path: Path) -> None:
    assert contents(*write_image(tmp_path / "1", [], Memory(), Random(0))) == ({}, set())


def test_an_image_that_is_discarded_leaves_no_file(tmp_path: Path) -> None:
    with NewImagesDir.create(tmp_path / "1") as images:
        image = PagesImage(images, NAME)
        for chunk in image.append(entries_of({1: 4})):
            image.write(chunk, Memory(), make_buffer(1), None)
        image.discard()
        image.close()
        assert os.listdir(tmp_path / "1") == []
        assert image.nr_pages == 0


def test_closing_twice_closes_nobody_elses_descriptor(tmp_path: Path) -> None:
    with NewImagesDir.create(tmp_path / "1") as images:
        image = PagesImage(images, NAME)
        image.close()
        with open(tmp_path / "other", "wb") as other:
            image.close()
            other.write(b"still open")


@pytest.mark.parametrize("entries", [entries_of({}), entries_of({1: 4})])
def test_short_tables_need_no_merging(entries: Entries) -> None:
    assert merge_entries(entries) is entries
