"""Fixtures for all tests.

- `churn`, `rewriter`: factories of target processes (tests/targets/build.py); what they started is ended with the test.
- `images_root`: a directory on disk, mode 0700, for images dirs.
- `two_hosts`: network namespaces that a slow link joins (tests/hosts.py); `lossy_hosts`: one that loses packets;
  `switched_hosts`: three, and a switch.
- Every session has a few huge pages for its targets, and its own ``INCDUMP_RUNTIME_DIR`` (where the holder's socket
  is); it fails if a process that it started, directly or not, is left at the end.
- No test leaves a userfaultfd open.
- `rng`: for a test that does things at random; its seed is in the output, ``--seed N`` has it again. `times`: how often
  such a test does them; with ``--long`` ten times as often.
- ``INCDUMP_REQUIRE_ALL=1`` turns skipped tests into failures (tests/require_all.py).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.hosts import LOSSY, joined_hosts, switched_hosts
from tests.huge_pages import at_least
from tests.targets import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.hosts import Host

pytest_plugins = ("pytester", "tests.require_all")

MARK = "INCDUMP_TEST_SESSION"
HUGE_PAGES = 128
"""More than the targets of a test ever have: with an empty pool the kernel kills who writes to a forked page."""


def _take_signals() -> None:
    """Where tests run in the background, these are ignored, and every process that they start would inherit that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


_take_signals()

LONGER = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    """`tests/run --long`, `tests/run --seed N`."""
    parser.addoption("--long", action="store_true", help=f"tests that do things at random do {LONGER} times as many")
    parser.addoption("--seed", type=int, help="the seed of all that is done at random")


@pytest.fixture
def seed(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> int:
    """Of what a test does at random: said in any case, and on the terminal where it goes on for long."""
    given: int | None = request.config.getoption("--seed")
    number = random.SystemRandom().randrange(1, 1 << 30) if given is None else given
    told = f"{request.node.nodeid}: --seed {number}"
    if request.config.getoption("--long"):
        with capsys.disabled():
            print(f"\n{told}")
    print(told)
    return number


@pytest.fixture
def rng(seed: int) -> random.Random:
    """What a test does at random goes by this."""
    return random.Random(seed)


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How often a test does something, of which so many are enough in everyday runs."""
    factor = LONGER if request.config.getoption("--long") else 1
    return lambda number: number * factor


@pytest.fixture(scope="session", autouse=True)
def runtime_dir() -> Iterator[Path]:
    """The session's private INCDUMP_RUNTIME_DIR."""
    with tempfile.TemporaryDirectory(prefix="incdump-run-", ignore_cleanup_errors=True) as name:
        os.environ["INCDUMP_RUNTIME_DIR"] = name
        yield Path(name)
        del os.environ["INCDUMP_RUNTIME_DIR"]


def _environment(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def _marked(mark: str) -> list[int]:
    """Processes that have inherited this session's mark and have not exited."""
    wanted = f"{MARK}={mark}".encode()
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and wanted in _environment(pid)]


def _describe(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode(errors='replace')}"
    return str(pid)


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left(runtime_dir: Path) -> Iterator[None]:
    """Mark what this session starts (the environment is inherited); at the end nothing marked may live on.

    A holder leaves by itself when its last target is gone; it has some seconds for that.
    """
    mark = os.environ[MARK] = uuid.uuid4().hex
    yield
    deadline = time.monotonic() + 10
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    del os.environ[MARK]
    if left:
        text = "; ".join(_describe(pid) for pid in left)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        pytest.fail(f"the tests left processes behind: {text}")


def _userfaultfds() -> int:
    """How many this process has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[userfaultfd]"
    return found


@pytest.fixture(autouse=True)
def no_userfaultfd_is_left() -> Iterator[None]:
    """No test may leave one open: the mappings of its target would be write-protected for as long as the tests run."""
    before = _userfaultfds()
    yield
    assert _userfaultfds() <= before, "the test leaves a userfaultfd open"


def pytest_configure(config: pytest.Config) -> None:
    """Where several processes run tests side by side, the one that starts them keeps the pool of huge pages."""
    if getattr(config.option, "numprocesses", None):
        pool = contextlib.ExitStack()
        pool.enter_context(at_least(2 * HUGE_PAGES))
        config.add_cleanup(pool.close)


@pytest.fixture(scope="session", autouse=True)
def huge_pages() -> Iterator[None]:
    """A few huge pages for targets that want some, where they can be had; the pool is left as it was found."""
    with contextlib.nullcontext() if "PYTEST_XDIST_WORKER" in os.environ else at_least(HUGE_PAGES):
        yield


@pytest.fixture
def images_root() -> Iterator[Path]:
    """An empty directory on disk, mode 0700."""
    with tempfile.TemporaryDirectory(prefix="incdump-images-", dir="/var/tmp") as name:
        yield Path(name)


@pytest.fixture
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """`tests.hosts.joined_hosts`, gone with the test."""
    with joined_hosts() as hosts:
        yield hosts


@pytest.fixture
def lossy_hosts() -> Iterator[tuple[Host, Host]]:
    """The same with a link that is slow to deliver, and loses packets."""
    with joined_hosts(LOSSY) as hosts:
        yield hosts


@pytest.fixture(name="switched_hosts")
def _switched_hosts() -> Iterator[tuple[Host, Host, Host]]:
    """`tests.hosts.switched_hosts`, gone with the test."""
    with switched_hosts() as hosts:
        yield hosts


def _factory(start: Callable[..., build.Target]) -> Iterator[Callable[..., build.Target]]:
    with contextlib.ExitStack() as stack:

        def make(**options: object) -> build.Target:
            try:
                return stack.enter_context(start(**options))
            except build.NoCompilerError as error:
                pytest.skip(str(error))

        yield make


@pytest.fixture
def churn() -> Iterator[Callable[..., build.Target]]:
    """`build.churn`, whose targets end with the test."""
    yield from _factory(build.churn)


@pytest.fixture
def rewriter() -> Iterator[Callable[..., build.Target]]:
    """`build.rewriter`, whose targets end with the test."""
    yield from _factory(build.rewriter)
