"""Pages that processes share copy-on-write stay shared, whatever is dumped: a dump must not make its target grow.

process_vm_readv(2) would copy each such page for the target (`incdump.proc.sharing`).
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import incdump
from incdump.model.runs import PAGE_SIZE, run
from incdump.proc import sharing
from incdump.proc.memory import ProcessMemory
from incdump.proc.sharing import may_share_pages, sharing_address_space
from incdump.proc.tree import process_tree
from tests import huge_pages
from tests.kernel.support import Chain, Odd, require_root
from tests.targets.build import cat

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]

MERGEABLE = 12  # madvise(2): let KSM look at it


def mapped_once(pid: int, address: int, pages: int) -> int:
    """How many of these pages are present and mapped by nobody else (bit 56 of pagemap entries)."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        entries = np.frombuffer(os.pread(file.fileno(), 8 * pages, address // PAGE_SIZE * 8), np.uint64)
    return int(((entries >> np.uint64(63) != 0) & (entries >> np.uint64(56) & np.uint64(1) != 0)).sum())


@pytest.mark.parametrize("kind", ["predump", "dump"])
@pytest.mark.parametrize("tracker", ["uffd-wp", "content"])
async def test_a_forked_childs_pages_stay_shared(odd: Odd, images_root: Path, kind: str, tracker: str) -> None:
    (address, _) = odd.do("anon 3000")
    odd.do(f"fill {address} 3000 1")
    (child,) = odd.do("fork")
    odd.do(f"poke {address} 7 3")
    odd.do(f"poke {address + 1000 * PAGE_SIZE} 1 3")
    assert [mapped_once(pid, address, 3000) for pid in (odd.pid, child)] == [8, 8]
    chain = Chain(odd, images_root, incdump.DumpOptions(tracker=tracker))  # type: ignore[arg-type]
    for _ in range(2):
        await chain.round(kind)
    assert [mapped_once(pid, address, 3000) for pid in (odd.pid, child)] == [8, 8]
    await chain.prove(check=False)


async def test_pages_shared_with_a_process_outside_the_tree_stay_shared(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 1000")
    odd.do(f"fill {address} 1000 1")
    (child,) = odd.do("fork")
    await incdump.dump(child, images_root / "child")
    assert mapped_once(odd.pid, address, 1000) == 0


@pytest.mark.alone
async def test_a_child_does_not_lose_its_huge_page_to_a_dump_of_its_parent(odd: Odd, images_root: Path) -> None:
    """The pool is empty: a copy for one of them would have to be taken from the other."""
    require_root()
    with huge_pages.exactly(1):
        (address, _) = odd.do("hugetlb 512")
        odd.do(f"fill {address} 512 1")
        (child,) = odd.do("fork")
        chain = Chain(odd, images_root)
        for kind in ("predump", "dump"):
            await chain.round(kind)
            with open(f"/proc/{child}/mem", "rb", buffering=0) as memory:
                held = [os.pread(memory.fileno(), PAGE_SIZE, address + n * PAGE_SIZE) for n in (0, 511)]
            assert mapped_once(child, address, 512) == 0
            assert all(any(page) for page in held)
        await chain.prove(check=False)
        odd.do(f"unmap {address} 512")


@contextmanager
def merging() -> Iterator[None]:
    """Have KSM at work, for as long as the context lasts; skip the test where there is none."""
    ksm = Path("/sys/kernel/mm/ksm")
    if not ksm.exists() or os.geteuid():
        pytest.skip("needs a kernel with KSM, and root")
    before = {name: (ksm / name).read_text() for name in ("run", "pages_to_scan", "sleep_millisecs")}
    try:
        for name, value in (("pages_to_scan", "100000"), ("sleep_millisecs", "1"), ("run", "1")):
            (ksm / name).write_text(value)
        yield
    finally:
        for name, value in before.items():
            (ksm / name).write_text(value)


async def test_pages_that_ksm_has_merged_stay_merged(odd: Odd, images_root: Path) -> None:
    merged = Path(f"/proc/{odd.pid}/ksm_merging_pages")
    with merging():
        (address, _) = odd.do("anon 600")
        odd.do(f"poke {address} 600 9")  # all alike
        odd.do(f"advise {address} 600 {MERGEABLE}")
        deadline = time.monotonic() + 90
        while int(merged.read_text()) < 500:
            assert time.monotonic() < deadline, merged.read_text()
            time.sleep(0.05)
        Path("/sys/kernel/mm/ksm/run").write_text("0")
        before = mapped_once(odd.pid, address, 600)
        chain = Chain(odd, images_root)
        await chain.predump()
        await chain.dump(parent=None)
        assert mapped_once(odd.pid, address, 600) == before
        await chain.prove(check=False)


async def test_who_may_share_pages(odd: Odd) -> None:
    def pids() -> set[int]:
        return may_share_pages(process_tree(odd.pid))

    assert pids() == set()
    (child,) = odd.do("fork")
    assert pids() == {odd.pid, child}
    assert may_share_pages(process_tree(child)) == {child}
    os.kill(child, 9)
    odd.do(f"reap {child}")
    assert pids() == set()


async def test_who_runs_in_whose_memory(odd: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the one is not the other's parent; and one that exits meanwhile hides nothing of the others."""
    (forked,), (one,), (other,) = odd.do("fork"), odd.do("clonevm"), odd.do("clonevm")

    def gone(_pid: int, _other: int, what: int) -> int:
        raise ProcessLookupError(what)

    with cat() as stranger:
        for _ in range(2):
            for pids, found in (
                ((odd.pid, forked, one, stranger.pid, other), {one: odd.pid, other: odd.pid}),
                ((stranger.pid, other, forked, one), {one: other}),
                ((forked, odd.pid, stranger.pid), {}),
                ((), {}),
            ):
                assert sharing_address_space(pids) == found
            monkeypatch.setattr(sharing, "order", gone)


async def test_shared_and_other_pages_of_one_run_are_read_alike(odd: Odd) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    (child,) = odd.do("fork")
    for page in (0, 5, 6, 63):
        odd.do(f"poke {address + page * PAGE_SIZE} 1 {page + 1}")
    whole = run(address, address + 64 * PAGE_SIZE)
    for pid in (odd.pid, child):
        buffers = []
        for may_share in (True, False):
            buffer = np.empty(64 * PAGE_SIZE, np.uint8)
            with ProcessMemory(pid, may_share=may_share) as memory:
                assert not len(memory.read_into(buffer, whole))
            buffers.append(buffer)
        assert (buffers[0] == buffers[1]).all()
