"""Another host to migrate to: a receiver with a process table, and if need be a network, of its own.

It shares the file system with the tests' own host, and its processes can be seen from here, under other numbers::

    with receiving(images_root / "arriving", "--once") as there:
        migrate(target, there.port)
        there.take_over(target)       # the target's numbers are those over there, as seen from here
        target.check()
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.command import environment, read_until
from tests.criu.criu import criu_path, exists, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.criu.criu import RestorableTarget
    from tests.hosts import Host

# Process 1 over there: it reaps, and outlives the receiver, whose numbers are not those of any target.
_INIT = """
import os, sys, time
with open("/proc/sys/kernel/ns_last_pid", "w") as last:
    last.write("20000")
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.01)
"""


class There:
    """The other host.

    :ivar port: where its receiver listens.
    :ivar pid: the receiver, as seen from here.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._said: list[dict[str, Any]] = []
        self.port = int(json.loads(read_until(process.stdout, b"\n"))["port"])
        (init,) = _children(process.pid)
        (self.pid,) = _children(init)
        self._namespace = os.readlink(f"/proc/{init}/ns/pid")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(json.loads(line))

    def migration(self, timeout: float = 60) -> dict[str, Any]:
        """What the receiver says of the next migration that ends."""
        found: list[dict[str, Any]] = []

        def ended() -> bool:
            found.extend(line for line in self._said if line["event"] == "migration")
            return bool(found)

        until(ended, timeout)
        self._said.clear()
        return found[0]

    def here(self, pid: int) -> int | None:
        """The number, as seen from here, of the process that has this one over there; None if there is none."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(OSError):
                    if os.readlink(entry / "ns/pid") != self._namespace:
                        continue
                    status = (entry / "status").read_text()
                    numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
                    if numbers[-1] == str(pid) and exists(int(entry.name)):
                        return int(entry.name)
        return None

    def take_over(self, target: RestorableTarget) -> None:
        """The target is what runs over there."""
        reap(target)
        pid = self.here(target.pid)
        assert pid is not None, "it does not run there"
        target.pid = pid

    def kill_receiver(self) -> None:
        """SIGKILL."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def reap(target: RestorableTarget) -> None:
    """Free the pids of a target that has been killed, as process 1, while others that are no children's run on."""
    target.process.wait(60)
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@contextmanager
def receiving(images: Path, *options: object, host: Host | None = None, criu: Path | None = None) -> Iterator[There]:
    """A receiver that restores, on a host of its own; everything there ends with the context.

    :param options: for ``incdump receive``.
    :param host: whose network it has; None: the one of the tests.
    """
    address = "127.0.0.1" if host is None else host.address
    receive = ["-m", "incdump", "receive", "--json", "-D", images, "--listen", f"{address}:0"]
    command = [sys.executable, "-c", _INIT, sys.executable, *map(str, [*receive, *_in_order(options, criu)])]
    with ExitStack() as stack:
        if host is not None:
            stack.enter_context(host.inside())
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command],
            env=environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
    try:
        yield There(process)
    finally:
        process.kill()
        process.wait()


def _in_order(options: tuple[object, ...], criu: Path | None) -> list[object]:
    """The receiver's options; what is for CRIU stays last."""
    split = options.index("--") if "--" in options else len(options)
    ours = list(options[:split])
    if "--no-restore" in ours:
        ours.remove("--no-restore")
    else:
        ours += ["--restore", "--criu", criu or criu_path()]
    return [*ours, *options[split:]]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
