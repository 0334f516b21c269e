"""Pagemap entries to regions, held against a reference that goes page by page; and the scan's duties."""

from __future__ import annotations

import errno
import threading
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.errors import TargetExited
from incdump.model.regions import PageIs
from incdump.model.runs import Regions, Runs, canonical
from incdump.proc import pagemap
from incdump.proc.maps import parse_maps
from incdump.proc.pagemap import ScanReader, scan
from incdump.proc.pagemap.entries import PIECE, pieces
from incdump.proc.pagemap.pme import clip_to, regions_of_pmes
from incdump.proc.pagemap.reader import helper, join_near

if TYPE_CHECKING:
    from collections.abc import Iterable

    from incdump.model.vmas import VmaTable

PAGE = 4096
ZERO_PFN = 0x3B34
PRESENT, SWAP, FILE, GUARD, UFFD_WP, SOFT_DIRTY = (1 << bit for bit in (63, 62, 61, 58, 57, 55))
MARKER = SWAP | UFFD_WP | 31 | 1 << 5

flag_sets = st.lists(st.sampled_from([PRESENT, SWAP, FILE, GUARD, UFFD_WP, SOFT_DIRTY, 1 << 56]), max_size=4).map(
    lambda flags: reduce(or_, flags, 0)
)
low_bits = st.sampled_from([0, 1, 0x1234567, ZERO_PFN, 31 | 1 << 5, 31 | 4 << 5, 7, (1 << 55) - 1])
entries = st.one_of(
    st.just(0), st.sampled_from([MARKER, PRESENT | ZERO_PFN]), st.builds(lambda a, b: a | b, flag_sets, low_bits)
)


def category(pme: int, zero_pfn: int | None) -> int:
    """What a pagemap entry says, one bit after the other."""
    low = pme & ((1 << 55) - 1)
    if not pme & (PRESENT | SWAP):
        return 0
    if zero_pfn is not None and low == 31 | 1 << 5 and pme & (PRESENT | SWAP | UFFD_WP | GUARD) == SWAP | UFFD_WP:
        return 0
    is_zero = bool(pme & PRESENT) and low == zero_pfn
    pairs = ((PRESENT, PageIs.PRESENT), (SWAP, PageIs.SWAPPED), (FILE, PageIs.FILE), (GUARD, PageIs.GUARD))
    found = sum(int(to) for bit, to in pairs if pme & bit)
    found |= 0 if pme & UFFD_WP else PageIs.WRITTEN
    found |= PageIs.SOFT_DIRTY if pme & SOFT_DIRTY else 0
    return int(found) | (PageIs.PFNZERO if is_zero else 0)


def by_page(regions: Regions) -> dict[int, int]:
    """Address to categories; fails on regions that are empty, overlap or are out of order."""
    pages: dict[int, int] = {}
    last = 0
    for start, end, categories in regions.tolist():
        assert last <= start < end
        assert start % PAGE == end % PAGE == 0
        pages |= dict.fromkeys(range(start, end, PAGE), categories)
        last = end
    return pages


def segments_of(parts: Iterable[tuple[int, list[int]]]) -> tuple[Runs, dict[int, int]]:
    """Segments, with gaps in between, and the entry of every page in them."""
    spans, entry_at, at = [], {}, 0x7000_0000_0000
    for gap, pmes in parts:
        start = at + gap * PAGE
        entry_at |= {start + i * PAGE: pme for i, pme in enumerate(pmes)}
        at = start + len(pmes) * PAGE
        spans.append((start, at))
    return np.array(spans, np.uint64).reshape(-1, 2), entry_at


parts = st.lists(st.tuples(st.integers(0, 3), st.lists(entries, min_size=1, max_size=12)), min_size=1, max_size=6)


@given(parts, st.sampled_from([None, ZERO_PFN]))
def test_regions_say_of_every_page_what_its_entry_says(parts: list[tuple[int, list[int]]], zero: int | None) -> None:
    segments, entry_at = segments_of(parts)
    regions = regions_of_pmes(segments, np.array(list(entry_at.values()), np.uint64), zero)
    expected = {address: category(pme, zero) for address, pme in entry_at.items()}
    assert by_page(regions) == {address: bits for address, bits in expected.items() if bits}


@given(parts)
def test_regions_in_one_segment_are_as_few_as_can_be(parts: list[tuple[int, list[int]]]) -> None:
    segments, entry_at = segments_of([(0, [pme for _, pmes in parts for pme in pmes])])
    regions = regions_of_pmes(segments, np.array(list(entry_at.values()), np.uint64))
    touching = regions[1:, 0] == regions[:-1, 1]
    assert not (touching & (regions[1:, 2] == regions[:-1, 2])).any()


def test_a_write_protection_marker_is_no_page_but_only_when_it_can_be_told() -> None:
    segment = np.array([[0x1000, 0x4000]], np.uint64)
    pmes = np.array([MARKER, SWAP | UFFD_WP | 5 << 5, SWAP | UFFD_WP], np.uint64)
    assert by_page(regions_of_pmes(segment, pmes, ZERO_PFN)) == {0x2000: PageIs.SWAPPED, 0x3000: PageIs.SWAPPED}
    hidden = pmes & ~np.uint64((1 << 55) - 1)
    assert set(by_page(regions_of_pmes(segment, hidden, None))) == {0x1000, 0x2000, 0x3000}


spans_in = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8).map(
    lambda pairs: canonical(np.array([(a * PAGE, (a + n) * PAGE) for a, n in pairs], np.uint64).reshape(-1, 2))
)
tables = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 3)), max_size=10)


@given(tables, spans_in)
def test_clipping_leaves_the_pages_in_the_spans(rows: list[tuple[int, int, int]], spans: Runs) -> None:
    at, regions = 0, []
    for gap, length, bits in rows:
        regions.append((at + gap * PAGE, at + (gap + length) * PAGE, bits))
        at += (gap + length) * PAGE
    table = np.array(regions, np.uint64).reshape(-1, 3)
    wanted = {page for start, end in spans.tolist() for page in range(start, end, PAGE)}
    clipped = clip_to(table, spans)
    assert by_page(clipped) == {page: bits for page, bits in by_page(table).items() if page in wanted}


def test_clipping_what_needs_none_copies_nothing() -> None:
    table = np.array([[0x1000, 0x2000, 8], [0x5000, 0x6000, 8]], np.uint64)
    assert clip_to(table, np.array([[0x1000, 0x3000], [0x4000, 0x7000]], np.uint64)) is table


@given(spans_in, st.integers(1, 4))
def test_pieces_are_the_same_pages_in_smaller_spans(spans: Runs, pages: int) -> None:
    cut = pieces(spans, pages * PAGE)
    assert not len(cut) or int((cut[:, 1] - cut[:, 0]).max()) <= pages * PAGE
    assert (cut[1:, 0] >= cut[:-1, 1]).all()
    assert (canonical(cut) == spans).all()


@given(spans_in, st.integers(0, 4))
def test_joining_bridges_small_gaps_only(spans: Runs, pages: int) -> None:
    joined = join_near(spans, pages * PAGE)
    expected: list[list[int]] = []
    for start, end in spans.tolist():
        if expected and start - expected[-1][1] <= pages * PAGE:
            expected[-1][1] = end
        else:
            expected.append([start, end])
    assert joined.tolist() == expected


# --- the scan, on a made-up kernel ---


def vmas(*spans: tuple[int, int, str]) -> VmaTable:
    lines = []
    for start, end, name in spans:
        lines.append(f"{start:08x}-{end:08x} rw-p 00000000 {'08:01 7' if name else '00:00 0'} {name}\n")
    return parse_maps("".join(lines).encode())


class FakeKernel:
    """PAGEMAP_SCAN over one-page regions at every other page, a few at a time."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        at_once: int = 3,
        fail_at: int = -1,
        fail_in: int = -1,
        number: int = 0,
    ) -> None:
        self.fail_in = fail_in
        self.calls: list[tuple[int, int, dict[str, Any]]] = []
        self.at_once = at_once
        self.fail_at = fail_at
        self.number = number
        monkeypatch.setattr(scan, "pagemap_scan", self.scan)
        monkeypatch.setattr(scan, "_check_there", lambda fd, address: None)

    def scan(self, fd: int, start: int, end: int, vec: Regions, **options: Any) -> tuple[int, int]:
        self.calls.append((start, end, options))
        if len(self.calls) - 1 == self.fail_at or start <= self.fail_in < end:
            raise OSError(self.number, "made up")
        pages = range(start + start % (2 * PAGE), end, 2 * PAGE)[: min(self.at_once, len(vec))]
        for i, page in enumerate(pages):
            vec[i] = page, page + PAGE, PageIs.PRESENT | PageIs.WRITTEN
        return len(pages), min(end, pages[-1] + 2 * PAGE if pages else end)


def test_every_call_is_told_before_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(monkeypatch)
    told: list[tuple[int, list[list[int]]]] = []
    reader = ScanReader(flags=1, on_regions=lambda regions: told.append((len(kernel.calls), regions.tolist())))
    found = np.concatenate([window.regions for window in reader.windows(-1, vmas((0x10000, 0x20000, "")))])
    assert [calls for calls, _ in told] == list(range(1, len(kernel.calls) + 1))
    assert [row for _, rows in told for row in rows] == found.tolist()
    assert len(found) == 8


def test_the_ledger_is_told_of_what_is_not_wanted_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeKernel(monkeypatch)
    told: list[Regions] = []
    wanted = vmas((0x10000, 0x12000, ""), (0x16000, 0x18000, ""))
    found = [w.regions for w in ScanReader(flags=1, on_regions=told.append).windows(-1, wanted)]
    assert set(by_page(np.concatenate(told))) == {0x10000, 0x12000, 0x14000, 0x16000}
    assert set(by_page(np.concatenate(found))) == {0x10000, 0x16000}


def test_a_failed_call_may_have_protected_all_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeKernel(monkeypatch, fail_at=1, number=errno.EINTR)
    told: list[Regions] = []
    failed: list[tuple[int, int]] = []
    reader = ScanReader(flags=1, on_regions=told.append, on_failure=lambda lo, hi: failed.append((lo, hi)))
    with pytest.raises(InterruptedError):
        list(reader.windows(-1, vmas((0x10000, 0x20000, ""))))
    assert sorted(by_page(np.concatenate(told))) == [0x10000, 0x12000, 0x14000]
    assert failed == [(0x16000, 0x20000)]


def test_an_interrupted_scan_that_protects_nothing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeKernel(monkeypatch, fail_at=1, number=errno.EINTR)
    windows = list(ScanReader().windows(-1, vmas((0x10000, 0x20000, ""))))
    assert len(by_page(np.concatenate([w.regions for w in windows]))) == 8


def test_a_ledger_that_fails_counts_as_a_failed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeKernel(monkeypatch, at_once=100)
    failed: list[tuple[int, int]] = []

    def broken(regions: Regions) -> None:
        raise KeyboardInterrupt

    reader = ScanReader(flags=1, on_regions=broken, on_failure=lambda lo, hi: failed.append((lo, hi)))
    with pytest.raises(KeyboardInterrupt):
        list(reader.windows(-1, vmas((0x10000, 0x20000, ""))))
    assert failed == [(0x10000, 0x20000)]


def test_an_address_space_that_is_gone_is_an_exited_target(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeKernel(monkeypatch, fail_at=0, number=errno.ESRCH)
    with pytest.raises(TargetExited):
        list(ScanReader().windows(-1, vmas((0x10000, 0x20000, ""))))


def test_windows_are_bounded_and_leave_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeKernel(monkeypatch, at_once=10**9)
    monkeypatch.setattr(scan, "_SCAN_REGIONS", 5)
    windows = list(ScanReader().windows(-1, vmas((0x10000, 0x18000, ""), (0x30000, 0x48000, ""))))
    assert max(len(w.regions) for w in windows) <= 5
    assert windows[0].lo == 0x10000
    assert windows[-1].hi == 0x48000
    assert all(a.hi == b.lo for a, b in pairwise(windows))
    assert sorted(by_page(np.concatenate([w.regions for w in windows]))) == [
        *range(0x10000, 0x18000, 2 * PAGE),
        *range(0x30000, 0x48000, 2 * PAGE),
    ]


def in_small_steps(monkeypatch: pytest.MonkeyPatch, first: int, most: int) -> None:
    for name, pages in (
        ("_FIRST_SCAN_PAGES", first),
        ("_FEW_PAGES", 0),
        ("_SCAN_PAGES", most),
        ("_WORTH_TWO_THREADS", 2),
    ):
        monkeypatch.setattr(scan, name, pages)


@pytest.mark.parametrize("at_once", [1, 2, 5, 1000])
@pytest.mark.parametrize(("first", "most"), [(1, 4), (3, 7), (8, 1000), (1000, 1000)])
def test_two_threads_find_what_one_does(monkeypatch: pytest.MonkeyPatch, at_once: int, first: int, most: int) -> None:
    in_small_steps(monkeypatch, first, most)
    kernel = FakeKernel(monkeypatch, at_once=at_once)
    told: list[Regions] = []
    table = vmas((0x10000, 0x13000, ""), (0x15000, 0x16000, ""), (0x20000, 0x7B000, ""), (0x90000, 0x92000, "/lib"))
    windows = list(ScanReader(flags=1, on_regions=told.append).windows(-1, table))
    found = np.concatenate([w.regions for w in windows])
    wanted = [page for lo, hi in table.spans().tolist() for page in range(lo, hi, PAGE) if not page % (2 * PAGE)]
    assert found[:, 0].tolist() == wanted
    assert set(np.concatenate(told)[:, 0].tolist()) >= set(wanted)
    assert (windows[0].lo, windows[-1].hi) == (0x10000, 0x92000)
    assert all(a.hi == b.lo for a, b in pairwise(windows))
    assert all(w.lo <= lo < hi <= w.hi for w in windows for lo, hi, _ in w.regions.tolist())
    assert len({start for start, _, _ in kernel.calls}) == len(kernel.calls)


@pytest.mark.parametrize("bad", [0x20000, 0x5F000])
def test_when_one_of_two_threads_fails_what_the_other_took_is_told(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    in_small_steps(monkeypatch, 1000, 1000)
    kernel = FakeKernel(monkeypatch, at_once=1000, fail_in=bad, number=errno.ENOMEM)
    told: list[Regions] = []
    failed: list[tuple[int, int]] = []
    reader = ScanReader(flags=1, on_regions=told.append, on_failure=lambda lo, hi: failed.append((lo, hi)))
    with pytest.raises(OSError, match="made up"):
        list(reader.windows(-1, vmas((0x20000, 0x60000, ""))))
    halves = [(0x20000, 0x40000), (0x40000, 0x60000)]
    ((lo, hi),) = failed
    halves.remove((lo, hi))
    assert lo <= bad < hi
    taken = [start for start, _, _ in kernel.calls]  # the second thread need not have begun
    expected = list(range(*halves[0], 2 * PAGE)) if halves[0][0] in taken else []
    assert sorted(page for regions in told for page in by_page(regions)) == expected


def test_a_second_thread_that_gets_no_processor_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_steps(monkeypatch, 1000, 1000)
    kernel = FakeKernel(monkeypatch, at_once=1000)
    has_a_processor = threading.Event()
    busy = helper().submit(has_a_processor.wait, 20)
    try:
        (window,) = ScanReader().windows(-1, vmas((0x20000, 0x60000, "")))
        assert not busy.done()
    finally:
        has_a_processor.set()
    assert sorted(by_page(window.regions)) == list(range(0x20000, 0x60000, 2 * PAGE))
    assert [start for start, _, _ in kernel.calls] == [0x20000, 0x40000]


def test_a_sparse_mapping_is_scanned_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 TiB of which nothing is there, as sanitizers reserve."""
    kernel = FakeKernel(monkeypatch, at_once=0)
    assert len(np.concatenate([w.regions for w in ScanReader().windows(-1, vmas((0x10000, 1 << 44, "")))])) == 0
    assert len(kernel.calls) < 20


def test_file_is_asked_about_only_near_mappings_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_WORTH_A_CALL", 3)
    kernel = FakeKernel(monkeypatch, at_once=10**9)
    not_file = int(PageIs.FILE)
    reader = ScanReader(mask=not_file | PageIs.WPALLOWED, inverted=not_file)
    near, far = 0x7F00_0000_0000, 0x7F00_0100_0000
    list(reader.windows(-1, vmas((near, near + PAGE, ""), (far, far + PAGE, "/lib"), (far + PAGE, far + 2 * PAGE, ""))))
    asked = [
        (
            start,
            end,
            bool(o["returned"] & PageIs.FILE),
            bool(o["mask"] & PageIs.FILE),
            bool(o["inverted"] & PageIs.FILE),
        )
        for start, end, o in kernel.calls
    ]
    assert asked == [
        (near, far, False, False, False),
        (far, far + PAGE, True, True, True),
        (far + PAGE, far + 2 * PAGE, False, False, False),
    ]
    assert all(o["mask"] & PageIs.WPALLOWED for _, _, o in kernel.calls)


def test_for_few_pages_file_is_asked_about_everywhere_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_WORTH_A_CALL", 4)
    kernel = FakeKernel(monkeypatch, at_once=10**9)
    near, far = 0x7F00_0000_0000, 0x7F00_0100_0000
    mappings = vmas((near, near + PAGE, ""), (far, far + PAGE, "/lib"), (far + PAGE, far + 2 * PAGE, ""))
    list(ScanReader().windows(-1, mappings))
    assert [(start, end, bool(o["returned"] & PageIs.FILE)) for start, end, o in kernel.calls] == [
        (near, far + 2 * PAGE, True)
    ]


def test_no_vmas_are_no_windows() -> None:
    for name in ("plain", "cache", "scan"):
        assert list(pagemap.make_reader(name).windows(-1, parse_maps(b""))) == []  # type: ignore[arg-type]


def test_a_big_vma_is_read_in_pieces() -> None:
    cut = pieces(np.array([[0, 5 * PIECE + PAGE]], np.uint64))
    assert (cut[:, 1] - cut[:, 0]).tolist() == [PIECE] * 5 + [PAGE]
