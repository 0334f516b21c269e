#!/usr/bin/env python3
"""Pre-dumps over the network: a page server takes the rounds, and no page touches the disk of whoever sends them.

Both ends are in this program; in earnest they are on two hosts, the server's with an address of its own and TLS.

    python examples/library_page_server.py PID DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

import incdump

ROUNDS = 3


async def receive(server: incdump.PageServer) -> None:
    """Take all rounds, each on top of the one before."""
    await server.serve(lambda report: print(f"received {report.pages} pages into {report.images_dir}"))


async def send(pid: int, root: Path, server: incdump.PageServer) -> None:
    """Two pre-dumps and a dump; what stays here is small: which pages the server has."""
    options = incdump.DumpOptions(page_server=(server.host, server.port))
    async with incdump.Session(pid, options) as session:
        for number in range(1, ROUNDS):
            await session.predump(root / str(number))
        result = await session.dump(root / str(ROUNDS))
    print(
        f"sent {result.stats.pages_written} pages in the last round, frozen for {result.stats.frozen_time / 1e3:.1f} ms"
    )


async def main(pid: int, root: Path) -> None:
    """The pages go to `root`/served, the rest to `root`/sent."""
    options = incdump.PageServerOptions(rounds=ROUNDS)
    async with incdump.PageServer(root / "served", options=options) as server, anyio.create_task_group() as tasks:
        tasks.start_soon(receive, server)
        await send(pid, root / "sent", server)
    report = incdump.check(root / "served" / str(ROUNDS))
    print(f"{len(report.levels)} images dirs, every page that is left to a parent is there")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        anyio.run(main, int(sys.argv[1]), Path(sys.argv[2]))
    except* incdump.IncdumpError as group:
        sys.exit(f"library_page_server: {group.exceptions[0]}")
