"""Changes of memory that set no soft-dirty bit: they must not be taken for pages that nobody wrote to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import incdump
from incdump.model.options import DumpOptions
from tests.kernel.support import require_tracker, same_when_stopped
from tests.kernel.victims import victim

if TYPE_CHECKING:
    from pathlib import Path

    from incdump.model.options import PagemapName, TrackerName

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]

MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 4, 14, 15
START = """
M = 2 << 20
def aligned():
    return (mapping.map_anonymous(2 * M) + M - 1) & -M
old, new = aligned(), aligned()
for place in (old, new):
    mapping.advise(place, M, {advice})
touch(old, *range(512), value=1)
touch(new, *range(512), value=2)
tell()
wait()
"""
CHANGES = {
    "2 MiB move over others": "mapping.move(old, M, new)",
    "2 MiB are dropped and read": f"mapping.advise(old, M, {MADV_DONTNEED})\n"
    "for page in range(512):\n    mapping.read_byte(old + page * PAGE)",
}


@pytest.mark.parametrize("reader", ["scan", "cache"])
@pytest.mark.parametrize("tracker", ["soft-dirty", "uffd-wp"])
@pytest.mark.parametrize("advice", [MADV_HUGEPAGE, MADV_NOHUGEPAGE], ids=["huge", "small"])
@pytest.mark.parametrize("change", CHANGES)
async def test_changed_without_a_write(
    images_root: Path, change: str, advice: int, tracker: TrackerName, reader: PagemapName
) -> None:
    require_tracker(tracker)
    options = DumpOptions(tracker=tracker, pagemap=reader)
    with victim(f"{START.format(advice=advice)}{CHANGES[change]}\ntell()") as target:
        await incdump.predump(target.pid, images_root / "1", options=options)
        target.go_and_listen()
        result = await incdump.predump(target.pid, images_root / "2", parent="../1", options=options)
        assert result.incremental
        report = same_when_stopped(target, images_root / "2")  # type: ignore[arg-type]
        assert report.ok, report
