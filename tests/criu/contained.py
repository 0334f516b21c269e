"""A churn target in a container of its own (tests/criu/container.py), that can be checkpointed and restored."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.criu import container
from tests.criu.criu import RestorableTarget, exists, until
from tests.targets import build

OPS = "write,map,free,brk,stack"
ROOT = container.FIRST


class ContainedTarget(RestorableTarget):
    """For a test in namespaces of its own: the container's root directory is mounted there.

    :ivar directory: that directory.
    :ivar pid: process 1 of the container, by its number outside; `restored` gives it another one.
    """

    def __init__(self, root: Path, *, first: int = ROOT, seed: int = 1, mib: int = 8) -> None:
        """
        :param root: a directory that outlives the target, and that others may enter.
        :param first: the user outside that is root inside.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="target-", dir=root, ignore_cleanup_errors=True)
        self.directory = Path(self._directory.name)
        self.directory.chmod(0o755)
        self._buffer = b""
        self._fill(build.build("churn"))
        subprocess.run(["chown", "-R", f"{first}:{first}", self.directory], check=True)
        subprocess.run(["mount", "--bind", self.directory, self.directory], check=True)
        self._commands = os.open(self.directory / "commands", os.O_RDWR | os.O_CLOEXEC)
        self._errors = (self.directory / "errors").open("r+b")
        self._words = (self.directory / "words").open("r+b")
        program = ["/churn", f"--seed={seed}", "--threads=2", "--processes=1", f"--mib={mib}", f"--ops={OPS}"]
        self.process = subprocess.Popen(
            [sys.executable, container.__file__, str(first), *program, "--dir=/"], cwd=self.directory
        )
        self.pid = self.process.pid
        try:
            if (ready := self._line(60)) != "ready 1":
                raise build.BadTargetError(f"target said {ready!r} instead of ready")
            (self.pid,) = build.descendants(self.process.pid)
        except BaseException:
            self.close()
            raise

    def _fill(self, program: Path) -> None:
        """Put a program there, and the libraries that it needs."""
        shutil.copy(program, self.directory / "churn")
        needs = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for library in re.findall(r"(/\S+) \(", needs):
            place = self.directory / library[1:]
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            shutil.copy(library, place)
        (self.directory / "proc").mkdir()
        os.mkfifo(self.directory / "commands")
        for name in ("words", "errors"):
            (self.directory / name).touch()

    def restored(self, pid: int) -> None:
        """It has come back, with a number of its own outside."""
        self.pid = pid

    @property
    def restore_options(self) -> tuple[str, ...]:
        """What CRIU needs to know of the container."""
        return "--root", str(self.directory)

    def close(self) -> None:
        """Kill it, and take its root directory down."""
        if exists(self.pid):
            os.kill(self.pid, signal.SIGKILL)  # all of its namespace ends with it
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        until(lambda: not exists(self.pid), 60)
        os.close(self._commands)
        self._words.close()
        self._errors.close()
        subprocess.run(["umount", "--lazy", self.directory], check=True)
        self._directory.cleanup()
