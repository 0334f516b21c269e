"""What the benchmarks have in common: their settings, a place for images, targets, and incdump called in three ways.

`Bench.predump` and `Bench.dump` call the library; `Bench.command` runs ``python -m incdump`` and asks the kernel what
it used. Tracking is kept by a holder process of this benchmark's own (a private ``INCDUMP_RUNTIME_DIR``), which ends
with its targets.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

import incdump
from tests.targets.build import Target, rewriter

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent

# The peak of a child's memory counts from before its exec: it is what the parent had in use. So the command is started
# by a small process, not by this one.
_LAUNCHER = """
import json, os, sys, time
out, *command = sys.argv[1:]
began = time.monotonic()
to_file = (os.POSIX_SPAWN_OPEN, 1, out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
pid = os.posix_spawn(command[0], command, os.environ, file_actions=[to_file])
_, status, used = os.wait4(pid, 0)
wall = time.monotonic() - began
code = os.waitstatus_to_exitcode(status)
print(json.dumps({"code": code, "wall": wall, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024}))
"""


class NotHere(Exception):
    """A benchmark cannot run on this machine; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Command:
    """What a run of a command used.

    :ivar code: exit code.
    :ivar wall: seconds from before it was started until it had ended.
    :ivar cpu: seconds of processor time, user and system.
    :ivar peak: the most memory that it had at any moment (VmHWM), bytes.
    :ivar answer: what it printed with ``--json``; empty if it failed.
    """

    code: int
    wall: float
    cpu: float
    peak: int
    answer: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Bench:
    """Settings, and a directory for images.

    :ivar mib: size of the target of `full` and `incremental`; other sizes follow from it.
    :ivar vmas: how many mappings the targets of `readers` have, one number a target.
    :ivar rounds: how many times each contestant is measured.
    :ivar directory: where images go.
    """

    mib: int
    vmas: tuple[int, ...]
    rounds: int
    directory: Path
    _count: int = 0

    def new_dir(self) -> Path:
        """A directory that does not exist yet, for images."""
        self._count += 1
        return self.directory / str(self._count)

    def clear(self) -> None:
        """Remove all images."""
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextmanager
    def target(self, *, mib: int = 0, vmas: int = 0, vma_kib: int = 40) -> Iterator[Target]:
        """A quiet process with incompressible pages; whatever tracks it, and all images, are gone afterwards.

        :raises NotHere: there is not enough memory for it or disk for its images.
        """
        size = mib * MIB + vmas * vma_kib * 1024
        _check_room(size, self.directory)
        with rewriter(mib=mib, vmas=vmas, vma_kib=vma_kib) as target:
            try:
                yield target
            finally:
                self.untrack(target)
                self.clear()

    def predump(
        self, target: Target, parent: incdump.DumpResult | None = None, options: incdump.DumpOptions | None = None
    ) -> incdump.DumpResult:
        """A pre-dump by the library into a new directory."""
        path = self.new_dir()
        above = None if parent is None else parent.images_dir
        return anyio.run(partial(incdump.predump, target.pid, path, parent=above, options=options))

    def dump(self, target: Target, parent: incdump.DumpResult | None = None) -> incdump.DumpResult:
        """A dump by the library into a new directory."""
        path = self.new_dir()
        above = None if parent is None else parent.images_dir
        return anyio.run(partial(incdump.dump, target.pid, path, parent=above))

    def untrack(self, target: Target) -> None:
        """Give up tracking; nothing happens if there is none."""
        with suppress(incdump.IncdumpError):
            anyio.run(incdump.untrack, target.pid)

    def command(self, *arguments: str) -> Command:
        """Run ``python -m incdump ARGUMENTS --json``; whether that failed is told by the result's exit code."""
        done = self.python("-m", "incdump", *arguments, "--json")
        if done.code == 0:
            done.answer.update(json.loads(self._out.read_text()))
        return done

    @property
    def _out(self) -> Path:
        return self.directory / "answer"

    def python(self, *arguments: str) -> Command:
        """Run ``python ARGUMENTS``."""
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(self._out), sys.executable, *arguments]
        done = subprocess.run(
            launcher, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
        )
        return Command(**json.loads(done.stdout))


@contextmanager
def bench(mib: int, vmas: tuple[int, ...], rounds: int, directory: str) -> Iterator[Bench]:
    """A `Bench` whose directories are gone afterwards.

    :param directory: where to make them; it decides which disk is measured.
    """
    with (
        tempfile.TemporaryDirectory(prefix="incdump-bench-", dir=directory) as images,
        tempfile.TemporaryDirectory(prefix="incdump-bench-run-", ignore_cleanup_errors=True) as runtime,
    ):
        os.environ["INCDUMP_RUNTIME_DIR"] = runtime
        # As when it is installed: modules are compiled once, in the warm-up.
        os.environ["PYTHONPYCACHEPREFIX"] = f"{runtime}/bytecode"
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        yield Bench(mib, vmas, rounds, Path(images))


def _check_room(size: int, directory: Path) -> None:
    """:raises NotHere: `size` bytes of target, and as much again of page cache, will not fit."""
    spare = 512 * MIB
    free = shutil.disk_usage(directory).free
    if free < size + spare:
        raise NotHere(f"needs {(size + spare) // MIB:,} MiB of disk, {free // MIB:,} MiB are free: see --dir and --mib")
    available = _meminfo("MemAvailable")
    if available < 2 * size + spare:
        needed = (2 * size + spare) // MIB
        raise NotHere(f"needs {needed:,} MiB of memory, {available // MIB:,} MiB are available: see --mib")


def _meminfo(name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def machine(directory: str) -> dict[str, str]:
    """What kind of machine this is: nothing that names it."""
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{_meminfo('MemTotal') / 2**30:.0f} GiB",
        "architecture": platform.machine(),
        "kernel": ".".join(platform.release().split("-")[0].split(".")[:2]),
        "file system": _file_system(directory),
        "Python": platform.python_version(),
    }


def _file_system(directory: str) -> str:
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return "unknown"
