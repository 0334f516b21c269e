"""A dump that does not come to its end, by cancellation or error: the target runs on, and no write is forgotten.

Cancelled by anyio's scopes, by ``asyncio.timeout`` and by ``task.cancel()``; at random moments, and at each step that a
dump reports. What a cancelled round took from the tracker is given back: the next round is incremental, and right.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import random
import subprocess
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import incdump
from incdump._uapi import userfaultfd
from incdump.engine.dump import DumpRun
from incdump.errors import ImagesIOError, IncdumpError
from incdump.model.options import DumpOptions
from tests import oracle
from tests.kernel.support import (
    WAYS,
    Chain,
    Odd,
    assert_untouched,
    by_scope,
    by_task,
    carry_on,
    kill_holder,
    open_fds,
    require_root,
    require_tracker,
    same_when_stopped,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from incdump.model.options import Afterwards, TrackerName
    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]

PAGE = 4096
CANCELLATIONS = {"uffd-wp": 30, "content": 12}


async def timed(work: Coroutine[Any, Any, object]) -> float:
    """How long something takes, seconds."""
    began = anyio.current_time()
    await work
    return anyio.current_time() - began


@pytest.mark.parametrize("tracker", ["uffd-wp", "content"])
@pytest.mark.parametrize("own", [False, True], ids=["functions", "session"])
async def test_cancelled_at_random_moments(
    churn: Callable[..., Target],
    images_root: Path,
    rng: random.Random,
    times: Callable[[int], int],
    own: bool,
    tracker: TrackerName,
) -> None:
    require_tracker(tracker)
    target = churn(seed=71, threads=2, processes=2, mib=4, free_run=True, dirty_rate=1500)
    options = DumpOptions(tracker=tracker)
    async with incdump.Session(target.pid, options) as session:
        chain = Chain(target, images_root, options, session if own else None)
        await chain.predump()
        seconds = {kind: await timed(chain.round(kind)) for kind in ("predump", "dump")}
        before = len(open_fds()), threading.active_count()
        cancelled = 0
        for n in itertools.count(1):
            kind = rng.choice(("predump", "dump"))
            done = await rng.choice(WAYS)(chain.round(kind), seconds[kind] * rng.uniform(0, 1.1))
            assert_untouched(target)
            if not done:
                cancelled += 1
                assert not (images_root / f"{chain.attempts:03}").exists()
            if n % 20 == 0:
                await chain.prove()
            if cancelled == times(CANCELLATIONS[tracker]):
                break
        await chain.prove()
        assert all(r.incremental for r in chain.rounds[1:]), [r.warnings for r in chain.rounds]
        assert len(open_fds()) <= before[0] + 8, open_fds()
        assert threading.active_count() <= before[1] + 8
    target.quit()


class Cut:
    """Cancels, or raises, at the n-th step that a dump reports."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.left = at
        self.act = act
        self.seen: list[str] = []

    def __call__(self, step: str, stats: object) -> None:
        self.seen.append(step)
        self.left -= 1
        if self.left == 0:
            self.act()


async def cut_at(pid: int, kind: str, where: Path, parent: str, n: int, native: bool, options: DumpOptions) -> bool:
    """A round that is cancelled at the n-th step; whether it came to its end."""
    call = incdump.predump if kind == "predump" else incdump.dump
    with anyio.CancelScope() as scope:

        async def work() -> None:
            task = asyncio.current_task()
            assert task is not None
            cut = Cut(n, task.cancel if native else scope.cancel)  # type: ignore[arg-type]
            await call(pid, where, parent=parent, options=options, progress=cut)

        if native:
            task = asyncio.ensure_future(work())
            await asyncio.wait((task,))
            if task.cancelled():
                return False
            task.result()
        else:
            await work()
        return True
    return False


@pytest.mark.parametrize("native", [False, True], ids=["scope", "task"])
@pytest.mark.parametrize("kind", ["predump", "dump"])
async def test_cancelled_at_each_step(odd: Odd, images_root: Path, kind: str, native: bool) -> None:
    require_tracker("uffd-wp")
    (address, _) = odd.do("anon 512")
    odd.do(f"fill {address} 512 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    for n in itertools.count(1):
        odd.do(f"poke {address} {n} {n % 200 + 1}")
        where = chain.next_dir()
        done = await cut_at(odd.pid, kind, where, chain.last.images_dir, n, native, DumpOptions())
        assert_untouched(odd)
        if done:
            break
        assert not where.exists()
        await chain.predump()
        assert chain.last.incremental
        assert same_when_stopped(odd, chain.last.images_dir).ok
    assert n > (4 if kind == "predump" else 5)
    await chain.predump(parent=str(where))
    await chain.prove()


@pytest.mark.parametrize("native", [False, True], ids=["scope", "task"])
@pytest.mark.parametrize("afterwards", ["killed", "stopped"])
async def test_a_cancelled_dump_leaves_a_running_target_or_whole_images(
    images_root: Path, afterwards: Afterwards, native: bool
) -> None:
    """Killed with its images thrown away is what must not be; nor stopped by a dump that says it was cancelled."""
    options = DumpOptions(afterwards=afterwards)
    outcomes = set()
    rng = random.Random(5)
    seconds = 0.1
    for n in (*range(1, 9), *itertools.repeat(0, 20)):
        with Odd() as odd:
            (address, _) = odd.do("anon 64")
            odd.do(f"fill {address} 64 1")
            where = images_root / f"{len(os.listdir(images_root))}-{n}"
            began = anyio.current_time()
            if n:
                done = await cut_at(odd.pid, "dump", where, None, n, native, options)  # type: ignore[arg-type]
                seconds = anyio.current_time() - began
            else:
                way = by_task if native else by_scope
                done = await way(incdump.dump(odd.pid, where, options=options), seconds * rng.uniform(0.4, 1.1))
            await ended_as_it_should(odd, where, afterwards, done)
            outcomes.add(done)
    assert outcomes == {True, False}


async def ended_as_it_should(odd: Odd, where: Path, afterwards: Afterwards, done: bool) -> None:
    """Judge a dump that may have been cancelled."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        odd.process.wait(0.02 if not done else 5 if afterwards == "killed" else 0)
    if not odd.alive():
        assert afterwards == "killed"
        incdump.check(where)
        return
    assert not (done and afterwards == "killed")
    if done:
        assert oracle.compare(where, {odd.pid: odd.pid}).ok
        carry_on([odd.pid])
    else:
        assert not where.exists()
    odd.do("ping")
    assert_untouched(odd)


async def test_cancelled_again_and_again_while_it_cleans_up(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 2048")
    odd.do(f"fill {address} 2048 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    seconds = await timed(chain.dump())
    for n in range(20):
        odd.do(f"poke {address} 2048 {n}")
        task = asyncio.ensure_future(chain.round("dump"))
        await asyncio.wait((task,), timeout=seconds * n / 20)
        while not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=0.001)
        assert_untouched(odd)
        await chain.predump()
        assert chain.last.incremental
    await chain.prove()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["functions", "session"])
async def test_a_full_disk_leaves_nothing_and_forgets_nothing(odd: Odd, images_root: Path, own: bool) -> None:
    require_root()
    require_tracker("uffd-wp")
    (address, _) = odd.do("anon 300")
    odd.do("shared 40")
    odd.do(f"fill {address} 300 1")
    async with incdump.Session(odd.pid) as session:
        chain = Chain(odd, images_root / "chain", session=session if own else None)
        await chain.predump()
        failures = 0
        for kib in (8, 64, 600, 1240, 1260, 1280, 1300, 1340, 1500, 4000):
            with tiny_disk(images_root / "tiny", kib) as disk:
                for kind in ("predump", "dump"):
                    odd.do(f"poke {address} 300 {kib % 250}")
                    if await fails_for_want_of_space(chain, kind, disk / kind):
                        failures += 1
                        assert kind not in os.listdir(disk)
                        assert_untouched(odd)
                    odd.do(f"poke {address} 10 {kib % 100}")
                    await chain.predump()
                    assert same_when_stopped(odd, chain.last.images_dir).ok
        assert failures > 5
        assert all(r.incremental for r in chain.rounds[1:])
        await chain.prove()


async def fails_for_want_of_space(chain: Chain, kind: str, where: Path) -> bool:
    """A round that goes to another disk, and is not built upon."""
    parent = chain.last.images_dir
    chain.next_dir = lambda: where  # type: ignore[method-assign]
    try:
        await chain.round(kind, parent=parent)
    except ImagesIOError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return True
    finally:
        del chain.next_dir
    # It fitted: the chain may go on from here no more, since the disk is taken away.
    chain.rounds.pop()
    chain.rounds.append(await chain_restart(chain))
    return False


async def chain_restart(chain: Chain) -> incdump.DumpResult:
    """A full round."""
    result = await chain.predump(parent=None)
    chain.rounds.pop()
    return replace(result, incremental=True)


@contextlib.contextmanager
def tiny_disk(path: Path, kib: int) -> Iterator[Path]:
    """A file system of a few KiB."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k,mode=700", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        path.rmdir()
        pytest.skip(f"a tmpfs cannot be mounted: {mounted.stderr.decode()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)
        path.rmdir()


async def test_any_error_at_any_step_leaves_nothing_and_forgets_nothing(odd: Odd, images_root: Path) -> None:
    """An error that nobody expected: raised by the callback, by a writer, by what comes last."""
    require_tracker("uffd-wp")

    class UnforeseenError(Exception):
        pass

    def fail() -> None:
        raise UnforeseenError

    (address, _) = odd.do("anon 256")
    odd.do(f"fill {address} 256 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    for kind, n in itertools.product((incdump.predump, incdump.dump), range(1, 6)):
        odd.do(f"poke {address} 128 {n}")
        where = chain.next_dir()
        try:
            chain.rounds.append(await kind(odd.pid, where, parent=chain.last.images_dir, progress=Cut(n, fail)))
        except UnforeseenError:
            assert not where.exists()
        assert_untouched(odd)
        await chain.predump()
        assert chain.last.incremental
        assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()


async def test_a_holder_that_dies_in_mid_dump_is_no_harm(odd: Odd, images_root: Path) -> None:
    require_tracker("uffd-wp")
    (address, _) = odd.do("anon 256")
    odd.do(f"fill {address} 256 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    for kind, step in itertools.product(("predump", "dump"), ("checking", "freezing", "dumping", "finishing")):
        odd.do(f"poke {address} 99 7")
        killed: list[int] = []

        def kill(at: str, _stats: object, step: str = step, killed: list[int] = killed) -> None:
            if at == step and not killed:
                killed.append(kill_holder())

        where = chain.next_dir()
        call = incdump.predump if kind == "predump" else incdump.dump
        try:
            chain.rounds.append(await call(odd.pid, where, parent=chain.last.images_dir, progress=kill))
        except IncdumpError:
            assert not where.exists()
        assert_untouched(odd)
        odd.do(f"poke {address} 50 8")
        await chain.predump()
        assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()


async def test_a_target_that_exits_in_mid_dump_is_an_error_and_nothing_is_left(images_root: Path) -> None:
    for kind, step in itertools.product(("predump", "dump"), ("checking", "freezing", "dumping")):
        with Odd() as odd:

            def kill(at: str, _stats: object, step: str = step, odd: Odd = odd) -> None:
                if at == step:
                    odd.process.kill()
                    odd.process.wait()

            if (kind, step) in {("predump", "freezing"), ("dump", "dumping")}:
                continue
            call = incdump.predump if kind == "predump" else incdump.dump
            with pytest.raises(incdump.TargetError):
                await call(odd.pid, images_root / "1", progress=kill)
            assert os.listdir(images_root) == []


async def test_giving_back_is_what_makes_the_next_round_right(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests of this module can fail: without giving back, a write is missed."""
    require_tracker("uffd-wp")
    (address, _) = odd.do("anon 256")
    odd.do(f"fill {address} 256 1")
    async with incdump.Session(odd.pid) as session:
        chain = Chain(odd, images_root, session=session)
        await chain.predump()
        odd.do(f"poke {address} 256 2")

        def fail(*_args: object) -> None:
            raise OSError(5, "broken on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(DumpRun, "_finish", fail)
            patch.setattr("incdump.tracking.uffd_wp.UffdWpRound.give_back", lambda *_args: None)
            with pytest.raises(OSError, match="on purpose"):
                await chain.predump()
        await chain.predump()
        assert same_when_stopped(odd, chain.last.images_dir).counts["wrong"] >= 256


async def test_what_was_taken_of_mappings_that_have_gone_is_given_back_in_a_few_calls(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tracker("uffd-wp")
    (address, _) = odd.do("anon 4096")
    chain = Chain(odd, images_root)
    odd.do(f"fill {address} 4096 1")
    await chain.predump()
    odd.do(f"poke {address} 4096 2")
    calls = []
    protect, finish = userfaultfd.writeprotect, DumpRun._finish

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        protect(*arguments)

    def fail(run: DumpRun, *arguments: Any) -> None:
        odd.do(f"unmap {address + 1000 * PAGE} 2000")
        odd.do(f"at {address + 2000 * PAGE} 500 0")  # in its place there is, partly, something else
        odd.do(f"fill {address + 2000 * PAGE} 400 3")
        finish(run, *arguments)
        raise ImagesIOError("made up")

    with monkeypatch.context() as patch:
        patch.setattr(userfaultfd, "writeprotect", counted)
        patch.setattr(DumpRun, "_finish", fail)
        with pytest.raises(ImagesIOError):
            await chain.predump()
    assert len(calls) < 100
    assert (await chain.predump()).incremental
    assert chain.last.stats.pages_written >= 2096 + 400
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()
