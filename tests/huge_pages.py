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

_POOL = Path("/proc/sys/vm/nr_hugepages")


def pool() -> int:
    """How many there are, free or not."""
    return int(_POOL.read_text())


def _free() -> int:
    found = re.search(r"^HugePages_Free: *(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def _changed_by(pages: int) -> Iterator[None]:
    before = pool()
    _POOL.write_text(str(before + pages))
    try:
        yield
    finally:
        _POOL.write_text(str(before))


@contextlib.contextmanager
def at_least(free: int) -> Iterator[None]:
    """See to it that so many huge pages are free, if they can be had."""
    with contextlib.ExitStack() as stack:
        missing = free - _free()
        if missing > 0:
            with contextlib.suppress(OSError):
                stack.enter_context(_changed_by(missing))
        yield


@contextlib.contextmanager
def exactly(free: int) -> Iterator[None]:
    """See to it that exactly so many huge pages are free; the test is skipped where they cannot be had."""
    with _changed_by(free - _free()):
        if _free() != free:
            pytest.skip("no hugetlb pages can be reserved")
        yield
