"""A full dump against the limit: two threads that read and write the same bytes, and do nothing else.

The limit's threads take turns at blocks of the target's one big mapping: process_vm_readv(2) into a buffer that is used
again and again, pwrite(2) at the block's place in a file. It is run with blocks of 4 and of 1 MiB; the better of the
two is the limit. What it would take in a file laid out beforehand by fallocate(2), as incdump's is, is told beside it.
Every file is new and is removed right after its round, for all contestants alike: page cache that was
just given back is what makes these machines slow or fast.

Contestants of incdump, all of the same quiet target:

- ``dump``: `incdump.dump` in this program, tracking on since an earlier dump; its total_time. The target is about this.
- ``first dump``: the same when nothing is tracked yet: a holder process is started, a userfaultfd made.
- ``command``: ``python -m incdump dump``, from the start of Python until it has ended.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.bench import MIB
from benchmarks.report import Report, Verdict, alternate, ratios
from incdump._uapi.fallocate import fallocate
from incdump._uapi.memory import process_vm_readv
from incdump.proc.maps import read_vmas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.bench import Bench
    from incdump.model.stats import DumpResult
    from tests.targets.build import Target

BLOCKS = (4 * MIB, 1 * MIB)
THREADS = 2
SLOWER_THAN_LIMIT = 1.25


class Limit:
    """The plain loop.

    :param span: start and end of the memory to copy.
    :param block: bytes copied at a time.
    :param laid_out: whether the file is laid out first; that counts.
    """

    def __init__(self, bench: Bench, pid: int, span: tuple[int, int], block: int, *, laid_out: bool = False) -> None:
        self._laid_out = laid_out
        self._bench = bench
        self._pid = pid
        self._span = span
        self._block = block
        self._buffers = [np.frombuffer(mmap.mmap(-1, block), np.uint8) for _ in range(THREADS)]
        for buffer in self._buffers:
            buffer[:] = 1  # fresh memory is not the loop's matter

    def __call__(self) -> float:
        """Copy everything to a new file; returns the seconds that it took."""
        path = self._bench.directory / "limit"
        began = time.perf_counter()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        if self._laid_out:
            fallocate(fd, self._span[1] - self._span[0])
        turns = itertools.count()
        threads = [threading.Thread(target=self._copy, args=(fd, turns, buffer)) for buffer in self._buffers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.close(fd)
        took = time.perf_counter() - began
        size = path.stat().st_size
        path.unlink()
        if size != self._span[1] - self._span[0]:
            raise RuntimeError(f"the plain loop copied {size} bytes")
        return took

    def _copy(self, fd: int, turns: itertools.count[int], buffer: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        start, end = self._span
        address = buffer.ctypes.data
        remote = np.empty((1, 2), np.uint64)
        while (offset := next(turns) * self._block) < end - start:
            size = min(self._block, end - start - offset)
            remote[0] = start + offset, size
            copied = process_vm_readv(self._pid, address, size, remote)
            os.pwrite(fd, buffer.data[:copied], offset)


class Dumps:
    """incdump's contestants, and the results of ``dump``."""

    def __init__(self, bench: Bench, target: Target) -> None:
        self._bench = bench
        self._target = target
        self.results: list[DumpResult] = []

    def dump(self) -> float:
        """A full dump of a tracked process; returns its total_time, seconds."""
        result = self._bench.dump(self._target)
        self._bench.clear()
        self.results.append(result)
        return result.stats.total_time / 1e6

    def first_dump(self) -> float:
        """A full dump of a process that nobody tracks; returns its total_time, seconds."""
        self._bench.untrack(self._target)
        result = self._bench.dump(self._target)
        self._bench.clear()
        return result.stats.total_time / 1e6

    def command(self) -> float:
        """The command; returns the seconds until it has ended."""
        done = self._bench.command("dump", "-t", str(self._target.pid), "-D", str(self._bench.new_dir()))
        self._bench.clear()
        if done.code:
            raise RuntimeError(f"incdump dump failed with {done.code}")
        return done.wall


def run(bench: Bench) -> Iterator[Report]:
    """Measure a target of ``bench.mib`` MiB."""
    with bench.target(mib=bench.mib) as target:
        span = biggest_mapping(target.pid)
        dumps = Dumps(bench, target)
        limits = {f"limit, {block // MIB} MiB": Limit(bench, target.pid, span, block) for block in BLOCKS}
        contestants: dict[str, Callable[[], float]] = {
            **limits,
            "limit, laid out": Limit(bench, target.pid, span, BLOCKS[-1], laid_out=True),
            "first dump": dumps.first_dump,
            "dump": dumps.dump,
            "command": dumps.command,
        }
        figures = alternate(contestants, bench.rounds)
    better = min(limits, key=lambda name: sorted(figures[name])[bench.rounds // 2])
    what = f"a full dump of {bench.mib:,} MiB against {THREADS} threads that copy the same bytes to the same disk"
    report = Report("full", what, figures=figures)
    report.compare("dump", better, limit=SLOWER_THAN_LIMIT)
    report.compare("first dump", better)
    report.compare("command", better)
    report.compare("dump", "limit, laid out")
    results = dumps.results[-bench.rounds :]
    frozen = [r.stats.frozen_time / 1e6 for r in results]
    report.verdicts.append(Verdict(f"frozen_time of dump / {better}", ratios(frozen, figures[better])))
    report.verdicts.append(Verdict("frozen_time of dump / its total_time", ratios(frozen, figures["dump"])))
    last = results[-1]
    report.notes.append(f"dump: {last.stats.pages_written:,} pages, tracker {last.tracker}, reader {last.pagemap}")
    report.notes += last.warnings
    yield report


def biggest_mapping(pid: int) -> tuple[int, int]:
    """Start and end of a process's biggest mapping."""
    spans = read_vmas(pid, flags=False).spans()
    at = int(np.argmax(spans[:, 1] - spans[:, 0]))
    return int(spans[at, 0]), int(spans[at, 1])
