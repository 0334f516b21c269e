"""Magics, records, small files."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from incdump.errors import BadImage, ImagesIOError
from incdump.images import framing
from incdump.images.framing import Magic, create_file, frame, only_record, read_file, unframe, write_file

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("magic", "expected"),
    [
        (Magic.INVENTORY, "16313158"),
        (Magic.PSTREE, "19435654 30302750"),
        (Magic.MM, "19435654 20284957"),
        (Magic.PAGEMAP, "19435654 25400856"),
        (Magic.CORE, "19435654 47380555"),
        (Magic.FILES, "19435654 38313056"),
        (Magic.MEMFD, "19435654 99344548"),
        (Magic.STATS, "40591055 06330957"),
    ],
)
def test_each_kind_of_image_begins_with_its_magics(magic: Magic, expected: str) -> None:
    assert frame(magic, []) == bytes.fromhex(expected)


def test_a_record_is_its_length_and_its_bytes() -> None:
    assert frame(Magic.INVENTORY, [b"ab", b""]) == bytes.fromhex("16313158 02000000 6162 00000000")


def test_records_come_back_as_they_were() -> None:
    records = [b"", b"a", b"b" * 70_000]
    assert [bytes(r) for r in unframe(frame(Magic.FILES, records), Magic.FILES, "x")] == records


@pytest.mark.parametrize("cut", range(1, 10))
def test_an_image_cut_anywhere_in_its_record_is_bad(cut: int) -> None:
    data = frame(Magic.FILES, [b"record"])
    with pytest.raises(BadImage, match=r"x\.img is cut short") as caught:
        list(unframe(data[:-cut], Magic.FILES, "x.img"))
    assert caught.value.path == "x.img"


@pytest.mark.parametrize("data", [b"", b"\x19", frame(Magic.MM, []), b"\0" * 64])
def test_another_magic_is_bad(data: bytes) -> None:
    with pytest.raises(BadImage, match=r"x\.img is not a files image"):
        list(unframe(data, Magic.FILES, "x.img"))


@pytest.mark.parametrize("records", [[], [b"a", b"b"], [b"a", b"b", b"c"]])
def test_one_record_means_one(records: list[bytes]) -> None:
    with pytest.raises(BadImage, match="than one record"):
        only_record(frame(Magic.MM, records), Magic.MM, "x")


def test_a_file_that_is_not_there_reads_as_none(tmp_path: Path) -> None:
    assert read_file(tmp_path / "none") is None


def test_a_fifo_under_an_images_name_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stats-dump")
    with pytest.raises(BadImage):
        read_file(tmp_path / "stats-dump")


def test_a_directory_under_an_images_name_is_bad(tmp_path: Path) -> None:
    with pytest.raises(BadImage):
        read_file(tmp_path)


def test_a_huge_sparse_file_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.img"
    path.touch()
    os.truncate(path, framing.MAX_IMAGE_SIZE + 1)
    with pytest.raises(BadImage, match="far too big"):
        read_file(path)


def test_reading_reports_what_the_kernel_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImagesIOError, match=r"cannot read .*: Not a directory") as caught:
        read_file(tmp_path / "file" / "below")
    assert caught.value.errno == errno.ENOTDIR


def test_a_file_is_created_private_and_never_overwritten(tmp_path: Path) -> None:
    old_umask = os.umask(0)
    try:
        write_file(tmp_path / "a", [b"12", b"3"])
    finally:
        os.umask(old_umask)
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o600
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", [b"other"])
    assert (tmp_path / "a").read_bytes() == b"123"


def test_a_symlink_is_not_followed_when_creating(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "link")
    assert not (tmp_path / "target").exists()
