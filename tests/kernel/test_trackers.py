"""When a tracker's answer may be trusted, and what takes its place when it may not.

Every test ends with the oracle's word on every page (`Chain.prove`): a fallback that is taken too late shows there as a
wrong page.
"""

from __future__ import annotations

import contextlib
import os
import pkgutil
import platform
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest

import incdump
from incdump.engine.watch import Watch
from incdump.errors import InjectionFailed, ParentMismatch, TrackerLost
from incdump.images.mm import decode_mm
from incdump.model.options import DumpOptions
from incdump.model.vmas import VmaFlag
from incdump.proc.identity import is_exiting
from incdump.proc.maps import read_vmas
from tests import huge_pages, oracle
from tests.kernel.support import (
    Chain,
    Odd,
    carry_on,
    kill_holder,
    require_root,
    require_tracker,
    same_when_stopped,
    swap_file,
    until,
    watched_vmas,
)
from tests.targets import build

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]

PAGE = 4096
READERS = ("scan", "cache")
MADV_DONTNEED, MADV_PAGEOUT, MADV_HUGEPAGE, MADV_COLLAPSE = 4, 21, 14, 25


@pytest.fixture(autouse=True)
def _uffd_wp() -> None:
    require_tracker(os.environ.get("INCDUMP_TEST_TRACKER", "uffd-wp"))  # type: ignore[arg-type]


async def rounds(odd: Odd, root: Path, *commands: str, reader: str = "scan") -> Chain:
    """A chain with a pre-dump before each of the commands, and one after the last."""
    chain = Chain(odd, root, DumpOptions(pagemap=reader))  # type: ignore[arg-type]
    await chain.predump()
    for command in commands:
        odd.do(command)
        await chain.predump()
        assert same_when_stopped(odd, chain.last.images_dir).ok
    return chain


def told(chain: Chain) -> str:
    """The last round's warnings, but for the one that soft-dirty has on kernels where it is blind to some moves."""
    return "\n".join(line for line in chain.last.warnings if not line.startswith("tracker soft-dirty:"))


# --- generations -----------------------------------------------------------------------------------------------------


async def test_a_parent_of_another_generation_makes_a_full_dump_and_a_warning(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root)
    first = await chain.predump()
    odd.do(f"poke {address} 32 7")
    await chain.predump(parent=None)
    odd.do(f"poke {address} 16 9")
    late = await chain.predump(parent=os.path.relpath(first.images_dir, chain.root / "x"))
    assert not late.incremental
    assert late.stats.pages_skipped_parent == 0
    assert "all of it is dumped" in told(chain)
    await chain.prove()
    assert chain.last.incremental
    assert not told(chain)


async def test_require_incremental_refuses_a_parent_of_another_generation(odd: Odd, images_root: Path) -> None:
    chain = Chain(odd, images_root)
    first = await chain.predump()
    await chain.predump()
    strict = DumpOptions(require_incremental=True)
    with pytest.raises(TrackerLost) as caught:
        await chain.predump(strict, parent=first.images_dir)
    assert caught.value.pid == odd.pid
    assert len(list(images_root.iterdir())) == 2
    assert (await chain.predump(strict)).incremental  # what was taken for the refused one was given back
    await chain.prove(strict)


async def test_a_lost_holder_makes_a_full_dump_and_a_warning(odd: Odd, images_root: Path) -> None:
    chain = Chain(odd, images_root)
    await chain.predump()
    kill_holder()
    assert watched_vmas(odd.pid) == []
    await chain.predump()
    assert not chain.last.incremental
    assert "all of it is dumped" in told(chain)
    await chain.prove()
    assert chain.last.incremental


async def test_trackers_may_change_along_a_chain(churn: Callable[..., Target], images_root: Path) -> None:
    target = churn(seed=51, threads=2, mib=4, free_run=True, dirty_rate=20000)
    chain = Chain(target, images_root)
    for tracker in ("uffd-wp", "content", "uffd-wp", "uffd-wp", "content", "content"):
        await chain.predump(DumpOptions(tracker=tracker))  # type: ignore[arg-type]
    incremental = [r.incremental for r in chain.rounds]
    assert incremental[:4] == [False, False, False, True]
    assert incremental[5]
    await chain.prove(DumpOptions(tracker="uffd-wp"))
    await chain.prove(DumpOptions(tracker="content"))


async def test_the_content_tracker_is_not_led_astray_by_a_write_protection_beside_it(
    odd: Odd, images_root: Path
) -> None:
    """One chain by content, with another by uffd-wp in between, whose scans reset what the kernel calls written."""
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    by_content = Chain(odd, images_root / "a", DumpOptions(tracker="content", pagemap="scan"))
    by_uffd = Chain(odd, images_root / "b", DumpOptions(tracker="uffd-wp"))
    await by_uffd.predump()
    await by_content.predump()
    odd.do(f"poke {address} 64 5")
    await by_uffd.predump()
    await by_content.predump()
    assert same_when_stopped(odd, by_content.last.images_dir).ok
    await by_content.prove()
    await by_uffd.prove()


# --- the target becomes another ------------------------------------------------------------------------------------


async def test_exec_between_rounds_starts_tracking_anew(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    assert odd.command("exec") == f"ready {odd.pid}"
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 2")
    await chain.predump()
    assert not chain.last.incremental
    assert chain.last.warnings
    assert watched_vmas(odd.pid)
    odd.do(f"poke {address} 3 1")
    await chain.predump()
    assert chain.last.incremental
    assert chain.last.stats.pages_written < 64
    await chain.prove()


async def test_exec_between_rounds_of_a_session_starts_tracking_anew(odd: Odd, images_root: Path) -> None:
    async with incdump.Session(odd.pid) as session:
        chain = Chain(odd, images_root, session=session)
        await chain.predump()
        odd.command("exec")
        await chain.predump()
        assert not chain.last.incremental
        await chain.predump()
        assert chain.last.incremental
        await chain.prove()


async def test_exec_before_a_dump_of_the_frozen_process_is_noticed(odd: Odd, images_root: Path) -> None:
    chain = Chain(odd, images_root)
    await chain.predump()
    odd.command("exec")
    await chain.prove()
    assert not chain.last.incremental
    assert chain.last.warnings


async def test_require_incremental_refuses_after_exec(odd: Odd, images_root: Path) -> None:
    chain = Chain(odd, images_root, DumpOptions(require_incremental=True))
    await chain.predump()
    odd.command("exec")
    for call in (chain.predump, chain.dump):
        with pytest.raises(TrackerLost):
            await call()


async def test_a_parent_of_an_earlier_process_with_the_same_pid_is_refused(odd: Odd, images_root: Path) -> None:
    require_root()
    (child,) = odd.do("fork")
    await incdump.predump(child, images_root / "1")
    odd.do(f"reap {child}")
    assert odd.do(f"forkat {child}") == [child]
    # Two processes of one pid can be told apart when their start times can: 10 ms.
    for call in (incdump.predump, incdump.dump):
        with pytest.raises(ParentMismatch, match="earlier process"):
            await call(child, images_root / "2", parent="../1")
    assert [path.name for path in images_root.iterdir()] == ["1"]
    await incdump.predump(child, images_root / "2")


async def test_a_child_with_the_pid_of_an_earlier_one_is_dumped_whole(odd: Odd, images_root: Path) -> None:
    require_root()
    (child,) = odd.do("fork")
    (address, _) = odd.do("anon 64")
    chain = Chain(odd, images_root)
    await chain.predump()
    odd.do(f"reap {child}")
    odd.do(f"fill {address} 64 2")
    odd.do(f"forkat {child}")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()
    assert chain.last.pids == [odd.pid, child]


async def test_children_come_and_go(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    (one,) = odd.do("fork")
    odd.do(f"poke {address} 64 2")
    await chain.predump()
    assert set(chain.last.pids) == {odd.pid, one}
    (two,) = odd.do("fork")
    odd.do(f"reap {one}")
    await chain.predump()
    assert set(chain.last.pids) == {odd.pid, two}
    assert not told(chain)
    await chain.prove()
    assert not (Path(chain.last.images_dir) / f"pagemap-{one}.img").exists()


@pytest.mark.parametrize("kind", ["pre-dump", "dump"])
async def test_a_child_that_exits_when_it_is_its_turn_is_just_gone(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its parent has not heard of it yet: what is left of it has no address space any more."""
    chain = Chain(odd, images_root, DumpOptions(require_incremental=True))
    (child,) = odd.do("fork")
    await chain.predump()
    begin = Watch.begin

    def die_first(watch: Watch, vmas: Any) -> Any:
        if watch.task.pid == child:
            os.kill(child, signal.SIGKILL)
            until(lambda: is_exiting(child))
        return begin(watch, vmas)

    monkeypatch.setattr(Watch, "begin", die_first)
    await (chain.predump() if kind == "pre-dump" else chain.dump())
    monkeypatch.undo()
    assert chain.last.exited == [child]
    assert chain.last.pids == [odd.pid]
    assert not told(chain)
    odd.do(f"reap {child}")
    await chain.prove()


@pytest.mark.parametrize("reader", READERS)
async def test_processes_that_share_their_memory(odd: Odd, images_root: Path, reader: str) -> None:
    """Two processes, one address space: what one's scan clears must not count as unwritten for the other."""
    (child,) = odd.do("clonevm")
    addresses = [odd.do("anon 32")[0]]
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))  # type: ignore[arg-type]
    for turn in range(4):
        addresses.append(odd.do("anon 32")[0])
        for address in addresses:
            odd.do(f"fill {address} 32 {turn}")
        with oracle.stopped_tree(odd.pid) as pids:
            await chain.predump()
            report = oracle.compare(chain.last.images_dir, pids)
        assert report.ok, report
    await chain.prove()
    assert set(chain.last.pids) == {odd.pid, child}
    odd.do(f"reap {child}")
    await chain.prove()


async def test_a_child_in_vfork(odd: Odd, images_root: Path) -> None:
    chain = Chain(odd, images_root)
    await chain.predump()
    (address, _) = odd.do("anon 32")
    odd.do("vfork")
    (child,) = build.descendants(odd.pid)
    for turn in range(4):
        odd.do(f"fill {address} 32 {turn}")
        await chain.round("dump" if turn == 3 else "predump")
        assert set(chain.last.pids) == {odd.pid, child}
        # The thread that waits for its child does not stop for a SIGSTOP: the oracle must look at the memory as it is.
        actual, _ = oracle.read_memory(odd.pid, np.arange(address, address + 32 * 4096, 4096, dtype=np.uint64))
        images = incdump.ImagesDir(chain.last.images_dir)
        for pid in chain.last.pids:
            assert images.read(pid, address, 32 * 4096) == actual.tobytes()
    os.kill(child, signal.SIGKILL)
    until(lambda: oracle.tree(odd.pid) == {odd.pid: odd.pid})
    await chain.prove()


# --- mappings that are not ours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
async def test_memory_of_the_targets_own_userfaultfd_is_dumped_right_and_left_alone(
    odd: Odd, images_root: Path, reader: str
) -> None:
    """The target tracks its own writes in the same way: neither may disturb the other."""
    (low, _), (own, _), (high, _) = odd.do("anon 16"), odd.do("anon 64"), odd.do("anon 16")
    for address, pages in ((low, 16), (own, 64), (high, 16)):
        odd.do(f"fill {address} {pages} 1")
    odd.do(f"uffd {own} 64")
    assert odd.do(f"written {own} 64") == [64]
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))  # type: ignore[arg-type]
    await chain.predump()
    odd.do(f"poke {own} 5 3")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    assert odd.do(f"written {own} 64") == [5]  # the target's scan resets what a scan of ours would call written
    odd.do(f"poke {own} 7 4")
    assert odd.do(f"written {own} 64") == [7]
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    assert chain.last.stats.pages_untracked > 0 or chain.last.stats.pages_compared > 0
    odd.do(f"poke {own} 9 5")
    await chain.prove()
    assert odd.do(f"written {own} 64") == [9]


async def test_aio_rings_are_dumped_whole(odd: Odd, images_root: Path) -> None:
    odd.do("aio")
    chain = await rounds(odd, images_root, "ping")
    await chain.prove()


@pytest.mark.alone
async def test_hugetlb_memory_is_dumped_whole(odd: Odd, images_root: Path) -> None:
    require_root()
    with huge_pages.exactly(16):  # others may take some
        (address, _) = odd.do("hugetlb 1024")
        odd.do(f"fill {address} 600 1")
        chain = await rounds(odd, images_root, f"poke {address} 3 1", f"poke {address} 300 2")
        assert chain.last.stats.pages_written >= 1024
        await chain.prove()
        odd.do(f"unmap {address} 1024")


# --- writes that nobody sees ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["auto", "content"])
@pytest.mark.parametrize("hidden", [False, True])
async def test_io_uring_fixed_buffers_are_compared_by_content(
    odd: Odd, images_root: Path, tracker: str, hidden: bool
) -> None:
    (address, _), (file,) = odd.do("anon 64"), odd.do("direct 64")
    odd.do(f"fill {address} 64 1")
    odd.do(f"uring {address} 64")
    if hidden:  # the ring is in use, and there is no descriptor of it
        odd.do("hide")
    odd.do(f"close {file}")
    (plain, fd) = odd.do("file 64")
    chain = Chain(odd, images_root, DumpOptions(tracker=tracker))  # type: ignore[arg-type]
    await chain.predump()
    assert ("io_uring" in told(chain)) == (tracker == "auto")
    odd.do(f"fixed {fd} {address} 8")
    with oracle.stopped_tree(odd.pid) as pids:
        await chain.predump()
        assert oracle.compare(chain.last.images_dir, pids).ok
    assert chain.last.incremental
    odd.do(f"fixed {fd} {address} 16")
    await chain.prove()
    assert chain.last.stats.pages_skipped_parent > 0
    assert odd.do(f"peek {plain}") is not None


async def test_an_open_o_direct_file_leaves_the_process_to_content(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    (file,) = odd.do("direct 32")
    odd.do(f"pread {file} {address} 32")
    await chain.predump()
    assert "O_DIRECT" in told(chain)
    assert not chain.last.incremental
    await chain.predump()
    assert chain.last.incremental  # by content
    assert chain.last.stats.pages_compared
    odd.do(f"pread {file} {address + 4096 * 32} 32")
    odd.do(f"close {file}")
    await chain.predump()  # the tracker again: of all this it knows nothing
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()
    assert chain.last.incremental


async def test_a_tracker_that_was_passed_over_for_a_round_is_not_trusted_for_it(odd: Odd, images_root: Path) -> None:
    """uffd-wp, then content because of an open file, then uffd-wp on the *first*: its answer is older than that."""
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root)
    first = await chain.predump()
    (file,) = odd.do("direct 32")
    await chain.predump()
    odd.do(f"pread {file} {address} 32")
    odd.do(f"close {file}")
    await chain.predump(parent=first.images_dir)
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()


# --- pages in unusual states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
async def test_discarded_pages_of_a_private_file_mapping_are_the_files_again(
    odd: Odd, images_root: Path, reader: str
) -> None:
    """Their markers look like pages that are swapped out and were not written: they must not become holes."""
    (address, _) = odd.do("file 64")
    odd.do(f"fill {address} 48 1")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))  # type: ignore[arg-type]
    await chain.predump()
    odd.do(f"advise {address} 32 {MADV_DONTNEED}")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    odd.do(f"read {address} 16")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    odd.do(f"poke {address} 8 1")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()


@pytest.mark.parametrize("reader", READERS)
async def test_memory_that_is_discarded_by_whole_page_tables_is_zero_again(
    odd: Odd, images_root: Path, reader: str
) -> None:
    """Then there is not even an entry to say so; and a mapping that is nearly empty is no work."""
    ((address, _), (vast, _)) = odd.do("anon 4096"), odd.do(f"anon {1 << 17}")
    aligned = (address + (2 << 20) - 1) & -(2 << 20)
    odd.do(f"fill {aligned} 3000 1")
    odd.do(f"fill {vast + (3 << 27)} 700 2")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))  # type: ignore[arg-type]
    await chain.predump()
    odd.do(f"advise {aligned + (2 << 20)} 1024 {MADV_DONTNEED}")
    odd.do(f"advise {vast + (3 << 27)} 600 {MADV_DONTNEED}")
    await chain.predump()
    assert 2000 < chain.last.stats.pages_skipped_parent < 2600
    assert same_when_stopped(odd, chain.last.images_dir).ok
    odd.do(f"poke {aligned + (3 << 20)} 5 3")
    await chain.prove()
    assert chain.last.stats.pages_skipped_parent < 2600


@pytest.mark.parametrize("reader", [*READERS, "plain"])
async def test_the_last_image_of_a_killed_target_has_what_it_held(odd: Odd, images_root: Path, reader: str) -> None:
    """Nothing is marked as clean any more then, which is another scan."""
    (address, _) = odd.do("anon 600")
    odd.do(f"fill {address} 600 1")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))  # type: ignore[arg-type]
    await chain.predump()
    odd.do(f"poke {address} 200 7")
    with open(f"/proc/{odd.pid}/mem", "rb", buffering=0) as memory:
        held = os.pread(memory.fileno(), 600 * PAGE, address)
    await chain.dump(DumpOptions(pagemap=reader, afterwards="killed"))  # type: ignore[arg-type]
    assert odd.process.wait(10) == -signal.SIGKILL
    assert chain.last.stats.pages_skipped_parent >= 400
    assert incdump.ImagesDir(chain.last.images_dir).read(odd.pid, address, 600 * PAGE) == held


@pytest.mark.parametrize("reader", READERS)
async def test_moved_mappings_are_dumped_anew(odd: Odd, images_root: Path, reader: str) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))  # type: ignore[arg-type]
    await chain.predump()
    for turn in range(3):
        odd.do(f"at {address + (1 << 30)} 64 0")  # where it was before, there is something else by the next round
        (moved,) = odd.do(f"move {address} 64")
        odd.do(f"at {address} 64 0")
        odd.do(f"fill {address} 32 {turn + 10}")
        odd.do(f"poke {moved} 5 {turn}")
        await chain.predump()
        assert same_when_stopped(odd, chain.last.images_dir).ok
        odd.do(f"unmap {address} 64")
        odd.do(f"move {moved} 64")
        odd.do(f"at {moved} 64 0")
        odd.do(f"fill {moved} 64 {turn + 20}")
        await chain.predump()
        assert same_when_stopped(odd, chain.last.images_dir).ok
        address = moved
    await chain.prove()


@pytest.mark.parametrize("reader", READERS)
async def test_swapped_out_pages(odd: Odd, images_root: Path, reader: str) -> None:
    require_root()
    (address, _), (file, _) = odd.do("anon 256"), odd.do("file 64")
    odd.do(f"fill {address} 256 1")
    odd.do(f"fill {file} 32 1")
    chain = Chain(odd, images_root / "chain", DumpOptions(pagemap=reader))  # type: ignore[arg-type]
    with swap_file(images_root):
        odd.do(f"advise {address} 128 {MADV_PAGEOUT}")
        odd.do(f"advise {file} 64 {MADV_PAGEOUT}")
        assert swapped(odd.pid) > 100
        await chain.predump()
        odd.do(f"advise {address} 192 {MADV_PAGEOUT}")
        odd.do(f"advise {file} 64 {MADV_PAGEOUT}")
        await chain.predump()
        # By soft-dirty, a page table whose noted pages have all been swapped out is believed in nothing.
        assert chain.last.stats.pages_skipped_parent > (0 if chain.last.tracker == "soft-dirty" else 128)
        odd.do(f"poke {address} 20 3")
        odd.do(f"advise {address} 256 {MADV_PAGEOUT}")
        assert swapped(odd.pid) > 200
        await chain.predump()
        assert same_when_stopped(odd, chain.last.images_dir).ok
        odd.do(f"poke {address} 10 4")
        odd.do(f"advise {address} 64 {MADV_PAGEOUT}")
        await chain.prove()


def swapped(pid: int) -> int:
    """Pages of a process that are in swap."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmSwap:"):
            return int(line.split()[1]) // 4
    return 0


async def test_transparent_huge_pages(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 2048")
    aligned = (address + (2 << 20) - 1) & -(2 << 20)
    odd.do(f"fill {aligned} 512 1")
    odd.do(f"advise {aligned} 1024 {MADV_HUGEPAGE}")
    odd.do(f"advise {aligned} 512 {MADV_COLLAPSE}")
    odd.do(f"fill {aligned + (2 << 20)} 512 2")
    chain = await rounds(odd, images_root, f"poke {aligned} 1 1", f"poke {aligned + (2 << 20)} 3 1")
    assert chain.last.stats.pages_written < 100
    odd.do(f"advise {aligned + (2 << 20)} 256 {MADV_DONTNEED}")
    await chain.prove()


@pytest.mark.parametrize("action", ["errno", "kill"])
async def test_a_target_that_may_not_call_userfaultfd_is_tracked_or_compared(
    odd: Odd, images_root: Path, action: str
) -> None:
    """Its filter is suspended for the one call where that is allowed; else its pages are compared."""
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    odd.do(f"seccomp {action}")
    chain = await rounds(odd, images_root, f"poke {address} 3 1", f"poke {address} 5 1")
    assert watched_vmas(odd.pid) or "cannot be tracked" in told(chain)
    assert chain.last.incremental
    assert chain.last.stats.pages_written < 64
    await chain.prove()
    odd.do("ping")


async def test_a_target_that_cannot_be_made_to_call_userfaultfd_is_compared_by_content(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> NoReturn:
        raise InjectionFailed("refused on purpose", pid=odd.pid)

    monkeypatch.setattr("incdump.holder.client.HolderKeeper.acquire", refuse)
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = await rounds(odd, images_root, f"poke {address} 3 1", f"poke {address} 5 1")
    assert "cannot be tracked" in told(chain)
    assert chain.last.incremental
    assert chain.last.stats.pages_compared > 0
    assert chain.last.stats.pages_written < 64
    await chain.prove()
    assert watched_vmas(odd.pid) == []


async def test_a_stopped_target_is_dumped_and_stays_stopped(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    os.kill(odd.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, odd.pid, os.WSTOPPED | os.WNOWAIT)
    chain = Chain(odd, images_root)
    await chain.predump()
    await chain.predump()
    assert chain.last.incremental
    await chain.dump()
    await incdump.check_against(chain.last.images_dir, odd.pid)
    until(lambda: oracle.states(odd.pid) == {"T"})  # on its way back there when its tracer lets go
    carry_on([odd.pid])
    odd.do("ping")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit programs are tested on x86_64")
async def test_a_32_bit_target_gets_no_userfaultfd_and_is_compared_by_content(
    tmp_path: Path, images_root: Path
) -> None:
    binary, source = tmp_path / "plain32", Path(__file__).with_name("victims") / "plain32.c"
    alone = ("-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-stack-protector", "-fno-pic", "-no-pie")
    subprocess.run([build.compiler(), *alone, "-o", binary, source], check=True, capture_output=True)
    with subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        last = await incdump.predump(child.pid, images_root / "1")
        for turn in (2, 3):
            for byte in b"\x01\x05":
                os.write(child.stdin.fileno(), bytes([byte + turn]))
                assert child.stdout.readline() == b"ok\n"
            last = await incdump.predump(child.pid, images_root / str(turn), parent=last.images_dir)
            assert any("32-bit" in line and "compared by content" in line for line in last.warnings)
        assert last.incremental
        assert 2 <= last.stats.pages_written < 40 < last.stats.pages_skipped_parent
        stopped = DumpOptions(afterwards="stopped")
        last = await incdump.dump(child.pid, images_root / "4", parent=last.images_dir, options=stopped)
        report = oracle.compare(last.images_dir, oracle.tree(child.pid))
        child.kill()
    assert report.ok, report
    assert report.compared > 64


# --- what changes between one step of a round and the next ----------------------------------------------------------


class Between:
    """Has the target do something at the very moment when a step of a round has just ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> None:
        module, _, attribute = name.rpartition(".")
        owner = pkgutil.resolve_name(module.replace(".Watch", ":Watch").replace(".ProcessDump", ":ProcessDump"))
        step = getattr(owner, attribute)
        self.times = 0

        def then(*args: Any, **options: Any) -> Any:
            result = step(*args, **options)
            self.times += 1
            if self.times == 1:
                act()
            return result

        monkeypatch.setattr(owner, attribute, then)


CHANGES = {
    "grows": ("grow {a} 64 96", "fill {end} 32 5"),
    "is unmapped": ("unmap {a} 32",),
    "is replaced": ("at {a} 32 0", "fill {a} 32 6"),
    "is replaced by droppable memory": ("at {a} 32 1", "fill {a} 32 6"),
    "is replaced by shared memory": ("unmap {a} 64", "shared 64"),
    "is split": ("prot {a} 16 1", "unmap {mid} 8"),
    "is dropped and written": ("advise {a} 64 4", "fill {a} 20 7"),
    "moves": ("move {a} 64", "at {a} 64 0", "fill {a} 9 8"),
    "is written": ("poke {a} 64 9",),
    "calls fork": ("fork", "poke {a} 8 9"),
    "opens a file with O_DIRECT": ("direct 4",),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "step",
    [
        "engine.watch.Watch.open",
        "engine.watch.Watch.begin",
        "tracking.ledger.Ledger.record",  # what was written is cleared, what is absent not yet looked at
        "engine.process.ProcessDump.classify",
    ],
)
async def test_memory_that_changes_during_a_round_is_right_by_the_next(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch, step: str, change: str, reader: str
) -> None:
    (address, _) = odd.do("anon 96")
    odd.do(f"unmap {address + 64 * PAGE} 32")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root, DumpOptions(pagemap=reader))  # type: ignore[arg-type]
    await chain.predump()
    odd.do(f"poke {address} 48 2")
    places = {"a": address, "mid": address + 24 * PAGE, "end": address + 64 * PAGE}
    with monkeypatch.context() as patch:
        between = Between(patch, f"incdump.{step}", lambda: [odd.do(text.format(**places)) for text in CHANGES[change]])
        await chain.predump()
        assert between.times or (step.startswith("tracking") and chain.last.tracker != "uffd-wp")
    incdump.check(chain.last.images_dir)
    await chain.predump()
    report = same_when_stopped(odd, chain.last.images_dir)
    assert report.ok, report
    await chain.prove()


@pytest.mark.parametrize("change", CHANGES)
async def test_mappings_that_change_just_before_the_freeze_are_dumped_as_they_are_then(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Their flags were read before it."""
    (address, _) = odd.do("anon 96")
    odd.do(f"unmap {address + 64 * PAGE} 32")
    odd.do(f"fill {address} 64 1")
    odd.do(f"advise {address} 64 {MADV_HUGEPAGE}")
    chain = Chain(odd, images_root)
    await chain.predump()
    places = {"a": address, "mid": address + 24 * PAGE, "end": address + 64 * PAGE}

    def act() -> None:
        for text in CHANGES[change]:
            odd.do(text.format(**places))

    with monkeypatch.context() as patch:
        between = Between(patch, "incdump.engine.process.ProcessDump.make_room", act)
        await chain.prove()
        assert between.times
    images = Path(chain.last.images_dir)
    vmas = read_vmas(odd.pid, flags=True)
    entry = decode_mm((images / f"mm-{odd.pid}.img").read_bytes(), images)
    advised = {vma.start: vma.madv & 1 << MADV_HUGEPAGE for vma in entry.vmas}
    expected = (vmas.flags & np.uint64(VmaFlag.HUGEPAGE)) != 0
    if change != "moves":  # then a mapping is another one by now, which looks the same in maps
        assert [bool(advised.get(start)) for start in vmas.start.tolist()] == expected.tolist()
    await chain.prove()


@pytest.mark.parametrize("reader", READERS)
async def test_exec_during_a_round_is_right_by_the_next(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    for step in ("open", "begin"):
        chain = Chain(odd, images_root / step, DumpOptions(pagemap=reader))  # type: ignore[arg-type]
        await chain.predump()
        with monkeypatch.context() as patch:
            Between(patch, f"incdump.engine.watch.Watch.{step}", lambda: odd.command("exec"))
            with contextlib.suppress(incdump.TargetError):
                await chain.predump()
        await chain.predump()
        assert same_when_stopped(odd, chain.last.images_dir).ok
        await chain.prove()


async def test_pages_that_vanish_before_they_are_read_are_counted(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root)
    Between(
        monkeypatch, "incdump.engine.process.ProcessDump.classify", lambda: odd.do(f"unmap {address + 8 * PAGE} 16")
    )
    await chain.predump()
    assert chain.last.stats.pages_vanished == 16
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()


async def test_a_mapping_that_goes_before_the_scan_does_not_pass_for_pages_that_the_parent_lacks(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan by exception says nothing of it, as of pages that were not written."""
    (sparse, _) = odd.do("anon 4096")
    odd.do(f"fill {sparse} 3 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    Between(monkeypatch, "incdump.engine.watch.Watch.begin", lambda: odd.do(f"unmap {sparse} 4096"))
    await chain.predump()
    assert chain.last.incremental
    assert chain.last.stats.pages_vanished == 0
    await chain.prove()
