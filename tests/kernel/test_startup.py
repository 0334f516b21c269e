"""What a command has loaded when it first turns to its target: nothing that it may not need."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from incdump.errors import NoSuchTarget
from tests.command import ROOT, environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

NO_SUCH_PID = (1 << 22) + 1
"""Beyond the highest pid that Linux can be told to use."""

HEAVY = (
    "rich",
    "aiofiles",
    "google.protobuf",
    "hypothesis",
    "pytest",
    "unittest",
    "multiprocessing",
    "importlib.metadata",
    "email",
    "http",
    "xml",
    "sqlite3",
    "numpy.random",
    "numpy.testing",
    "incdump.cli.check",
    "incdump.cli.progress",
    "incdump.cli.text",
    "incdump.cli.doctor",
    "incdump.images._pb",
)

# Runs a command; says what is loaded when the engine is called, or when the command has ended.
HOOK = """
import os, sys
from incdump.cli.main import main
import incdump.cli.dumping as dumping
when, arguments = sys.argv[1], sys.argv[2:]

def tell():
    sys.stdout.write(" ".join(sys.modules) + "\\n" + os.environ["OPENBLAS_NUM_THREADS"] + "\\n")
    sys.stdout.flush()
    os._exit(0)

engine = dumping._engine
def hooked(*args):
    found = engine(*args)
    async def stop(*args, **kwargs):
        tell()
    return stop if when == "called" else found
dumping._engine = hooked
dumping.print_json = lambda value: None
code = main(arguments)
assert code == 0, code
tell()
"""


def modules(when: str, *arguments: object) -> set[str]:
    environ = {name: value for name, value in environment().items() if name != "OPENBLAS_NUM_THREADS"}
    command = [sys.executable, "-c", HOOK, when, *map(str, arguments)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=ROOT, check=True)
    names, threads = done.stdout.splitlines()
    assert threads == "1"
    return set(names.split())


def loaded(names: set[str]) -> list[str]:
    return [heavy for heavy in HEAVY if heavy in names]


@pytest.fixture
def target() -> Iterator[int]:
    """The pid of a process that sleeps."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["predump", "dump"])
def test_nothing_heavy_is_loaded_before_the_engine_is_called(kind: str, target: int) -> None:
    names = modules("called", kind, "-t", target)
    assert "incdump.engine.dump" in names
    assert loaded(names) == []


@pytest.mark.parametrize("kind", ["predump", "dump", "checkpoint"])
def test_a_process_that_is_not_there_is_refused_before_the_engine_is_loaded(kind: str) -> None:
    code = (
        "import sys; from incdump.cli.main import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, kind, "-t", str(NO_SUCH_PID)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == NoSuchTarget.exit_code
    assert f"there is no process {NO_SUCH_PID}" in done.stderr
    assert not {"numpy", "asyncio", "anyio", "rich"} & set(done.stdout.split())


def test_a_dump_that_nobody_watches_never_loads_rich(images_root: Path, target: int) -> None:
    names = modules("ended", "dump", "-t", target, "-D", images_root / "1", "--json")
    assert "rich" not in names
    assert (images_root / "1" / "inventory.img").exists()


def test_help_loads_neither_numpy_nor_asyncio() -> None:
    code = (
        "import sys; from incdump.cli.main import main; main(['dump', '--help']); print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"numpy", "asyncio", "anyio", "rich"} & set(done.stderr.split())
