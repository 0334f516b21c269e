"""Running the command ``incdump`` in tests, as a process of its own, and looking at what it did to others."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.targets.build import Target

NO_PID = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
"""No process has it."""
KINDS = ("predump", "dump")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.out.count("\n") == 1, self
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The one line on stderr, which is an error."""
        assert self.err.startswith("incdump: error: "), self
        assert self.err.count("\n") == 1, self
        assert self.err.endswith("\n"), self
        return self.err.removeprefix("incdump: error: ").rstrip("\n")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with the project to be found."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **(extra or {})}


def run_python(
    *args: object, python: str = sys.executable, env: Mapping[str, str] | None = None, **options: Any
) -> Done:
    """Run a Python program to its end."""
    command = [python, *map(str, args)]
    options.setdefault("cwd", "/")
    done = subprocess.run(
        command, env=environment(env), capture_output=True, stdin=subprocess.DEVNULL, timeout=240, **options
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def incdump(*args: object, **options: Any) -> Done:
    """Run a command to its end."""
    return run_python("-m", "incdump", *args, **options)


def start(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command; stdout and stderr are pipes, unless told otherwise."""
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, "-m", "incdump", *map(str, args)],
        env=environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        bufsize=0,
        **options,
    )


def read_until(stream: IO[bytes] | None, wanted: bytes, timeout: float = 60) -> bytes:
    """Read a pipe until a text has come; returns all that was read."""
    assert stream is not None
    deadline = time.monotonic() + timeout
    got = b""
    while wanted not in got:
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{wanted!r} did not come, but {got!r}"
        chunk = os.read(stream.fileno(), 65536)
        assert chunk, f"the output ended without {wanted!r}: {got!r}"
        got += chunk
    return got


def wait(process: subprocess.Popen[bytes], timeout: float = 60) -> Done:
    """Wait for a started command to end; what was read before is not in the result."""
    out, err = process.communicate(timeout=timeout)
    return Done(process.returncode, out.decode(), (err or b"").decode())


def states(pid: int) -> set[str]:
    """The states of all threads of a process, letters of /proc/PID/stat."""
    found = set()
    for tid in os.listdir(f"/proc/{pid}/task"):
        found.add(Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[0])
    return found


def is_untouched(pid: int) -> bool:
    """Whether a process runs, not stopped and not traced."""
    status = Path(f"/proc/{pid}/status").read_text()
    return "TracerPid:\t0\n" in status and not states(pid) & set("tTZX")


def predump(target: Target, images: Path, *options: object) -> Done:
    """Pre-dump a target."""
    return incdump("predump", "-t", target.pid, "-D", images, *options)


def refused(done: Done, code: int, *words: str) -> None:
    """Make sure that a command failed as it should: with one line, which has these words."""
    assert done.code == code, done
    for word in words:
        assert word in done.error, done
    assert done.out == ""
