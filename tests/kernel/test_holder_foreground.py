"""A holder that is run in the foreground serves everybody until it is told to end; one that is gone is said to be."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import incdump
from incdump.errors import HolderError
from incdump.holder import wire
from incdump.holder.client import connect
from tests.kernel.support import (
    Chain,
    Odd,
    holder_pid,
    kill_holder,
    require_tracker,
    tracked_pids,
    until,
    watched_vmas,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]

COMMAND = [sys.executable, "-m", "incdump", "holder"]


@pytest.fixture(autouse=True)
def _needs() -> None:
    require_tracker("uffd-wp")


@contextlib.contextmanager
def foreground(**environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """``incdump holder``, and what it says when it is ready."""
    env = {**os.environ, **environment}
    with subprocess.Popen([*COMMAND, "--json"], stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


async def test_the_next_dump_says_that_the_holder_is_gone(odd: Odd, images_root: Path) -> None:
    chain = Chain(odd, images_root)
    await chain.predump()
    pid = kill_holder()
    await chain.predump()
    assert not chain.last.incremental
    (warning,) = chain.last.warnings
    assert f"the holder, process {pid}, started 20" in warning
    assert re.search(r"started \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\) is gone", warning)
    assert "incdump holder" in warning
    assert warning.endswith("all of it is dumped")
    await chain.predump()
    assert chain.last.incremental
    assert chain.last.warnings == []


async def test_another_reason_is_not_blamed_on_the_holder(odd: Odd, images_root: Path) -> None:
    chain = Chain(odd, images_root)
    with Odd() as other:  # for whose sake the holder stays
        await incdump.predump(other.pid, images_root / "other")
        await chain.predump()
        await incdump.untrack(odd.pid)
        await chain.predump()
    assert not chain.last.incremental
    assert "gone" not in chain.last.warnings[0]


async def test_commands_use_the_one_in_the_foreground(odd: Odd, images_root: Path) -> None:
    with foreground() as (process, ready):
        assert ready == {"event": "ready", "pid": process.pid, "socket": wire.socket_path()}
        assert holder_pid() == process.pid
        assert Path(wire.socket_path()).stat().st_mode & 0o077 == 0
        chain = Chain(odd, images_root)
        await chain.predump()
        await chain.predump()
        assert chain.last.incremental
        assert tracked_pids() == [odd.pid]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_ends_by_a_signal_and_releases_its_targets(odd: Odd, images_root: Path, number: int) -> None:
    with foreground() as (process, _):
        await incdump.predump(odd.pid, images_root / "1")
        assert watched_vmas(odd.pid)
        process.send_signal(number)
        assert process.wait(10) == 0
        assert watched_vmas(odd.pid) == []
        assert not [name for name in os.listdir(wire.runtime_dir()) if not name.endswith(".log")]
        assert connect() is None


async def test_it_does_not_end_with_its_last_target(images_root: Path) -> None:
    with foreground() as (process, _):
        with Odd() as target:
            await incdump.predump(target.pid, images_root / "1")
        until(lambda: tracked_pids() == [])
        with Odd() as target:
            await incdump.predump(target.pid, images_root / "2")
            assert await incdump.untrack(target.pid) == [target.pid]
            assert await incdump.untrack(None) == []
        assert process.poll() is None
        assert holder_pid() == process.pid


async def test_there_is_one_holder(odd: Odd, images_root: Path) -> None:
    await incdump.predump(odd.pid, images_root / "1")
    running = holder_pid()
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == HolderError.exit_code
    assert f"a holder runs already, process {running}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert holder_pid() == running
    assert tracked_pids() == [odd.pid]
    await incdump.untrack(None)


@pytest.mark.parametrize("abstract", [False, True])
async def test_systemd_is_told_when_it_is_ready_and_when_it_ends(tmp_path: Path, *, abstract: bool) -> None:
    name = f"@incdump-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind("\0" + name[1:] if abstract else name)
        notified.settimeout(10)
        with foreground(NOTIFY_SOCKET=name) as (process, _):
            assert notified.recv(100) == b"READY=1"
            process.terminate()
            assert notified.recv(100) == b"STOPPING=1"
            assert process.wait(10) == 0


async def test_it_says_where_it_serves() -> None:
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.terminate()
    assert said == f"holder ready: process {process.pid} serves {wire.socket_path()}\n"
