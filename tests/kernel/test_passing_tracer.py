"""A tracer that turns up after the checks, for a moment: the freeze is undone and made again, tracking starts after it.

As py-spy, or strace -p that is ended at once. One that stays is named, and nothing stays frozen.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump.engine import dump as engine
from incdump.errors import AlreadyTraced
from incdump.freeze import seize
from incdump.freeze.seize import Freezer
from incdump.holder.client import HolderKeeper
from tests.kernel.freeze_kit import tracer_of
from tests.kernel.support import Chain, Odd, assert_untouched, kill_holder, require_tracker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from incdump.holder.client import Lease

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]

TRACER = """
import sys, time
from incdump._uapi import ptrace
ptrace.seize(int(sys.argv[1]))
print(flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def traced(pid: int, seconds: float) -> Iterator[int]:
    """Another process traces one for so long."""
    command = [sys.executable, "-c", TRACER, str(pid), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == b"\n"
        try:
            yield tracer.pid
        finally:
            tracer.kill()


@pytest.fixture
def child(odd: Odd) -> int:
    """A child of it: the checks look at the root alone."""
    return odd.do("fork")[0]


async def test_a_freeze_is_made_again_when_the_tracer_has_left(odd: Odd, child: int) -> None:
    with traced(child, 0.3):
        async with Freezer() as freezer:
            frozen = await freezer.freeze(odd.pid)
            assert set(frozen.pids) == {odd.pid, child}
            assert tracer_of(child) not in (0, None)
    assert_untouched(odd)


async def test_the_tree_runs_while_the_tracer_is_waited_for(odd: Odd, child: int) -> None:
    with traced(child, 1000) as tracer:
        began = time.monotonic()
        async with Freezer() as freezer:
            with pytest.raises(AlreadyTraced, match=f"{child} is traced by process {tracer}"):
                await freezer.freeze(odd.pid)
            assert tracer_of(odd.pid) == 0
        assert seize.TRACER_PATIENCE * 0.9 < time.monotonic() - began < seize.TRACER_PATIENCE + 2
    assert_untouched(odd)


async def test_a_dump_does_not_fail_for_a_tracer_that_came_after_its_checks(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(odd, images_root)
    await chain.predump()
    passing = contextlib.ExitStack()
    prepare = engine.DumpRun._prepare_tree

    def then_traced(run: engine.DumpRun) -> None:
        prepare(run)
        passing.enter_context(traced(odd.pid, 0.3))

    monkeypatch.setattr(engine.DumpRun, "_prepare_tree", then_traced)
    with passing:
        result = await chain.dump()
    assert result.incremental
    assert result.warnings == []
    assert_untouched(odd)


async def test_tracking_starts_when_the_tracer_has_left(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tracker("uffd-wp")
    passing = contextlib.ExitStack()
    acquire = HolderKeeper.acquire

    def traced_by_then(keeper: HolderKeeper, pid: int, start_time: int, *, renew: bool = False) -> Lease:
        if not os.environ.get("PASSED"):
            monkeypatch.setenv("PASSED", "1")
            passing.enter_context(traced(pid, 0.3))
        return acquire(keeper, pid, start_time, renew=renew)

    monkeypatch.setattr(HolderKeeper, "acquire", traced_by_then)
    with passing:
        result = await incdump.predump(odd.pid, images_root / "1")
    assert result.tracker == "uffd-wp"
    assert result.warnings == []
    kill_holder()
