"""How much of each mapping a dump wrote, and how its freeze divides."""

from __future__ import annotations

import numpy as np
import pytest

from incdump.engine.mappings import pages_within
from incdump.model.runs import PAGE_SIZE, PE_PARENT, PE_PRESENT, Entries, Runs, empty_regions
from incdump.model.stats import CheckpointTimes, DumpResult, DumpStats, freeze_parts


def entries(*rows: tuple[int, int, int]) -> Entries:
    """first page, pages, flags."""
    return np.array([[first * PAGE_SIZE, pages, flags] for first, pages, flags in rows], np.uint64)


def spans(*rows: tuple[int, int]) -> Runs:
    """first page, page after the last."""
    return np.array(rows, np.uint64) * np.uint64(PAGE_SIZE)


def test_an_entry_that_reaches_over_several_mappings_counts_in_each() -> None:
    table = entries((10, 10, PE_PRESENT), (20, 5, PE_PARENT), (30, 1, PE_PRESENT))
    counted = pages_within(table, spans((0, 5), (5, 12), (12, 15), (15, 25), (25, 30), (30, 31), (31, 99)))
    assert counted.tolist() == [0, 2, 3, 5, 0, 1, 0]


def test_pages_are_counted_as_one_by_one() -> None:
    random = np.random.default_rng(5)
    for _ in range(50):
        bounds = np.sort(random.choice(400, 40, replace=False)).reshape(-1, 2)
        flags = random.choice([PE_PRESENT, PE_PARENT], len(bounds))
        table = entries(*((lo, hi - lo, flag) for (lo, hi), flag in zip(bounds.tolist(), flags.tolist(), strict=True)))
        written = {p for (lo, hi), flag in zip(bounds, flags, strict=True) if flag == PE_PRESENT for p in range(lo, hi)}
        mappings = np.sort(random.choice(400, 20, replace=False)).reshape(-1, 2)
        expected = [len(written & set(range(lo, hi))) for lo, hi in mappings]
        assert pages_within(table, spans(*mappings.tolist())).tolist() == expected


def test_of_nothing_written_there_is_nothing_anywhere() -> None:
    assert pages_within(empty_regions(), spans((0, 5), (7, 9))).tolist() == [0, 0]
    assert pages_within(entries((0, 5, PE_PARENT)), spans((0, 5))).tolist() == [0]


def result(checkpoint: CheckpointTimes | None = None, **times: int) -> DumpResult:
    return DumpResult("images", 1, stats=DumpStats(**times), checkpoint=checkpoint)


def test_the_parts_of_a_dumps_freeze_add_up() -> None:
    parts = freeze_parts(result(freezing_time=500, frozen_time=10_000, memdump_time=8_000, memwrite_time=6_000))
    assert [(part.name, part.microseconds) for part in parts] == [
        ("freezing", 500),
        ("scan", 2_000),
        ("copy", 6_000),
        ("rest", 2_000),
    ]


@pytest.mark.parametrize("frozen", [40_000, 30_000, 29_000])
def test_the_parts_of_a_checkpoints_freeze_add_up_whatever_the_clocks_say(frozen: int) -> None:
    times = CheckpointTimes(before_scan=90_000, memory=20_000, waited=4_000, in_place=6_000)
    parts = freeze_parts(result(times, freezing_time=700, frozen_time=frozen, memwrite_time=15_000))
    assert [part.name for part in parts] == ["freezing", "scan", "copy", "waited", "in_place", "criu"]
    assert sum(part.microseconds for part in parts) == 700 + frozen
    assert min(part.microseconds for part in parts) >= 0


def test_of_a_freeze_whose_length_is_not_known_there_are_no_parts() -> None:
    assert freeze_parts(result()) == []
    assert freeze_parts(result(CheckpointTimes(memory=5))) == []
