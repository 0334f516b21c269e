"""The holder process: there when it is needed, gone when it is not, and nobody's to talk to but its user's."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest

import incdump
from incdump.errors import HolderError
from incdump.holder import wire
from incdump.holder.client import HolderKeeper, OwnKeeper, connect, held_targets
from incdump.proc.identity import identify
from tests.kernel.support import (
    Chain,
    Odd,
    holder_pid,
    kill_holder,
    open_fds,
    require_root,
    require_tracker,
    tracked_pids,
    until,
    wait_readable,
    watched_vmas,
)
from tests.targets.build import cat

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]


@pytest.fixture(autouse=True)
def _uffd_wp() -> None:
    require_tracker("uffd-wp")


async def test_it_starts_on_demand_and_ends_with_its_last_target(images_root: Path) -> None:
    with Odd() as odd:
        await incdump.predump(odd.pid, images_root / "1")
        pid = holder_pid()
        assert pid is not None
        assert tracked_pids() == [odd.pid]
        pidfd = os.pidfd_open(pid)
    try:
        wait_readable(pidfd)
    finally:
        os.close(pidfd)
    assert connect() is None
    assert not Path(wire.socket_path()).exists()


async def test_untrack_leaves_nothing(odd: Odd, images_root: Path) -> None:
    descriptors = sorted(open_fds(odd.pid))
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    pid = holder_pid()
    assert pid is not None
    assert watched_vmas(odd.pid)
    pidfd = os.pidfd_open(pid)
    try:
        assert await incdump.untrack(odd.pid) == [odd.pid]
        assert watched_vmas(odd.pid) == []
        assert sorted(open_fds(odd.pid)) == descriptors
        wait_readable(pidfd, seconds=0)
        assert os.listdir(wire.runtime_dir()) == []
    finally:
        os.close(pidfd)
    assert await incdump.untrack(odd.pid) == []
    assert await incdump.untrack(None) == []
    odd.do(f"poke {address} 64 3")
    await chain.predump()
    assert not chain.last.incremental
    await chain.prove()


async def test_untrack_leaves_nothing_of_a_holder_that_was_killed_either(odd: Odd, images_root: Path) -> None:
    await incdump.predump(odd.pid, images_root / "1")
    kill_holder()
    assert os.listdir(wire.runtime_dir()) != []
    assert await incdump.untrack(None) == []
    assert os.listdir(wire.runtime_dir()) == []


async def test_untrack_all_gives_up_every_target(images_root: Path) -> None:
    with Odd() as one, Odd() as two:
        await incdump.predump(one.pid, images_root / "1")
        await incdump.predump(two.pid, images_root / "2")
        assert sorted(await incdump.untrack(None)) == sorted((one.pid, two.pid))
        assert watched_vmas(one.pid) == watched_vmas(two.pid) == []


async def test_a_process_that_exits_is_let_go(odd: Odd, images_root: Path) -> None:
    (child,) = odd.do("fork")
    await incdump.predump(odd.pid, images_root / "1")
    assert sorted(tracked_pids()) == [odd.pid, child]
    odd.do(f"reap {child}")
    until(lambda: tracked_pids() == [odd.pid])


@pytest.mark.parametrize("keeper", [HolderKeeper, OwnKeeper])
async def test_a_child_that_was_forked_with_the_userfaultfd_is_rid_of_it_when_it_is_tracked(
    odd: Odd, keeper: type[HolderKeeper | OwnKeeper]
) -> None:
    """As it happens when a thread of the target forks while another one has the descriptor for a moment."""
    keeps = keeper()
    try:
        lease = keeps.acquire(odd.pid, identify(odd.pid).start_time)
        with cat(pass_fds=(lease.uffd,)) as child:
            assert "anon_inode:[userfaultfd]" in open_fds(child.pid)
            keeps.acquire(child.pid, identify(child.pid).start_time).close()
            assert "anon_inode:[userfaultfd]" not in open_fds(child.pid)
        lease.close()
    finally:
        keeps.close()


@pytest.mark.parametrize("renew", [False, True])
async def test_a_keeper_that_is_closed_while_it_lends_leaves_no_descriptor(
    odd: Odd, monkeypatch: pytest.MonkeyPatch, renew: bool
) -> None:
    start_time = identify(odd.pid).start_time
    keeper = OwnKeeper()
    first = keeper.acquire(odd.pid, start_time)
    first.close()
    keeper.commit(first, "some")
    closing = threading.Thread(target=keeper.close)
    duplicate = fcntl.fcntl

    def close_first(*arguments: Any) -> Any:
        closing.start()
        closing.join(0.2)
        return duplicate(*arguments)

    monkeypatch.setattr(fcntl, "fcntl", close_first)
    keeper.acquire(odd.pid, start_time, renew=renew).close()
    closing.join()
    assert "anon_inode:[userfaultfd]" not in open_fds()
    with pytest.raises(HolderError, match="closed"):
        keeper.acquire(odd.pid, start_time)
    assert "anon_inode:[userfaultfd]" not in open_fds()


async def test_a_keeper_that_has_no_descriptor_to_lend_keeps_what_it_can_close(
    odd: Odd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_arguments: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    keeper = OwnKeeper()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", too_many)
        with pytest.raises(OSError, match="Too many"):
            keeper.acquire(odd.pid, identify(odd.pid).start_time)
    keeper.close()
    assert "anon_inode:[userfaultfd]" not in open_fds()


async def test_two_dumps_of_one_process_at_once_are_refused(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    keeper = HolderKeeper()
    try:
        start_time = held_targets()[0]["start_time"]
        lease = keeper.acquire(odd.pid, start_time)
        for call in (chain.predump, chain.dump):
            with pytest.raises(HolderError, match=f"another incdump is dumping process {odd.pid}"):
                await call()
        with pytest.raises(HolderError, match="another incdump"):
            await incdump.untrack(odd.pid)
        assert len(os.listdir(images_root)) == 1
        lease.close()
    finally:
        keeper.close()
    odd.do(f"poke {address} 4 2")
    until(lambda: not held_targets()[0]["busy"])
    await chain.predump()  # the loan that was never committed: nobody knows what it took
    assert not chain.last.incremental
    await chain.prove()


async def test_of_two_dumps_started_together_at_least_one_is_right(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("anon 512")
    odd.do(f"fill {address} 512 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    parent = chain.last.images_dir
    for n in range(5):
        odd.do(f"poke {address} 40 {n}")
        calls = [incdump.predump(odd.pid, images_root / f"{n}{k}", parent=parent) for k in "abc"]
        results = await asyncio.gather(*calls, return_exceptions=True)
        good = [r for r in results if isinstance(r, incdump.DumpResult)]
        assert good
        assert all(isinstance(r, (incdump.DumpResult, HolderError)) for r in results), results
        parent = good[-1].images_dir
        chain.rounds.append(good[-1])
    await chain.prove()


def shout(data: bytes) -> None:
    """Send the holder a datagram that it does not expect; it may hang up."""
    sock = connect()
    assert sock is not None
    with sock, contextlib.suppress(OSError):
        sock.settimeout(5)
        sock.send(data)
        sock.recv(65536)


async def test_nonsense_does_not_end_it(odd: Odd, images_root: Path) -> None:
    chain = Chain(odd, images_root)
    await chain.predump()
    pid = holder_pid()
    words = (
        b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"do": 5}', b'{"do": "acquire"}', b'{"do": "commit"}',
        b'{"do": "acquire", "pid": "x", "start_time": 1}', b'{"do": "acquire", "pid": -1, "start_time": 1}',
        b'{"do": "acquire", "pid": 1e99, "start_time": 1}', b'{"do": "forget", "pid": []}', b'{"do": "forget"}',
        b'{"do": "acquire", "pid": 99999999999999999999, "start_time": 1}',
        b'{"do": "renew", "pid": 2, "start_time": 1}', b'{"do": "commit", "pid": %d, "generation": "x"}' % odd.pid,
        b'{"do": "hello"' + b" " * 100_000 + b"}", b"[" * 60_000,
    )  # fmt: skip
    for word in words:
        shout(word)
    assert holder_pid() == pid
    assert tracked_pids() == [odd.pid]
    await chain.predump()
    assert chain.last.incremental
    await chain.prove()


async def test_descriptors_that_are_sent_to_it_are_not_kept(odd: Odd, images_root: Path) -> None:
    await incdump.predump(odd.pid, images_root / "1")
    pid = holder_pid()
    assert pid is not None
    before = len(open_fds(pid))
    for _ in range(10):
        sock = connect()
        assert sock is not None
        with sock, open("/dev/null", "rb") as null:
            for message in (b'{"do": "hello"}', b"nonsense"):
                with contextlib.suppress(OSError):
                    socket.send_fds(sock, [message], [null.fileno()] * 3)
                    sock.recv(65536)
    until(lambda: len(open_fds(pid)) <= before)


async def test_only_its_user_can_reach_it(odd: Odd, images_root: Path) -> None:
    require_root()
    await incdump.predump(odd.pid, images_root / "1")
    path = Path(wire.socket_path())
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    child = os.fork()
    if not child:
        sock = connect()  # connected as root, and handed on: it goes by who connects
        os.seteuid(65534)
        try:
            wire.receive(sock) if sock is None else connect()
        except HolderError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


async def test_its_death_takes_all_protection_off(odd: Odd, images_root: Path) -> None:
    await incdump.predump(odd.pid, images_root / "1")
    assert watched_vmas(odd.pid)
    kill_holder()
    assert watched_vmas(odd.pid) == []
    odd.do("ping")


async def test_sigterm_ends_it(odd: Odd, images_root: Path) -> None:
    await incdump.predump(odd.pid, images_root / "1")
    pid = holder_pid()
    assert pid is not None
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGTERM)
        wait_readable(pidfd)
    finally:
        os.close(pidfd)
    result = await incdump.predump(odd.pid, images_root / "2", parent="../1")
    assert not result.incremental


TERMINATED = """
import os, random, signal, subprocess, sys, time
from incdump.holder.server import make_tracking_uffd

def spawn():
    busy = subprocess.Popen([sys.executable, "-c", "print(flush=True)\\nwhile True: pass"], stdout=subprocess.PIPE)
    busy.stdout.readline()
    return busy

target, random = spawn(), random.Random(1)
for turn in range(150):
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # as the holder does
        make_tracking_uffd(target.pid, os.pidfd_open(target.pid))
        os._exit(0)
    time.sleep(random.uniform(0.0003, 0.004))
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    if target.poll() is not None:
        sys.exit(f"turn {turn}: the target died of signal {-target.returncode}")
target.kill()
"""


@pytest.mark.timeout(120)
async def test_sigterm_while_it_starts_tracking_harms_no_target() -> None:
    """A register of the target is altered then."""
    done = subprocess.run([sys.executable, "-c", TERMINATED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_it_has_nothing_of_whoever_started_it(odd: Odd, images_root: Path) -> None:
    with contextlib.suppress(AssertionError):
        kill_holder()
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        await incdump.predump(odd.pid, images_root / "1")
        pid = holder_pid()
        assert pid is not None
        os.close(writer)
        wait_readable(reader)  # end of file: nobody else has the other end
        assert os.read(reader, 1) == b""
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) != os.getsid(0)
        names = {os.readlink(f"/proc/{pid}/fd/{n}") for n in range(3)}
        assert names <= {"/dev/null", wire.log_path(wire.runtime_dir())}
    finally:
        os.close(reader)
