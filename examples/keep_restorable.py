"""Checkpoint a long computation every so often, keep the last ones restorable, and go on after a crash.

    python examples/keep_restorable.py [--every SECONDS] [--keep K] [--criu PATH]

Needs root and CRIU 4.1 or later. A computation (it counts primes, and writes its progress to a file) is started and
checkpointed on and on, each time only what it has written since. Then it is killed, as a crash would, the newest
checkpoint is brought back to life, and it goes on from there.

The checkpoints form chains of K: when a chain is full the next one begins with a whole checkpoint, and the chain before
the last is removed. So there are always at least K to go back to, and no chain grows for ever.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import anyio

import incdump

COMPUTATION = """
import time
table = bytearray(64 << 20)  # something to save
count = number = 0
while True:
    number += 1
    if number > 1 and all(number % n for n in range(2, int(number ** 0.5) + 1)):
        count += 1
        table[count % len(table)] = number & 255
    if number % 20000 == 0:
        with open("progress", "w") as file:
            file.write(f"{number} numbers, {count} primes")
"""


@dataclass
class Checkpoints:
    """The checkpoints of one process.

    :ivar root: where their directories go: ``chain-N/M``.
    :ivar keep: how many stay restorable, at least.
    """

    pid: int
    root: Path
    keep: int
    criu: str | None
    made: list[Path] = field(default_factory=list)

    async def make(self) -> incdump.DumpResult:
        """Make another; the process runs on."""
        chain, nth = divmod(len(self.made), self.keep)
        images = self.root / f"chain-{chain}" / f"{nth}"
        result = await incdump.checkpoint(
            self.pid,
            images,
            parent=f"../{nth - 1}" if nth else None,
            options=incdump.DumpOptions(afterwards="running", track_for=3600),  # for the next one to build on
            criu=self.criu,
        )
        self.made.append(images)
        if nth == self.keep - 1 and chain:
            shutil.rmtree(self.root / f"chain-{chain - 1}")
        return result


def start(directory: Path) -> subprocess.Popen[bytes]:
    """Start the computation, on its own: no terminal, a session of its own, as CRIU likes it."""
    with (directory / "output").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", COMPUTATION],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


async def main(every: float, keep: int, criu: str | None) -> None:
    """The whole story."""
    with tempfile.TemporaryDirectory(prefix="keep-restorable-", dir="/var/tmp") as name:
        root = Path(name)
        process = start(root)
        checkpoints = Checkpoints(process.pid, root, keep, criu)
        print(f"process {process.pid} counts primes; a checkpoint every {every:g} s, at least {keep} are kept\n")
        print("  checkpoint     pages   written      frozen   progress")
        for _ in range(2 * keep + 1):
            await anyio.sleep(every)
            stats = (await checkpoints.make()).stats
            where = checkpoints.made[-1].relative_to(root)
            progress = (root / "progress").read_text() if (root / "progress").exists() else "-"
            print(
                f"  {where!s:12} {stats.pages_scanned:>7,} {stats.pages_written:>9,} "
                f"{stats.frozen_time / 1e3:>8.1f} ms   {progress}"
            )
        await anyio.sleep(every)
        crashed_at = (root / "progress").read_text()
        process.kill()
        process.wait()
        print(f"\nit was killed at {crashed_at}")
        restored = await incdump.restore(checkpoints.made[-1], criu=criu)
        print(f"restored as process {restored.pid} in {restored.restore_time / 1e3:.0f} ms")
        await anyio.sleep(2 * every)
        print(f"and now it is at {(root / 'progress').read_text()}")
        os.kill(restored.pid, signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between two checkpoints")
    parser.add_argument("--keep", type=int, default=3, metavar="K", help="how many stay restorable, at least")
    parser.add_argument("--criu", metavar="PATH", help="CRIU's program")
    arguments = parser.parse_args()
    anyio.run(main, arguments.every, max(1, arguments.keep), arguments.criu)
