"""Checkpoints of a tree in a user namespace: CRIU reads them as that namespace's root, and nobody else can."""

from __future__ import annotations

import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump.criu.program import find
from incdump.engine.restore import HeldRestore
from tests.command import incdump as command
from tests.command import is_untouched
from tests.criu.arrivals import receiving
from tests.criu.contained import ROOT, ContainedTarget
from tests.criu.criu import criu_path, dump, restorable_churn, restore
from tests.criu.namespaces import in_own_namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from incdump.model.options import WayName

pytestmark = pytest.mark.usefixtures("real_criu")


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A directory on disk that others may enter."""
    with tempfile.TemporaryDirectory(prefix="incdump-images-", dir="/var/tmp") as name:
        os.chmod(name, 0o711)
        yield Path(name)


def checkpoint(
    target: ContainedTarget, path: Path, parent: str | None = None, way: WayName = "auto"
) -> incdump.DumpResult:
    """It is gone afterwards."""
    run = partial(incdump.checkpoint, target.pid, path, parent=parent, criu=str(criu_path()), way=way)
    result = anyio.run(run)
    target.reap()
    return result


def predump(target: ContainedTarget, path: Path, parent: str | None = None) -> incdump.DumpResult:
    return anyio.run(partial(incdump.predump, target.pid, path, parent=parent))


def revive(target: ContainedTarget, path: Path, by: str) -> None:
    """It finds all of its memory as it was."""
    if by == "criu":
        pidfile = target.directory.parent / "pid"
        pidfile.unlink(missing_ok=True)
        restore(path, *target.restore_options, "--pidfile", str(pidfile))
        target.restored(int(pidfile.read_text()))
    else:
        run = partial(incdump.restore, path, criu=str(criu_path()), criu_options=target.restore_options)
        target.restored(anyio.run(run).pid)
    target.check()


def modes(path: Path) -> dict[str, tuple[int, int]]:
    """The owner and the mode of each file, but for what is no image."""
    found = {entry.name: entry.lstat() for entry in path.iterdir() if not entry.is_symlink()}
    return {name: (at.st_uid, at.st_mode & 0o7777) for name, at in found.items() if name.endswith(".img")}


def assert_private(path: Path, owner: int = ROOT) -> None:
    """Nobody but root and the tree's own root reads what is in there."""
    at = path.lstat()
    assert (at.st_uid, at.st_gid, at.st_mode & 0o7777) == (owner, os.getegid(), 0o710)
    wrong = {
        name: (uid, oct(mode))
        for name, (uid, mode) in modes(path).items()
        if (uid, mode) != (owner, 0o640 if name.startswith("timens") else 0o600)
    }
    assert wrong == {}
    assert all(entry.lstat().st_mode & 0o007 == 0 for entry in path.iterdir() if not entry.is_symlink())


@pytest.mark.parametrize("by", ["criu", "incdump"])
@pytest.mark.parametrize("way", ["leash", "lazy-pages"])
@in_own_namespaces
def test_a_checkpoint_is_restored_and_is_private(open_root: Path, way: WayName, by: str) -> None:
    with ContainedTarget(open_root) as target:
        target.step(20)
        checkpoint(target, open_root / "images", way=way)
        assert_private(open_root / "images")
        revive(target, open_root / "images", by)
        target.step(20)
        target.quit()


@pytest.mark.parametrize("by", ["criu", "incdump"])
@in_own_namespaces
def test_a_checkpoint_on_a_chain_of_predumps_is_restored(open_root: Path, by: str) -> None:
    images = open_root / "made" / "images"
    with ContainedTarget(open_root, seed=2) as target:
        target.step(20)
        assert predump(target, images / "1").warnings == []
        target.step(5)
        assert predump(target, images / "2", "../1").warnings == []
        target.step(5)
        result = checkpoint(target, images / "3", "../2")
        assert result.incremental
        assert result.stats.pages_skipped_parent
        for name in "123":
            assert_private(images / name)
        revive(target, images / "3", by)
        target.step(20)
        target.quit()


@in_own_namespaces
def test_the_images_are_the_trees_from_the_moment_they_are_made(open_root: Path) -> None:
    """While the dump is under way, and nothing of it is complete."""
    seen: dict[str, tuple[int, int]] = {}
    images = open_root / "images"

    def look(step: str, _: incdump.DumpStats) -> None:
        if step in ("dumping", "finishing"):
            seen.update(modes(images))
            assert (images.stat().st_uid, images.stat().st_mode & 0o7777) == (ROOT, 0o710)

    with ContainedTarget(open_root, seed=3) as target:
        anyio.run(partial(incdump.dump, target.pid, images, progress=look))
        assert set(seen.values()) == {(ROOT, 0o600)}
        assert_private(images)
        target.quit()


@in_own_namespaces
def test_a_namespace_whose_root_is_root_is_restored_too(open_root: Path) -> None:
    with ContainedTarget(open_root, first=0, seed=4) as target:
        predump(target, open_root / "1")
        target.step(5)
        checkpoint(target, open_root / "2", "../1")
        assert_private(open_root / "2", 0)
        revive(target, open_root / "2", "incdump")
        target.quit()


@in_own_namespaces
def test_precopy_that_ends_in_a_checkpoint_is_restored(open_root: Path) -> None:
    with ContainedTarget(open_root, seed=5) as target:
        target.run()
        policy = incdump.PrecopyPolicy(final="checkpoint", max_rounds=3)
        options = incdump.DumpOptions(afterwards="killed")
        run = partial(incdump.precopy, target.pid, open_root / "images", policy=policy, options=options)
        result = anyio.run(partial(run, criu=str(criu_path())))
        assert result.final is not None
        target.reap()
        for path in (open_root / "images").iterdir():
            if not path.is_symlink():
                assert_private(path)
        revive(target, Path(result.final.images_dir), "criu")
        target.quit()


@in_own_namespaces
def test_what_a_page_server_has_stored_is_restored(open_root: Path) -> None:
    async def send(pid: int) -> None:
        there = incdump.PageServer(open_root / "there")
        async with there, anyio.create_task_group() as tasks:
            tasks.start_soon(there.serve)
            options = incdump.DumpOptions(page_server=(there.host, there.port), afterwards="killed")
            await incdump.predump(pid, open_root / "here" / "1", options=options)
            await incdump.checkpoint(
                pid, open_root / "here" / "2", parent="../1", options=options, criu=str(criu_path())
            )
            tasks.cancel_scope.cancel()

    with ContainedTarget(open_root, seed=12) as target:
        anyio.run(send, target.pid)
        target.reap()
        for name in "12":
            assert_private(open_root / "there" / name)
        revive(target, open_root / "there" / "2", "criu")
        target.quit()


@in_own_namespaces
def test_a_tree_migrates(open_root: Path) -> None:
    with ContainedTarget(open_root, seed=13) as target:
        arriving = open_root / "arriving"
        options = ("--", *target.restore_options)
        with receiving(arriving, *options) as there:
            policy = incdump.PrecopyPolicy(downtime=1e-6, timeout=600, max_rounds=2)
            run = partial(incdump.migrate, target.pid, "127.0.0.1", there.port, policy=policy, criu=str(criu_path()))
            assert anyio.run(run).outcome == "runs"
            report = there.migration()
            target.restored(_seen_from_here(report["restored"]["pid"]))
            target.check()
            assert report["rounds"] > 1
            for path in Path(report["images_dir"]).parent.iterdir():
                assert_private(path)
            target.quit()


def _seen_from_here(pid: int) -> int:
    """Process 1 of a container over there, by its number there."""
    for status in Path("/proc").glob("[0-9]*/status"):
        numbers = next(line for line in status.read_text().splitlines() if line.startswith("NSpid:")).split()
        if numbers[2:] == [str(pid), "1"]:
            return int(numbers[1])
    raise AssertionError("it does not run there")


# --- what could not be restored is refused while the tree runs -------------------------------------------------------


def assert_refused(target: ContainedTarget, path: Path, parent: str | None, shut: Path, advice: str) -> None:
    before = set(path.parent.iterdir())
    with pytest.raises(incdump.ImagesOutOfReach, match=f"whose root is user {ROOT} here") as raised:
        checkpoint(target, path, parent)
    assert raised.value.path is not None
    assert Path(raised.value.path) == shut
    assert raised.value.pid == target.pid
    assert advice in str(raised.value)
    assert is_untouched(target.pid)
    assert set(path.parent.iterdir()) == before
    target.check()


@in_own_namespaces
def test_an_images_dir_that_was_there_and_is_shut_is_refused(open_root: Path) -> None:
    """One that is open is not, and stays whose it is."""
    with ContainedTarget(open_root, seed=6) as target:
        images = open_root / "images"
        images.mkdir(0o700)
        assert_refused(target, images, None, images, f"chmod o+x {images}")
        images.chmod(0o701)
        checkpoint(target, images)
        assert (images.stat().st_uid, images.stat().st_mode & 0o7777) == (0, 0o701)
        assert {mode for name, mode in modes(images).items() if "timens" not in name} == {(ROOT, 0o600)}
        revive(target, images, "criu")
        target.quit()


@in_own_namespaces
def test_parents_behind_a_directory_that_is_shut_are_refused(open_root: Path) -> None:
    """Like those in /root. A first checkpoint there stands on nothing, and is restored."""
    place = open_root / "place"
    place.mkdir(0o700)
    with ContainedTarget(open_root, seed=7) as target:
        assert predump(target, place / "1").warnings == []
        (warning,) = predump(target, place / "2", "../1").warnings
        assert f"{place} is shut to it" in warning
        assert_refused(target, place / "3", "../2", place, f"chmod o+x {place}")
        assert_refused(target, open_root / "3", str(place / "1"), place, f"chmod o+x {place}")
        policy = incdump.PrecopyPolicy(final="checkpoint")
        with pytest.raises(incdump.ImagesOutOfReach):
            anyio.run(partial(incdump.precopy, target.pid, place, policy=policy, criu=str(criu_path())))
        checkpoint(target, place / "4")
        revive(target, place / "4", "criu")
        target.quit()


@in_own_namespaces
def test_parents_of_another_owner_are_refused(open_root: Path) -> None:
    with ContainedTarget(open_root, seed=8) as target:
        predump(target, open_root / "1")
        predump(target, open_root / "2", "../1")
        pages = next((open_root / "1").glob("pages-*.img"))
        os.chown(pages, 0, 0)
        assert_refused(target, open_root / "3", "../2", pages, f"chown -R {ROOT} {open_root / '1'}")
        os.chown(pages, ROOT, 0)
        os.chown(open_root / "1", 0, 0)
        for mode in (0o700, 0o711, 0o744):  # to be entered, and to be read
            os.chmod(open_root / "1", mode)
            assert_refused(target, open_root / "3", "../2", open_root / "1", f"chown -R {ROOT} {open_root / '1'}")
        target.quit()


@in_own_namespaces
def test_parents_that_criu_made_are_refused_until_they_are_given_away(open_root: Path) -> None:
    first = open_root / "1"
    with ContainedTarget(open_root, seed=9) as target:
        dump(target.pid, first, "--leave-running")
        subprocess.run(["chmod", "-R", "go=", first], check=True)
        with pytest.raises(incdump.ImagesOutOfReach, match=f"{first} is shut to it"):
            checkpoint(target, open_root / "2", "../1")
        assert is_untouched(target.pid)
        subprocess.run(["chown", "-R", str(ROOT), first], check=True)
        checkpoint(target, open_root / "2", "../1")
        revive(target, open_root / "2", "criu")
        target.quit()


@in_own_namespaces
def test_a_namespace_without_a_root_is_refused_but_not_its_memory(open_root: Path) -> None:
    """As in the sandboxes of browsers: CRIU would find out when the tree is gone."""
    with restorable_churn(open_root, seed=14, ops="write", under=("unshare", "--user")) as target:
        with pytest.raises(incdump.TargetUnsuitable, match="in which nobody of here is root"):
            anyio.run(partial(incdump.checkpoint, target.pid, open_root / "1", criu=str(criu_path())))
        assert is_untouched(target.pid)
        assert not (open_root / "1").exists()
        anyio.run(partial(incdump.dump, target.pid, open_root / "1"))
        assert (open_root / "1").stat().st_mode & 0o7777 == 0o700
        target.quit()


@in_own_namespaces
def test_a_restore_says_what_is_out_of_reach(open_root: Path) -> None:
    """Images that were copied by root, say."""
    images = open_root / "images"
    with ContainedTarget(open_root, seed=10) as target:
        checkpoint(target, images)
        subprocess.run(["chown", "-R", "0:0", images], check=True)
        done = command("restore", "-D", images, "--criu", criu_path(), "--", *target.restore_options)
        assert done.code == 4
        assert f"{images} is shut to it" in done.err
        subprocess.run(["chown", "-R", str(ROOT), images], check=True)
        (images / "timens-0.img").chmod(0o600)
        with pytest.raises(incdump.ImagesOutOfReach, match=r"timens-0\.img is shut"):
            revive(target, images, "incdump")
        (images / "timens-0.img").chmod(0o640)
        revive(target, images, "incdump")
        target.quit()


# --- what CRIU writes at a restore ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["library", "command", "held"])
@in_own_namespaces
def test_what_a_restore_writes_is_its_owners_alone(open_root: Path, by: str) -> None:
    """From the first moment, in a directory that all may read, whatever the caller's umask is."""
    images = open_root / "images"
    images.mkdir()
    images.chmod(0o755)
    script = open_root / "look"  # which CRIU calls before it has restored anything, and again at the end
    script.write_text(f"#!/bin/sh\nls -l {images} | grep restore >> {open_root}/seen\n")
    script.chmod(0o700)
    with ContainedTarget(open_root, seed=11) as target:
        checkpoint(target, images)
        os.umask(0)
        options = (*target.restore_options, "--action-script", str(script))
        if by == "held":
            target.restored(anyio.run(_restore_held, images, options, target.pid))
        elif by == "command":
            done = command("restore", "-d", "--json", "-D", images, "--criu", criu_path(), "--", *options)
            target.restored(done.json["pid"])
        else:
            run = partial(incdump.restore, images, criu=str(criu_path()), criu_options=options)
            target.restored(anyio.run(run).pid)
        target.check()
        written = {path.name: path.stat().st_mode & 0o777 for path in images.iterdir() if "restore" in path.name}
        assert written == {"criu-restore.log": 0o600, "stats-restore": 0o600}
        seen = (open_root / "seen").read_text().splitlines()
        assert len(seen) > 1
        assert {line.split()[0] for line in seen} <= {"-rw-------", "drwx------"}
        target.quit()


async def _restore_held(images: Path, options: tuple[str, ...], pid: int) -> int:
    restored = HeldRestore(images, find(str(criu_path())), options, pid)
    try:
        await restored.until_ready()
        return (await restored.go()).pid
    finally:
        await restored.close()
