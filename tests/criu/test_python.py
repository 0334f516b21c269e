"""A Python program in the middle of its work in eight threads: nothing of what they know is lost."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.criu.criu import exists, until
from tests.criu.namespaces import in_own_namespaces
from tests.criu.services import Service

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu_for_sockets")]

STEPS = 100
PROGRAM = Path(__file__).with_name("busy_python.py")


class BusyPython(Service):
    """busy_python.py, which is told what to do through a named pipe, and says how it went in its log."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        os.mkfifo(directory / "commands", 0o600)
        self._commands = os.open(directory / "commands", os.O_RDWR)
        super().__init__([sys.executable, "-I", PROGRAM], directory, stdin=self._commands)
        self._said = 0
        assert self.word() == "ready"

    def word(self) -> str:
        """The next line that it says."""
        self.until(lambda: self.log.read_text().count("\n") > self._said)
        self._said += 1
        return self.log.read_text().splitlines()[self._said - 1]

    def tell(self, command: str) -> str:
        """Say something to it, and wait for its answer."""
        os.write(self._commands, f"{command}\n".encode())
        return self.word()

    def work(self) -> None:
        """Wait until every thread has made many steps."""
        before = int(self.tell("steps"))
        self.until(lambda: int(self.tell("steps")) > before + STEPS)


@in_own_namespaces
def test_every_thread_of_a_python_program_finds_what_it_left(images_root: Path) -> None:
    with BusyPython(images_root / "python") as service:
        for way in ("leash", "preload", "lazy-pages"):
            for _ in range(3):
                service.predump()
                service.work()
            result = service.checkpoint(way)
            assert result["incremental"]
            assert result["pages_skipped_parent"] > 20 << 8
            service.restore()
            assert service.tell("check") == "good"
            service.work()
        assert service.tell("quit") == "ended"
        until(lambda: not exists(service.pid), 60)
