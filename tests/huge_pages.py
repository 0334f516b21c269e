"""The kernel's pool of huge pages, as large as tests need it.

A run of tests that is killed cannot give back what it took, so nothing here adds to what it finds free: the next run is
content with what the killed one has left.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

POOL = Path("/proc/sys/vm/nr_hugepages")


def _free() -> int:
    found = re.search(r"^HugePages_Free: *(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def at_least(free: int) -> Iterator[None]:
    """See to it that so many huge pages are free, if they can be had."""
    before = POOL.read_text() if POOL.exists() else "0"
    missing = free - _free()
    enlarged = False
    if missing > 0:
        with contextlib.suppress(OSError):
            POOL.write_text(str(int(before) + missing))
            enlarged = True
    try:
        yield
    finally:
        if enlarged:
            POOL.write_text(before)


@contextlib.contextmanager
def exactly(free: int) -> Iterator[None]:
    """See to it that exactly so many huge pages are free; the test is skipped where they cannot be had."""
    before = POOL.read_text()
    in_use = int(before) - _free()
    try:
        POOL.write_text(str(in_use + free))
        if _free() != free:
            pytest.skip("no hugetlb pages can be reserved")
        yield
    finally:
        POOL.write_text(before)
