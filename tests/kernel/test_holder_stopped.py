"""A holder that does not answer (SIGSTOP): signals end whoever waits for it, doctor says so, nothing is mixed up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump.errors import HolderError
from incdump.holder import client, wire
from incdump.holder.client import HolderKeeper
from incdump.proc.identity import identify
from tests.command import incdump as run
from tests.command import start, wait
from tests.kernel.support import (
    Chain,
    Odd,
    assert_untouched,
    holder_pid,
    kill_holder,
    require_tracker,
    tracked_pids,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]


@pytest.fixture(autouse=True)
def _needs() -> None:
    require_tracker("uffd-wp")


@pytest.fixture
def chain(odd: Odd, images_root: Path) -> Chain:
    """A chain of one pre-dump."""
    chain = Chain(odd, images_root)
    asyncio.run(chain.predump())
    return chain


@pytest.fixture
def stopped(chain: Chain) -> Iterator[int]:
    """The holder, stopped; it goes on afterwards, and is ended."""
    holder = holder_pid()
    assert holder is not None
    os.kill(holder, signal.SIGSTOP)
    yield holder
    os.kill(holder, signal.SIGCONT)
    kill_holder()


def _fds(pid: int) -> list[str]:
    names = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            names.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return names


def lock_is_kept() -> bool:
    """Whether somebody looks for the holder."""
    try:
        os.close(wire.lock_socket(wire.runtime_dir(), wait=False))
    except BlockingIOError:
        return True
    return False


COMMANDS = {
    "predump": ("predump", "-t", "PID", "-D", "DIR"),
    "dump": ("dump", "-t", "PID", "-D", "DIR"),
    "precopy": ("precopy", "-t", "PID", "-D", "DIR", "--downtime", "1s"),
    "untrack": ("untrack", "PID"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", COMMANDS)
async def test_a_signal_ends_a_command_that_waits_for_it(
    chain: Chain, stopped: int, command: str, number: signal.Signals
) -> None:
    given = {"PID": chain.target.pid, "DIR": chain.root / "waits"}
    with start(*[given.get(word, word) for word in COMMANDS[command]]) as process:
        until(lock_is_kept)
        began = time.monotonic()
        process.send_signal(number)
        done = wait(process)
    assert time.monotonic() - began < 2
    assert done.code == 128 + number
    assert f"stopped by {number.name}" in done.error
    assert not (chain.root / "waits").exists()
    assert_untouched(chain.target)
    os.kill(stopped, signal.SIGCONT)
    await chain.predump()
    await chain.prove()


async def test_a_signal_ends_a_command_that_waits_for_the_lock(odd: Odd, images_root: Path) -> None:
    lock = wire.lock_socket(wire.runtime_dir())
    try:
        with start("predump", "-t", odd.pid, "-D", images_root / "1") as process:
            until(lambda: any(name.endswith(".lock") for name in _fds(process.pid)))
            began = time.monotonic()
            process.terminate()
            assert wait(process).code == 143
        assert time.monotonic() - began < 2
    finally:
        os.close(lock)
        assert await incdump.untrack(None) == []


async def test_doctor_says_that_it_does_not_answer(stopped: int) -> None:
    began = time.monotonic()
    report = run("doctor", "--json", "--criu", "/nowhere/criu").json
    took = time.monotonic() - began
    assert report["tracked"] is None
    assert f"process {stopped}, does not answer" in report["holder"]
    os.kill(stopped, signal.SIGCONT)
    began = time.monotonic()
    report = run("doctor", "--json", "--criu", "/nowhere/criu").json
    assert took < time.monotonic() - began + 3
    assert report["holder"] is None
    assert len(report["tracked"]) == 1


async def test_doctor_says_so_in_its_text(stopped: int) -> None:
    out = run("doctor", "--criu", "/nowhere/criu").out
    assert f"what is tracked now is not known: the holder, process {stopped}, does not answer" in " ".join(out.split())


async def test_an_answer_that_comes_late_is_nobody_elses(
    chain: Chain, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = HolderKeeper()
    pid = chain.target.pid
    os.kill(stopped, signal.SIGCONT)
    lease = keeper.acquire(pid, identify(pid).start_time)
    os.kill(stopped, signal.SIGSTOP)
    monkeypatch.setattr(client, "ANSWER_TIMEOUT", 0.1)
    keeper.commit(lease, "generation")  # the images are complete: that it failed is found out by the next
    with pytest.raises(HolderError, match="does not answer"):
        keeper.acquire(pid, identify(pid).start_time)
    lease.close()
    monkeypatch.undo()
    os.kill(stopped, signal.SIGCONT)
    until(lambda: tracked_pids() == [pid])
    again = keeper.acquire(pid, identify(pid).start_time)
    assert os.readlink(f"/proc/self/fd/{again.uffd}") == "anon_inode:[userfaultfd]"
    assert again.pid == pid
    again.close()
    keeper.close()
