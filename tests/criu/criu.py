"""The real CRIU, for tests: fetched once (tests/criu/fetch.py), and run on targets that it can dump whole.

CRIU restores a process with the pid that it had, and looks up its mounts. So a test that dumps and restores has a
process table and mounts of its own::

    @in_own_namespaces
    def test_something(images_root: Path) -> None:
        with restorable_churn(images_root, seed=7) as target:
            dump(target.pid, images)      # it is gone now
            target.reap()                 # and its pid is free
            restore(images)
            target.check()
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.criu.fetch import fetch_criu
from tests.guest.debian import CannotFetchError
from tests.targets import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RESTORABLE_OPS = "all,-guard,-hugetlb,-sysv"
"""What churn can do and CRIU can put back."""

CHAINABLE_OPS = "write,kwrite,zero,map,free,brk,stack"
"""What churn can do between CRIU's own dumps of a chain: of a tree that does everything CRIU finds clean pages that no
parent has, and gives up."""

_SECONDS = 300


TRIES_AGAIN = "Zombies with threads"
"""What CRIU says of a thread that exits in the very moment of its freeze; it works a moment later."""


class CriuFailed(AssertionError):
    """CRIU did not end with 0; the text has what it logged as errors."""


@functools.cache
def _criu() -> Path | str:
    if os.geteuid():
        return "needs root, for criu"
    try:
        criu = fetch_criu()
    except CannotFetchError as error:
        return f"needs criu: {error}"
    with tempfile.TemporaryDirectory() as name:
        checked = subprocess.run([criu, "check"], cwd=name, capture_output=True, text=True, check=False)
    return criu if checked.returncode == 0 else f"criu does not work here: {checked.stderr.strip()[-400:]}"


def criu_path() -> Path:
    """The program; skips the test, by name, where it cannot be had or does not work on this kernel."""
    found = _criu()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def criu(action: str, images: Path, *options: str | os.PathLike[str], log: str | None = None) -> None:
    """Run ``criu ACTION`` with an images dir.

    :param log: name of the log in the images dir; None: ``ACTION.log``.
    :raises CriuFailed: with the errors that it logged.
    """
    log = log or f"{action}.log"
    images.mkdir(mode=0o700, exist_ok=True)
    command = [criu_path(), action, "--images-dir", images, "--log-file", log, "-v4", *options]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    if done.returncode:
        text = (images / log).read_text(errors="replace") if (images / log).exists() else ""
        errors = [line for line in text.splitlines() if "Error" in line] or text.splitlines()[-5:]
        raise CriuFailed("\n".join([f"criu {action}: exit status {done.returncode}", *errors, done.stderr.strip()]))


def dump(pid: int, images: Path, *options: str | os.PathLike[str]) -> None:
    """``criu dump`` of a tree; it is gone afterwards unless ``--leave-running`` or ``--leave-stopped`` is given.

    :raises CriuFailed: with the errors that it logged.
    """
    try:
        criu("dump", images, "--tree", str(pid), *options)
    except CriuFailed as error:
        if TRIES_AGAIN not in str(error):
            raise
        criu("dump", images, "--tree", str(pid), *options)


def restore(images: Path, *options: str | os.PathLike[str]) -> None:
    """``criu restore`` of a tree, which then runs on as an orphan.

    :raises CriuFailed: with the errors that it logged.
    """
    criu("restore", images, "--restore-detached", *options)


@contextlib.contextmanager
def page_server(images: Path, *options: str) -> Iterator[int]:
    """CRIU's page server for one dump, over when that is; yields its port.

    :raises CriuFailed: it did not end with 0.
    """
    images.mkdir(mode=0o700, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listening, told = os.pipe()
    place = ("--images-dir", images, "--log-file", "page-server.log", "-v4", "--status-fd", str(told))
    command: list[str | os.PathLike[str]] = [
        criu_path(),
        "page-server",
        *place,
        "--address",
        "127.0.0.1",
        "--port",
        str(port),
        *options,
    ]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[told])
    os.close(told)
    try:
        with open(listening, "rb") as pipe:
            pipe.read(1)  # a byte when it listens, none when it has ended
        yield port
        if server.wait(_SECONDS):
            raise CriuFailed(f"criu page-server: exit status {server.returncode}")
    finally:
        server.kill()
        server.wait()


class RestorableTarget(build.Target):
    """A target that a checkpoint can hold whole, and that goes on listening after its restore.

    It has a named pipe for its commands and files for its words instead of pipes to the test.
    """

    def __init__(self, command: Sequence[str | os.PathLike[str]], root: Path) -> None:
        """Start a program and wait for its line ``ready PID``.

        :param root: a directory that outlives the target; its own is made there.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="target-", dir=root, ignore_cleanup_errors=True)
        self.directory = Path(self._directory.name)
        self._buffer = b""
        fifo, words, errors = (self.directory / name for name in ("commands", "words", "errors"))
        os.mkfifo(fifo, 0o600)
        self._commands = os.open(fifo, os.O_RDWR | os.O_CLOEXEC)  # both ways: there is no end of file for anybody
        self._errors = errors.open("w+b")
        self._words = words.open("w+b")
        reader = os.open(fifo, os.O_RDWR | os.O_CLOEXEC)
        with words.open("ab") as output, errors.open("ab") as complaints:
            self.process = subprocess.Popen(
                [os.fspath(part) for part in command],
                stdin=reader,
                stdout=output,
                stderr=complaints,
                cwd=self.directory,
                start_new_session=True,
            )
        os.close(reader)
        self.pid = self.process.pid
        try:
            ready = self._line(60)
            if ready != f"ready {self.pid}":
                raise build.BadTargetError(f"target said {ready!r} instead of ready")
        except BaseException:
            self.close()
            raise

    def alive(self) -> bool:
        """Whether the root process runs, the one that was started or a restored one."""
        return exists(self.pid)

    def reap(self, timeout: float = 60) -> None:
        """After a checkpoint that ended the tree: free its pids, and those of orphans, which keep the root's as theirs.

        Only as process 1, whose children the orphans are.
        """
        assert os.getpid() == 1
        self.process.wait(timeout)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)

    def send(self, text: str) -> None:
        """Send a command without waiting for the answer."""
        os.write(self._commands, text.encode() + b"\n")

    def _line(self, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            was_alive = self.alive()  # asked first: its last words come before its end
            got = self._words.read()
            self._buffer += got
            if not got:
                if not was_alive:
                    raise build.BadTargetError(f"target {self.pid} has ended: {self.errors()}")
                if time.monotonic() > deadline:
                    raise build.BadTargetError(f"target {self.pid} did not answer within {timeout} s; {self.errors()}")
                time.sleep(0.002)
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def quit(self) -> None:
        """Let it check everything, end its children and exit."""
        self.send("quit")
        while self._line(120.0) != "ok quit":
            pass
        until(lambda: not self.alive(), 60)

    def close(self) -> None:
        """Kill the tree, and reap its root if that is still our child."""
        for pid in self.tree() if self.alive() else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        os.close(self._commands)
        self._words.close()
        self._errors.close()
        self._directory.cleanup()


def revive(target: RestorableTarget, images: Path) -> None:
    """Restore a target that a checkpoint has ended; it finds all of its memory as it was."""
    target.reap()
    restore(images)
    target.check()


def restorable_churn(
    root: Path,
    *,
    seed: int = 1,
    threads: int = 2,
    processes: int = 1,
    mib: int = 16,
    ops: str = RESTORABLE_OPS,
    dirty_rate: float = 0,
    under: Sequence[str | os.PathLike[str]] = (),
) -> RestorableTarget:
    """A churn target, at rest until told to work.

    :param root: see `RestorableTarget`.
    :param dirty_rate: see `build.churn`.
    :param under: a program, and its arguments, that becomes the target.
    """
    command = [
        *map(str, under),
        str(build.build("churn")),
        f"--seed={seed}",
        f"--threads={threads}",
        f"--processes={processes}",
    ]
    return RestorableTarget([*command, f"--mib={mib}", f"--ops={ops}", f"--dirty-rate={dirty_rate}", "--dir=."], root)


def exists(pid: int) -> bool:
    """Whether there is a process of this pid that has not exited."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def until(holds: Callable[[], bool], seconds: float) -> None:
    """Wait for something that cannot be awaited."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)
