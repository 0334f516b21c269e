"""SIGKILL at random moments: of incdump, of the holder, of both. The target never notices, no write is forgotten.

What is killed are the real commands, as processes of their own; the moments are spread over all of their run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump.errors import ImagesError
from tests.command import environment
from tests.kernel.support import Chain, assert_untouched, holder_pid, require_tracker, until

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]

KILLS = 20
HOLDER_KILLS = 8


class Command:
    """``incdump predump`` or ``dump`` on its way."""

    def __init__(self, kind: str, pid: int, where: Path, parent: str | None) -> None:
        words = [kind, "-t", str(pid), "-D", str(where), "--track-for", "1h"]
        if parent is not None:
            words += ["--prev-images-dir", os.path.relpath(parent, where)]
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "incdump", *words],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def ended_within(self, seconds: float) -> bool:
        """Let it run for some time; whether it ended by itself."""
        try:
            self.process.wait(max(0.0, self.began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL it, and reap it."""
        self.process.kill()
        self.process.wait()

    def end(self) -> tuple[int, str]:
        """Its exit status, and what it said."""
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said.decode()


def is_whole(where: Path) -> bool:
    """Whether a directory is a whole dump; anything else must be refused."""
    if not where.exists():
        return False
    if (where / "inventory.img").exists():
        incdump.check(where)
        return True
    with pytest.raises(ImagesError):
        incdump.check(where)
    return False


def typical(chain: Chain, target: Target) -> float:
    """How long a command takes: measured on one that is left alone, which becomes a round."""
    where = chain.next_dir()
    command = Command("predump", target.pid, where, chain.last.images_dir if chain.rounds else None)
    status, said = command.end()
    assert status == 0, said
    seconds = time.monotonic() - command.began
    adopt(chain, where)
    return seconds


def adopt(chain: Chain, where: Path) -> None:
    """A dump that a command has made is the chain's last."""
    chain.rounds.append(incdump.DumpResult(images_dir=str(where), pid=chain.target.pid))


def running_again(target: Target) -> None:
    """Every process of the tree runs; what is still being let go may take a moment."""

    def holds() -> bool:
        try:
            assert_untouched(target)
        except AssertionError:
            return False
        return True

    until(holds)


@pytest.mark.timeout(1200)
async def test_incdump_killed_at_random_moments(
    churn: Callable[..., Target], images_root: Path, rng: random.Random, times: Callable[[int], int]
) -> None:
    require_tracker("uffd-wp")
    target = churn(seed=61, threads=3, processes=2, mib=8, free_run=True, dirty_rate=1500)
    chain = Chain(target, images_root)
    seconds = typical(chain, target)
    killed = whole = 0
    while killed < times(KILLS):
        where = chain.next_dir()
        command = Command(rng.choice(("predump", "dump")), target.pid, where, chain.last.images_dir)
        if command.ended_within(seconds * rng.uniform(0.25, 1.05)):
            status, said = command.end()
            assert status == 0, said
        else:
            command.kill()
            command.end()
            killed += 1
        running_again(target)
        target.check()
        if is_whole(where):
            whole += 1
            adopt(chain, where)
        if killed % 10 == 9 and command.process.returncode:
            await chain.prove()
            assert await chain.predump()
    await chain.prove()
    target.quit()


@pytest.mark.parametrize("victims", ["holder", "holder and incdump"])
async def test_the_holder_killed_at_random_moments(
    churn: Callable[..., Target],
    images_root: Path,
    rng: random.Random,
    times: Callable[[int], int],
    victims: str,
) -> None:
    require_tracker("uffd-wp")
    target = churn(seed=62, threads=2, processes=2, mib=8, free_run=True, dirty_rate=1500)
    chain = Chain(target, images_root)
    seconds = typical(chain, target)
    for n in range(times(HOLDER_KILLS)):
        where = chain.next_dir()
        command = Command(rng.choice(("predump", "dump")), target.pid, where, chain.last.images_dir)
        command.ended_within(seconds * rng.uniform(0.25, 1.05))
        holder = holder_pid()
        if holder is not None:
            os.kill(holder, signal.SIGKILL)
        if victims != "holder":
            command.kill()
        status, said = command.end()
        assert status >= 0 or status == -signal.SIGKILL, said
        assert "Traceback" not in said
        running_again(target)
        target.check()
        if is_whole(where):
            adopt(chain, where)
        else:
            assert status, said
            assert status < 0 or not where.exists()
        if n % 4 == 3:
            await chain.predump()
            await chain.prove()
    target.quit()


async def test_the_whole_process_group_killed_while_the_tree_is_frozen(
    churn: Callable[..., Target], images_root: Path
) -> None:
    """The moment is chosen: it is killed when the first thread of the target is seen stopped."""
    require_tracker("uffd-wp")
    target = churn(seed=63, threads=3, processes=3, mib=8, free_run=True, dirty_rate=20000)
    chain = Chain(target, images_root)
    await chain.predump()
    for _ in range(5):
        where = chain.next_dir()
        command = Command("dump", target.pid, where, None)
        until(lambda process=command.process: is_traced(target.pid) or process.poll() is not None)
        command.kill()
        command.end()
        running_again(target)
        target.check()
        assert not is_whole(where)
    await chain.prove()
    target.quit()


def is_traced(pid: int) -> bool:
    """Whether somebody traces a process."""
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
