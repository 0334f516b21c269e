"""Tracking costs the target something: it lasts as long as was said, and no longer than the target can bear.

While mappings are watched they do not merge with new neighbours, huge pages are split by writes, and mremap(2) over
several mappings fails. Numbers of mappings are those of programs that exchange memory all the time.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump.holder.client import held_targets
from incdump.holder.mappings import count_mappings, most_mappings
from tests.command import incdump as command
from tests.kernel.freeze_kit import Victim, Victims
from tests.kernel.support import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from incdump.model.options import PagemapName
    from tests.conftest import MakeTarget
    from tests.targets.build import Target

pytestmark = pytest.mark.kernel


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Callable[..., Victim]]:
    victims = Victims(tmp_path)
    yield victims
    victims.end()


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """What is started meanwhile cannot write files of more than 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def target(rewriter: MakeTarget) -> Target:
    """A quiet process of a few MiB."""
    return rewriter(mib=4)


def is_tracked(pid: int) -> bool:
    return pid in [target["pid"] for target in held_targets()]


# -- for how long ------------------------------------------------------------------------------------------------------


def test_tracking_ends_when_it_was_said_to_and_the_next_dump_says_so(target: Target, images_root: Path) -> None:
    assert command("predump", "-t", target.pid, "-D", images_root / "1", "--track-for", "2s").code == 0
    assert is_tracked(target.pid)
    until(lambda: not is_tracked(target.pid), 10)
    done = command("predump", "-t", target.pid, "-D", images_root / "2", "--prev-images-dir", "../1")
    assert done.code == 0
    assert "tracking ended 2 s after that dump (--track-for): all of it is dumped" in done.err


def test_each_dump_says_anew_for_how_long(target: Target, images_root: Path) -> None:
    for number in "123":
        assert command("predump", "-t", target.pid, "-D", images_root / number, "--track-for", "3s").code == 0
        time.sleep(2)
    assert is_tracked(target.pid), "6 seconds after the first of them"
    left = next(row["left"] for row in held_targets() if row["pid"] == target.pid)
    assert 0 < left < 2


def test_a_predump_is_tracked_for_an_hour_and_says_so(target: Target, images_root: Path) -> None:
    done = command("predump", "-t", target.pid, "-D", images_root / "1")
    assert "tracked until" in done.out
    left = next(row["left"] for row in held_targets() if row["pid"] == target.pid)
    assert 3500 < left <= 3600


@pytest.mark.parametrize("kind", ["dump", "dump on top of a pre-dump", "precopy"])
def test_nothing_is_tracked_after_a_dump_that_nobody_said_was_to_have_a_child(
    target: Target, images_root: Path, kind: str
) -> None:
    if kind == "precopy":
        assert command("precopy", "-t", target.pid, "-D", images_root / "r", "--downtime", "10s").code == 0
    else:
        on_top = kind.endswith("pre-dump")
        if on_top:
            assert command("predump", "-t", target.pid, "-D", images_root / "1").code == 0
        parent = ("--prev-images-dir", "../1") if on_top else ()
        done = command("dump", "-t", target.pid, "-D", images_root / "2", *parent)
        assert done.code == 0
        assert "tracked until" not in done.out
        last = command("dump", "-t", target.pid, "-D", images_root / "3", "--prev-images-dir", "../2")
        assert "nothing was tracked after that dump, as it did not say for how long (--track-for)" in last.err
    assert held_targets() == []


@pytest.mark.parametrize("word", [("--track-for", "1h"), ("--track-mem",)])
def test_a_dump_that_is_to_have_a_child_has_one(target: Target, images_root: Path, word: tuple[str, ...]) -> None:
    assert command("dump", "-t", target.pid, "-D", images_root / "1", *word).code == 0
    assert is_tracked(target.pid)
    done = command(
        "dump", "-t", target.pid, "-D", images_root / "2", "--prev-images-dir", "../1", "--require-incremental"
    )
    assert done.code == 0, done


def test_a_loop_that_fails_leaves_nothing_tracked(target: Target, images_root: Path) -> None:
    done = command(
        *("precopy", "-t", target.pid, "-D", images_root / "r", "--downtime", "1ms", "--max-rounds", "1"),
        *("--final", "checkpoint", "--criu", "/nonexistent"),
    )
    assert done.code != 0
    assert held_targets() == []


def test_a_first_dump_that_fails_leaves_nothing_tracked(target: Target, images_root: Path) -> None:
    done = (
        command(*("predump", "-t", target.pid, "-D", images_root / "1"), env={"INCDUMP_TEST": "1"}, file_size=1 << 20)
        if False
        else command("predump", "-t", target.pid, "-D", "/dev/full/1")
    )
    assert done.code != 0
    assert held_targets() == []


# -- what it costs -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_rest(target: Victim) -> Iterator[None]:
    """It exchanges nothing meanwhile: a pre-dump comes to its end, however slow the machine is."""
    target.set(6, 1)
    target.wait_for_beats(2)
    yield
    target.set(6, 0)


def exchanged(target: Victim, more: int) -> None:
    start = target.value(0)
    target.wait_until(lambda: target.value(0) >= start + more, 120)


def test_a_program_that_exchanges_its_memory_is_let_go_of_in_time_and_the_next_dump_says_so(
    victim: Callable[..., Victim], images_root: Path
) -> None:
    """It would have 65,530 mappings within three seconds, and then fail."""
    target = victim("exchange", "150000")
    exchanged(target, 60_000)
    with at_rest(target):
        assert command("predump", "-t", target.pid, "-D", images_root / "1").code == 0
    exchanged(target, 200_000)
    assert count_mappings(target.pid) < most_mappings() * 0.9
    with at_rest(target):
        done = command("predump", "-t", target.pid, "-D", images_root / "2", "--prev-images-dir", "../1")
    assert done.code == 0
    assert "as tracked ones do not merge and the kernel allows 65,530 (vm.max_map_count)" in done.err
    target.finish()


def test_a_program_that_exchanges_its_memory_never_runs_out_of_mappings(
    victim: Callable[..., Victim], images_root: Path
) -> None:
    """Whether a pre-dump comes to its end before there are too many depends on how quick the machine is."""
    target = victim("exchange", "150000")
    parent: tuple[str, ...] = ()
    most = 0
    for number in range(4):
        exchanged(target, 60_000)
        done = command("predump", "-t", target.pid, "-D", images_root / str(number), *parent)
        parent = ("--prev-images-dir", f"../{number}")
        assert done.code in (0, 3), "3: it gives up in the middle, since the target comes to have too many"
        if done.code:
            assert "mappings by now: it exchanges them all the time" in done.err
            parent = ()
        most = max(most, count_mappings(target.pid))
    exchanged(target, 200_000)
    assert most < most_mappings() * 0.9
    target.finish()


@pytest.mark.asyncio
async def test_a_session_lets_go_of_a_program_that_exchanges_its_memory(
    victim: Callable[..., Victim], images_root: Path
) -> None:
    target = victim("exchange", "150000")
    async with incdump.Session(target.pid) as session:
        with at_rest(target):
            await session.predump(images_root / "1")
        exchanged(target, 200_000)
        assert count_mappings(target.pid) < most_mappings() * 0.8
        with at_rest(target):
            result = await session.predump(images_root / "2")
        assert not result.incremental
        assert "tracking ended when it had" in " ".join(result.warnings)
    target.finish()


def huge_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("AnonHugePages:")[2].split()[0])


@pytest.mark.parametrize("keeper", ["holder", "session"])
@pytest.mark.asyncio
async def test_huge_pages_are_put_together_again_when_tracking_ends(
    victim: Callable[..., Victim], images_root: Path, keeper: str
) -> None:
    size = 64
    target = victim("huge", str(size))
    if huge_kib(target.pid) < size << 9:
        pytest.skip("the kernel gives no huge pages here")
    before = huge_kib(target.pid)

    def written() -> None:
        target.set(5, 1)
        target.wait_until(lambda: target.value(1) == 0)
        assert huge_kib(target.pid) < before // 8, "writes to what is watched split it"

    if keeper == "session":
        async with incdump.Session(target.pid) as session:
            await session.predump(images_root / "1")
            written()
    else:
        await incdump.predump(target.pid, images_root / "1")
        written()
        assert await incdump.untrack(target.pid)
    rss = resident(target.pid)
    until(lambda: huge_kib(target.pid) > before * 0.9, 20)
    assert resident(target.pid) - rss < 4 << 20, "it does not grow by it"
    target.finish()


@pytest.mark.parametrize("kind", ["predump", "dump"])
@pytest.mark.parametrize("pagemap", ["scan", "cache", "plain"])
@pytest.mark.asyncio
async def test_huge_pages_are_kept_where_that_is_asked_for_and_nothing_is_missed(
    victim: Callable[..., Victim], images_root: Path, pagemap: PagemapName, kind: str
) -> None:
    size = 32
    target = victim("huge", str(size))
    if huge_kib(target.pid) < size << 9:
        pytest.skip("the kernel gives no huge pages here")
    before = huge_kib(target.pid)
    options = incdump.DumpOptions(thp="keep", pagemap=pagemap)
    async with incdump.Session(target.pid, options) as session:
        for number in range(4):
            await getattr(session, kind)(images_root / str(number))
            target.set(5, 1)
            target.wait_until(lambda: target.value(1) == 0)
            assert huge_kib(target.pid) > before * 0.9
        stopped = incdump.DumpOptions(thp="keep", pagemap=pagemap, afterwards="stopped")
        result = await session.dump(images_root / "last", options=stopped)
        assert result.incremental
        assert size << 8 <= result.stats.pages_written < (size << 8) + 600, "huge pages whole, and little else"
        report = await incdump.check_against(images_root / "last", target.pid)
        assert report.ok, report
    os.kill(target.pid, signal.SIGCONT)
    target.finish()


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_after_a_loop_that_is_told_to_go_on_the_target_is_tracked(target: Target, images_root: Path) -> None:
    loop = ("precopy", "-t", target.pid, "-D", images_root / "r", "--downtime", "10s", "--track-for", "1h")
    assert command(*loop).code == 0
    assert is_tracked(target.pid)
    last = os.path.realpath(images_root / "r" / "latest")
    on_top = ("--prev-images-dir", last, "--require-incremental")
    assert command("dump", "-t", target.pid, "-D", images_root / "2", *on_top).code == 0
