"""Images dirs being made: private, whole or not there."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from typing import TYPE_CHECKING

import pytest

from incdump.errors import BrokenChain, ImagesDirInUse, ImagesIOError, UnfinishedImages
from incdump.images.framing import Magic
from incdump.images.images_dir import ImagesDir
from incdump.images.inventory import encode_pre_dump_inventory
from incdump.images.new_dir import NewImagesDir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INVENTORY = encode_pre_dump_inventory(1)


def tree(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def finished(path: Path, parent: str | None = None) -> Path:
    with NewImagesDir.create(path, parent) as images:
        images.finish(INVENTORY)
    return path


@pytest.fixture
def no_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.mark.usefixtures("no_umask")
def test_directories_and_files_are_the_owner_s_alone(tmp_path: Path) -> None:
    with NewImagesDir.create(tmp_path / "a" / "b") as images:
        os.close(images.open_pages(images.next_pages_id()))
        images.write_raw("stats-dump", b"1")
        images.write_image("pstree.img", Magic.PSTREE, [b"2"])
        images.finish(INVENTORY)
    modes = {p.name: p.stat().st_mode & 0o7777 for p in tmp_path.rglob("*")}
    assert modes == {"a": 0o700, "b": 0o700} | dict.fromkeys(
        ["pages-1.img", "stats-dump", "pstree.img", "inventory.img"], 0o600
    )


@pytest.mark.usefixtures("no_umask")
def test_a_directory_that_exists_keeps_its_mode_and_its_other_files(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir(mode=0o750)
    (tmp_path / "d" / "dump.log").touch()
    images = NewImagesDir.create(tmp_path / "d")
    assert (tmp_path / "d").stat().st_mode & 0o7777 == 0o750
    images.write_raw("stats-dump", b"1")
    images.discard()
    assert tree(tmp_path) == {"d", "d/dump.log"}


def test_pages_are_written_where_the_descriptor_says(tmp_path: Path) -> None:
    with NewImagesDir.create(tmp_path / "d") as images:
        assert [images.next_pages_id() for _ in range(3)] == [1, 2, 3]
        fd = images.open_pages(3)
        os.pwrite(fd, b"x", 4096)
        assert os.pread(fd, 1, 4096) == b"x"
        os.close(fd)
        images.finish(INVENTORY)
    assert (tmp_path / "d" / "pages-3.img").stat().st_size == 4097


def test_an_image_is_framed(tmp_path: Path) -> None:
    with NewImagesDir.create(tmp_path / "d") as images:
        images.write_image("pstree.img", Magic.PSTREE, [b"ab"])
        images.finish(INVENTORY)
    assert (tmp_path / "d" / "pstree.img").read_bytes() == bytes.fromhex("19435654 30302750 02000000") + b"ab"


def test_the_inventory_comes_last_and_makes_it_whole(tmp_path: Path) -> None:
    images = NewImagesDir.create(tmp_path / "d")
    images.write_raw("pagemap-1.img", b"")
    with pytest.raises(UnfinishedImages):
        ImagesDir(tmp_path / "d")
    images.finish(INVENTORY)
    assert images.finished
    assert tree(tmp_path / "d") == {"pagemap-1.img", "inventory.img"}
    ImagesDir(tmp_path / "d")


@pytest.mark.parametrize("end", ["leave", "raise", "discard", "discard twice", "discard after finish"])
def test_nothing_is_left_of_a_dump_that_does_not_finish(tmp_path: Path, end: str) -> None:
    finished(tmp_path / "0")
    before = tree(tmp_path)
    images = NewImagesDir.create(tmp_path / "a" / "b" / "c", "../../../0")
    os.close(images.open_pages(1))
    images.write_raw("pagemap-1.img", b"")
    if end == "leave":
        with images:
            pass
    elif end == "raise":
        with pytest.raises(KeyError), images:
            raise KeyError
    else:
        if end == "discard after finish":
            images.finish(INVENTORY)
        for _ in range(2 if end == "discard twice" else 1):
            images.discard()
    assert tree(tmp_path) == before
    assert "discarded" in repr(images)


def test_discarding_leaves_what_others_put_there(tmp_path: Path) -> None:
    images = NewImagesDir.create(tmp_path / "d")
    images.write_raw("stats-dump", b"")
    (tmp_path / "d" / "notes").touch()
    images.discard()
    assert tree(tmp_path) == {"d", "d/notes"}


def test_discarding_works_after_the_directory_was_renamed_or_removed(tmp_path: Path) -> None:
    images = NewImagesDir.create(tmp_path / "d")
    images.write_raw("stats-dump", b"")
    (tmp_path / "d").rename(tmp_path / "e")
    images.discard()
    assert tree(tmp_path / "e") == set()
    gone = NewImagesDir.create(tmp_path / "f")
    (tmp_path / "f").rmdir()
    gone.discard()


def test_a_removed_file_is_gone_and_may_be_made_again(tmp_path: Path) -> None:
    images = NewImagesDir.create(tmp_path / "d")
    os.close(images.open_pages(1))
    images.remove("pages-1.img")
    assert tree(tmp_path / "d") == set()
    os.close(images.open_pages(1))
    with pytest.raises(ValueError, match="not created here"):
        images.remove("other")
    images.discard()


def test_a_finished_dump_is_never_overwritten(tmp_path: Path) -> None:
    finished(tmp_path / "d")
    with pytest.raises(ImagesDirInUse, match="already holds a dump; choose another") as caught:
        NewImagesDir.create(tmp_path / "d")
    assert caught.value.path == str(tmp_path / "d")
    ImagesDir(tmp_path / "d")


@pytest.mark.parametrize(
    "name",
    [
        "pagemap-1.img",
        "pagemap-shmem-1.img",
        "pages-1.img",
        "stats-dump",
        "incdump.json",
        "incdump-hashes-1",
        "core-1.img",
        "inventory.img.unfinished",
    ],
)
def test_an_unfinished_dump_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ImagesDirInUse, match=rf"unfinished dump \({name}, no inventory.img\); remove it"):
        NewImagesDir.create(tmp_path)
    assert tree(tmp_path) == {name}


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    with NewImagesDir.create(tmp_path / "d") as images:
        for name in ("pages-1.img", "stats-dump", "inventory.img"):
            (tmp_path / "d" / name).write_bytes(b"theirs")
        with pytest.raises(ImagesDirInUse, match="another dump writes there"):
            images.open_pages(1)
        with pytest.raises(ImagesDirInUse, match="another dump writes there"):
            images.write_raw("stats-dump", b"")
        with pytest.raises(ImagesDirInUse, match="another dump writes there"):
            images.finish(INVENTORY)
    assert {p.read_bytes() for p in (tmp_path / "d").iterdir()} == {b"theirs"}
    assert len(tree(tmp_path / "d")) == 3


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "."])
def test_only_plain_names_are_written(tmp_path: Path, name: str) -> None:
    with NewImagesDir.create(tmp_path / "d") as images, pytest.raises((ValueError, ImagesDirInUse)):
        images.write_raw(name, b"")
    assert tree(tmp_path) == set()


class TestParent:
    def test_a_relative_parent_is_taken_from_the_images_dir(self, tmp_path: Path) -> None:
        finished(tmp_path / "0")
        finished(tmp_path / "new" / "1", "../../0")
        assert os.readlink(tmp_path / "new" / "1" / "parent") == "../../0"
        parent = ImagesDir(tmp_path / "new" / "1").parent
        assert parent is not None
        assert parent.path == tmp_path / "0"

    def test_an_absolute_parent_will_do(self, tmp_path: Path) -> None:
        finished(tmp_path / "0")
        images = NewImagesDir.create(tmp_path / "1", str(tmp_path / "0"))
        assert images.parent == tmp_path / "0"
        assert os.readlink(tmp_path / "1" / "parent") == str(tmp_path / "0")
        images.discard()

    def test_a_relative_parent_is_taken_from_where_a_symlinked_images_dir_really_is(self, tmp_path: Path) -> None:
        finished(tmp_path / "deep" / "0")
        (tmp_path / "deep" / "1").mkdir()
        (tmp_path / "link").symlink_to("deep/1")
        finished(tmp_path / "link", "../0")
        parent = ImagesDir(tmp_path / "link").parent
        assert parent is not None
        assert parent.path == tmp_path / "deep" / "0"

    def test_a_parent_that_is_missing_is_refused_before_anything_is_made(self, tmp_path: Path) -> None:
        with pytest.raises(BrokenChain, match="does not exist: it is taken from") as caught:
            NewImagesDir.create(tmp_path / "1", "../0")
        assert caught.value.path == str(tmp_path / "0")
        assert tree(tmp_path) == set()

    def test_a_parent_given_from_the_working_directory_is_refused_with_the_right_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finished(tmp_path / "images" / "0")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(BrokenChain, match=r"perhaps \.\./0 is meant"):
            NewImagesDir.create("images/1", "images/0")
        finished(tmp_path / "images" / "1", "../0")

    def test_an_unfinished_parent_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "pagemap-1.img").touch()
        with pytest.raises(UnfinishedImages) as caught:
            NewImagesDir.create(tmp_path / "1", "../0")
        assert caught.value.path == str(tmp_path / "0")
        assert not (tmp_path / "1").exists()

    @pytest.mark.parametrize("parent", ["", ".", "../1", "../link"])
    def test_a_directory_is_never_its_own_parent(self, tmp_path: Path, parent: str) -> None:
        (tmp_path / "link").symlink_to("1")
        with pytest.raises(BrokenChain, match="cannot be its own parent"):
            NewImagesDir.create(tmp_path / "1", parent)

    def test_a_parent_link_that_is_there_already_must_be_the_same(self, tmp_path: Path) -> None:
        finished(tmp_path / "0")
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "parent").symlink_to("../0")
        for other in (None, str(tmp_path / "0")):
            with pytest.raises(ImagesDirInUse, match="has a parent link to"):
                NewImagesDir.create(tmp_path / "1", other)
        NewImagesDir.create(tmp_path / "1", "../0").discard()
        assert (tmp_path / "1" / "parent").is_symlink()


class TestKernelSaysNo:
    @pytest.mark.parametrize(
        ("path", "number"),
        [("file", errno.ENOTDIR), ("file/below", errno.ENOTDIR), ("x" * 300, errno.ENAMETOOLONG)],
    )
    def test_a_directory_that_cannot_be_is_an_io_error(self, tmp_path: Path, path: str, number: int) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ImagesIOError) as caught:
            NewImagesDir.create(tmp_path / path)
        assert caught.value.errno == number
        assert caught.value.path == str(tmp_path / path)
        assert tree(tmp_path) == {"file"}

    def test_a_place_where_nothing_can_be_made_is_an_io_error(self) -> None:
        with pytest.raises(ImagesIOError) as caught:
            NewImagesDir.create("/proc/self/fdinfo/images")
        assert caught.value.errno in (errno.ENOENT, errno.EACCES, errno.EPERM)

    def test_a_directory_without_write_permission_is_refused_at_once(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            os.chmod(name, 0o555)
            before = os.geteuid()
            if before == 0:
                os.seteuid(65534)  # for root may write anywhere
            try:
                for path in (name, f"{name}/below"):
                    with pytest.raises(ImagesIOError, match="Permission denied; choose") as caught:
                        NewImagesDir.create(path)
                    assert caught.value.errno == errno.EACCES
            finally:
                os.seteuid(before)

    def test_a_full_disk_is_an_io_error_and_nothing_is_left(self, full_disk: Path) -> None:
        images = NewImagesDir.create(full_disk / "d")
        with pytest.raises(ImagesIOError, match="No space left on device; free some space") as caught:
            images.write_raw("pagemap-1.img", bytes(1 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.errno_name == "ENOSPC"
        images.discard()
        assert tree(full_disk) == set()

    def test_a_disk_that_is_full_before_the_inventory_leaves_no_dump(self, full_disk: Path) -> None:
        with NewImagesDir.create(full_disk / "d") as images:
            fd = images.open_pages(1)
            assert os.write(fd, bytes(1 << 20)) < 1 << 20
            os.close(fd)
            with pytest.raises(ImagesIOError) as caught:
                images.finish(INVENTORY)
        assert caught.value.errno == errno.ENOSPC
        assert tree(full_disk) == set()

    def test_a_read_only_file_system_is_an_io_error(self, full_disk: Path) -> None:
        (full_disk / "d").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", full_disk], check=True, capture_output=True)
        for path in (full_disk / "d", full_disk / "e"):
            with pytest.raises(ImagesIOError, match="Read-only file system; choose") as caught:
                NewImagesDir.create(path)
            assert caught.value.errno == errno.EROFS

    @pytest.fixture
    def full_disk(self, tmp_path: Path) -> Iterator[Path]:
        if os.geteuid() != 0:
            pytest.skip("mounting a tmpfs takes root")
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "incdump-test", disk]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"a tmpfs cannot be mounted: {mounted.stderr.strip()}")
        try:
            yield disk
        finally:
            subprocess.run(["umount", disk], check=True, capture_output=True)


def test_where_files_cannot_be_given_away_nothing_is_left_or_they_stay_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS that takes root for nobody, say."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(ImagesIOError, match="Operation not permitted"):
        NewImagesDir.create(tmp_path / "a" / "b", None, 100_000)
    assert tree(tmp_path) == set()
    (tmp_path / "there").mkdir()
    with pytest.raises(ImagesIOError, match="Operation not permitted"):
        NewImagesDir.create(tmp_path / "there", None, 100_000)
    assert tree(tmp_path) == {"there"}
    with NewImagesDir.create_if_possible_for(tmp_path / "c", None, 100_000) as images:
        images.write_raw("pagemap-1.img", b"")
        images.finish(INVENTORY)
    assert (tmp_path / "c").stat().st_mode & 0o7777 == 0o700
    assert (tmp_path / "c" / "pagemap-1.img").stat().st_uid == os.geteuid()
