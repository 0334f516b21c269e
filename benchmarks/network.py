"""Pages over the network: a dump of incompressible memory to a page server on loopback, in all four combinations,
and between two incdumps in CRIU's protocol as well as in incdump's own.

What is timed is the whole of ``criu dump --leave-running``, and of `incdump.dump`, until the server has said that it
has everything. The servers are processes of their own, which listen before the time begins.

What the machine allows is shown by two others. Of CRIU's client a server that throws everything away, unread
(`benchmarks.discard`): no server can be quicker. And the bare copy loop (`benchmarks.bare_copy`): the same memory,
copied by two processes that do nothing else, over one connection and over two.

Needs root, and CRIU (``$INCDUMP_TEST_CRIU``, or fetched as for the tests).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest

import incdump
from benchmarks import bare_copy, discard
from benchmarks.bench import MIB, NotHere
from benchmarks.report import Report, alternate
from incdump._uapi.memory import process_vm_readv
from incdump.proc.maps import read_vmas
from tests.command import environment, read_until, start, wait
from tests.criu.criu import RestorableTarget, criu_path, dump, page_server
from tests.targets.build import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.bench import Bench
    from incdump.model.options import ProtocolName

FASTER_SERVER = 1.5
FASTER_BOTH = 2.2
BARE_CONNECTIONS = (1, 2)


def run(bench: Bench) -> Iterator[Report]:
    """Measure a target of ``bench.mib`` MiB."""
    if os.geteuid():
        raise NotHere("needs root, for CRIU")
    try:
        criu_path()
    except pytest.skip.Exception as why:
        raise NotHere(str(why)) from None
    target = RestorableTarget([build("rewriter"), f"--mib={bench.mib}"], bench.directory)
    try:

        def contestant(server: Callable[[Path], object], client: Callable[[Bench, int, int], float]) -> float:
            with server(bench.new_dir()) as port:  # type: ignore[attr-defined]
                seconds = client(bench, target.pid, port)
            for path in bench.directory.iterdir():
                if path.name.isdecimal():
                    _remove(path)
            return seconds

        contestants: dict[str, Callable[[], float]] = {
            "criu to criu": lambda: contestant(page_server, _criu),
            "criu to incdump": lambda: contestant(_incdump_server, _criu),
            "criu to nothing": lambda: contestant(_discarding_server, _criu),
            "incdump to criu": lambda: contestant(page_server, _incdump),
            "incdump to incdump": lambda: contestant(_incdump_server, _incdump),
            "the same, CRIU's protocol": lambda: contestant(_incdump_server, partial(_incdump, protocol="criu")),
            **{f"bare loop, {n}": partial(_bare_loop, bench, target.pid, n) for n in BARE_CONNECTIONS},
        }
        figures = alternate(contestants, bench.rounds)
    finally:
        target.close()
    report = Report("network", f"a dump of {bench.mib:,} MiB to a page server on loopback", figures=figures)
    report.compare("criu to criu", "criu to incdump", limit=FASTER_SERVER, above=True)
    report.compare("criu to criu", "criu to nothing")
    report.compare("criu to criu", "the same, CRIU's protocol", limit=FASTER_SERVER, above=True)
    report.compare("criu to criu", "incdump to incdump", limit=FASTER_BOTH, above=True)
    for n in BARE_CONNECTIONS:
        report.compare("criu to criu", f"bare loop, {n}")
    yield report


def _remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@contextmanager
def _incdump_server(images: Path) -> Iterator[int]:
    server = start("page-server", "--json", "--once", "-D", images)
    try:
        yield json.loads(read_until(server.stdout, b"\n"))["port"]
        done = wait(server)
        if done.code:
            raise RuntimeError(f"incdump page-server failed with {done.code}: {done.err}")
    finally:
        server.kill()
        server.communicate()


@contextmanager
def _discarding_server(_: Path) -> Iterator[int]:
    program = [sys.executable, "-m", discard.__name__]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        except BaseException:
            server.kill()
            raise
    if server.returncode:
        raise RuntimeError(f"the server that throws everything away failed with {server.returncode}")


def _criu(bench: Bench, pid: int, port: int) -> float:
    images = bench.new_dir()
    began = time.perf_counter()
    dump(pid, images, "--leave-running", "--page-server", "--address", "127.0.0.1", "--port", str(port))
    return time.perf_counter() - began


def _incdump(bench: Bench, pid: int, port: int, protocol: ProtocolName = "auto") -> float:
    options = incdump.DumpOptions(page_server=("127.0.0.1", port), page_server_protocol=protocol)
    images = bench.new_dir()

    async def job() -> incdump.DumpResult:
        return await incdump.dump(pid, images, options=options)

    return anyio.run(job).stats.total_time / 1e6


def _bare_loop(bench: Bench, pid: int, connections: int) -> float:
    """Copy a process's biggest mapping; returns the seconds that it took."""
    path = bench.new_dir()
    program = [sys.executable, bare_copy.__file__, str(path), str(MIB), str(connections)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        spans = read_vmas(pid, flags=False).spans()
        start, end = spans[(spans[:, 1] - spans[:, 0]).argmax()].tolist()

        def read(buffer: memoryview, offset: int) -> None:
            remote = np.array([[start + offset, len(buffer)]], np.uint64)
            process_vm_readv(pid, np.frombuffer(buffer, np.uint8).ctypes.data, len(buffer), remote)

        began = time.perf_counter()
        bare_copy.send(read, (end - start) // MIB * MIB, port, MIB, connections)
        seconds = time.perf_counter() - began
    if path.stat().st_size < end - start - MIB:
        raise RuntimeError(f"the bare loop copied {path.stat().st_size} bytes")
    path.unlink()
    return seconds
