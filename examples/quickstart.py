#!/usr/bin/env python3
"""See incdump at work, on a process that this program starts itself.

The target has 64 MiB of memory, and four threads that keep rewriting a twentieth of it. It is pre-dumped twice while it
runs, then dumped; each time only what was written since is copied. In the end every page of the images is compared with
the target, which the last dump left stopped for that.

    python examples/quickstart.py

Exit code 0: every page is right.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import anyio

import incdump

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 64

# The target. The prctl lets processes that are not its ancestors trace it, which Yama, where it is on, forbids ordinary
# users otherwise: incdump's tracking is kept by a process of its own.
TARGET = """
import ctypes, mmap, os, random, sys, threading, time
size, threads, page = int(sys.argv[1]) << 20, 4, 4096
PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)
ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for start in range(0, size, 1 << 20):
    memory[start:start + (1 << 20)] = os.urandom(1 << 20)

def rewrite(number):
    pages = size // page // threads
    while True:
        start = (number * pages + random.randrange(pages // 20)) * page
        memory[start:start + page] = os.urandom(page)
        time.sleep(0.001)

for number in range(threads):
    threading.Thread(target=rewrite, args=(number,), daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def target() -> Iterator[int]:
    """Start the target; end it afterwards, and nothing else."""
    command = [sys.executable, "-c", TARGET, str(MIB)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process.pid
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


def print_round(number: int, kind: str, result: incdump.DumpResult) -> None:
    """One line of the table."""
    s = result.stats
    print(
        f"{number}  {kind:<9}{s.pages_scanned:>9,}{s.pages_written:>9,}{s.pages_skipped_parent:>13,}"
        f"{s.bytes_written / 2**20:>9.1f} MiB{s.stopped_time / 1000:>11.1f} ms{s.total_time / 1000:>10.1f} ms"
    )


async def dump_rounds(pid: int, root: str) -> incdump.DumpResult:
    """Two pre-dumps and a dump, each on top of the one before it."""
    print("             scanned  written      skipped        bytes  time stopped  time in all")
    print("               pages    pages  (in parent)")
    first = await incdump.predump(pid, f"{root}/1")
    print_round(1, "pre-dump", first)
    await anyio.sleep(0.3)  # in which the target writes
    second = await incdump.predump(pid, f"{root}/2", parent="../1")
    print_round(2, "pre-dump", second)
    await anyio.sleep(0.3)
    options = incdump.DumpOptions(afterwards="stopped")
    last = await incdump.dump(pid, f"{root}/3", parent="../2", options=options)
    print_round(3, "dump", last)
    for result in (first, second, last):
        for warning in result.warnings:
            print(f"warning: {warning}")
    print(f"\ntracker: {last.tracker} ({last.tracker_reason}); pagemap reader: {last.pagemap}")
    return last


async def check_result(pid: int, images_dir: str) -> bool:
    """Prove the chain by itself, then compare every page with the stopped target."""
    chain = incdump.check(images_dir)
    print(f"check of the chain: {len(chain.levels)} images dirs, every page is in its place")
    report = await incdump.check_against(images_dir, pid)
    print(
        f"check of every page: {report.pages_compared:,} pages compared with the stopped target, "
        f"{report.pages_wrong:,} wrong, {report.pages_missing:,} missing: {'good' if report.ok else 'BAD'}"
    )
    return report.ok


async def run(pid: int) -> int:
    """The whole of it; returns the exit code."""
    print(f"target: process {pid}, {MIB} MiB, 4 threads that keep writing\n")
    with tempfile.TemporaryDirectory(prefix="incdump-quickstart-") as root:
        try:
            last = await dump_rounds(pid, root)
            return 0 if await check_result(pid, last.images_dir) else 1
        except incdump.IncdumpError as error:
            print(f"quickstart: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            with anyio.CancelScope(shield=True), suppress(incdump.HolderError):
                await incdump.untrack(pid)


def main() -> int:
    """Run it.

    :returns: the exit code.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with target() as pid:
        return anyio.run(run, pid)


if __name__ == "__main__":
    sys.exit(main())
