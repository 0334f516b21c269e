"""Complete checkpoints on this kernel, restored by the real CRIU: the target finds all of its memory as it was."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest

import incdump
from incdump.criu import program
from incdump.criu.leash import LeashedCriu
from incdump.engine.checkpoint import CheckpointRun
from incdump.tracking.uffd_wp import UffdWpRound
from tests import oracle
from tests.command import incdump as command
from tests.command import is_untouched, run_python
from tests.criu.criu import criu_path, restorable_churn, revive
from tests.criu.namespaces import in_own_namespaces
from tests.kernel.support import of_forced_tracker as forced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump._uapi.seccomp import Notification
    from incdump.model.options import Afterwards, WayName
    from incdump.model.vmas import VmaTable
    from tests.criu.criu import RestorableTarget

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]

PRIVATE_OPS = "all,-guard,-hugetlb,-sysv,-memfd,-shared,-zombie"
"""Segments have other numbers in CRIU's images than the oracle looks for."""


def predump(target: RestorableTarget, images: Path, parent: str | None = None) -> incdump.DumpResult:
    return anyio.run(partial(incdump.predump, target.pid, images, parent=parent, options=forced(incdump.DumpOptions())))


def checkpoint(
    target: RestorableTarget,
    images: Path,
    parent: str | None = None,
    afterwards: Afterwards = "killed",
    criu: Path | None = None,
    criu_options: tuple[str, ...] = (),
    way: WayName = "auto",
) -> incdump.DumpResult:
    # One is to have another on top of it.
    track_for = None if afterwards == "killed" else 3600
    options = forced(incdump.DumpOptions(afterwards=afterwards, track_for=track_for))
    call = partial(incdump.checkpoint, target.pid, images, parent=parent, options=options, way=way)
    return anyio.run(partial(call, criu=str(criu or criu_path()), criu_options=criu_options))


def prove_next(target: RestorableTarget, images: Path, parent: str) -> None:
    """The next dump on the chain is right, page by page, and the target finds all of its memory as it was."""
    with oracle.stopped_tree(target.pid) as pids:
        result = anyio.run(partial(incdump.dump, target.pid, images, parent=parent))
        report = oracle.compare(images, pids)
    assert report.ok, report
    assert result.incremental
    target.check()


WAYS: list[WayName] = ["leash", "preload", "lazy-pages"]


@pytest.mark.parametrize("way", WAYS)
@in_own_namespaces
def test_a_chain_that_ends_in_a_checkpoint_is_restored(images_root: Path, way: WayName) -> None:
    with restorable_churn(images_root, seed=7, threads=3, processes=2) as target:
        predump(target, images_root / "1")
        for n in (2, 3):
            target.step(200)
            predump(target, images_root / str(n), f"../{n - 1}")
        target.step(200)
        result = checkpoint(target, images_root / "4", "../3", way=way)
        assert result.incremental
        assert result.checkpoint is not None
        assert result.checkpoint.way == way
        assert result.stats.pages_skipped_parent > 0
        assert result.stats.frozen_time > 0
        incdump.check(images_root / "4")
        revive(target, images_root / "4")
        target.step(100)
        target.quit()


@in_own_namespaces
def test_a_checkpoint_that_leaves_the_tree_running_is_a_parent_like_any_other(images_root: Path) -> None:
    with restorable_churn(images_root, seed=8, threads=2, processes=2, ops=PRIVATE_OPS) as target:
        checkpoint(target, images_root / "1", afterwards="running")
        target.step(100)
        assert predump(target, images_root / "2", "../1").incremental
        target.step(100)
        result = checkpoint(target, images_root / "3", "../2", afterwards="running")
        assert result.incremental
        target.step(50)
        prove_next(target, images_root / "4", "../3")
        target.quit()


@in_own_namespaces
def test_criu_looks_for_pages_once_a_process_however_many_mappings_there_are(images_root: Path) -> None:
    """Each time costs a tenth of a millisecond of the stop."""
    looked: list[int | None] = []
    left_to_us = LeashedCriu._left_to_us

    def count(self: LeashedCriu, notification: Notification) -> int | None:
        looked.append(left_to_us(self, notification))
        return looked[-1]

    with (
        pytest.MonkeyPatch.context() as patch,
        restorable_churn(images_root, seed=9, threads=2, processes=2) as target,
    ):
        patch.setattr(LeashedCriu, "_left_to_us", count)
        result = checkpoint(target, images_root / "1", afterwards="running", way="leash")
        assert sum(pid is not None for pid in looked) == len(result.pids) < len(maps(target.pid))
        target.quit()


def is_crius(images: Path, finding: oracle.Finding, pids: dict[int, int]) -> bool:
    """Whether a difference came about after the copy, by CRIU, and does no harm.

    It has system calls run by the process, and puts back the code that it changed for that: the page is the process's
    own then, and the same as the file's. And when threads go on to where SIGSTOP holds them, the kernel notes their
    processor in their rseq area, 32 bytes.
    """
    pid = pids[finding.pid]
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        actual = np.frombuffer(os.pread(memory.fileno(), oracle.PAGE, finding.vaddr), np.uint8)
    if finding.kind == "missing":
        vma = next(vma for vma in oracle.read_vmas(pid) if vma.start <= finding.vaddr < vma.end)
        offset = int(next(line for line in maps(pid) if line.startswith(f"{vma.start:x}-")).split()[2], 16)
        content = Path(vma.name).read_bytes()[offset + finding.vaddr - vma.start :][: oracle.PAGE]
        return "x" in vma.perms and actual.tobytes() == content.ljust(oracle.PAGE, b"\0")
    if finding.kind != "wrong":
        return False
    held = np.frombuffer(incdump.ImagesDir(images).read(finding.pid, finding.vaddr, oracle.PAGE), np.uint8)
    return len(set((np.flatnonzero(held != actual) // 32).tolist())) == 1


def maps(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/maps").read_text().splitlines()


@pytest.mark.parametrize("way", WAYS)
@in_own_namespaces
def test_every_page_of_a_checkpoint_is_the_stopped_targets(images_root: Path, way: WayName) -> None:
    with restorable_churn(images_root, seed=9, threads=3, processes=2, ops=PRIVATE_OPS) as target:
        predump(target, images_root / "1")
        for n in range(2, 6):
            target.step(100)
            checkpoint(target, images_root / str(n), f"../{n - 1}", afterwards="stopped", way=way)
            pids = oracle.tree(target.pid)
            monkey_shown, oracle.SHOWN = oracle.SHOWN, 10_000
            report = oracle.compare(images_root / str(n), pids)
            oracle.SHOWN = monkey_shown
            wrong = [finding for finding in report.findings if not is_crius(images_root / str(n), finding, pids)]
            for pid in pids.values():
                os.kill(pid, signal.SIGCONT)
            assert not wrong, [str(finding) for finding in wrong]
            assert report.from_parents
            target.check()
        target.quit()


@in_own_namespaces
def test_a_restored_tree_starts_a_second_generation(images_root: Path) -> None:
    with restorable_churn(images_root, seed=10, threads=2) as target:
        checkpoint(target, images_root / "1")
        revive(target, images_root / "1")
        target.step(100)
        again = predump(target, images_root / "2", "../1")
        assert not again.incremental
        assert again.warnings
        target.step(100)
        assert checkpoint(target, images_root / "3", "../2").incremental
        revive(target, images_root / "3")
        target.quit()


# --- where CRIU cannot be held on a leash -----------------------------------------------------------------------------


FILTERED = Path(__file__).with_name("filtered.py")


@in_own_namespaces
def test_while_criu_looks_at_mappings_none_begin_to_be_watched(images_root: Path) -> None:
    """CRIU looks at them before it scans, in several reads: one that merges with its neighbour could come twice."""
    events: list[tuple[str, int | None]] = []
    register, look = UffdWpRound.register, LeashedCriu._left_to_us

    def slow_register(self: UffdWpRound, vmas: VmaTable) -> NDArray[np.bool_]:
        time.sleep(0.2)
        watched = register(self, vmas)
        events.append(("watched", self._pid))
        return watched

    def noted_look(self: LeashedCriu, notification: Notification) -> int | None:
        pid = look(self, notification)
        events.append(("scanned", pid))
        return pid

    with restorable_churn(images_root, seed=21, processes=3, ops=PRIVATE_OPS) as target:
        predump(target, images_root / "1")
        target.step(50)
        children = set(oracle.tree(target.pid).values()) - {target.pid}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UffdWpRound, "register", slow_register)
            patch.setattr(LeashedCriu, "_left_to_us", noted_look)
            checkpoint(target, images_root / "2", "../1", way="leash")
        assert events.index(("scanned", target.pid)) < min(events.index(("watched", pid)) for pid in children)
        for pid in children:
            assert events.index(("watched", pid)) < events.index(("scanned", pid))
        revive(target, images_root / "2")
        target.quit()


@in_own_namespaces
def test_where_somebody_listens_to_system_calls_already_criu_is_held_otherwise(images_root: Path) -> None:
    with restorable_churn(images_root, seed=16, threads=2, processes=2) as target:
        predump(target, images_root / "1")
        target.step(50)
        incdump_checkpoint = ["-m", "incdump", "checkpoint", "-t", target.pid, "--json", "--criu", criu_path()]
        listened_to = [FILTERED, "listener", sys.executable, *incdump_checkpoint, "--prev-images-dir", "../1"]
        done = run_python(*listened_to, "-D", images_root / "none", "--way", "leash")
        assert done.code == 7
        assert "leash" in done.error
        assert not (images_root / "none").exists()
        done = run_python(*listened_to, "-D", images_root / "2")
        assert done.code == 0, done
        assert done.json["incremental"]
        assert done.json["checkpoint"]["way"] == "preload"
        assert "busy" in done.json["checkpoint"]["why"]
        assert done.json["frozen_time"] > 0
        revive(target, images_root / "2")
        target.quit()


@in_own_namespaces
def test_a_criu_that_does_not_scan_makes_a_lazy_dump(images_root: Path) -> None:
    # Where /run is a tmpfs, CRIU notes there what the kernel can do: one that may scan has been here.
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
    wrapped = images_root / "criu"
    wrapped.write_text(f'#!/bin/sh\nexec {sys.executable} {FILTERED} no-scan {criu_path()} "$@"\n')
    wrapped.chmod(0o700)
    with restorable_churn(images_root, seed=17, threads=2, processes=2) as target:
        predump(target, images_root / "1")
        target.step(50)
        with pytest.raises(incdump.CriuError, match="PAGEMAP_SCAN"):
            checkpoint(target, images_root / "none", "../1", criu=wrapped, way="preload")
        assert is_untouched(target.pid)
        result = checkpoint(target, images_root / "2", "../1", criu=wrapped)
        assert result.incremental
        assert result.checkpoint is not None
        assert result.checkpoint.way == "lazy-pages"
        assert any("PAGEMAP_SCAN" in warning for warning in result.warnings)
        revive(target, images_root / "2")
        target.quit()


# --- the commands -----------------------------------------------------------------------------------------------------


@in_own_namespaces
def test_the_commands(images_root: Path) -> None:
    criu, lasting = ("--criu", str(criu_path())), ("--leave-running", "--track-for", "1h")
    with restorable_churn(images_root, seed=11) as target:
        pid = str(target.pid)
        done = command("checkpoint", "-t", pid, "-D", images_root / "1", *lasting, *criu)
        assert done.code == 0, done
        assert "CRIU 4" in done.out
        target.step(50)
        done = command("checkpoint", "-t", pid, "-D", images_root / "2", "--prev-images-dir", "../1", *criu, "--json")
        assert done.code == 0, done
        assert done.json["incremental"]
        assert done.json["checkpoint"]["memory"] > 0
        assert done.json["frozen_time"] > 0
        target.reap()
        done = command("restore", "-D", images_root / "2", "-d", "--pidfile", images_root / "pid", *criu, "--json")
        assert done.code == 0, done
        assert done.json["pid"] == target.pid == int((images_root / "pid").read_text())
        assert done.json["restore_time"] > 0
        target.check()
        target.quit()


@in_own_namespaces
def test_what_cannot_be_restored_is_refused_before_criu_starts(images_root: Path) -> None:
    criu = ("--criu", str(criu_path()))
    with restorable_churn(images_root, seed=12) as target:
        predump(target, images_root / "1")
        done = command("restore", "-D", images_root / "1", "-d", *criu)
        assert done.code == 4
        assert "memory of process" in done.err
        checkpoint(target, images_root / "2", "../1", afterwards="running")
        next((images_root / "1").glob("pages-*.img")).unlink()
        done = command("restore", "-D", images_root / "2", "-d", *criu)
        assert done.code == 4, done
        assert not (images_root / "2" / "criu-restore.log").exists()
        target.quit()


# --- when something goes wrong ----------------------------------------------------------------------------------------


@in_own_namespaces
def test_without_a_usable_criu_nothing_happens_to_the_target(images_root: Path) -> None:
    with restorable_churn(images_root, seed=13, ops=PRIVATE_OPS) as target:
        predump(target, images_root / "1")
        target.step(50)
        for name, says, said in (
            ("none", None, "no program"),
            ("old", "Version: 3.17.1", "3.17.1: 4.1 or later"),
            ("other", "hello", "no CRIU"),
        ):
            path = images_root / name
            if says is not None:
                path.write_text(f"#!/bin/sh\necho {says}\n")
                path.chmod(0o700)
            with pytest.raises(incdump.CriuError, match=said):
                checkpoint(target, images_root / "2", "../1", criu=path)
            assert not (images_root / "2").exists()
        prove_next(target, images_root / "2", "../1")
        target.quit()


@in_own_namespaces
def test_crius_own_reason_is_told_and_the_tree_runs_on(images_root: Path) -> None:
    with restorable_churn(images_root, seed=14, ops=PRIVATE_OPS) as target:
        predump(target, images_root / "1")
        target.step(50)
        with pytest.raises(incdump.CriuError, match="CRIU") as caught:
            checkpoint(target, images_root / "2", "../1", criu_options=("--action-script", "/bin/false"))
        assert "script" in str(caught.value).lower()
        assert not (images_root / "2").exists()
        prove_next(target, images_root / "2", "../1")
        target.quit()


@pytest.mark.parametrize("room", ["24k", "64k", "6m"])
@pytest.mark.parametrize("way", WAYS)
@in_own_namespaces
def test_when_the_disk_is_full_the_tree_runs_on(images_root: Path, way: WayName, room: str) -> None:
    """CRIU's log does not fit, or its images, or incdump's."""
    small = images_root / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", small], check=True)
    with restorable_churn(images_root, seed=18, threads=2, ops=PRIVATE_OPS) as target:
        predump(target, images_root / "1")
        target.step(400)
        with pytest.raises((incdump.CriuError, incdump.ImagesIOError), match=r"(?i)space|write"):
            checkpoint(target, small / "2", str(images_root / "1"), way=way)
        assert not list(small.rglob("inventory.img"))
        assert not any(oracle.states(pid) & set("tT") for pid in oracle.tree(target.pid).values())
        prove_next(target, images_root / "2", "../1")
        target.quit()


@pytest.mark.parametrize("way", WAYS)
@in_own_namespaces
def test_a_criu_that_is_killed_and_leaves_a_process_behind_is_not_waited_for(images_root: Path, way: WayName) -> None:
    """As CRIU's own do that it has stopped for a moment, early on: they keep its filter in use."""
    wrapped = images_root / "criu"
    wrapped.write_text(f'#!/bin/sh\nif [ "$1" = dump ]; then sleep 40 & kill -KILL $$; fi\nexec {criu_path()} "$@"\n')
    wrapped.chmod(0o700)
    with restorable_churn(images_root, seed=20, ops=PRIVATE_OPS) as target:
        predump(target, images_root / "1")
        target.step(50)
        began = time.monotonic()
        with pytest.raises(incdump.CriuError, match="killed by signal 9"):
            checkpoint(target, images_root / "2", "../1", criu=wrapped, way=way)
        assert time.monotonic() - began < 30
        prove_next(target, images_root / "2", "../1")
        target.quit()


@in_own_namespaces
def test_a_criu_that_is_killed_while_it_waits_for_the_watch_to_begin_is_noticed(images_root: Path) -> None:
    register, look = UffdWpRound.register, LeashedCriu._left_to_us
    held: list[tuple[LeashedCriu, int]] = []

    def kill_criu(self: UffdWpRound, vmas: VmaTable) -> NDArray[np.bool_]:
        while held:
            criu, pid = held.pop()
            assert not criu._may_go_on.is_set()
            os.kill(pid, signal.SIGKILL)
        return register(self, vmas)

    def note_criu(self: LeashedCriu, notification: Notification) -> int | None:
        pid = look(self, notification)
        if pid is not None:
            held.append((self, notification.pid))
        return pid

    with restorable_churn(images_root, seed=22, processes=2, ops=PRIVATE_OPS) as target:
        predump(target, images_root / "1")
        target.step(50)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UffdWpRound, "register", kill_criu)
            patch.setattr(LeashedCriu, "_left_to_us", note_criu)
            with pytest.raises(incdump.CriuError, match="killed by signal 9"):
                checkpoint(target, images_root / "2", "../1", way="leash")
        assert not (images_root / "2").exists()
        prove_next(target, images_root / "2", "../1")
        target.quit()


def until_criu_has_ended(images: Path) -> None:
    """An incdump that was killed leaves a CRIU that finds out, and gives up."""
    deadline = time.monotonic() + 60
    while any(str(images / "criu-unfinished") in words for words in command_lines()):
        assert time.monotonic() < deadline, "CRIU goes on"
        time.sleep(0.005)


def command_lines() -> Iterator[list[str]]:
    return (command_line(int(name)) for name in os.listdir("/proc") if name.isdigit())


def command_line(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


@pytest.mark.parametrize("way", WAYS)
@in_own_namespaces
def test_when_memory_runs_out_criu_is_not_the_first_to_go(images_root: Path, way: WayName) -> None:
    """Seen by another number, one that everybody may set. What is restored does not inherit it."""
    seen: list[str] = []
    put_in_place = CheckpointRun._put_in_place

    def look(self: CheckpointRun, *arguments: Any) -> None:
        words = {int(name): command_line(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        crius = [pid for pid in words if any("criu-unfinished" in word for word in words[pid])]
        seen.extend(Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in crius)
        put_in_place(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, restorable_churn(images_root, seed=19, threads=2) as target:
        before = Path(f"/proc/{target.pid}/oom_score_adj").read_text()
        assert before != "300\n"
        patch.setattr(program, "_SPARED", "300")
        patch.setattr(CheckpointRun, "_put_in_place", look)
        checkpoint(target, images_root / "1", way=way)
        assert seen == ["300\n"]
        revive(target, images_root / "1")
        assert Path(f"/proc/{target.pid}/oom_score_adj").read_text() == before
        target.quit()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("victim", ["incdump", "criu at the gate", "script"])
@in_own_namespaces
def test_whoever_is_killed_the_tree_runs_on_and_the_next_dump_is_right(
    images_root: Path, victim: str, way: WayName
) -> None:
    rng = random.Random(victim)
    with restorable_churn(images_root, seed=15, threads=3, processes=2, ops=PRIVATE_OPS) as target:
        last, killed = "0", 0
        predump(target, images_root / last)
        for n in range(1, 13):
            target.step(30)
            images = images_root / f"{n}-killed"
            arguments = ["checkpoint", "-t", str(target.pid), "-D", str(images), "--prev-images-dir", f"../{last}"]
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "incdump",
                    *arguments,
                    "--leave-running",
                    "--way",
                    way,
                    "--criu",
                    str(criu_path()),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            killed += kill(process, victim, rng.random())
            process.wait(60)
            until_criu_has_ended(images)
            assert not any(oracle.states(pid) & set("tT") for pid in oracle.tree(target.pid).values())
            target.check()
            if (images / "inventory.img").exists():
                incdump.check(images)
            with oracle.stopped_tree(target.pid) as pids:
                anyio.run(partial(incdump.dump, target.pid, images_root / f"{n}-next", parent=f"../{last}"))
                report = oracle.compare(images_root / f"{n}-next", pids)
            assert report.ok, report
            last = f"{n}-whole"
            predump(target, images_root / last)
        assert killed >= 10
        target.quit()


def kill(process: subprocess.Popen[bytes], victim: str, moment: float) -> bool:
    """Kill one of those at work; False when it has not turned up."""
    if victim == "incdump":
        time.sleep(0.15 + 0.35 * moment)
        process.kill()
        return True
    while process.poll() is None:
        at_work = {pid: words for pid in oracle.tree(process.pid).values() if (words := command_line(pid))}
        if any("flock" in words[0] for words in at_work.values()):
            name = "flock" if victim == "script" else "criu"
            for pid, words in at_work.items():
                if any(os.path.basename(word) == name for word in words[:4]):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        return True
        time.sleep(0.001)
    return False
