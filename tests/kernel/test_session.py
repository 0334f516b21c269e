"""`incdump.Session`: a chain inside one program, which keeps the tracking itself."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump.errors import BrokenChain, HolderError
from incdump.freeze.seize import Freezer
from incdump.images.pagemap import decode_pagemap, encode_pagemap
from incdump.model.options import DumpOptions
from incdump.model.runs import present_entries
from tests.kernel.support import (
    Chain,
    Odd,
    assert_untouched,
    holder_pid,
    open_fds,
    require_tracker,
    tracked_pids,
    watched_vmas,
)

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]


@pytest.fixture(autouse=True)
def _uffd_wp() -> None:
    require_tracker("uffd-wp")


async def test_a_session_keeps_the_tracking_itself_and_gives_it_up_at_its_end(odd: Odd, images_root: Path) -> None:
    before = holder_pid(), tracked_pids()
    descriptors = sorted(open_fds(odd.pid))
    async with incdump.Session(odd.pid) as session:
        await session.predump(images_root / "1")
        await session.predump(images_root / "2")
        assert watched_vmas(odd.pid)
        assert "anon_inode:[userfaultfd]" in open_fds()
        assert odd.pid not in tracked_pids()
    assert watched_vmas(odd.pid) == []
    assert "anon_inode:[userfaultfd]" not in open_fds()
    assert sorted(open_fds(odd.pid)) == descriptors
    assert before == (holder_pid(), tracked_pids())


async def test_the_parent_is_the_sessions_last_dump_unless_told_otherwise(odd: Odd, images_root: Path) -> None:
    async with incdump.Session(odd.pid) as session:
        first = await session.predump(images_root / "1")
        second = await session.dump(images_root / "2")
        third = await session.predump(images_root / "deep" / "3")
        full = await session.predump(images_root / "4", parent=None)
        with pytest.raises(incdump.ImagesError):
            await session.predump(images_root / "5", parent="../nowhere")
        after = await session.predump(images_root / "6")
        given = await session.predump(images_root / "7", parent="../6")
    assert first.parent is None
    assert full.parent is None
    assert [r.parent for r in (second, third, after, given)] == [
        str(images_root / "1"), str(images_root / "2"), str(images_root / "4"), str(images_root / "6")
    ]  # fmt: skip
    assert os.readlink(images_root / "deep" / "3" / "parent") == "../../2"
    assert all(r.incremental for r in (second, third, after, given))
    assert session.rounds == [first, second, third, full, after, given]


async def test_two_dumps_of_a_session_at_once_are_refused(odd: Odd, images_root: Path) -> None:
    async with incdump.Session(odd.pid) as session:
        one = asyncio.ensure_future(session.predump(images_root / "1"))
        await asyncio.sleep(0)
        with pytest.raises(HolderError, match="under way"):
            await session.predump(images_root / "2")
        await one
        assert not (images_root / "2").exists()
        assert (await session.predump(images_root / "2")).incremental


async def test_a_closed_session_dumps_no_more(odd: Odd, images_root: Path) -> None:
    session = incdump.Session(odd.pid)
    await session.predump(images_root / "1")
    session.close()
    with pytest.raises(HolderError, match="closed"):
        await session.predump(images_root / "2")
    session.close()
    assert "closed" in repr(session)


async def test_a_session_that_is_closed_while_it_dumps(odd: Odd, images_root: Path) -> None:
    session = incdump.Session(odd.pid)
    await session.predump(images_root / "1")
    under_way = asyncio.ensure_future(session.predump(images_root / "2"))
    await asyncio.sleep(0.001)
    session.close()
    try:
        await under_way
    except incdump.IncdumpError:
        assert not (images_root / "2").exists()
    assert watched_vmas(odd.pid) == []
    assert "anon_inode:[userfaultfd]" not in open_fds()


async def test_one_session_after_another(odd: Odd, images_root: Path) -> None:
    """The second knows nothing of what the first has tracked."""
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    async with incdump.Session(odd.pid) as session:
        await session.predump(images_root / "1")
    odd.do(f"poke {address} 64 2")
    async with incdump.Session(odd.pid) as session:
        chain = Chain(odd, images_root / "chain", session=session)
        result = await session.predump(images_root / "2", parent="../1")
        assert not result.incremental
        assert result.warnings
        chain.rounds.append(result)
        await chain.prove()


async def test_a_session_beside_the_holder_compares_by_content(odd: Odd, images_root: Path) -> None:
    """Only one userfaultfd can watch a mapping: who comes second falls back, and both are right."""
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    by_holder = Chain(odd, images_root / "a")
    await by_holder.predump()
    async with incdump.Session(odd.pid) as session:
        second = Chain(odd, images_root / "b", session=session)
        await second.predump()
        assert second.last.stats.pages_untracked >= 64
        for n in range(3):
            odd.do(f"poke {address} 8 {n}")
            await by_holder.predump()
            odd.do(f"poke {address} 4 {n + 99}")
            await second.predump()
        assert second.last.stats.pages_compared > 0
        await by_holder.prove()
        await second.prove()
    await by_holder.prove()


async def test_a_session_holds_no_descriptors_of_children_that_have_exited(odd: Odd, images_root: Path) -> None:
    async with incdump.Session(odd.pid) as session:
        await session.predump(images_root / "0")
        before = len(open_fds())
        for n in range(1, 13):
            (child,) = odd.do("fork")
            await session.predump(images_root / str(n))
            odd.do(f"reap {child}")
        await session.predump(images_root / "last")
        assert len(open_fds()) <= before + 2


async def test_options_of_one_dump_stand_in_for_the_sessions(odd: Odd, images_root: Path) -> None:
    async with incdump.Session(odd.pid, DumpOptions(pagemap="cache", writers=1)) as session:
        assert (await session.predump(images_root / "1")).pagemap == "cache"
        result = await session.dump(images_root / "2", options=DumpOptions(pagemap="plain", afterwards="killed"))
        assert result.pagemap == "plain"
    assert odd.process.wait(10) == -9


async def test_sessions_of_several_targets_at_once(churn: Callable[..., Target], images_root: Path) -> None:
    targets = [churn(seed=80 + n, threads=2, mib=4, free_run=True, dirty_rate=5000) for n in range(3)]

    async def whole_chain(n: int, target: Target) -> None:
        async with incdump.Session(target.pid) as session:
            chain = Chain(target, images_root / str(n), session=session)
            for _ in range(5):
                await chain.predump()
            await chain.dump()
            await chain.prove()
            assert all(r.incremental for r in chain.rounds[1:])

    async with asyncio.TaskGroup() as tasks:
        for n, target in enumerate(targets):
            tasks.create_task(whole_chain(n, target))
    for target in targets:
        target.quit()


async def test_a_dump_reads_the_one_before_it_and_no_older_ones(
    churn: Callable[..., Target], images_root: Path, pagemap_reads: Counter[str]
) -> None:
    """By the oracle, too, such a chain is right, long as it is."""
    target = churn(seed=47, threads=2, processes=2, mib=4, free_run=True)
    async with incdump.Session(target.pid) as session:
        chain = Chain(target, images_root, session=session)
        for n in range(24):
            await (chain.dump() if n % 10 == 9 else chain.predump())
        assert pagemap_reads == {
            result.images_dir: len(list(Path(result.images_dir).glob("pagemap-*.img"))) for result in chain.rounds[:-1]
        }
        await chain.prove()
        assert len(incdump.check(chain.last.images_dir).levels) == len(chain.rounds)
        await chain.predump()
        await chain.prove()
    target.quit()


async def grown(chain: Chain, number: int) -> None:
    """So many rounds, each with a tenth of the pages."""
    for n in range(number):
        chain.target.dirty(10, seed=n)
        await chain.predump()


def leave_nothing_to_the_parent(images_dir: str, pid: int) -> tuple[Path, bytes]:
    """Take the holes out of a pagemap; returns its path, and what was in it."""
    path = Path(images_dir) / f"pagemap-{pid}.img"
    before = path.read_bytes()
    pages_id, entries = decode_pagemap(before, path)
    path.write_bytes(encode_pagemap(pages_id, present_entries(entries)))
    return path, before


async def test_an_older_parent_that_somebody_changed_is_noticed(
    rewriter: Callable[..., Target], images_root: Path, pagemap_reads: Counter[str]
) -> None:
    target = rewriter(mib=8)
    async with incdump.Session(target.pid) as session:
        chain = Chain(target, images_root, session=session)
        await grown(chain, 5)
        path, before = leave_nothing_to_the_parent(chain.rounds[1].images_dir, target.pid)
        for _ in range(2):
            with pytest.raises(BrokenChain, match=f"lacks the page at .* of {path.name}"):
                await chain.predump()
        assert_untouched(target)
        path.write_bytes(before)
        pagemap_reads.clear()
        await chain.predump()
        assert chain.last.incremental
        assert pagemap_reads == {result.images_dir: 1 for result in chain.rounds[:-1]}
        await chain.prove(check=False)


async def test_of_a_last_parent_that_somebody_changed_counts_what_it_has_now(
    rewriter: Callable[..., Target], images_root: Path
) -> None:
    target = rewriter(mib=8)
    async with incdump.Session(target.pid) as session:
        chain = Chain(target, images_root, session=session)
        await grown(chain, 5)
        kept = chain.last.stats.pages_written
        leave_nothing_to_the_parent(chain.last.images_dir, target.pid)
        await chain.predump()
        assert chain.last.stats.pages_skipped_parent <= kept < chain.last.stats.pages_written
        await chain.prove(check=False)


async def test_a_parent_that_is_gone_is_missed(rewriter: Callable[..., Target], images_root: Path) -> None:
    target = rewriter(mib=1)
    async with incdump.Session(target.pid) as session:
        chain = Chain(target, images_root, session=session)
        await grown(chain, 4)
        shutil.rmtree(chain.rounds[0].images_dir)
        with pytest.raises(BrokenChain, match="is no images dir"):
            await chain.predump()
        await chain.predump(parent=None)
        await chain.prove(check=False)


@pytest.mark.parametrize("afterwards", ["run", "leave-running", "", None])
async def test_a_misspelt_word_for_afterwards_harms_nobody(odd: Odd, images_root: Path, afterwards: str | None) -> None:
    """Neither as an option nor where the tree is let go, where every other word once meant SIGKILL."""
    async with incdump.Session(odd.pid) as session:
        with pytest.raises(incdump.InvalidOption, match="afterwards"):
            await session.dump(images_root / "1", options=DumpOptions(afterwards=afterwards))  # type: ignore[arg-type]
    async with Freezer() as freezer:
        await freezer.freeze(odd.pid)
        with pytest.raises(incdump.InvalidOption, match="afterwards"):
            await freezer.thaw(afterwards)  # type: ignore[arg-type]
    assert not (images_root / "1").exists()
    assert_untouched(odd)
