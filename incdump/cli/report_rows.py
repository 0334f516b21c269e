"""The heat map of a report: which mappings were written how much in which round.

Mappings grow, shrink, and merge with their neighbours from round to round. What overlaps, in the same process and with
the same name, is one row, from the lowest address to the highest. What was not written again after the first dump,
which writes everything, is one row together: it tells nothing of the rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from incdump.cli.invocation import one_line
from incdump.model.runs import canonical

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from incdump.model.precopy import MappingWrites

_NAME_LENGTH = 40


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Rows from the most written mapping down.

    :ivar labels: of the rows: process, addresses, name.
    :ivar pages: written, shape (rows, dumps), int64.
    :ivar left_out: how many mappings that were written later have no row of their own; if any, one row is their sum.
    :ivar idle: how many were not written after the first dump; if more than one, the last row is their sum.
    """

    labels: list[str]
    pages: NDArray[np.int64]
    left_out: int
    idle: int = 0


def heat_map(written: Sequence[Sequence[MappingWrites]], limit: int) -> HeatMap:
    """The mappings that were written most after the first dump, which writes everything.

    :param written: what each dump wrote.
    :param limit: rows at most, with those for all others.
    """
    regions = _regions(written)
    pages = np.zeros((sum(map(len, regions.values())), len(written)), np.int64)
    parts = [("", "", "")] * len(pages)
    first = 0
    first_of: dict[tuple[int, str], int] = {}
    for (pid, name), spans in regions.items():
        first_of[pid, name] = first
        first += len(spans)
    for n, mappings in enumerate(written):
        for m in mappings:
            spans = regions[m.pid, m.name]
            at = int(np.searchsorted(spans[:, 0], np.uint64(m.start), "right")) - 1
            row = first_of[m.pid, m.name] + at
            pages[row, n] += m.pages
            parts[row] = f"{m.pid} {one_line(m.comm)}", f"{int(spans[at, 0]):x}-{int(spans[at, 1]):x}", _short(m.name)
    later = pages[:, 1:].sum(axis=1)
    order = np.lexsort((pages.sum(axis=1), later))[::-1]
    idle = order[later[order] == 0] if pages.shape[1] > 1 else order[:0]
    if len(idle) < 2:  # one mapping is as good a row as any
        idle = idle[:0]
    busy = order[: len(order) - len(idle)]
    limit -= bool(len(idle))
    others = busy[limit - 1 :] if len(busy) > limit else busy[:0]
    kept = busy[: len(busy) - len(others)]
    labels, rows = _aligned([parts[n] for n in kept.tolist()]), [pages[kept]]
    for which, what in ((others, "others"), (idle, "mappings not written after the first round")):
        if len(which):
            labels.append(f"{len(which):,} {what}")
            rows.append(pages[which].sum(axis=0, keepdims=True))
    return HeatMap(labels, np.concatenate(rows), len(others), len(idle))


def _regions(written: Sequence[Sequence[MappingWrites]]) -> dict[tuple[int, str], NDArray[np.uint64]]:
    """What is one row each: of a process and a name, the spans that its mappings ever covered."""
    spans: dict[tuple[int, str], set[tuple[int, int]]] = {}
    for mappings in written:
        for m in mappings:
            spans.setdefault((m.pid, m.name), set()).add((m.start, m.end))
    return {key: _overlapping(found) for key, found in spans.items()}


def _overlapping(spans: set[tuple[int, int]]) -> NDArray[np.uint64]:
    """Spans that overlap as one; those that only touch stay apart."""
    # A byte less in length, and they do not touch.
    table = np.array(sorted(spans), np.uint64)
    table[:, 1] -= np.uint64(1)
    joined = canonical(table)
    joined[:, 1] += np.uint64(1)
    return joined


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of texts as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _short(name: str) -> str:
    """A name that fits beside a row: its end tells more than its beginning."""
    name = one_line(name) or "(anonymous)"
    return name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}"
