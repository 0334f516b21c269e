"""Shared memory: each segment once, however it was written, right by the oracle; also for a user without privilege."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump.model.options import DumpOptions
from tests import oracle
from tests.command import environment
from tests.kernel.support import Chain, Odd, build_victim, require_root, same_when_stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]


def segments(chain: Chain) -> list[str]:
    """The names of the last round's segment images."""
    return sorted(path.name for path in Path(chain.last.images_dir).glob("pagemap-shmem-*.img"))


@pytest.mark.parametrize("kind", ["shared", "memfd", "sysv"])
async def test_a_segment_is_dumped_once_and_then_only_what_changed(odd: Odd, images_root: Path, kind: str) -> None:
    (address, _) = odd.do(f"{kind} 64")
    odd.do(f"fill {address} 40 1")
    odd.do("fork")
    odd.do("fork")
    chain = Chain(odd, images_root)
    await chain.predump()
    assert len(segments(chain)) == 1
    assert chain.last.stats.shpages_written == 40
    odd.do(f"poke {address} 3 7")
    await chain.predump()
    assert chain.last.stats.shpages_written == 3
    assert chain.last.stats.shpages_skipped_parent == 37
    assert same_when_stopped(odd, chain.last.images_dir).ok
    report = await chain.prove()
    assert report.shmem_compared == 64
    assert chain.last.stats.shpages_skipped_parent == 40
    assert chain.last.stats.shpages_written == 0


async def test_what_is_written_by_write_is_not_missed(odd: Odd, images_root: Path) -> None:
    """No page table sees it."""
    (address, fd) = odd.do("memfd 64")
    odd.do(f"fill {address} 32 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    for page in (0, 5, 40):
        odd.do(f"pwrite {fd} {page} {page + 3}")
    await chain.predump()
    assert chain.last.stats.shpages_written == 3
    assert same_when_stopped(odd, chain.last.images_dir).ok
    odd.do(f"pwrite {fd} 41 9")
    await chain.prove()


async def test_pages_that_no_page_table_maps_are_dumped(odd: Odd, images_root: Path) -> None:
    (address, fd) = odd.do("memfd 64")
    for page in range(20):
        odd.do(f"pwrite {fd} {page} 4")
    chain = Chain(odd, images_root)
    await chain.predump()
    assert chain.last.stats.shpages_written == 20
    odd.do(f"advise {address} 64 4")
    await chain.prove()


async def test_a_segment_that_shrinks_and_grows(odd: Odd, images_root: Path) -> None:
    (address, fd) = odd.do("memfd 64")
    odd.do(f"fill {address} 64 1")
    chain = Chain(odd, images_root)
    await chain.predump()
    odd.do(f"truncate {fd} 10")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    odd.do(f"truncate {fd} 64")
    odd.do(f"poke {address + 4096 * 60} 2 3")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()


async def test_a_private_mapping_of_a_memfd(odd: Odd, images_root: Path) -> None:
    (shared, fd) = odd.do("memfd 32")
    odd.do(f"fill {shared} 32 1")
    (private,) = odd.do(f"private {fd} 32")
    odd.do(f"poke {private} 8 2")
    chain = Chain(odd, images_root)
    await chain.predump()
    odd.do(f"poke {private} 12 3")
    odd.do(f"poke {shared} 20 4")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()


async def test_segments_come_and_go(odd: Odd, images_root: Path) -> None:
    chain = Chain(odd, images_root)
    await chain.predump()
    (one, _) = odd.do("shared 16")
    odd.do(f"fill {one} 16 1")
    await chain.predump()
    (two, _) = odd.do("sysv 16")
    odd.do(f"fill {two} 16 2")
    odd.do(f"unmap {one} 16")
    await chain.predump()
    assert len(segments(chain)) == 1
    (three, _) = odd.do("shared 16")  # it may have the inode number of the first
    odd.do(f"fill {three} 16 3")
    await chain.predump()
    assert same_when_stopped(odd, chain.last.images_dir).ok
    await chain.prove()


async def test_a_segment_is_no_page_of_a_process(odd: Odd, images_root: Path) -> None:
    before = await incdump.predump(odd.pid, images_root / "1")
    (address, _) = odd.do("shared 500")
    odd.do(f"fill {address} 500 1")
    after = await incdump.predump(odd.pid, images_root / "2")
    assert after.stats.shpages_written == 500
    assert after.stats.pages_written < before.stats.pages_written + 20
    sizes = sum(path.stat().st_size for path in (images_root / "2").glob("pages-*.img"))
    assert sizes == 4096 * (after.stats.pages_written + after.stats.shpages_written)


async def test_shared_memory_of_a_busy_tree(churn: Callable[..., Target], images_root: Path) -> None:
    ops = ["write", "shared", "memfd", "sysv", "fork"]
    target = churn(seed=91, threads=2, processes=3, mib=4, ops=ops, free_run=True, dirty_rate=20000)
    chain = Chain(target, images_root)
    for _ in range(6):
        await chain.predump()
        assert not [line for line in chain.last.warnings if "CAP_SYS_ADMIN" in line]
    report = await chain.prove()
    assert report.shmem_compared


# --- without privilege ------------------------------------------------------------------------------------------------

DRIVER = """
import asyncio, json, os, sys
import incdump
from incdump.model.options import DumpOptions
from tests.kernel.support import Odd

class Known(Odd):
    def __init__(self, program):
        super(Odd, self).__init__([program])

async def main(program, root, reader):
    rounds = []
    with Known(program) as odd:
        print(odd.pid, flush=True)
        (shared, _), (memfd, fd), (own, _) = odd.do("shared 64"), odd.do("memfd 64"), odd.do("anon 64")
        (sysv, _) = odd.do("sysv 16")
        odd.do("fork")
        for n in range(4):
            for address in (shared, memfd, own, sysv):
                odd.do(f"fill {address} {16 - n} {n + 1}")
            odd.do(f"pwrite {fd} {20 + n} 3")
            odd.do(f"read {own + 4096 * 32} 16")
            options = DumpOptions(pagemap=reader, afterwards="stopped" if n == 3 else "running")
            call = incdump.dump if n == 3 else incdump.predump
            result = await call(odd.pid, f"{root}/{n}", parent=f"../{n - 1}" if n else None, options=options)
            rounds.append(result.as_dict())
        print(json.dumps(rounds), flush=True)
        sys.stdin.readline()
        await incdump.untrack(None)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("reader", ["scan", "cache"])
async def test_without_privilege_segments_are_read_through_their_mappings(reader: str) -> None:
    """Neither map_files nor page frame numbers are to be had then. The oracle, for its part, may see everything."""
    require_root()
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to give up privileges")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as root:
        runtime = Path(root) / "run"
        runtime.mkdir(mode=0o700)
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        command += [sys.executable, "-c", DRIVER, str(build_victim("odd")), f"{root}/chain", reader]
        driver = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment({"INCDUMP_RUNTIME_DIR": str(runtime)}),
        )
        with driver:
            try:
                assert driver.stdout is not None
                pid = int(driver.stdout.readline())
                rounds = json.loads(driver.stdout.readline())
                report = oracle.compare(f"{root}/chain/3", oracle.tree(pid))
            finally:
                driver.communicate(b"\n", timeout=60)
        assert driver.returncode == 0
    assert report.ok, report
    assert report.shmem_compared == 144
    assert rounds[-1]["tracker"] == "uffd-wp"
    assert rounds[-1]["incremental"]
    assert rounds[-1]["shpages_skipped_parent"] > 0
    assert rounds[-1]["pages_skipped_parent"] > rounds[-1]["pages_written"] // 2
    assert any("CAP_SYS_ADMIN" in line for line in rounds[-1]["warnings"])


async def test_the_content_tracker_takes_segments_alike(odd: Odd, images_root: Path) -> None:
    (address, _) = odd.do("shared 32")
    odd.do(f"fill {address} 32 1")
    chain = Chain(odd, images_root, DumpOptions(tracker="content"))
    await chain.predump()
    odd.do(f"poke {address} 2 2")
    await chain.predump()
    assert chain.last.stats.shpages_written == 2
    await chain.prove()
    assert os.path.exists(chain.last.images_dir)
