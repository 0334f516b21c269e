"""Page runs: sets of pages as NumPy arrays, and their algebra.

A *run set* (`Runs`) is an array of shape (n, 2), dtype uint64: each row is ``[start, end)`` in bytes, page aligned,
non-empty; rows are sorted, disjoint, and do not touch (two runs that touch are one run). Every function here takes and
returns run sets in that canonical form, and costs time in the number of runs, never of pages.

A *region table* (`Regions`) is an array of shape (n, 3), dtype uint64: ``[start, end, categories]`` as PAGEMAP_SCAN
returns it (struct page_region, Documentation/admin-guide/mm/pagemap.rst), sorted and disjoint; rows may touch.

An *entry table* (`Entries`) is an array of shape (n, 3), dtype uint64: ``[vaddr, nr_pages, flags]`` with CRIU's flags
of a pagemap entry (`PE_PARENT`, `PE_LAZY`, `PE_PRESENT`), sorted and disjoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_SIZE = 4096
PAGE_SHIFT = 12

PE_PARENT = 1
"""The page is in the parent images (CRIU's pagemap entry flag)."""
PE_LAZY = 2
"""The page may be restored lazily: private anonymous memory."""
PE_PRESENT = 4
"""The page's contents are in the pages image."""

Runs: TypeAlias = "NDArray[np.uint64]"
Regions: TypeAlias = "NDArray[np.uint64]"
Entries: TypeAlias = "NDArray[np.uint64]"


def empty_runs() -> Runs:
    """The run set of no pages."""
    return np.empty((0, 2), np.uint64)


def empty_regions() -> Regions:
    """A region (or entry) table of no rows."""
    return np.empty((0, 3), np.uint64)


def run(start: int, end: int) -> Runs:
    """The run set of one run, or of none when ``start >= end``."""
    return np.array([[start, end]], np.uint64) if start < end else empty_runs()


def canonical(spans: Runs) -> Runs:
    """Sort spans (shape (n, 2), in any order, overlapping or empty ones allowed) and merge those that touch."""
    spans = spans[spans[:, 0] < spans[:, 1]]
    if len(spans) <= 1:
        return np.ascontiguousarray(spans, np.uint64)
    if not (spans[1:, 0] >= spans[:-1, 0]).all():
        spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    first = np.empty(len(spans), bool)
    first[0] = True
    np.greater(spans[1:, 0], reach[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    last = np.append(starts[1:], len(spans)) - 1
    return np.stack((spans[starts, 0], reach[last]), axis=1)


def ascending(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted and distinct values. (`numpy.unique` hashes, which takes far longer for what is nearly in order.)"""
    values = np.sort(values, kind="stable")
    return values[np.concatenate(([True], values[1:] != values[:-1]))] if len(values) else values


def page_count(runs: Runs) -> int:
    """The number of pages in a run set (or in any (n, 2+) table whose rows are start, end)."""
    return int((runs[:, 1] - runs[:, 0]).sum()) >> PAGE_SHIFT


def union(a: Runs, b: Runs) -> Runs:
    """Pages in either set."""
    if not len(a):
        return b
    if not len(b):
        return a
    return canonical(np.concatenate((a, b)))


def _combine(a: Runs, b: Runs, keep_b: bool) -> Runs:
    """Pages of `a` that are in `b` (keep_b) or are not (not keep_b), by sweeping the bounds of both."""
    bounds = ascending(np.concatenate((a.ravel(), b.ravel())))
    lo, hi = bounds[:-1], bounds[1:]
    wanted = member(a, lo) & (member(b, lo) == keep_b)
    return canonical(np.stack((lo[wanted], hi[wanted]), axis=1))


def intersect(a: Runs, b: Runs) -> Runs:
    """Pages in both sets."""
    if not len(a) or not len(b):
        return empty_runs()
    return _combine(a, b, True)


def subtract(a: Runs, b: Runs) -> Runs:
    """Pages of `a` that are not in `b`."""
    if not len(a) or not len(b):
        return a
    return _combine(a, b, False)


def clip(runs: Runs, lo: int, hi: int) -> Runs:
    """Pages of a run set within ``[lo, hi)``."""
    if lo >= hi or not len(runs):
        return empty_runs()
    first = int(np.searchsorted(runs[:, 1], np.uint64(lo), "right"))
    last = int(np.searchsorted(runs[:, 0], np.uint64(hi), "left"))
    part = runs[first:last].copy()
    if len(part):
        part[0, 0] = max(int(part[0, 0]), lo)
        part[-1, 1] = min(int(part[-1, 1]), hi)
    return part


def member(runs: Runs, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """For each address, whether its page is in the run set.

    :param addresses: shape (n,), uint64.
    :returns: shape (n,), bool.
    """
    if not len(runs):
        return np.zeros(len(addresses), bool)
    at = np.searchsorted(runs[:, 0], addresses, "right").astype(np.int64) - 1
    inside: NDArray[np.bool_] = (at >= 0) & (addresses < runs[np.maximum(at, 0), 1])
    return inside


def covers(outer: Runs, inner: Runs) -> bool:
    """Whether every page of `inner` is in `outer`."""
    return len(first_uncovered(outer, inner)) == 0


def first_uncovered(outer: Runs, inner: Runs) -> Runs:
    """The pages of `inner` that `outer` lacks, cut down to the first run of them (or none)."""
    return subtract(inner, outer)[:1]


def page_addresses(runs: Runs) -> NDArray[np.uint64]:
    """The address of every page of a run set, shape (pages,). Bounded use only: it costs 8 bytes a page."""
    counts = ((runs[:, 1] - runs[:, 0]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
    total = int(counts.sum())
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(runs[:, 0], counts) + (np.arange(total) - before).astype(np.uint64) * np.uint64(PAGE_SIZE)


def runs_of_pages(addresses: NDArray[np.uint64]) -> Runs:
    """The run set of single pages given by sorted, distinct addresses."""
    if not len(addresses):
        return empty_runs()
    breaks = np.flatnonzero(np.diff(addresses) != PAGE_SIZE) + 1
    starts = addresses[np.concatenate(([0], breaks))]
    ends = addresses[np.concatenate((breaks - 1, [len(addresses) - 1]))] + np.uint64(PAGE_SIZE)
    return np.stack((starts, ends), axis=1)


def present_entries(entries: Entries) -> Entries:
    """The rows of an entry table that have a place in the pages image (PE_PRESENT)."""
    present: Entries = entries[(entries[:, 2] & np.uint64(PE_PRESENT)) != 0]
    return present


def entry_runs(entries: Entries) -> Runs:
    """The pages that an entry table covers, whatever their flags, as a run set."""
    spans = np.stack((entries[:, 0], entries[:, 0] + (entries[:, 1] << np.uint64(PAGE_SHIFT))), axis=1)
    return canonical(spans)
