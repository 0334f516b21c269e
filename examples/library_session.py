#!/usr/bin/env python3
"""Pre-copy in a program of one's own: pre-dump until little is left to write, then freeze and dump.

A `incdump.Session` keeps the tracking in this program, without a holder process, and builds each dump on the last.

    python examples/library_session.py PID DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

import incdump

MAX_ROUNDS = 8
FEW_PAGES = 256


async def precopy(pid: int, root: Path) -> incdump.DumpResult:
    """Dump a process in rounds.

    :param root: the images dirs are made in here: 1, 2, and so on.
    :returns: of the last round, the consistent one.
    """
    async with incdump.Session(pid) as session:
        for number in range(1, MAX_ROUNDS):
            with anyio.fail_after(60):  # a cancelled round leaves the target running, and no write is forgotten
                result = await session.predump(root / str(number))
            print(f"round {number}: {result.stats.pages_written} pages written while the process ran")
            if result.stats.pages_written <= FEW_PAGES:
                break
        return await session.dump(root / "final")


async def read_back(result: incdump.DumpResult) -> None:
    """Read the first page of every process back through the chain."""
    images = incdump.ImagesDir(result.images_dir)
    for pid in images.pids():
        start = int(images.covered(pid)[0, 0])
        print(f"process {pid} at {start:#x}: {images.read(pid, start, 16).hex(' ')}")


async def main(pid: int, root: Path) -> None:
    """Dump, then read."""
    result = await precopy(pid, root)
    print(f"dump: {result.stats.pages_written} pages written, frozen for {result.stats.frozen_time} microseconds")
    await read_back(result)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        anyio.run(main, int(sys.argv[1]), Path(sys.argv[2]))
    except incdump.IncdumpError as error:
        sys.exit(f"library_session: {error}")
