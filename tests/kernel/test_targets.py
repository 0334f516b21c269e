"""The targets themselves: right when left alone, and able to notice when they are not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import oracle
from tests.targets import build
from tests.targets.build import BadTargetError, Target

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("seed", range(3))
def test_churn_finds_itself_good_when_stepped(churn: Callable[..., Target], seed: int) -> None:
    target = churn(seed=seed, threads=4, processes=3)
    for turn in range(1, 6):
        assert target.step(100) == turn * 100
        target.check()
    target.quit()


def test_churn_finds_itself_good_when_it_runs_free(churn: Callable[..., Target]) -> None:
    target = churn(seed=5, threads=4, processes=3, free_run=True)
    for _ in range(3):
        target.check()
    target.stop()
    target.check()
    target.quit()


def test_churn_does_all_of_its_operations(churn: Callable[..., Target]) -> None:
    target = churn(seed=2, threads=2, processes=2, mib=32)
    target.step(1500)
    stats = target.stats()
    assert set(build.ALL_OPS) <= set(stats)
    needs_the_kernel = {"hugetlb", "guard", "droppable"}
    assert [name for name in build.ALL_OPS if not stats[name] and name not in needs_the_kernel] == []


@pytest.mark.parametrize("op", [*build.ALL_OPS])
def test_each_operation_works_alone(churn: Callable[..., Target], op: str) -> None:
    target = churn(seed=4, mib=4, ops=["write", op])
    target.step(60)
    target.check()


def test_operations_can_be_left_out(churn: Callable[..., Target]) -> None:
    target = churn(ops="all,-fork,-exec")
    target.step(200)
    stats = target.stats()
    assert stats["fork"] == stats["exec"] == 0
    assert stats["write"] > 0


def test_the_same_seed_does_the_same(churn: Callable[..., Target]) -> None:
    counts = []
    for _ in range(2):
        target = churn(seed=9, threads=2, ops="write,kwrite,zero,map,dontneed,protect,stack")
        target.step(300)
        counts.append(target.stats())
    assert counts[0] == counts[1]


def test_churn_survives_being_stopped_and_continued(churn: Callable[..., Target]) -> None:
    target = churn(seed=6, threads=4, processes=3, free_run=True)
    for _ in range(20):
        with oracle.stopped_tree(target.pid) as pids:
            assert len(pids) >= 3
    target.check()
    target.quit()


def test_churn_notices_one_changed_byte(churn: Callable[..., Target]) -> None:
    target = churn(seed=3)
    target.step(50)
    target.check()
    address = target.where()
    with open(f"/proc/{target.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address + 1234)
        byte = memory.read(1)
        memory.seek(address + 1234)
        memory.write(bytes([byte[0] ^ 0x10]))
    with pytest.raises(BadTargetError, match=f"bad page {address:#x}"):
        target.check()
    assert target.process.wait(10) == 99
    assert f"bad page {address:#x}" in target.errors()


def test_churn_notices_a_change_in_another_process(churn: Callable[..., Target]) -> None:
    target = churn(seed=3, threads=1, processes=2, mib=4, ops="write")
    target.step(20)
    (other,) = build.descendants(target.pid)
    changed = 0
    with open(f"/proc/{other}/mem", "r+b", buffering=0) as memory:
        for vma in oracle.read_vmas(other):
            # Its areas have no name, no more has much else: whatever of its own it trips over, it must say so.
            if vma.perms == "rw-p" and not vma.name:
                for address in oracle.required_pages(other, vma):
                    memory.seek(int(address) + 3000)
                    content = memory.read(1)
                    memory.seek(int(address) + 3000)
                    memory.write(bytes([content[0] ^ 0x10]))
                    changed += 1
    assert changed
    with pytest.raises(BadTargetError, match=r"bad|ended"):
        target.check()


def test_closing_a_target_ends_its_whole_tree() -> None:
    target = build.churn(seed=8, threads=3, processes=3, free_run=True)
    pids = target.tree()
    directory = target.directory
    target.close()
    assert len(pids) >= 3
    assert not directory.exists()
    for pid in pids:
        try:
            assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            continue


def test_a_target_that_was_killed_says_so(churn: Callable[..., Target]) -> None:
    target = churn()
    os.kill(target.pid, signal.SIGKILL)
    with pytest.raises(BadTargetError, match="ended with -9"):
        target.check()
    assert not target.alive()


def test_rewriter_rewrites_exactly_the_share_it_is_told(rewriter: Callable[..., Target]) -> None:
    target = rewriter(mib=4, vmas=20, vma_kib=40)
    big = 1024 * 4096
    sizes = [v.end - v.start for v in oracle.read_vmas(target.pid) if v.perms == "rw-p" and not v.name]
    assert sizes.count(40960) == 20

    def contents() -> list[bytes]:
        pages = []
        for vma in oracle.read_vmas(target.pid):
            if vma.perms == "rw-p" and not vma.name and vma.end - vma.start in (big, 40960):
                data, good = oracle.read_memory(target.pid, oracle.required_pages(target.pid, vma))
                assert good.all()
                pages += [bytes(page) for page in data]
        return pages

    before = contents()
    assert target.dirty(10, seed=7) == round((1024 + 200) * 0.1)
    after = contents()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 122


def test_rewriter_writes_at_a_rate(rewriter: Callable[..., Target]) -> None:
    target = rewriter(mib=1, rate=20000)
    while int(target.command("written").removeprefix("ok ")) < 100:
        pass
    assert target.command("rate 0") == "ok"
    written = target.command("written")
    assert target.command("written") == written
