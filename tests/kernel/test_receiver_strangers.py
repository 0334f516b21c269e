"""A receiver and strangers: they may say little, soon, and never hold up anybody else."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import anyio
import pytest

from incdump.engine import listener, receive
from incdump.xfer.blocks import LENGTH
from incdump.xfer.control import MIGRATE, MOST_MESSAGE, MOST_UNKNOWN
from tests import command
from tests.kernel.test_receiver import TREE, is_well, message, receiver, said, say
from tests.strangers import WORDS, Strangers

pytestmark = [pytest.mark.kernel, pytest.mark.alone, pytest.mark.asyncio, pytest.mark.timeout(120)]

LONG_TREE = {**TREE, "files": {f"/usr/lib/{number:05}.so": [0, 0, "0" * 40] for number in range(5000)}}


@pytest.mark.parametrize("words", WORDS)
async def test_who_does_not_say_what_it_is_here_for_is_hung_up_on(
    images_root: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon, however long a source may be silent."""
    monkeypatch.setattr(receive, "_PATIENCE", 0.5)
    async with receiver(images_root / "arriving", timeout=60.0) as (serving, _):
        with Strangers(serving.port) as strangers:
            strangers.come(3, words)
            with anyio.fail_after(5):
                while strangers.stay():
                    await anyio.sleep(0.01)
        await is_well(serving)


@pytest.mark.parametrize("words", WORDS)
async def test_any_number_of_strangers_holds_up_no_migration(images_root: Path, words: str) -> None:
    """Also one that says nothing for a while: another is begun at once, and answered at once."""
    async with receiver(images_root / "arriving", timeout=60.0) as (serving, _):
        with Strangers(serving.port) as strangers:
            await anyio.to_thread.run_sync(strangers.come, 3 * listener._WAITING, words)
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", serving.port), 5) as source:
                source.sendall(MIGRATE + message("migrate", version=1, tree=TREE))
                assert await anyio.to_thread.run_sync(source.recv, 1)
                await anyio.to_thread.run_sync(strangers.come, 3 * listener._WAITING, words)
                (welcome,) = said(
                    await say(serving.port, MIGRATE, message("migrate", version=1, tree=TREE), quiet=True)
                )
                assert welcome["problems"] == [receive._BUSY]
            assert time.monotonic() - began < 3


async def test_a_long_message_is_heard_of_one_at_a_time_and_of_nobody_during_a_migration(images_root: Path) -> None:
    assert len(message("migrate", version=1, tree=LONG_TREE)) > MOST_UNKNOWN
    length = LENGTH.pack(MOST_MESSAGE)
    async with receiver(images_root / "arriving") as (serving, reports):
        (welcome, *_) = said(await say(serving.port, MIGRATE, message("migrate", version=1, tree=LONG_TREE)))
        assert welcome["say"] == "welcome"
        while not reports:
            await anyio.sleep(0.01)
        with socket.create_connection(("127.0.0.1", serving.port), 5) as first:
            first.sendall(MIGRATE + length + b"{")
            await anyio.sleep(0.2)
            (answer,) = said(await say(serving.port, MIGRATE, length + b"{"))
            assert answer == {"say": "failed", "why": receive._BUSY}
        with socket.create_connection(("127.0.0.1", serving.port), 5) as source:
            source.sendall(MIGRATE + message("migrate", version=1, tree=TREE))
            await anyio.to_thread.run_sync(source.recv, 1)
            (answer,) = said(await say(serving.port, MIGRATE, message("migrate", version=1, tree=LONG_TREE)))
            assert answer == {"say": "failed", "why": receive._BUSY}


async def test_strangers_that_say_much_cost_little(images_root: Path) -> None:
    """All of them at once, as much as each of them can."""
    server = command.start("receive", "--json", "-D", images_root / "arriving")
    try:
        port = json.loads(command.read_until(server.stdout, b"\n"))["port"]
        await say(port, MIGRATE, message("migrate", version=1, tree=TREE))
        before = most_memory(server.pid)
        much = LENGTH.pack(MOST_MESSAGE) + bytes(MOST_MESSAGE - 1)
        async with anyio.create_task_group() as tasks:
            for _ in range(listener._WAITING):
                tasks.start_soon(say, port, MIGRATE, much)
        assert most_memory(server.pid) - before < 10 * MOST_MESSAGE  # one is heard, and decoded
    finally:
        server.kill()
        server.communicate()


def most_memory(pid: int) -> int:
    """Bytes that a process has had in memory at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
