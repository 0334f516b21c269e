"""Whoever has stopped a process waits for nothing that only this process could do, or not for long.

The target serves a file system (bindfs, a real one in user space), or reads a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump.proc.served import server_of
from incdump.proc.tree import process_tree
from tests.command import incdump as command
from tests.command import is_untouched, read_until, start, wait
from tests.criu.criu import criu_path, until
from tests.criu.services import program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

SOON = 20.0
"""Seconds; a limit of the dump is 1 in these tests."""


class Server:
    """A process that serves a file system.

    :ivar pid: its own.
    :ivar mount: where the file system is.
    """

    def __init__(self, directory: Path) -> None:
        self.mount, behind = directory / "served", directory / "behind"
        self.mount.mkdir()
        behind.mkdir()
        self.process = subprocess.Popen([program("bindfs", "usr/bin/bindfs"), "-f", behind, self.mount])
        self.pid = self.process.pid
        until(lambda: self.process.poll() is not None or os.path.ismount(self.mount), 30)
        assert self.process.poll() is None

    def is_fine(self) -> bool:
        """Whether it runs, untouched, and answers."""
        (self.mount / "asked").write_text("answer")
        return (self.mount / "asked").read_text() == "answer" and is_untouched(self.pid)

    def end(self) -> None:
        """Unmount and end it."""
        subprocess.run(["umount", "--lazy", self.mount], check=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.end()


def waits_in(pid: int) -> set[str]:
    """Where in the kernel the threads of a process wait."""
    found = set()
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{tid}/wchan", encoding="ascii") as file:
            found.add(file.read())
    return found


def fails_soon(job: Callable[[], Awaitable[object]], kind: type[BaseException]) -> BaseException:
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        anyio.run(job)
    assert time.monotonic() - began < SOON
    return caught.value


@pytest.mark.parametrize("kind", ["dump", "checkpoint", "check"])
def test_images_are_not_written_where_the_stopped_target_serves(server: Server, images_root: Path, kind: str) -> None:
    images = server.mount / "deeper" / "1"
    if kind == "check":
        assert command("predump", "-t", server.pid, "-D", images).code == 0, "it runs on meanwhile"
        done = command("check", images, "--against", server.pid)
    else:
        done = command(kind, "-t", server.pid, "-D", images, *(["--criu", criu_path()] if kind == "checkpoint" else []))
        assert not images.exists()
    assert done.code == 3, done
    assert f"process {server.pid}, which is to be stopped, serves itself" in done.err
    assert server.is_fine()
    assert command("untrack", "--all").code == 0


def test_a_file_system_that_another_process_serves_is_like_any_other(server: Server, target_pid: int) -> None:
    assert server_of(server.mount, process_tree(target_pid)) is None
    assert server_of(server.mount, process_tree(server.pid)) == server.pid
    assert server_of("/", process_tree(server.pid)) is None
    assert command("dump", "-t", target_pid, "-D", server.mount / "1").code == 0


@pytest.fixture
def target_pid() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


def test_a_dump_that_waits_for_its_target_lets_it_run_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it cannot be known beforehand who serves a file system."""
    monkeypatch.setattr("incdump.engine.dump.refuse_served", lambda *_: None)
    options = incdump.DumpOptions(stall_timeout=1)
    images = server.mount / "1"
    error = fails_soon(partial(incdump.dump, server.pid, images, options=options), incdump.StopStalled)
    assert f"while process {server.pid} stood still, so it was let run on" in str(error)
    assert not images.exists()
    assert server.is_fine()


def test_a_comparison_that_waits_for_its_target_lets_it_run_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    images = server.mount / "1"
    assert command("predump", "-t", server.pid, "-D", images).code == 0
    monkeypatch.setattr("incdump.engine.check.refuse_served", lambda *_: None)
    fails_soon(partial(incdump.check_against, images, server.pid, stall_timeout=1), incdump.StopStalled)
    assert server.is_fine()
    assert command("untrack", "--all").code == 0


def test_cancelling_a_dump_that_waits_for_its_target_ends_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("incdump.engine.dump.refuse_served", lambda *_: None)
    images = server.mount / "1"

    async def cancelled() -> None:
        with anyio.move_on_after(2) as scope:
            await incdump.dump(server.pid, images, options=incdump.DumpOptions(stall_timeout=600))
        assert scope.cancelled_caught
        raise TimeoutError

    fails_soon(cancelled, TimeoutError)
    assert not images.exists()
    assert server.is_fine()


@pytest.mark.parametrize("kind", ["dump", "checkpoint"])
def test_who_writes_to_a_pipe_that_the_stopped_target_reads_lets_it_run_on(images_root: Path, kind: str) -> None:
    """The event loop itself waits, as for a terminal that is served by the target."""
    reading, writing = os.pipe()
    to = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    reader = subprocess.Popen(["cat"], stdin=reading, start_new_session=True, **to)
    os.close(reading)

    def chat(_step: str, stats: incdump.DumpStats) -> None:
        if stats.pages_written:
            os.write(writing, bytes(1 << 20))

    try:
        options = incdump.DumpOptions(stall_timeout=1)
        job = partial(incdump.dump, reader.pid, images_root / "1", options=options, progress=chat)
        if kind == "checkpoint":
            job = partial(
                incdump.checkpoint, reader.pid, images_root / "1", options=options, progress=chat, criu=str(criu_path())
            )
        fails_soon(job, incdump.StopStalled)
        assert not (images_root / "1").exists()
        assert all(is_untouched(task.pid) for task in process_tree(reader.pid))
    finally:
        os.close(writing)
        reader.wait()


def test_the_third_signal_ends_a_command_whatever_it_waits_for(server: Server, target_pid: int) -> None:
    """The file system does not answer at all: its server is stopped by somebody else."""
    os.kill(server.pid, signal.SIGSTOP)
    dumping = start("dump", "-t", target_pid, "-D", server.mount / "1")
    try:
        until(lambda: "request_wait_answer" in waits_in(dumping.pid), 30)
        for count in range(3):
            dumping.send_signal(signal.SIGTERM)
            if count == 1:
                read_until(dumping.stderr, b"once more to leave it undone")
            else:
                time.sleep(0.2)
        assert wait(dumping, SOON).code == 128 + signal.SIGTERM
        assert is_untouched(target_pid)
    finally:
        os.kill(server.pid, signal.SIGCONT)
