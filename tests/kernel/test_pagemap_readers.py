"""The three pagemap readers on real processes: they must agree, page for page, with each other and with the truth."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from incdump import kerndat
from incdump._uapi import mapping
from incdump._uapi.libc import libc
from incdump._uapi.pagemap_scan import pagemap_scan
from incdump.errors import TargetExited
from incdump.model.regions import PageIs, Window
from incdump.model.vmas import VmaKind, VmaTable
from incdump.proc.maps import read_vmas
from incdump.proc.pagemap import CacheReader, PagemapReader, PlainReader, ScanReader, make_reader
from incdump.proc.pagemap.reader import helper
from tests.kernel.victims import victim

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not kerndat.pagemap_scan().works, reason="this kernel has no PAGEMAP_SCAN to compare with"),
]

PAGE = 4096
READERS: list[type[PagemapReader]] = [PlainReader, CacheReader, ScanReader]
PRIVATE = (VmaKind.ANON, VmaKind.FILE_PRIVATE, VmaKind.VDSO)
NOT_IN_PMES = PageIs.WPALLOWED | PageIs.HUGE


@contextmanager
def pagemap_of(pid: int) -> Iterator[int]:
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def private_vmas(pid: int) -> VmaTable:
    table = read_vmas(pid, flags=True)
    return table.select(table.of_kind(*PRIVATE))


def windows_of(reader: PagemapReader, pid: int, vmas: VmaTable) -> list[Window]:
    with pagemap_of(pid) as fd:
        return list(reader.windows(fd, vmas))


def pages_of(windows: list[Window], lo: int = 0, hi: int = 1 << 63) -> dict[int, PageIs]:
    """Address to categories, of the pages in ``[lo, hi)``; fails if windows or regions are out of order."""
    pages: dict[int, PageIs] = {}
    last_hi = last_end = 0
    for window in windows:
        assert last_hi <= window.lo < window.hi
        last_hi = window.hi
        for start, end, categories in window.regions.tolist():
            assert window.lo <= start < end <= window.hi
            assert last_end <= start
            last_end = end
            pages |= dict.fromkeys(range(max(start, lo), min(end, hi), PAGE), PageIs(categories))
    return pages


def read_all(pid: int, vmas: VmaTable, lo: int = 0, hi: int = 1 << 63) -> dict[str, dict[int, PageIs]]:
    return {reader.name: pages_of(windows_of(reader(), pid, vmas), lo, hi) for reader in READERS}


def assert_agree(found: dict[str, dict[int, PageIs]], ignoring: PageIs = NOT_IN_PMES) -> None:
    """All readers say the same, but for what pagemap entries cannot tell."""
    if kerndat.zero_page_pfn() is None:
        ignoring |= PageIs.PFNZERO
    seen = {name: {at: is_ & ~ignoring for at, is_ in pages.items()} for name, pages in found.items()}
    assert seen["plain"] == seen["cache"]
    assert seen["cache"] == seen["scan"]


LAYOUT = """
base = mapping.map_anonymous(64 * PAGE)
mapping.advise_no_huge_pages(base, 64 * PAGE)
touch(base, 0, 1, 2, 5, 9, 10, 63)           # 3 and 4, 6 to 8: holes
for page in (20, 21, 24):
    mapping.read_byte(base + page * PAGE)    # zero pages
mapping.unmap(base + 30 * PAGE, 4 * PAGE)
touch(base, 40, 41, 42)
mapping.protect(base + 40 * PAGE, 2 * PAGE, mapping.PROT_NONE)
fd = os.memfd_create("file")
os.write(fd, bytes([1]) * 16 * PAGE)
private = mmap.mmap(fd, 16 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
for page in range(8):
    private[page * PAGE]                     # pages of the file
private[2 * PAGE] = 1                        # one of our own
where = ctypes.addressof(ctypes.c_char.from_buffer(private))
tell(base=base, file=where)
"""


def test_the_readers_agree_page_for_page_and_with_what_was_done() -> None:
    with victim(LAYOUT) as target:
        vmas = private_vmas(target.pid)
        assert_agree(read_all(target.pid, vmas))
        base = target.told["base"]
        for pages in read_all(target.pid, vmas, base, base + 64 * PAGE).values():
            populated = {(at - base) // PAGE for at in pages}
            assert populated == {0, 1, 2, 5, 9, 10, 20, 21, 24, 40, 41, 42, 63}
            assert all(is_ & PageIs.PRESENT and is_ & PageIs.WRITTEN for is_ in pages.values())
        scanned = pages_of(windows_of(ScanReader(), target.pid, vmas), base, base + 64 * PAGE)
        assert {(at - base) // PAGE for at, is_ in scanned.items() if is_ & PageIs.PFNZERO} == {20, 21, 24}
        start = target.told["file"]
        for pages in read_all(target.pid, vmas, start, start + 8 * PAGE).values():
            of_file = {(at - start) // PAGE: bool(is_ & PageIs.FILE) for at, is_ in pages.items()}
            assert of_file == {page: page != 2 for page in range(8)}


MANY = """
stride, gap = 11, {gap}
base = mapping.map_anonymous(1500 * stride * PAGE)
mapping.advise_no_huge_pages(base, 1500 * stride * PAGE)
for i in range(1500):
    touch(base + i * stride * PAGE, *range(i % 10 + 1))
    if gap:
        mapping.unmap(base + (i * stride + 10) * PAGE, PAGE)
    else:
        mapping.protect(base + (i * stride + 10) * PAGE, PAGE, mapping.PROT_NONE)
tell(base=base, end=base + 1500 * stride * PAGE)
"""


@pytest.mark.parametrize("gap", [True, False], ids=["holes between", "PROT_NONE between"])
def test_many_small_vmas_are_read_whole_by_all(gap: bool) -> None:
    with victim(MANY.format(gap=gap)) as target:
        vmas = private_vmas(target.pid)
        assert len(vmas) > 1500
        found = read_all(target.pid, vmas, target.told["base"], target.told["end"])
        assert_agree(found)
        expected = {target.told["base"] + (i * 11 + page) * PAGE for i in range(1500) for page in range(i % 10 + 1)}
        assert set(found["scan"]) == expected


def test_what_is_not_wanted_is_left_out() -> None:
    with victim(MANY.format(gap=True)) as target:
        vmas = private_vmas(target.pid)
        every_third = vmas.select(np.arange(len(vmas)) % 3 == 0)
        found = read_all(target.pid, every_third)
        assert_agree(found)
        whole = pages_of(windows_of(PlainReader(), target.pid, vmas))
        inside = every_third.at(np.array(list(whole), np.uint64)) >= 0
        assert set(found["cache"]) == {at for at, wanted in zip(whole, inside, strict=True) if wanted}


def test_the_vdsos_pages_are_a_files_to_all_readers_alone_too() -> None:
    with victim("tell()") as target:
        vmas = private_vmas(target.pid)
        vdso = vmas.select(vmas.of_kind(VmaKind.VDSO))
        found = read_all(target.pid, vdso)
        assert_agree(found)
        assert all(PageIs.FILE in page for page in found["scan"].values())
        assert found["scan"]


def test_shared_memory_between_private_vmas_is_read_along_by_none() -> None:
    script = """
    base = mapping.map_anonymous(3 * PAGE)
    touch(base, 0, 1, 2)
    shared = mmap.mmap(-1, 8 * PAGE)
    shared[:] = bytes([1]) * (8 * PAGE)
    tell(shared=ctypes.addressof(ctypes.c_char.from_buffer(shared)))
    """
    with victim(script) as target:
        for pages in read_all(target.pid, private_vmas(target.pid)).values():
            assert pages
            assert not any(target.told["shared"] <= at < target.told["shared"] + 8 * PAGE for at in pages)


def test_windows_cover_every_vma() -> None:
    with victim(LAYOUT) as target:
        vmas = private_vmas(target.pid)
        for reader in READERS:
            windows = windows_of(reader(), target.pid, vmas)
            for start, end in vmas.spans().tolist():
                at = start
                for window in windows:
                    if window.lo <= at < window.hi:
                        at = window.hi
                assert at >= end


def test_a_big_sparse_mapping_has_just_its_pages() -> None:
    script = """
    base = mapping.map_anonymous(1 << 30)
    mapping.advise_no_huge_pages(base, 1 << 30)
    pages = [0, 8191, 8192, 100_000, 262_143]
    touch(base, *pages)
    tell(base=base, pages=pages)
    """
    with victim(script) as target:
        base = target.told["base"]
        found = read_all(target.pid, private_vmas(target.pid), base, base + (1 << 30))
        assert_agree(found)
        assert [(at - base) // PAGE for at in found["cache"]] == target.told["pages"]


def test_a_scan_that_goes_on_many_times_reports_each_page_once() -> None:
    """The kernel's walk_end can lie: more than 512 regions, the last lot of 512 not full."""
    script = """
    base = mapping.map_anonymous(4000 * PAGE)
    mapping.advise_no_huge_pages(base, 4000 * PAGE)
    touch(base, *range(0, 4000, 2))
    tell(base=base)
    """
    with victim(script) as target, pagemap_of(target.pid) as fd:
        base, end = target.told["base"], target.told["base"] + 4000 * PAGE
        for room in (2500, 2000, 1999, 700, 512, 100):
            for most in (0, 2000, 1500, 513):
                vec = np.empty((room, 3), np.uint64)
                starts: list[int] = []
                start, calls = base, 0
                while start < end:
                    count, start = pagemap_scan(fd, start, end, vec, max_pages=most, mask=8, returned=8)
                    starts += vec[:count, 0].tolist()
                    calls += 1
                assert starts == list(range(base, end, 2 * PAGE)), (room, most)
                assert calls <= 2 + 2000 // min(room, most or room)


@contextmanager
def huge_pages_or_skip() -> Iterator[None]:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists() or "[never]" in path.read_text():
        pytest.skip("transparent huge pages are off")
    yield


def test_huge_pages_are_told_by_the_scan_and_seen_by_all() -> None:
    script = """
    size = 4 << 20
    base = mapping.map_anonymous(4 * size)
    base = (base + size - 1) & -size
    mapping.advise(base, size, 14)
    touch(base, 0)
    mapping.advise(base + size, size, 14)
    mapping.read_byte(base + size)
    tell(base=base)
    """
    with huge_pages_or_skip(), victim(script) as target:
        base, huge = target.told["base"], 2 << 20
        found = read_all(target.pid, private_vmas(target.pid), base, base + huge)
        if not found["scan"][base] & PageIs.HUGE:
            pytest.skip("no huge page was to be had")
        assert_agree(found)
        assert len(found["plain"]) == 512
        zero = read_all(target.pid, private_vmas(target.pid), base + 2 * huge, base + 3 * huge)
        # PMEs do not tell the huge zero page; the scan does. It may be a small zero page, too.
        assert_agree(zero, ignoring=NOT_IN_PMES | PageIs.PFNZERO | PageIs.FILE)
        assert all(is_ & PageIs.PFNZERO for is_ in zero["scan"].values())


def test_guard_pages_are_told_from_swapped_ones() -> None:
    if not kerndat.pagemap_scan_guard().works:
        pytest.skip(f"no guard regions here: {kerndat.pagemap_scan_guard().why}")
    script = """
    base = mapping.map_anonymous(8 * PAGE)
    touch(base, 0, 1)
    mapping.advise(base + 4 * PAGE, 2 * PAGE, mapping.MADV_GUARD_INSTALL)
    tell(base=base)
    """
    with victim(script) as target:
        base = target.told["base"]
        found = read_all(target.pid, private_vmas(target.pid), base, base + 8 * PAGE)
        assert_agree(found)
        assert {(at - base) // PAGE for at, is_ in found["plain"].items() if is_ & PageIs.GUARD} == {4, 5}


@contextmanager
def swap() -> Iterator[None]:
    """Some swap for a while, on a file."""
    if os.geteuid() != 0:
        pytest.skip("swapon needs root")
    path = Path("/var/tmp/incdump-test-swap")
    try:
        path.write_bytes(bytes(16 << 20))
        path.chmod(0o600)
        if subprocess.run(["mkswap", str(path)], check=False, capture_output=True).returncode:
            pytest.skip("mkswap does not work here")
        if libc.swapon(os.fsencode(path), 0):
            pytest.skip(f"swapon does not work here: {os.strerror(ctypes.get_errno())}")
        try:
            yield
        finally:
            libc.swapoff(os.fsencode(path))
    except FileNotFoundError:
        pytest.skip("there is no mkswap here")
    finally:
        path.unlink(missing_ok=True)


def test_swapped_pages_are_populated() -> None:
    script = """
    base = mapping.map_anonymous(64 * PAGE)
    mapping.advise_no_huge_pages(base, 64 * PAGE)
    touch(base, *range(0, 64, 2))
    mapping.advise(base, 64 * PAGE, 21)  # MADV_PAGEOUT
    tell(base=base)
    """
    with swap(), victim(script) as target:
        base = target.told["base"]
        found = read_all(target.pid, private_vmas(target.pid), base, base + 64 * PAGE)
        if not any(is_ & PageIs.SWAPPED for is_ in found["scan"].values()):
            pytest.skip("the kernel swapped none of the pages out")
        assert_agree(found)
        assert [(at - base) // PAGE for at in found["plain"]] == list(range(0, 64, 2))


def test_pages_of_an_armed_mapping_are_written_only_after_a_write() -> None:
    if not kerndat.uffd_wp_async().works:
        pytest.skip(f"no asynchronous write protection: {kerndat.uffd_wp_async().why}")
    script = """
    from incdump._uapi import userfaultfd as u
    base = mapping.map_anonymous(8 * PAGE)
    mapping.advise_no_huge_pages(base, 8 * PAGE)
    touch(base, 0, 1, 2, 3)
    fd = u.open_userfaultfd(os.O_CLOEXEC | u.UFFD_USER_MODE_ONLY)
    u.api(fd, u.FEATURE_WP_ASYNC | u.FEATURE_WP_UNPOPULATED)
    u.register_wp(fd, base, 8 * PAGE)
    u.writeprotect(fd, base, 8 * PAGE, True)  # pages 4 to 7 become markers
    touch(base, 2, value=2)
    tell(base=base)
    """
    with victim(script) as target:
        base = target.told["base"]
        found = read_all(target.pid, private_vmas(target.pid), base, base + 8 * PAGE)
        written = {
            name: {(at - base) // PAGE for at in pages if pages[at] & PageIs.WRITTEN} for name, pages in found.items()
        }
        assert written == {"plain": {2}, "cache": {2}, "scan": {2}}
        assert all(is_ & PageIs.WPALLOWED for is_ in found["scan"].values())
        if kerndat.zero_page_pfn() is not None:  # else a marker looks like a swapped page
            assert {(at - base) // PAGE for at in found["plain"]} == {0, 1, 2, 3}


def test_a_scan_that_protects_tells_each_write_once() -> None:
    if not kerndat.uffd_wp_async().works:
        pytest.skip(f"no asynchronous write protection: {kerndat.uffd_wp_async().why}")
    script = """
    from incdump._uapi import userfaultfd as u
    base = mapping.map_anonymous(3000 * PAGE)
    mapping.advise_no_huge_pages(base, 3000 * PAGE)
    touch(base, *range(3000))
    fd = u.open_userfaultfd(os.O_CLOEXEC | u.UFFD_USER_MODE_ONLY)
    u.api(fd, u.FEATURE_WP_ASYNC | u.FEATURE_WP_UNPOPULATED)
    u.register_wp(fd, base, 3000 * PAGE)
    tell(base=base)
    wait()
    touch(base, *range(1, 3000, 3), value=2)
    tell(base=base)
    """
    with victim(script) as target:
        base = target.told["base"]
        taken: list[int] = []
        mask = PageIs.WPALLOWED | PageIs.WRITTEN
        reader = ScanReader(
            flags=1,
            mask=mask,
            anyof=PageIs.PRESENT,
            on_regions=lambda regions: taken.extend(regions[:, :2].ravel().tolist()),
        )
        vmas = private_vmas(target.pid)
        assert len(pages_of(windows_of(reader, target.pid, vmas))) == 3000
        assert sum(taken[1::2]) - sum(taken[0::2]) == 3000 * PAGE
        target.go_and_listen()
        again = pages_of(windows_of(reader, target.pid, vmas))
        assert [(at - base) // PAGE for at in again] == list(range(1, 3000, 3))
        assert pages_of(windows_of(reader, target.pid, vmas)) == {}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_target_that_has_exited_is_an_error(reader: type[PagemapReader]) -> None:
    with victim("tell()") as target, pagemap_of(target.pid) as fd:
        vmas = private_vmas(target.pid)
        target.process.kill()
        target.process.wait()
        with pytest.raises(TargetExited) as caught:
            list(reader().windows(fd, vmas))
        assert caught.value.errno == errno.ESRCH


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_target_that_has_called_exec_is_an_error(reader: type[PagemapReader]) -> None:
    script = """
    tell()
    wait()
    os.execv(sys.executable, [sys.executable, "-c", "import sys; print('{}', flush=True); sys.stdin.readline()"])
    """
    with victim(script) as target, pagemap_of(target.pid) as fd:
        vmas = private_vmas(target.pid)
        target.go_and_listen()
        with pytest.raises(TargetExited):
            list(reader().windows(fd, vmas))


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.name)
def test_a_reader_may_be_used_by_many_threads_at_once(kind: type[PagemapReader]) -> None:
    with victim(MANY.format(gap=True)) as target, pagemap_of(target.pid) as fd:
        vmas = private_vmas(target.pid)
        parts = [vmas.select(np.arange(len(vmas)) % 4 == nth) for nth in range(4)]
        reader = kind()
        alone = [np.concatenate([w.regions for w in reader.windows(fd, part)]) for part in parts]
        start = threading.Barrier(4)

        def again(nth: int) -> bool:
            start.wait()
            for _ in range(30):
                found = np.concatenate([w.regions for w in reader.windows(fd, parts[nth])])
                if not np.array_equal(found, alone[nth]):
                    return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(again, range(4))) == [True] * 4


def test_the_cache_does_not_wait_for_a_second_thread_that_gets_no_processor() -> None:
    size = 64 << 20
    base = mapping.map_anonymous(size)
    has_a_processor = threading.Event()
    busy = helper().submit(has_a_processor.wait, 20)
    try:
        for page in range(0, size, 7 * PAGE):
            mapping.write_byte(base + page, 1)
        vmas = private_vmas(os.getpid())
        vmas = vmas.select((vmas.start <= base) & (base < vmas.end))
        found, expected = (windows_of(reader, os.getpid(), vmas) for reader in (CacheReader(), PlainReader()))
        assert not busy.done()
        assert np.array_equal(*(np.concatenate([w.regions for w in windows]) for windows in (found, expected)))
    finally:
        has_a_processor.set()
        mapping.unmap(base, size)


def test_auto_is_the_scan_where_the_kernel_has_it() -> None:
    assert make_reader("auto").name == "scan"
    assert [make_reader(name).name for name in ("plain", "cache", "scan")] == ["plain", "cache", "scan"]


def test_our_own_vsyscall_page_is_no_obstacle() -> None:
    base = mapping.map_anonymous(PAGE)
    try:
        mapping.write_byte(base, 1)
        vmas = read_vmas(os.getpid(), flags=False)
        for pages in read_all(os.getpid(), vmas, base, base + PAGE).values():
            assert set(pages) == {base}
    finally:
        mapping.unmap(base, PAGE)
