"""A receiver takes bytes from a network: whatever comes, it goes on, and leaves nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import socket
import subprocess
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import incdump
from incdump import DumpOptions, Receiver, ReceiverOptions
from incdump.criu.gate import Gate
from incdump.engine import arrival
from incdump.engine.hooks import Hook
from incdump.xfer.blocks import LENGTH, OFFER, encode_terms
from incdump.xfer.control import MIGRATE, MOST_MESSAGE, encode_message
from tests import command
from tests.command import refused, start
from tests.criu.criu import exists

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from incdump import Arriving, MigrationReport
    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio, pytest.mark.timeout(120)]

TREE = {
    "pid": 7, "comm": "somebody", "machine": "any", "page_size": 4096, "criu": [4, 1], "processor": None, "pids": [],
    "files": {},
}  # fmt: skip


@asynccontextmanager
async def receiver(path: Path, **options: Any) -> AsyncIterator[tuple[Receiver, list[MigrationReport]]]:
    reports: list[MigrationReport] = []
    options = {"restore": False, "timeout": 2.0, **options}
    async with Receiver(path, ReceiverOptions(**options)) as serving, anyio.create_task_group() as tasks:
        tasks.start_soon(serving.serve, None, reports.append)
        yield serving, reports
        tasks.cancel_scope.cancel()


async def say(port: int, *pieces: bytes, quiet: bool = False) -> bytes:
    """Say something and hang up; returns what was said back.

    :param quiet: no more is said, and the other side is to hang up.
    """

    def talk() -> bytes:
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            try:
                for piece in pieces:
                    sock.sendall(piece)
                if not quiet:
                    sock.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: sock.recv(1 << 16), b""))
            except OSError:
                return b""

    return await anyio.to_thread.run_sync(talk)


def said(data: bytes) -> list[dict[str, Any]]:
    """The messages in an answer, but for those that say nothing."""
    found = []
    while data:
        (size,) = LENGTH.unpack(data[: LENGTH.size])
        found.append(json.loads(data[LENGTH.size : LENGTH.size + size]))
        data = data[LENGTH.size + size :]
    return [message for message in found if message["say"] != "wait"]


def message(what: str, **fields: Any) -> bytes:
    return encode_message({"say": what, **fields})


async def is_well(serving: Receiver) -> None:
    """It takes a migration."""
    (welcome, *_) = said(await say(serving.port, MIGRATE, message("migrate", version=1, tree=TREE)))
    assert welcome["say"] == "welcome"
    assert welcome["problems"] == []


NONSENSE = {
    "nothing": b"",
    "no length": b"\1",
    "a length that cannot be": LENGTH.pack(MOST_MESSAGE + 1) + b"x" * 100,
    "a message that is cut off": LENGTH.pack(1000) + b"{",
    "no JSON": LENGTH.pack(3) + b"abc",
    "no object": LENGTH.pack(2) + b"17",
    "an object that says nothing": LENGTH.pack(2) + b"{}",
    "very deep JSON": LENGTH.pack(100_000) + b"[" * 100_000,
    "another version": message("migrate", version=99, tree=TREE),
    "no tree": message("migrate", version=1),
    "a tree that makes no sense": message("migrate", version=1, tree=[1, 2]),
    "a tree without a number": message("migrate", version=1, tree={**TREE, "pid": "x"}),
    "a name that no process has": message("migrate", version=1, tree={**TREE, "comm": "x" * 1000}),
    "restore without a round": message("migrate", version=1, tree=TREE) + message("restore", number=0),
    "a round that did not come": message("migrate", version=1, tree=TREE) + message("restore", number=3),
    "go": message("go"),
    "go first": message("migrate", version=1, tree=TREE) + message("go"),
    "an outcome that nobody knows": message("outcome", token="0" * 32),
    "an outcome without a token": message("outcome"),
    "many messages": message("migrate", version=1, tree=TREE) + message("go") * 1000,
}


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_nonsense_ends_its_own_conversation_only(images_root: Path, nonsense: str) -> None:
    async with receiver(images_root / "arriving") as (serving, reports):
        await say(serving.port, MIGRATE, NONSENSE[nonsense])
        await is_well(serving)
        await anyio.sleep(0.05)
    assert all(report.outcome == "void" for report in reports)
    assert list((images_root / "arriving").iterdir()) == []


async def test_random_bytes_end_their_own_conversation_only(images_root: Path) -> None:
    chance = random.Random(5)
    good = MIGRATE + message("migrate", version=1, tree=TREE) + message("restore", number=1) + message("go")
    async with receiver(images_root / "arriving") as (serving, _):
        for _ in range(150):
            data = bytearray(good)
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(MIGRATE), len(data))] = chance.randrange(256)
            await say(serving.port, bytes(data[: chance.randint(1, len(data))]))
        await is_well(serving)
        await anyio.sleep(0.05)
    assert list((images_root / "arriving").iterdir()) == []


async def test_pages_are_taken_from_the_source_only(images_root: Path) -> None:
    """Who has not been told the token is no part of the migration, also while one is under way."""
    offer = OFFER + encode_terms({"version": 1, "channels": 1, "parent": None, "compression": []})
    async with receiver(images_root / "arriving") as (serving, reports):
        assert await say(serving.port, offer) == b""
        with socket.create_connection(("127.0.0.1", serving.port), 5) as source:
            source.sendall(MIGRATE + message("migrate", version=1, tree=TREE))
            await anyio.to_thread.run_sync(source.recv, 1)
            for token in ({}, {"migration": "0" * 32}):
                terms = {"version": 1, "channels": 1, "parent": None, "compression": [], **token}
                answer = await say(serving.port, OFFER + encode_terms(terms))
                assert b"is not of the migration" in answer
        while not reports:
            await anyio.sleep(0.01)
    assert reports[0].rounds == 0
    assert list((images_root / "arriving").iterdir()) == []


async def test_what_is_coming_in_can_be_looked_at_while_it_comes(
    rewriter: Callable[..., Target], images_root: Path
) -> None:
    target = rewriter(mib=192, rate=0)
    seen: list[Arriving] = []
    async with receiver(images_root / "arriving", timeout=20.0) as (serving, _):
        assert serving.arriving is None
        with socket.create_connection(("127.0.0.1", serving.port), 5) as source:
            source.sendall(MIGRATE + message("migrate", version=1, tree=TREE))
            (size,) = LENGTH.unpack(await anyio.to_thread.run_sync(source.recv, LENGTH.size, socket.MSG_WAITALL))
            welcome = json.loads(await anyio.to_thread.run_sync(source.recv, size, socket.MSG_WAITALL))
            where = ("127.0.0.1", serving.port)
            options = DumpOptions(page_server=where, migration=welcome["token"], compression="off")

            async def look() -> None:
                while True:
                    if (now := serving.arriving) is not None:
                        seen.append(now)
                    await anyio.sleep(0.001)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(look)
                result = await incdump.predump(target.pid, images_root / "here", options=options)
                tasks.cancel_scope.cancel()
            assert serving.arriving is None
    assert {now.images_dir for now in seen} == {str(images_root / "arriving" / "1" / "1")}
    sizes = [now.bytes for now in seen]
    assert sizes == sorted(sizes)
    assert 0 < sizes[-1] <= result.stats.bytes_written + (16 << 20)
    assert len(set(sizes)) > 3


async def test_a_silent_source_is_given_up(images_root: Path) -> None:
    async with receiver(images_root / "arriving") as (serving, reports):
        with socket.create_connection(("127.0.0.1", serving.port), 5) as source:
            source.sendall(MIGRATE + message("migrate", version=1, tree=TREE))
            while not reports:
                await anyio.sleep(0.01)
    assert "silent for 2 s" in str(reports[0].error)


async def test_what_the_host_lacks_ends_one_migration_only(images_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, no descriptors left."""
    hooked: list[str] = []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with receiver(images_root / "arriving") as (serving, reports):
        for owner, name in ((arrival, "problems"), (Receiver, "_next_path")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, full)
                answer = said(await say(serving.port, MIGRATE, message("migrate", version=1, tree=TREE)))
            hooked += [str(found.get("why")) for found in answer]
        await is_well(serving)
        while len(reports) < 2:
            await anyio.sleep(0.01)
    assert all("No space left" in text for text in hooked)
    assert len(hooked) == 2
    assert "No space left" in str(reports[0].error)


async def test_what_a_hook_leaves_running_is_not_waited_for() -> None:
    with anyio.fail_after(5):
        await Hook(("sh", "-c", "sleep 6 & exit 0"), 60).call("stopped", 1)
        with pytest.raises(incdump.MigrationError, match="because of this"):
            await Hook(("sh", "-c", "sleep 6 & echo because of this >&2; exit 3"), 60).call("stopped", 1)


HANGS = "sleep 60 & echo $$ $! > {}; echo it hangs >&2; trap '' TERM INT; wait"


def hanging(said: Path) -> Hook:
    """A hook of two processes that does not end, nor heed what it could."""
    return Hook(("sh", "-c", HANGS.format(said)), 0.5)


async def all_have_ended(said: Path) -> None:
    """The processes that a hanging hook has named."""
    pids = [int(word) for word in said.read_text().split()]
    assert len(pids) == 2
    with anyio.fail_after(5):
        while any(exists(pid) for pid in pids):
            await anyio.sleep(0.01)


async def test_a_hook_that_hangs_is_killed_with_all_of_its_group(tmp_path: Path) -> None:
    hook = hanging(tmp_path / "said")
    with anyio.fail_after(5), pytest.raises(incdump.HookTimeout, match=r"killed at 'stopped', after 0\.5 s: it hangs"):
        await hook.call("stopped", 1)
    await all_have_ended(tmp_path / "said")
    text = await hook.tell("moved", 1)
    assert text is not None
    assert "killed at 'moved'" in text


async def test_a_hook_is_killed_with_all_of_its_group_when_it_is_cancelled(tmp_path: Path) -> None:
    said = tmp_path / "said"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(replace(hanging(said), timeout=60).call, "stopped", 1)
        with anyio.fail_after(5):
            while not said.exists() or not said.read_text().strip():
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    await all_have_ended(said)


async def test_a_gate_that_cannot_be_opened_is_shut(tmp_path: Path) -> None:
    """Its script must not wait for ever."""
    gate = Gate(tmp_path, tmp_path)
    script = subprocess.Popen([gate.script], env={**os.environ, "CRTOOLS_SCRIPT_ACTION": "post-restore"})
    while not gate.is_reached:
        await anyio.sleep(0.01)
    (tmp_path / "stay").unlink()
    with pytest.raises(OSError, match="No such file"):
        gate.open(may_pass=True)
    assert await anyio.to_thread.run_sync(lambda: script.wait(10)) != 0


async def test_a_receiver_for_one_says_why_it_failed(images_root: Path) -> None:
    async with Receiver(images_root / "a", ReceiverOptions(restore=False, once=True)) as serving:
        source = asyncio.create_task(say(serving.port, MIGRATE + message("migrate", version=1, tree=TREE)))
        with pytest.raises(incdump.IncdumpError, match="hung up"):
            await serving.serve()
        await source


async def test_a_directory_that_is_not_empty_is_refused_for_one(images_root: Path) -> None:
    (images_root / "a").mkdir()
    (images_root / "a" / "kept").touch()
    refused(command.incdump("receive", "-D", images_root / "a", "--once"), 4, "is not empty")
    assert (images_root / "a" / "kept").exists()


async def test_told_to_end_it_ends(images_root: Path) -> None:
    server = start("receive", "-D", images_root / "a")
    command.read_until(server.stdout, b"listening")
    server.terminate()
    done = command.wait(server)
    assert done.code == 0, done


@pytest.mark.parametrize("where", ["nowhere", "host:", ":1", "host:0", "host:65536", "[::1]", "a:b:1", "host:1x"])
async def test_what_is_no_address_is_refused(where: str) -> None:
    done = command.incdump("migrate", "-t", 1, where)
    assert done.code == 2, done
    assert "HOST:PORT" in done.err


async def test_criu_is_asked_for_before_it_listens(images_root: Path) -> None:
    refused(
        command.incdump("receive", "-D", images_root / "a", "--restore", "--criu", "/nowhere/criu"), 7, "/nowhere/criu"
    )
    assert command.incdump("receive", "-D", images_root / "a", "--criu", "/nowhere/criu").code == 2
