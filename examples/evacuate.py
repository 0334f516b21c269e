"""Move process trees to another host, one after the other, as before that host's own is taken down.

    incdump receive -D arriving --listen 192.0.2.7:7777 --restore       (there)
    python examples/evacuate.py 192.0.2.7:7777 1234 5678                (here)

A tree that cannot be moved goes on here, and the others are moved all the same.
"""

import argparse
import asyncio

import incdump
from incdump import DidNotConverge, IncdumpError, OutcomeUnknown, PrecopyPolicy


async def move(pid: int, host: str, port: int, downtime: float) -> bool:
    """Move one tree; returns whether it runs over there."""
    policy = PrecopyPolicy(downtime=downtime, timeout=120)
    try:
        try:
            result = await incdump.migrate(pid, host, port, policy=policy)
        except DidNotConverge as error:
            print(f"{error}; once more, with less of a hurry for the target")
            policy = PrecopyPolicy(downtime=downtime, timeout=120, on_timeout="throttle")
            result = await incdump.migrate(pid, host, port, policy=policy)
    except OutcomeUnknown:
        raise  # somebody has to look before anything else is done
    except IncdumpError as error:
        print(f"process {pid} stays here: {error}")
        return False
    print(f"process {pid}: {result.outcome} at {result.receiver}, {len(result.rounds)} rounds, {result.seconds:.1f} s; "
          f"it stood still for {result.downtime or 0:.3f} s")  # fmt: skip
    return result.outcome == "runs"


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("where", metavar="HOST:PORT")
    parser.add_argument("pids", metavar="PID", type=int, nargs="+")
    parser.add_argument("--downtime", type=float, default=1.0, metavar="SECONDS")
    args = parser.parse_args()
    host, _, port = args.where.rpartition(":")
    moved = [await move(pid, host, int(port), args.downtime) for pid in args.pids]
    return 0 if all(moved) else 1


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
