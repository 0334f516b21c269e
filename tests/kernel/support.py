"""What the tests of whole chains have in common: rounds on a target, and the proof that the last one is right.

`Chain` makes the rounds, by the functions (with the holder) or by a `incdump.Session`; `Chain.prove` leaves the tree
stopped after a last dump, has the oracle compare every page, lets the tree go on, and has the target check itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump.engine.trackers import needs
from incdump.holder.client import connect, held_targets
from incdump.holder.wire import receive, send
from incdump.model.options import DumpOptions
from tests import oracle
from tests.targets import build

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from typing import Any

    from incdump.model.options import TrackerName
    from incdump.model.stats import DumpResult
    from tests.targets.build import Target

VICTIMS = Path(__file__).parent / "victims"


def require_tracker(tracker: TrackerName) -> None:
    """Skip the test, by name, where a tracker does not work."""
    for feature in needs(tracker):
        if not feature.works:
            pytest.skip(f"tracker {tracker} does not work here: {feature.what}: {feature.why}")


def require_root() -> None:
    """Skip the test where it has no root."""
    if os.geteuid():
        pytest.skip("needs root")


def of_forced_tracker(options: DumpOptions) -> DumpOptions:
    """The same with ``$INCDUMP_TEST_TRACKER`` as the tracker where a test leaves the choice to incdump."""
    forced = os.environ.get("INCDUMP_TEST_TRACKER")
    return replace(options, tracker=forced) if forced and options.tracker == "auto" else options  # type: ignore[arg-type]


class Chain:
    """Rounds of dumps of one target, each building on the one before.

    :ivar rounds: what came of each.
    """

    def __init__(
        self, target: Target, root: Path, options: DumpOptions | None = None, session: incdump.Session | None = None
    ) -> None:
        self.target = target
        self.root = root
        self.options = of_forced_tracker(options or DumpOptions())
        self.session = session
        self.rounds: list[DumpResult] = []
        self.attempts = 0

    @property
    def last(self) -> DumpResult:
        """The newest round."""
        return self.rounds[-1]

    def next_dir(self) -> Path:
        """A directory that no round has used."""
        self.attempts += 1
        return self.root / f"{self.attempts:03}"

    async def round(self, kind: str, options: DumpOptions | None = None, parent: str | None = "last") -> DumpResult:
        """Another round.

        :param kind: ``"predump"`` or ``"dump"``.
        :param parent: ``"last"``: the last round; None: a full one; else as the functions take it.
        """
        options = of_forced_tracker(options or self.options)
        where = self.next_dir()
        if parent == "last":
            parent = os.path.relpath(self.last.images_dir, where) if self.rounds else None
        if self.session is None:
            call = incdump.predump if kind == "predump" else incdump.dump
            if options.track_for is None:  # a dump is to have another on top of it, too
                options = replace(options, track_for=3600)
            result = await call(self.target.pid, where, parent=parent, options=options)
        elif kind == "predump":
            result = await self.session.predump(where, parent=parent)
        else:
            result = await self.session.dump(where, parent=parent, options=options)
        self.rounds.append(result)
        return result

    async def predump(self, options: DumpOptions | None = None, parent: str | None = "last") -> DumpResult:
        """A pre-dump."""
        return await self.round("predump", options, parent)

    async def dump(self, options: DumpOptions | None = None, parent: str | None = "last") -> DumpResult:
        """A dump."""
        return await self.round("dump", options, parent)

    async def dump_stopped(self, options: DumpOptions | None = None) -> dict[int, int]:
        """A dump that leaves the tree stopped; returns its pids, as `oracle.compare` wants them.

        A thread in vfork(2) does not stop, it hangs on its child: then the tree goes on a bit, and is dumped once more.
        """
        while True:
            await self.dump(replace(options or self.options, afterwards="stopped"))
            pids = oracle.tree(self.target.pid)
            if not any("D" in oracle.states(pid) for pid in pids.values()):
                return pids
            carry_on(pids.values())

    async def prove(self, options: DumpOptions | None = None, *, check: bool = True) -> oracle.Report:
        """A last dump, compared page by page with the tree as it stands; then the tree goes on and checks itself."""
        pids = await self.dump_stopped(options)
        try:
            report = oracle.compare(self.last.images_dir, pids)
            incdump.check(self.last.images_dir)
        finally:
            carry_on(pids.values())
        assert report.ok, report
        assert set(pids.values()) == set(self.last.pids)
        stats = self.last.stats
        assert sum(p.stat().st_size for p in Path(self.last.images_dir).glob("pages-*.img")) == stats.bytes_written
        assert_untouched(self.target)
        if check:
            self.target.check()
        return report


def carry_on(pids: Iterator[int] | object) -> None:
    """SIGCONT processes, children before their parents know."""
    for pid in reversed(list(pids)):  # type: ignore[call-overload]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def same_when_stopped(target: Target, images: str | Path) -> oracle.Report:
    """Stop the tree by SIGSTOP, compare it with images, let it go on."""
    with oracle.stopped_tree(target.pid) as pids:
        return oracle.compare(images, pids)


def rest(target: Target) -> None:
    """Wait until nothing of a tree runs: it has answered before its threads have gone to sleep."""

    def sleeps() -> bool:
        for pid in target.tree():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if not oracle.states(pid) <= set("SDTtZX"):
                    return False
        return True

    until(lambda: sleeps() and sleeps())


def assert_untouched(target: Target) -> None:
    """Every process of the tree runs: not stopped, not traced."""
    for pid in target.tree():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert not oracle.states(pid) & set("tT"), f"{pid} is stopped"
            assert "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text()


def watched_vmas(pid: int) -> list[str]:
    """The mappings of a process that some userfaultfd write-protects."""
    return [f"{v.start:x}-{v.end:x} {v.name}" for v in oracle.read_vmas(pid) if "uw" in v.flags]


def open_fds(pid: int | str = "self") -> list[str]:
    """What the descriptors of a process are."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


# --- cancelling -------------------------------------------------------------------------------------------------------


async def by_scope(work: Coroutine[Any, Any, object], seconds: float) -> bool:
    """Cancel by an anyio scope; whether the work came to its end."""
    with anyio.move_on_after(seconds):
        await work
        return True
    return False


async def by_timeout(work: Coroutine[Any, Any, object], seconds: float) -> bool:
    """Cancel by asyncio.timeout."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        return False
    return True


async def by_task(work: Coroutine[Any, Any, object], seconds: float) -> bool:
    """Cancel by task.cancel(), twice."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait((task,), timeout=seconds)
    if not done:
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


WAYS = (by_scope, by_timeout, by_task)
"""Each cancels some work after so many seconds, and tells whether it came to its end."""


# --- the holder -------------------------------------------------------------------------------------------------------


def holder_pid() -> int | None:
    """The pid of the holder that runs now, or None."""
    sock = connect()
    if sock is None:
        return None
    with sock:
        send(sock, {"do": "hello"})
        answer, _ = receive(sock)
        return None if answer is None else int(answer["pid"])


def kill_holder() -> int:
    """SIGKILL the holder, and wait until it is gone."""
    pid = holder_pid()
    assert pid is not None, "no holder runs"
    kill_and_wait(pid)
    return pid


def kill_and_wait(pid: int) -> None:
    """SIGKILL a process that need not be a child, and wait until it is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        wait_readable(pidfd)
    finally:
        os.close(pidfd)


def wait_readable(fd: int, seconds: float = 20) -> None:
    """Wait for a descriptor (a pidfd: for its process's end)."""
    import select

    assert select.select([fd], [], [], seconds)[0], f"nothing came within {seconds} s"


def tracked_pids() -> list[int]:
    """What the holder keeps."""
    return [row["pid"] for row in held_targets()]


# --- the victim `odd`: memory of every unusual kind, on demand -----------------------------------------------------


def build_victim(name: str) -> Path:
    """Compile victims/NAME.c."""
    try:
        build.SOURCES[name] = (os.path.relpath(VICTIMS / f"{name}.c", build.HERE),)
        build.HEADERS[name] = ()
        return build.build(name)
    except build.NoCompilerError as error:
        pytest.skip(str(error))


class Odd(build.Target):
    """victims/odd.c: every command makes or changes some unusual memory; see there."""

    def __init__(self, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        super().__init__([*prefix, str(build_victim("odd")), *arguments])

    def do(self, text: str) -> list[int]:
        """A command; its numbers. Skips the test when the kernel cannot do it. It rests then."""
        answer = self.command(text)
        if answer.startswith("no "):
            pytest.skip(f"not on this machine: {text}: {answer[3:]}")
        assert answer.startswith("ok"), answer
        rest(self)
        return [int(word, 0) for word in answer.split()[1:]]

    def check(self) -> None:
        """It answers, that is all there is to check."""
        self.do("ping")


@contextlib.contextmanager
def swap_file(directory: Path, mib: int = 64) -> Iterator[None]:
    """A swap file for as long as the context lasts; skips the test where there can be none."""
    path = directory / "swap"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, mib << 20)
    path.chmod(0o600)
    try:
        subprocess.run(["mkswap", str(path)], check=True, capture_output=True)
        subprocess.run(["swapon", str(path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        path.unlink()
        pytest.skip(f"needs a swap file: {error}")
    try:
        yield
    finally:
        subprocess.run(["swapoff", str(path)], check=True, capture_output=True)
        path.unlink()


def until(holds: object, seconds: float = 120) -> None:
    """Wait for something in /proc that cannot be awaited."""
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)
