"""Whole chains on a busy, self-checking tree: whatever it does, every page of the last dump is right.

Each seed is a chain: five pre-dumps or more (with a dump among them now and then), a dump that leaves the tree stopped,
the oracle's verdict on every page, and on it goes. ``INCDUMP_SOAK_SECONDS`` makes `test_soak` as long as one likes, and
``--long`` ten times as long; the seed of a chain that fails is in its message, ``--seed`` starts with it.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump import kerndat
from incdump.model.options import DumpOptions
from tests import oracle
from tests.kernel.support import Chain, require_tracker, rest, same_when_stopped
from tests.targets import build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from incdump.model.options import PagemapName, TrackerName
    from tests.targets.build import Target

pytestmark = pytest.mark.kernel

TRACKERS: tuple[TrackerName, ...] = ("uffd-wp", "soft-dirty", "content")
READERS: tuple[PagemapName, ...] = ("scan", "cache", "plain")


def require_reader(reader: PagemapName) -> None:
    """Skip the test, by name, where a pagemap reader does not work."""
    if reader == "scan" and not kerndat.pagemap_scan().works:
        pytest.skip(f"pagemap reader scan does not work here: {kerndat.pagemap_scan().why}")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.asyncio
async def test_a_chain_on_a_busy_tree_is_exact(
    churn: Callable[..., Target], images_root: Path, tracker: TrackerName, reader: PagemapName
) -> None:
    require_tracker(tracker)
    require_reader(reader)
    target = churn(seed=READERS.index(reader) + 11, threads=3, processes=2, mib=8, free_run=True, dirty_rate=20000)
    chain = Chain(target, images_root, DumpOptions(tracker=tracker, pagemap=reader))
    for _ in range(5):
        await chain.predump()
    report = await chain.prove()
    assert report.from_parents
    assert {r.tracker for r in chain.rounds} == {tracker}
    assert {r.pagemap for r in chain.rounds} == {reader}
    assert all(r.incremental for r in chain.rounds[1:])
    target.quit()


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.asyncio
async def test_a_dump_is_a_parent_like_any_other(
    churn: Callable[..., Target], images_root: Path, tracker: TrackerName
) -> None:
    require_tracker(tracker)
    target = churn(seed=21, threads=2, processes=2, mib=8, free_run=True)
    chain = Chain(target, images_root, DumpOptions(tracker=tracker))
    await chain.dump()
    await chain.predump()
    await chain.dump()
    await chain.prove()
    for _ in range(2):
        await chain.predump()
    report = await chain.prove()
    assert report.from_parents
    assert all(r.incremental for r in chain.rounds[1:])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.asyncio
async def test_each_pre_dump_of_a_resting_tree_is_exact_by_itself(
    churn: Callable[..., Target], images_root: Path, reader: PagemapName
) -> None:
    """At rest is what SIGSTOP has stopped: a target that has said "ok" still has threads on their way to sleep."""
    require_reader(reader)
    target = churn(seed=31, threads=2, processes=2, mib=4)
    chain = Chain(target, images_root, DumpOptions(pagemap=reader))
    for _ in range(6):
        target.step(25)
        with oracle.stopped_tree(target.pid) as pids:
            await chain.predump()
            report = oracle.compare(chain.last.images_dir, pids)
        assert report.ok, report
    assert report.from_parents
    report = await chain.prove()
    assert chain.last.stats.pages_skipped_parent > chain.last.stats.pages_written


@pytest.mark.asyncio
async def test_nothing_is_written_twice_when_nothing_was_written(
    rewriter: Callable[..., Target], images_root: Path
) -> None:
    require_tracker("uffd-wp")
    target = rewriter(mib=16, vmas=40, vma_kib=40)
    chain = Chain(target, images_root)
    await chain.predump()
    await chain.predump()
    resting = chain.last.stats.pages_written
    assert resting < 60  # stack, the vDSO, what answering a command takes
    dirtied = target.dirty(10, seed=3)
    await chain.predump()
    assert dirtied <= chain.last.stats.pages_written <= dirtied + 60
    assert same_when_stopped(target, chain.last.images_dir).ok


def _plan(seed: int) -> tuple[random.Random, dict[str, int | bool]]:
    rng = random.Random(seed)
    options: dict[str, int | bool] = {
        "threads": rng.randint(1, 4),
        "processes": rng.randint(1, 3),
        "mib": rng.choice((2, 8, 24)),
        "free_run": rng.random() < 0.7,
    }
    return rng, options


def _options(rng: random.Random, tracker: TrackerName) -> DumpOptions:
    readers = [reader for reader in READERS if reader != "scan" or kerndat.pagemap_scan().works]
    return DumpOptions(tracker=tracker, pagemap=rng.choice(readers), writers=rng.randint(1, 4))


async def _soak(target: Target, root: Path, rng: random.Random, steps: bool, tracker: TrackerName, own: bool) -> Chain:
    """Two whole chains, the second going on from the first."""
    async with incdump.Session(target.pid) as session:
        chain = Chain(target, root, session=session if own else None)
        for n in (*range(rng.randint(5, 8)), "prove", *range(rng.randint(5, 8)), "prove"):
            chain.options = _options(rng, tracker)
            session.options = chain.options
            if steps:
                target.step(rng.randint(1, 60))
            if n == "prove":
                await chain.prove()
            elif steps and rng.random() < 0.5:
                with oracle.stopped_tree(target.pid) as pids:
                    await chain.predump()
                    report = oracle.compare(chain.last.images_dir, pids)
                assert report.ok, report
            else:
                await chain.round("dump" if rng.random() < 0.15 else "predump")
    return chain


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.asyncio
async def test_soak(
    images_root: Path, capsys: pytest.CaptureFixture[str], seed: int, times: Callable[[int], int]
) -> None:
    seconds = float(os.environ.get("INCDUMP_SOAK_SECONDS", times(15)))
    first, deadline = seed, time.monotonic() + seconds
    working = [t for t in ("uffd-wp", "uffd-wp", "uffd-wp", "content") if _works(t)]
    rounds = 0
    while seed == first or time.monotonic() < deadline:
        rng, options = _plan(seed)
        tracker, own = rng.choice(working), rng.random() < 0.5
        told = f"--seed {seed} {options} tracker={tracker} session={own}"
        root = images_root / str(seed)
        try:
            with build.churn(seed=seed, **options) as target:
                chain = await _soak(target, root, rng, not options["free_run"], tracker, own)
        except Exception as error:
            error.add_note(told)
            raise
        rounds += len(chain.rounds)
        seed += 1
    with capsys.disabled():
        print(f"\nsoak: {rounds} rounds, seeds {first} to {seed - 1}")


def _works(tracker: TrackerName) -> bool:
    try:
        require_tracker(tracker)
    except pytest.skip.Exception:
        return False
    return True


@pytest.mark.asyncio
async def test_the_proof_fails_on_one_wrong_page(churn: Callable[..., Target], images_root: Path) -> None:
    """The comparison itself: a byte changed behind the tracker's back is found."""
    target = churn(seed=41, mib=4)
    target.step(50)
    rest(target)
    chain = Chain(target, images_root)
    await chain.predump()
    with oracle.stopped_tree(target.pid) as pids:
        assert oracle.compare(chain.last.images_dir, pids).ok
        images = sorted(images_root.glob("*/pages-*.img"), key=lambda path: path.stat().st_size)[-1]
        with images.open("r+b") as file:
            file.seek(images.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        report = oracle.compare(chain.last.images_dir, pids)
    assert report.counts == {"wrong": 1}
