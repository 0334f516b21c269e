"""Checkpoints of processes that are confined, and what others may see of a checkpoint."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump.criu import gate
from incdump.proc import confinement
from incdump.proc.tree import process_tree
from tests.command import incdump as command
from tests.command import is_untouched
from tests.criu.criu import criu_path, restorable_churn, revive, until
from tests.criu.namespaces import in_own_namespaces
from tests.criu.test_checkpoint import FILTERED, PRIVATE_OPS, checkpoint, predump

if TYPE_CHECKING:
    from collections.abc import Iterator

    from incdump.model.options import WayName
    from tests.criu.criu import RestorableTarget

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]


def under_a_filter(root: Path, seed: int) -> RestorableTarget:
    """A target with a seccomp filter, as containers have."""
    return restorable_churn(root, seed=seed, ops=PRIVATE_OPS, under=(sys.executable, FILTERED, "no-scan"))


@in_own_namespaces
def test_a_process_under_a_seccomp_filter_is_checkpointed_in_another_way(images_root: Path) -> None:
    with under_a_filter(images_root, 41) as target:
        predump(target, images_root / "1")
        target.step(50)
        with pytest.raises(incdump.CriuError, match=f"process {target.pid} has a seccomp filter"):
            checkpoint(target, images_root / "2", "../1", way="leash")
        assert is_untouched(target.pid)
        assert not (images_root / "2").exists()
        result = checkpoint(target, images_root / "2", "../1")
        assert result.incremental
        assert result.checkpoint is not None
        assert result.checkpoint.way == "preload"
        assert "has a seccomp filter" in result.checkpoint.why
        assert not result.warnings
        revive(target, images_root / "2")
        assert confinement.filtered(process_tree(target.pid)) == target.pid
        target.quit()


@in_own_namespaces
def test_a_filter_that_appears_after_the_look_leads_to_the_other_way_too(images_root: Path) -> None:
    with under_a_filter(images_root, 42) as target, pytest.MonkeyPatch.context() as patch:
        patch.setattr("incdump.engine.checkpoint.filtered", lambda _: None)
        result = checkpoint(target, images_root / "1")
        assert result.checkpoint is not None
        assert result.checkpoint.way == "preload"
        revive(target, images_root / "1")
        target.quit()


@in_own_namespaces
def test_precopy_takes_a_way_and_finds_one(images_root: Path) -> None:
    with under_a_filter(images_root, 43) as target:
        policy = incdump.PrecopyPolicy(downtime=10.0, final="checkpoint")
        loop = partial(incdump.precopy, target.pid, policy=policy, criu=str(criu_path()))
        with pytest.raises(incdump.CriuError, match="has a seccomp filter"):
            anyio.run(partial(loop, images_root / "leash", way="leash"))
        assert is_untouched(target.pid)
        options = ("--downtime", "10s", "--final", "checkpoint", "-R", "--json", "--criu", criu_path())
        done = command("precopy", "-t", target.pid, "-D", images_root / "rounds", *options)
        assert done.code == 0, done
        assert '"way": "preload"' in done.out
        target.check()
        target.quit()


def test_a_criu_that_is_missing_is_found_out_before_the_rounds(images_root: Path) -> None:
    done = command("precopy", "-t", os.getppid(), "-D", images_root / "1", "--final", "checkpoint", "--criu", "/none")
    assert done.code in (3, 7), done  # whoever runs the tests may be our ancestor
    target = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        options = ("--final", "checkpoint", "--criu", "/none")
        done = command("precopy", "-t", target.pid, "-D", images_root / "1", *options)
        assert done.code == 7, done
        assert not (images_root / "1" / "1").exists()
    finally:
        target.kill()
        target.wait()


# --- frozen cgroups ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_cgroup(kind: str, controller: str) -> Iterator[Path]:
    """A cgroup of a hierarchy that is mounted for the test alone."""
    place = Path(tempfile.mkdtemp(prefix="incdump-cgroup-"))
    options = [] if kind == "cgroup2" else ["-o", controller]
    mounted = subprocess.run(["mount", "-t", kind, *options, "none", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        place.rmdir()
        pytest.skip(f"no {kind} with a freezer can be mounted on this x86_64 or aarch64 machine: {mounted.stderr}")
    group = place / place.name  # others' tests see the hierarchy, too
    group.mkdir()
    try:
        yield group
    finally:
        for _ in range(500):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.01)
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


@pytest.mark.parametrize(
    ("kind", "file", "freeze", "thaw"),
    [("cgroup2", "cgroup.freeze", "1", "0"), ("cgroup", "freezer.state", "FROZEN", "THAWED")],
)
@in_own_namespaces
def test_a_tree_in_a_frozen_cgroup_is_refused_and_lives_on(
    images_root: Path, kind: str, file: str, freeze: str, thaw: str
) -> None:
    with own_cgroup(kind, "freezer") as group, restorable_churn(images_root, seed=44, ops=PRIVATE_OPS) as target:
        (group / "cgroup.procs").write_text(str(target.pid))
        assert confinement.frozen_cgroup(target.pid) is None
        (group / file).write_text(freeze)
        try:
            deadline = time.monotonic() + 10
            while Path(confinement.frozen_cgroup(target.pid) or "/").name != group.name:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            done = command("checkpoint", "-t", target.pid, "-D", images_root / "1", "--criu", criu_path())
            assert done.code == 3, done
            assert f"{group.name}, where CRIU can have nothing run" in done.error
            assert not (images_root / "1").exists()
        finally:
            (group / file).write_text(thaw)
        target.step(20)
        checkpoint(target, images_root / "2", afterwards="running")
        target.check()
        target.quit()


def criu_of(pid: int) -> int:
    """The CRIU that traces a process; 0: none does."""
    status = Path(f"/proc/{pid}/status").read_text()
    tracer = int(status.partition("TracerPid:\t")[2].split()[0])
    with contextlib.suppress(OSError):
        return tracer if b"--action-script" in Path(f"/proc/{tracer}/cmdline").read_bytes() else 0
    return 0


async def checkpoint_frozen(target: RestorableTarget, images: Path, way: WayName, *, cancel: bool) -> int:
    """A checkpoint in a cgroup that is frozen. It fails.

    :param cancel: while CRIU waits; else its time runs out.
    :returns: the CRIU that it leaves.
    """
    options = incdump.DumpOptions(afterwards="killed", freeze_timeout=60 if cancel else 1)

    async def stop_when_it_waits() -> None:
        while not criu_of(target.pid):
            await anyio.sleep(0.02)
        await anyio.sleep(0.5)  # it has nothing to do then
        tasks.cancel_scope.cancel()

    error: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            if cancel:
                tasks.start_soon(stop_when_it_waits)
            await incdump.checkpoint(target.pid, images, options=options, criu=str(criu_path()), way=way)
    except BaseExceptionGroup as group:
        error = group.exceptions[0]
    assert isinstance(error, incdump.CriuError), error
    assert "do not kill it, thaw the tree" in str(error)
    assert error.pid == target.pid
    left = criu_of(target.pid)
    assert f"(process {left})" in str(error)
    return left


@pytest.mark.parametrize("cancel", [False, True], ids=["out of time", "cancelled"])
@pytest.mark.parametrize("way", ["leash", "preload", "lazy-pages"])
@in_own_namespaces
def test_a_tree_that_is_frozen_after_the_look_outlives_criu(images_root: Path, way: WayName, cancel: bool) -> None:
    """CRIU waits for its first call in a process; to end it then would be that process's end, by SIGTRAP."""
    with (
        own_cgroup("cgroup2", "freezer") as group,
        restorable_churn(images_root, seed=48, ops=PRIVATE_OPS) as target,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("incdump.engine.checkpoint.frozen_cgroup", lambda _: None)
        (group / "cgroup.procs").write_text(str(target.pid))
        (group / "cgroup.freeze").write_text("1")
        try:
            left = anyio.run(partial(checkpoint_frozen, target, images_root / "1", way, cancel=cancel))
        finally:
            (group / "cgroup.freeze").write_text("0")
        assert not (images_root / "1").exists()
        until(lambda: is_untouched(target.pid), 60)
        until(lambda: b"--action-script" not in _command_line(left), 60)
        target.step(20)
        target.check()
        target.quit()


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


# --- files, scripts, logs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["leash", "preload", "lazy-pages"])
@in_own_namespaces
def test_a_checkpoint_is_its_owners_alone_from_the_first_moment(images_root: Path, way: WayName) -> None:
    """In a directory that was there before, and that all may enter."""
    place = images_root / "open"
    place.mkdir(0o755)
    place.chmod(0o755)
    modes: dict[str, int] = {}

    def look(self: gate.Gate, *, may_pass: bool) -> None:
        for path in place.rglob("*"):
            if path.is_file():
                modes[path.name] = path.stat().st_mode & 0o077
        leave(self, may_pass=may_pass)

    leave = gate.Gate.open
    os.umask(0o022)
    with restorable_churn(images_root, seed=45, ops=PRIVATE_OPS) as target, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.Gate, "open", look)
        checkpoint(target, place, way=way)
        assert f"core-{target.pid}.img" in modes
        assert {name: mode for name, mode in modes.items() if mode} == {}
        assert [path.name for path in place.iterdir() if path.stat().st_mode & 0o077 and not path.is_symlink()] == []
        before = modes.clear()
        assert before is None
        revive(target, place)
        assert "Umask:\t0022" in Path(f"/proc/{target.pid}/status").read_text()
        target.quit()


@in_own_namespaces
def test_the_users_script_finds_a_complete_images_dir(images_root: Path) -> None:
    """It copies it, and the copy is restored. The script's name is relative to the images dir, as CRIU takes it."""
    script = images_root / "copy"
    script.write_text(
        '#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\n'
        f'cp -a "$CRTOOLS_IMAGE_DIR" {images_root}/copied\n'
    )
    script.chmod(0o700)
    with restorable_churn(images_root, seed=46, ops=PRIVATE_OPS) as target:
        checkpoint(target, images_root / "1", criu_options=("--action-script", "../copy"))
        incdump.check(images_root / "copied")
        revive(target, images_root / "copied")
        target.quit()


@in_own_namespaces
def test_a_users_script_is_found_however_it_is_given(images_root: Path) -> None:
    """Shortened, as CRIU takes it; in a configuration file it would see images without memory, and is refused."""
    script, config = images_root / "copy", images_root / "config"
    script.write_text(
        '#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\n'
        f'cp -a "$CRTOOLS_IMAGE_DIR" {images_root}/copied\n'
    )
    script.chmod(0o700)
    config.write_text(f"# of ours\naction-script {script}\n")
    with restorable_churn(images_root, seed=48, ops=PRIVATE_OPS) as target:
        with pytest.raises(incdump.CriuError, match=f"{config} has an action script"):
            checkpoint(target, images_root / "0", criu_options=("--config", str(config)))
        assert is_untouched(target.pid)
        assert not (images_root / "copied").exists()
        checkpoint(target, images_root / "1", criu_options=(f"--ac={script}",))
        incdump.check(images_root / "copied")
        revive(target, images_root / "copied")
        target.quit()


@in_own_namespaces
def test_what_criu_refuses_is_quoted_and_its_log_is_kept(images_root: Path) -> None:
    with restorable_churn(images_root, seed=47, ops=PRIVATE_OPS) as target:
        with pytest.raises(incdump.CriuError, match=r"unrecognized option.*--magic"):
            checkpoint(target, images_root / "1", criu_options=("--magic",))
        failing = images_root / "failing"
        failing.write_text("#!/bin/sh\nfalse\n")
        failing.chmod(0o700)
        with pytest.raises(incdump.CriuError, match="its log is kept in ") as raised:
            checkpoint(target, images_root / "1", criu_options=("--action-script", str(failing)))
        kept = Path(str(raised.value).rpartition("its log is kept in ")[2])
        assert "pre-dump" in kept.read_text() or "script" in kept.read_text()
        assert "RLIMIT_NOFILE" not in str(raised.value)
        assert "; hint: an action script that was given after `--` failed" in str(raised.value)
        kept.unlink()
        assert is_untouched(target.pid)
        target.check()
        target.quit()
