"""Images dirs for tests: each page holds its own address and level, so that a page read from elsewhere is noticed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from incdump.images.inventory import encode_pre_dump_inventory
from incdump.images.new_dir import NewImagesDir
from incdump.images.pagemap import encode_pagemap
from incdump.model.runs import PAGE_SIZE, PE_LAZY, PE_PARENT, PE_PRESENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from incdump.model.runs import Entries

PID = 42
BASE = 0x7F00_0000_0000
P = PE_PRESENT | PE_LAZY
UP = PE_PARENT


def table(rows: Iterable[tuple[int, int, int]]) -> Entries:
    """An entry table from (page number, pages, flags)."""
    return np.array([(BASE + page * PAGE_SIZE, count, flags) for page, count, flags in rows], np.uint64).reshape(-1, 3)


def runs(*spans: tuple[int, int]) -> NDArray[np.uint64]:
    """A run set from (first page number, end page number)."""
    return np.array([(BASE + a * PAGE_SIZE, BASE + b * PAGE_SIZE) for a, b in spans], np.uint64).reshape(-1, 2)


def page(level: int, number: int) -> bytes:
    """What page `number` holds in level `level`."""
    return np.array([level + 1, number], np.uint64).tobytes() * (PAGE_SIZE // 16)


def contents(level: int, entries: Entries) -> bytes:
    """The pages image of an entry table."""
    parts = []
    for vaddr, count, flags in entries.tolist():
        if flags & PE_PRESENT:
            first = (vaddr - BASE) // PAGE_SIZE
            parts += [page(level, number) for number in range(first, first + count)]
    return b"".join(parts)


def write_level(
    path: Path,
    level: int,
    pagemaps: Mapping[str, Iterable[tuple[int, int, int]]],
    parent: str | None = None,
    *,
    meta: bytes | None = None,
) -> None:
    """Write a finished images dir.

    :param level: its number, which its pages hold.
    :param pagemaps: by name without ``.img`` (``"pagemap-42"``), rows of (page number, pages, flags).
    """
    with NewImagesDir.create(path, parent) as images:
        for name, rows in pagemaps.items():
            entries = table(rows)
            pages_id = images.next_pages_id()
            fd = images.open_pages(pages_id)
            with os.fdopen(fd, "wb") as file:
                file.write(contents(level, entries))
            images.write_raw(f"{name}.img", encode_pagemap(pages_id, entries))
        if meta is not None:
            images.write_raw("incdump.json", meta)
        images.finish(encode_pre_dump_inventory(1_000_000))


def write_chain(base: Path, *levels: Iterable[tuple[int, int, int]]) -> Path:
    """Write a chain of images dirs ``0``, ``1``, ... of one process, the oldest first, and return the newest."""
    for level, rows in enumerate(levels):
        write_level(base / str(level), level, {f"pagemap-{PID}": rows}, f"../{level - 1}" if level else None)
    return base / str(len(levels) - 1)
