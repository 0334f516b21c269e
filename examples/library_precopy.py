#!/usr/bin/env python3
"""Pre-copy by the rule of `incdump precopy`, round by round, in a program of one's own that has a say after each.

The process is frozen once the rest is estimated to take no longer than 50 ms, or after a minute.

    python examples/library_precopy.py PID DIR
"""

from __future__ import annotations

import sys

import anyio

import incdump

POLICY = incdump.PrecopyPolicy(downtime=0.05, timeout=60, on_timeout="force")
MOST_BYTES = 64 << 30
"""On the disk; then there are to be no more rounds."""


async def main(pid: int, root: str) -> None:
    """The rounds go to the directories 1, 2 and so on in `root`; so does the dump of the frozen process."""
    async with incdump.Session(pid) as session:
        rounds = session.precopy(root, policy=POLICY)
        on_disk = 0
        async for done, decision in rounds:  # between two rounds nothing is under way: `break` whenever you like
            on_disk += done.bytes_written
            left_out = f", {done.bytes_deferred >> 10} KiB left for the end" if done.bytes_deferred else ""
            print(f"round {done.number}: {done.bytes_written >> 10} KiB written{left_out}; {decision.why}")
            if on_disk > MOST_BYTES:
                break
        else:
            assert rounds.result.final is not None
            assert rounds.result.downtime is not None
            print(f"dump: {rounds.result.final.images_dir}, frozen for {rounds.result.downtime * 1e3:.1f} ms")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        anyio.run(main, int(sys.argv[1]), sys.argv[2])
    except incdump.IncdumpError as error:
        sys.exit(f"library_precopy: {error}")
