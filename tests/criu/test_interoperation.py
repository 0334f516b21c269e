"""Chains that incdump and the real CRIU make together, each going on where the other has ended."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest

import incdump
from tests import oracle
from tests.criu.criu import CHAINABLE_OPS, criu, dump, page_server, restorable_churn, revive
from tests.criu.namespaces import in_own_namespaces
from tests.kernel.support import require_tracker

if TYPE_CHECKING:
    from pathlib import Path

    from tests.criu.criu import RestorableTarget

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]

OPTIONS = incdump.DumpOptions(tracker="soft-dirty")
"""The one tracker that both understand."""


def predump(target: RestorableTarget, images: Path, parent: str | None = None) -> incdump.DumpResult:
    return anyio.run(partial(incdump.predump, target.pid, images, parent=parent, options=OPTIONS))


def criu_ends_the_chain(target: RestorableTarget, images: Path, parent: str) -> None:
    """CRIU dumps incrementally on top of the parent, the chain holds, and is restored as the target was."""
    dump(target.pid, images, "--track-mem", "--prev-images-dir", parent)
    stats = incdump.ImagesDir(images).stats()
    assert stats is not None
    assert stats.pages_skipped_parent > 0
    incdump.check(images)
    revive(target, images)
    target.quit()


@in_own_namespaces
def test_criu_dumps_on_top_of_incdumps_pre_dumps(images_root: Path) -> None:
    require_tracker("soft-dirty")
    with restorable_churn(images_root, seed=31, threads=2, ops=CHAINABLE_OPS) as target:
        predump(target, images_root / "1")
        target.step(100)
        predump(target, images_root / "2", "../1")
        target.step(100)
        criu_ends_the_chain(target, images_root / "3", "../2")


@in_own_namespaces
def test_incdump_goes_on_from_crius_pre_dumps_and_criu_from_incdumps(images_root: Path) -> None:
    require_tracker("soft-dirty")
    with restorable_churn(images_root, seed=32, threads=2, ops=CHAINABLE_OPS) as target:
        criu("pre-dump", images_root / "1", "--tree", str(target.pid))
        target.step(50)
        criu("pre-dump", images_root / "2", "--tree", str(target.pid), "--prev-images-dir", "../1")
        target.step(50)
        result = predump(target, images_root / "3", "../2")
        assert result.incremental
        assert result.stats.pages_skipped_parent > 0
        target.step(50)
        criu_ends_the_chain(target, images_root / "4", "../3")


def blocks(images: Path) -> int:
    """What the pages images take on disk."""
    return sum(path.stat().st_blocks for path in images.glob("pages-*.img"))


@in_own_namespaces
def test_criu_dumps_to_its_page_server_which_dedups_incdumps_images(images_root: Path) -> None:
    require_tracker("soft-dirty")
    source, served = images_root / "source", images_root / "2"
    with restorable_churn(images_root, seed=34, threads=2, ops=CHAINABLE_OPS) as target:
        predump(target, images_root / "1")
        target.step(100)
        before = blocks(images_root / "1")
        with page_server(served, "--prev-images-dir", "../1", "--auto-dedup") as port:
            to_server = ("--page-server", "--address", "127.0.0.1", "--port", str(port))
            dump(target.pid, source, "--track-mem", "--prev-images-dir", "../1", *to_server)
        assert blocks(images_root / "1") < before
        for image in source.glob("*.img"):
            image.rename(served / image.name)
        incdump.check(served)
        revive(target, served)
        target.quit()


@in_own_namespaces
def test_criu_dedups_incdumps_images_as_it_dumps(images_root: Path) -> None:
    require_tracker("soft-dirty")
    with restorable_churn(images_root, seed=35, threads=2, ops=CHAINABLE_OPS) as target:
        predump(target, images_root / "1")
        target.step(100)
        before = blocks(images_root / "1")
        dump(target.pid, images_root / "2", "--track-mem", "--prev-images-dir", "../1", "--auto-dedup")
        assert blocks(images_root / "1") < before
        incdump.check(images_root / "2")
        revive(target, images_root / "2")
        target.quit()


@in_own_namespaces
def test_incdump_checks_and_reads_a_dump_that_criu_made(images_root: Path) -> None:
    images = images_root / "1"
    with restorable_churn(images_root, seed=33, threads=2, processes=2) as target:
        target.step(200)
        dump(target.pid, images, "--leave-stopped")
        report = incdump.check(images)
        assert len(report.levels) == 1
        read = incdump.ImagesDir(images)
        pids = oracle.tree(target.pid)
        assert set(read.pids()) == set(pids)
        for vpid, pid in pids.items():
            compared = 0
            entries = read.pagemap(vpid)
            assert entries is not None
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                for vaddr, pages, _ in entries.tolist():
                    held = np.frombuffer(read.read(vpid, vaddr, pages * oracle.PAGE), np.uint8)
                    actual = np.frombuffer(os.pread(memory.fileno(), pages * oracle.PAGE, vaddr), np.uint8)
                    # The kernel notes each thread's processor in its 32 bytes of rseq area on the way to its stop.
                    assert len(set((np.flatnonzero(held != actual) // 32).tolist())) <= 4
                    compared += pages
            assert compared > 100
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
        target.check()
        target.quit()
