"""Pages that another program has yet to supply are never taken for untouched ones; what is reserved costs nothing."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

import incdump
from incdump.model.options import DumpOptions
from incdump.model.runs import page_count
from incdump.proc.maps import read_vmas
from incdump.proc.pagemap import entries, make_reader
from tests.command import is_untouched
from tests.kernel.support import require_root, require_tracker
from tests.kernel.victims import victim

if TYPE_CHECKING:
    from pathlib import Path

    from incdump.model.options import PagemapName, TrackerName

pytestmark = [pytest.mark.kernel]

LAZY = """
import fcntl, struct
from incdump._uapi import userfaultfd as uapi
from incdump._uapi.arch import ARCH
area = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_ANONYMOUS | mmap.{sharing})
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
for page in range(16):
    area[page * PAGE] = 1
uffd = ctypes.CDLL(None, use_errno=True).syscall(ARCH.sys_userfaultfd, os.O_CLOEXEC | uapi.UFFD_USER_MODE_ONLY)
assert uffd >= 0, os.strerror(ctypes.get_errno())
uapi.api(uffd, 0)
fcntl.ioctl(uffd, 0xC020AA00, bytearray(struct.pack("4Q", start, 64 * PAGE, 1, 0)))  # UFFDIO_REGISTER, MODE_MISSING
tell(start=start)
wait()
fcntl.ioctl(uffd, 0xC020AA04, bytearray(struct.pack("4Q", start + 16 * PAGE, 48 * PAGE, 0, 0)))  # UFFDIO_ZEROPAGE
area[40 * PAGE] = 7
tell(start=start)
"""


@pytest.mark.parametrize("sharing", ["MAP_PRIVATE", "MAP_SHARED"])
@pytest.mark.parametrize("tracker", ["uffd-wp", "content"])
@pytest.mark.asyncio
async def test_a_dump_fails_by_name_until_they_are_supplied(
    images_root: Path, tracker: TrackerName, sharing: str
) -> None:
    require_root()
    require_tracker(tracker)
    options = DumpOptions(tracker=tracker, afterwards="stopped")
    with victim(LAZY.format(sharing=sharing)) as target:
        first = target.told["start"] + 16 * 4096
        for make in (incdump.predump, incdump.dump):
            with pytest.raises(incdump.LazyMemory, match=f"process {target.pid} waits for 48 pages") as raised:
                await make(target.pid, images_root / "1", options=options)
            assert raised.value.vaddr == first
            assert not (images_root / "1").exists()
            assert is_untouched(target.pid)
        target.go_and_listen()
        await incdump.predump(target.pid, images_root / "1", options=options)
        result = await incdump.dump(target.pid, images_root / "2", parent="../1", options=options)
        assert result.incremental
        report = await incdump.check_against(images_root / "2", target.pid)
        assert report.ok, report
        await incdump.untrack(target.pid)


@pytest.mark.asyncio
async def test_a_dump_waits_for_them_where_it_is_asked_to(images_root: Path) -> None:
    require_root()
    with victim(LAZY.format(sharing="MAP_PRIVATE")) as target:
        waits = DumpOptions(wait_for_lazy=0.5, afterwards="stopped")
        with pytest.raises(incdump.LazyMemory):
            await incdump.dump(target.pid, images_root / "1", options=waits)
        steps: list[str] = []

        def supply(step: str, _stats: object) -> None:
            if step == "waiting for lazy pages" and step not in steps:
                target.go_and_listen()
            steps.append(step)

        waits = DumpOptions(wait_for_lazy=60, afterwards="stopped")
        await incdump.dump(target.pid, images_root / "1", options=waits, progress=supply)
        assert "waiting for lazy pages" in steps
        report = await incdump.check_against(images_root / "1", target.pid)
        assert report.ok, report


@pytest.mark.asyncio
async def test_a_comparison_with_a_process_that_lacks_pages_does_not_call_it_right(images_root: Path) -> None:
    require_root()
    with victim(LAZY.format(sharing="MAP_PRIVATE")) as target:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("incdump.engine.process.check_supplied", lambda *_: None)
            await incdump.dump(target.pid, images_root / "1", options=DumpOptions(afterwards="stopped"))
        with pytest.raises(incdump.LazyMemory, match="waits for 48 pages"):
            await incdump.check_against(images_root / "1", target.pid)


RESERVED = """
area = mmap.mmap(-1, {tib} << 40, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
for n in range(500):
    area[n << 31] = 1
tell(done=True)
"""


@pytest.mark.parametrize("name", ["plain", "cache", "scan"])
def test_what_is_reserved_and_not_used_is_not_read(name: PagemapName, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 pages of 4 TiB, each in a page table of its own: 4 KiB of pagemap for each, not 8 GiB."""
    read: list[int] = []
    count = entries._read_each

    def note(fd: int, view: memoryview, take: object) -> None:
        read.append(view.nbytes)
        count(fd, view, take)  # type: ignore[arg-type]

    monkeypatch.setattr(entries, "_read_each", note)
    with victim(RESERVED.format(tib=4)) as target:
        vmas = read_vmas(target.pid, flags=True)
        fd = os.open(f"/proc/{target.pid}/pagemap", os.O_RDONLY)
        try:
            windows = list(make_reader(name).windows(fd, vmas))
            expected = list(make_reader("scan").windows(fd, vmas))
        finally:
            os.close(fd)
    found, scanned = (np.concatenate([w.regions[:, :2] for w in each]) for each in (windows, expected))
    assert page_count(found) == page_count(scanned) > 500
    assert sum(read) < 100 << 20
    edges = [(w.lo, w.hi) for w in windows]
    assert edges[0][0] <= int(vmas.start[0])
    assert all(one[1] <= two[0] for one, two in pairwise(edges))


@pytest.mark.parametrize("pagemap", ["plain", "cache"])
@pytest.mark.asyncio
async def test_a_process_with_much_reserved_is_dumped_and_compared(images_root: Path, pagemap: PagemapName) -> None:
    with victim(RESERVED.format(tib=4)) as target:
        options = DumpOptions(pagemap=pagemap, afterwards="stopped")
        await incdump.dump(target.pid, images_root / "1", options=options)
        report = await incdump.check_against(images_root / "1", target.pid)
        assert report.ok, report
        assert report.pages_compared > 500
        await incdump.untrack(target.pid)
