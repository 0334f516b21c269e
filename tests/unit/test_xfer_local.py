"""A chunk's bytes land at its place in the pages image, and gaps are closed without touching another byte."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.errors import ImagesIOError
from incdump.model.runs import PE_PRESENT
from incdump.page_pipe import Chunk
from incdump.xfer.local import close_gaps, make_buffer, write_chunk
from tests.unit.pagesets import PAGE, Memory, content_of, moderately, pages_of, runs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

page_lists = st.sets(st.integers(0, 30), min_size=1, max_size=20)


@contextmanager
def image_file() -> Iterator[int]:
    """A pages image without a name."""
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def chunk_of(pages: set[int] | list[int], place: int) -> Chunk:
    """A chunk of these pages."""
    runs = runs_of(pages)
    return Chunk(runs, place, len(pages), np.full(len(runs), PE_PRESENT, np.uint64))


def whole(fd: int) -> bytes:
    """All bytes of a file."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def bytes_of(pages: list[int]) -> bytes:
    """The contents of pages, back to back."""
    return b"".join(content_of(page).tobytes() for page in pages)


@pytest.fixture
def short_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes at most 1000 bytes at a time, as it may (a signal, a full disk, some file systems)."""
    pwrite: Callable[[int, memoryview, int], int] = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, memoryview(data)[:1000], at))


def test_a_buffer_is_page_aligned_and_writable() -> None:
    buffer = make_buffer(3)
    assert buffer.shape == (3 * PAGE,)
    assert buffer.ctypes.data % PAGE == 0
    buffer[:] = 1


@moderately
@given(page_lists, st.integers(0, 50), st.data())
def test_a_chunk_is_written_at_its_place_and_nowhere_else(pages: set[int], place: int, data: st.DataObject) -> None:
    unreadable = data.draw(st.sets(st.sampled_from(sorted(pages))))
    before = os.urandom(80 * PAGE)
    buffer = make_buffer(32)
    with image_file() as fd:
        os.pwrite(fd, before, 0)
        failed = write_chunk(fd, chunk_of(pages, place), Memory(unreadable), buffer, "pages-1.img")
        after = whole(fd)
    assert pages_of(failed) == unreadable
    expected = b"".join(bytes(PAGE) if p in unreadable else content_of(p).tobytes() for p in sorted(pages))
    assert after == before[: place * PAGE] + expected + before[(place + len(pages)) * PAGE :]
    assert buffer[: len(pages) * PAGE].tobytes() == expected


@moderately
@given(st.lists(page_lists, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_in_which_chunks_are_written_is_of_no_matter(sets: list[set[int]], random: object) -> None:
    chunks, place = [], 0
    for pages in sets:
        chunks.append(chunk_of(pages, place))
        place += len(pages)
    expected = b"".join(bytes_of(sorted(pages)) for pages in sets)
    random.shuffle(chunks)  # type: ignore[attr-defined]
    buffer = make_buffer(32)
    with image_file() as fd:
        for chunk in chunks:
            write_chunk(fd, chunk, Memory(), buffer, "pages-1.img")
        assert whole(fd) == expected


@pytest.mark.usefixtures("short_writes")
def test_a_short_write_is_gone_on_with() -> None:
    pages = {1, 2, 5, 6, 7}
    with image_file() as fd:
        write_chunk(fd, chunk_of(pages, 2), Memory(), make_buffer(8), "pages-1.img")
        assert whole(fd) == bytes(2 * PAGE) + bytes_of(sorted(pages))


@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
def test_a_write_that_fails_names_the_image_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, number: int, hint: bool
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with image_file() as fd, pytest.raises(ImagesIOError, match=r"/images/pages-1\.img") as caught:
        write_chunk(fd, chunk_of({1}, 0), Memory(), make_buffer(1), "/images/pages-1.img")
    assert (caught.value.errno, caught.value.path) == (number, "/images/pages-1.img")
    assert ("free some space" in str(caught.value)) is hint


@moderately
@given(st.integers(0, 40), st.sets(st.integers(0, 39)))
def test_closing_gaps_leaves_just_the_other_pages(size: int, gone: set[int]) -> None:
    gone = {page for page in gone if page < size}
    with image_file() as fd:
        os.pwrite(fd, bytes_of(list(range(size))), 0)
        assert close_gaps(fd, runs_of(gone), size, "pages-1.img") == size - len(gone)
        assert whole(fd) == bytes_of([page for page in range(size) if page not in gone])


def test_closing_gaps_moves_more_than_a_buffer_full() -> None:
    """Three moves of several blocks each, over distances shorter and longer than a block (4 MiB)."""
    size = 6000
    contents = np.arange(size * PAGE // 8, dtype=np.uint64).reshape(size, -1)
    gaps = runs_of({0, *range(1500, 2900), 5999})
    with image_file() as fd:
        os.pwrite(fd, contents.tobytes(), 0)
        assert close_gaps(fd, gaps, size, "pages-1.img") == size - 1402
        assert whole(fd) == np.delete(contents, [0, *range(1500, 2900), 5999], axis=0).tobytes()


@pytest.mark.usefixtures("short_writes")
def test_closing_gaps_goes_on_after_a_short_write() -> None:
    with image_file() as fd:
        for page in range(6):
            for part in range(0, PAGE, 512):
                os.pwrite(fd, content_of(page)[part : part + 512].tobytes(), page * PAGE + part)
        close_gaps(fd, runs_of({0, 3}), 6, "pages-1.img")
        assert whole(fd) == bytes_of([1, 2, 4, 5])


def test_an_image_that_is_shorter_than_its_pages_is_an_error_and_no_endless_loop() -> None:
    with image_file() as fd:
        os.pwrite(fd, bytes_of([0, 1]), 0)
        with pytest.raises(ImagesIOError, match="pages-1") as caught:
            close_gaps(fd, runs_of({0}), 5, "pages-1.img")
    assert caught.value.errno == errno.EIO
