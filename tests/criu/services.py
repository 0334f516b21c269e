"""Real programs as targets: a service with a directory of its own, checkpointed on a chain and brought back again.

The programs are Debian's, unpacked into the tests' cache (tests/guest/debian.py): nothing is installed, and no service
is started but by a test. What they are asked, and what they have promised, is the tests' own business.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.command import incdump
from tests.criu.criu import TRIES_AGAIN, exists, until
from tests.criu.fetch import fetch_criu_for_sockets, fetch_program
from tests.guest.debian import CannotFetchError
from tests.oracle import tree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

HOST = "127.0.0.1"
TCP_LIVES_ON = ("--tcp-established", "--network-lock", "nftables")
"""Options for CRIU: connections are restored, and nobody notices that nobody was there."""


@functools.cache
def program(package: str, path: str) -> Path:
    """A program of a Debian package; skips the test, by name, where it cannot be had."""
    try:
        return fetch_program(package, path)
    except CannotFetchError as error:
        pytest.skip(f"needs {package}: {error}")


@functools.cache
def criu_for_sockets() -> Path:
    """A CRIU that can dump TCP sockets on this kernel; skips the test, by name, where it cannot be had."""
    try:
        return fetch_criu_for_sockets()
    except CannotFetchError as error:
        pytest.skip(f"needs criu: {error}")


class Load(threading.Thread):
    """What keeps a service busy from outside: `work`, again and again, in a thread of its own.

    :ivar error: what made it give up.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._go_on = threading.Event()
        self._rests = threading.Event()

    def work(self) -> None:
        """Ask the service for something, and note or check the answer."""
        raise NotImplementedError

    def run(self) -> None:
        """Work until told to rest, and again."""
        try:
            while True:
                if not self._go_on.is_set():
                    self._rests.set()
                    self._go_on.wait()
                self.work()
        except BaseException as error:
            self.error = error
            self._rests.set()

    def begin(self) -> None:
        """Work from now on."""
        self._rests.clear()
        self._go_on.set()
        if not self.is_alive():
            self.start()

    def rest(self) -> None:
        """Begin nothing more from now on."""
        self._go_on.clear()

    def until_rest(self) -> None:
        """Wait until everything that was begun is answered."""
        assert self._rests.wait(120), "an answer is missing"
        assert self.error is None, self.error


class Service:
    """A process tree that serves, in a session of its own, and the chain of its images.

    :ivar pid: the root's pid, before a checkpoint and after its restore.
    :ivar directory: its own, which outlives it.
    :ivar log: what it wrote to its standard output and error.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        directory: Path,
        *,
        criu_options: Sequence[str] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        """Start it.

        :param directory: its working directory, which is there already.
        :param criu_options: for CRIU's dumps and restores.
        """
        self.directory = directory
        self.log = directory / "log"
        self._criu_options = criu_options
        self._images = Path(tempfile.mkdtemp(prefix="images-", dir=directory.parent))
        self._levels = 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [os.fspath(part) for part in command],
                stdin=stdin,
                stdout=log,
                stderr=log,
                cwd=directory,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self.tree():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._process.returncode = 0  # Popen has not waited for it
        if kind is not None:
            print(self.log.read_text(errors="replace")[-4000:], flush=True)

    def tree(self) -> list[int]:
        """The pids of the whole tree; empty if the root is gone."""
        return list(tree(self.pid).values()) if Path(f"/proc/{self.pid}").exists() else []

    def until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for something that it, or whoever asks it, is about to do."""

        def holds_or_ended() -> bool:
            alive = exists(self.pid)  # asked first: what it has done before its end counts
            if holds():
                return True
            assert alive, "it has ended"
            return False

        until(holds_or_ended, seconds)

    def until_listening(self, port: int, host: str = HOST) -> None:
        """Wait until it takes connections."""

        def listens() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex((host, port)) == 0

        self.until(listens)

    # --- the chain ----------------------------------------------------------------------------------------------------

    def predump(self) -> dict[str, Any]:
        """Pre-dump it on the chain, by the command; returns what that said."""
        return self._dump("predump")

    def checkpoint(self, way: str = "auto") -> dict[str, Any]:
        """End the chain with a checkpoint, by the command: the tree is gone then, and its pids are free.

        :param way: how CRIU is kept from the memory.
        """
        pids = self.tree()
        done = self._dump("checkpoint", "--way", way, "--criu", criu_for_sockets(), "--", *self._criu_options)
        for pid in pids:
            self._reap(pid)
        return done

    def restore(self) -> dict[str, Any]:
        """Bring it back from the newest images, by the command; returns what that said."""
        images = self._images / str(self._levels)
        done = incdump("restore", "-D", images, "-d", "--json", "--criu", criu_for_sockets(), "--", *self._criu_options)
        assert done.code == 0, done
        assert done.json["pid"] == self.pid
        return done.json

    def _dump(self, kind: str, *options: object) -> dict[str, Any]:
        parent = ("--prev-images-dir", f"../{self._levels}") if self._levels else ()
        tracker = ("--tracker", os.environ.get("INCDUMP_TEST_TRACKER", "auto"))
        images = self._images / str(self._levels + 1)
        command = (kind, "-t", self.pid, "-D", images, *parent, *tracker, "--json", *options)
        done = incdump(*command)
        if done.code and TRIES_AGAIN in done.err:
            done = incdump(*command)
        assert done.code == 0, done
        self._levels += 1
        print(describe(kind, done.json), flush=True)
        return done.json

    def _reap(self, pid: int) -> None:
        """Free a pid, as process 1: of a child or of an orphan, which becomes ours when its own parent is gone."""
        assert os.getpid() == 1

        def gone() -> bool:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            return not Path(f"/proc/{pid}").exists()

        self._process.returncode = 0
        until(gone, 60)


def describe(kind: str, result: dict[str, Any]) -> str:
    """A round in a line: how much was written of how much, and how long the tree stood still."""
    written, scanned = (result[name] / 256 for name in ("pages_written", "pages_scanned"))
    steps = result["checkpoint"] or {}
    times = {"frozen": result["frozen_time"], "in all": result["total_time"]}
    times |= {name: value for name, value in steps.items() if name not in ("way", "why", "mappings")}
    return (
        f"{kind} {steps.get('way', '')} ({result['tracker']}): {written:.1f} of {scanned:.1f} MiB, "
        f"{len(result['pids'])} processes, ms: {', '.join(f'{name} {time / 1000:.0f}' for name, time in times.items())}"
    )
