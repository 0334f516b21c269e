"""Small target processes whose memory the test lays out itself, page by page.

`victim` runs a few lines of Python in a child process. They see `mapping` (incdump._uapi.mapping), `os`, `mmap`,
`PAGE`, and two functions::

    tell(**values)   hands values to the test
    wait()           waits until the test calls `Victim.go`

The child waits once more at the end, so that it lives until the test leaves the ``with`` block.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_PRELUDE = """
import ctypes, json, mmap, os, sys, threading
from incdump._uapi import mapping
PAGE = 4096
def tell(**values):
    print(json.dumps(values), flush=True)
def wait():
    if not sys.stdin.readline():
        os._exit(0)
def touch(address, *pages, value=1):
    for page in pages:
        mapping.write_byte(address + page * PAGE, value)
"""


class Victim:
    """A running child.

    :ivar pid: its process id.
    :ivar told: what it has told last.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self.told: dict[str, Any] = {}
        self.listen()

    def listen(self) -> dict[str, Any]:
        """Wait for the next `tell`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the victim died: {self.process.wait()}"
        self.told = json.loads(line)
        return self.told

    def go(self) -> None:
        """Let it go on after a `wait`."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def go_and_listen(self) -> dict[str, Any]:
        """Let it go on, and wait for the next `tell`."""
        self.go()
        return self.listen()


@contextmanager
def victim(script: str) -> Iterator[Victim]:
    """Run a script in a child process until it first calls `tell`; kill it in the end."""
    text = f"{_PRELUDE}\n{textwrap.dedent(script)}\nwait()\n"
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
        text=True,
    )
    with process:
        try:
            yield Victim(process)
        finally:
            process.kill()
