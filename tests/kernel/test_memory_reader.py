"""Reading the memory of real processes: every byte right, or its page reported, whatever is in the way."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from incdump import kerndat
from incdump.errors import NoSuchTarget, TargetExited
from incdump.model.runs import Runs, page_count
from incdump.proc import memory
from incdump.proc.memory import ProcessMemory
from tests.kernel.victims import Victim, victim

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = pytest.mark.kernel

PAGE = 4096

PATTERN = """
def fill(address, pages):
    for page in range(pages):
        ctypes.memset(address + page * PAGE, page % 250 + 1, PAGE)
"""


def runs_at(base: int, *spans: tuple[int, int]) -> Runs:
    return np.array([(base + a * PAGE, base + b * PAGE) for a, b in spans], np.uint64).reshape(-1, 2)


def expected(*spans: tuple[int, int], missing: frozenset[int] = frozenset()) -> NDArray[np.uint8]:
    pages = [page for a, b in spans for page in range(a, b)]
    return np.repeat(np.array([0 if p in missing else p % 250 + 1 for p in pages], np.uint8), PAGE)


def read(target: Victim, runs: Runs, **hints: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], Runs]:
    buffer = np.full(page_count(runs) * PAGE, 0xEE, np.uint8)
    with ProcessMemory(target.pid) as process_memory:
        return buffer, process_memory.read_into(buffer, runs, **hints)


def needs_force() -> None:
    if not kerndat.proc_mem_force().works:
        pytest.skip(f"PROT_NONE memory cannot be read here: {kerndat.proc_mem_force().why}")


def test_runs_are_read_back_to_back() -> None:
    spans = ((0, 1), (3, 7), (90, 100))
    with victim(PATTERN + "base = mapping.map_anonymous(100 * PAGE); fill(base, 100); tell(base=base)") as target:
        found, failed = read(target, runs_at(target.told["base"], *spans))
    assert (found == expected(*spans)).all()
    assert not len(failed)


def test_more_runs_than_one_call_takes_are_read() -> None:
    spans = tuple((page, page + 1) for page in range(0, 5000, 2))
    with victim(PATTERN + "base = mapping.map_anonymous(5000 * PAGE); fill(base, 5000); tell(base=base)") as target:
        found, failed = read(target, runs_at(target.told["base"], *spans))
    assert (found == expected(*spans)).all()
    assert not len(failed)


def test_prot_none_pages_are_read_with_and_without_the_hint() -> None:
    needs_force()
    script = """
    base = mapping.map_anonymous(30 * PAGE)
    fill(base, 30)
    mapping.protect(base + 5 * PAGE, 5 * PAGE, mapping.PROT_NONE)
    mapping.protect(base + 20 * PAGE, 10 * PAGE, mapping.PROT_NONE)
    tell(base=base)
    """
    spans = ((0, 5), (6, 12), (15, 16), (21, 30))
    with victim(PATTERN + _dedent(script)) as target:
        runs = runs_at(target.told["base"], *spans)
        for hints in ({}, {"unreadable": np.array([False, True, False, True])}, {"unreadable": np.ones(4, bool)}):
            found, failed = read(target, runs, **hints)
            assert (found == expected(*spans)).all()
            assert not len(failed)


def test_pages_that_are_gone_are_reported_and_zero() -> None:
    script = """
    base = mapping.map_anonymous(40 * PAGE)
    fill(base, 40)
    mapping.unmap(base + 3 * PAGE, PAGE)
    mapping.unmap(base + 10 * PAGE, 10 * PAGE)
    mapping.protect(base + 30 * PAGE, 4 * PAGE, mapping.PROT_NONE)
    mapping.unmap(base + 32 * PAGE, PAGE)
    tell(base=base)
    """
    spans = ((0, 5), (8, 15), (18, 40))
    gone = frozenset({3, *range(10, 20), 32})
    needs_force()
    with victim(PATTERN + _dedent(script)) as target:
        found, failed = read(target, runs_at(target.told["base"], *spans))
        assert (found == expected(*spans, missing=gone)).all()
        assert failed.tolist() == runs_at(target.told["base"], (3, 4), (10, 15), (18, 20), (32, 33)).tolist()


def test_a_hole_is_skipped_at_once_not_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
    base = mapping.map_anonymous(2000 * PAGE)
    fill(base, 2000)
    mapping.unmap(base + 10 * PAGE, 1900 * PAGE)
    tell(base=base)
    """
    asked: list[int] = []
    real = memory.query_vma
    with open("/proc/self/maps", "rb") as maps:
        try:
            real(maps.fileno(), 0)
        except OSError:
            pytest.skip("this kernel has no PROCMAP_QUERY")

    def counted(fd: int, address: int) -> tuple[int, int] | None:
        asked.append(address)
        return real(fd, address)

    monkeypatch.setattr(memory, "query_vma", counted)
    with victim(PATTERN + _dedent(script)) as target:
        found, failed = read(target, runs_at(target.told["base"], (0, 2000)))
        assert failed.tolist() == runs_at(target.told["base"], (10, 1910)).tolist()
        assert (found == expected((0, 2000), missing=frozenset(range(10, 1910)))).all()
    assert len(asked) == 1


def test_without_procmap_query_it_goes_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(fd: int, address: int) -> None:
        raise OSError(25, "made up")

    monkeypatch.setattr(memory, "query_vma", absent)
    script = """
    base = mapping.map_anonymous(30 * PAGE)
    fill(base, 30)
    mapping.unmap(base + PAGE, 20 * PAGE)
    tell(base=base)
    """
    with victim(PATTERN + _dedent(script)) as target:
        found, failed = read(target, runs_at(target.told["base"], (0, 30)))
        assert failed.tolist() == runs_at(target.told["base"], (1, 21)).tolist()
        assert (found == expected((0, 30), missing=frozenset(range(1, 21)))).all()


def test_nothing_mapped_above_is_no_obstacle() -> None:
    with victim("tell()") as target:
        top = 0x7FFFFFFFF000 if os.uname().machine == "x86_64" else 0xFFFFFFFFF000
        runs = np.array([[top - 8 * PAGE, top - PAGE]], np.uint64)
        found, failed = read(target, runs)
        assert failed.tolist() == runs.tolist()
        assert not found.any()


def test_pages_beyond_the_end_of_a_file_are_reported() -> None:
    script = """
    fd = os.memfd_create("x")
    os.write(fd, bytes([7]) * (2 * PAGE))
    shared = mmap.mmap(fd, 0)
    where = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    os.ftruncate(fd, PAGE)
    tell(base=where)
    """
    with victim(script) as target:
        found, failed = read(target, runs_at(target.told["base"], (0, 2)))
        assert failed.tolist() == runs_at(target.told["base"], (1, 2)).tolist()
        assert (found[:PAGE] == 7).all()
        assert not found[PAGE:].any()


def test_guard_pages_are_reported() -> None:
    if not kerndat.pagemap_scan_guard().works:
        pytest.skip(f"no guard regions here: {kerndat.pagemap_scan_guard().why}")
    script = """
    base = mapping.map_anonymous(10 * PAGE)
    fill(base, 10)
    mapping.advise(base + 4 * PAGE, 2 * PAGE, mapping.MADV_GUARD_INSTALL)
    tell(base=base)
    """
    with victim(PATTERN + _dedent(script)) as target:
        found, failed = read(target, runs_at(target.told["base"], (0, 10)))
        assert failed.tolist() == runs_at(target.told["base"], (4, 6)).tolist()
        assert (found == expected((0, 10), missing=frozenset({4, 5}))).all()


def test_many_threads_read_at_once() -> None:
    script = """
    base = mapping.map_anonymous(1000 * PAGE)
    fill(base, 1000)
    mapping.unmap(base + 500 * PAGE, PAGE)
    tell(base=base)
    """
    with victim(PATTERN + _dedent(script)) as target, ProcessMemory(target.pid) as process_memory:
        start = threading.Barrier(4)

        def one(nth: int) -> bool:
            spans = tuple((page, page + 1) for page in range(nth, 1000, 4))
            buffer = np.empty(len(spans) * PAGE, np.uint8)
            start.wait()
            for _ in range(20):
                failed = process_memory.read_into(buffer.data, runs_at(target.told["base"], *spans))
                if not (buffer == expected(*spans, missing=frozenset({500}))).all() or len(failed) != (nth == 0):
                    return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(one, range(4))) == [True] * 4


def test_the_rest_of_the_buffer_is_left_alone() -> None:
    with victim(PATTERN + "base = mapping.map_anonymous(2 * PAGE); fill(base, 2); tell(base=base)") as target:
        buffer = bytearray(b"\xee" * (4 * PAGE))
        with ProcessMemory(target.pid) as process_memory:
            process_memory.read_into(memoryview(buffer), runs_at(target.told["base"], (0, 2)))
        assert buffer[2 * PAGE :] == b"\xee" * (2 * PAGE)
        assert buffer[PAGE] == 2


def test_no_runs_are_nothing_to_read_and_a_small_buffer_is_refused() -> None:
    script = "base = mapping.map_anonymous(2 * PAGE); touch(base, 0); tell(base=base)"
    with victim(script) as target, ProcessMemory(target.pid) as process_memory:
        assert not len(process_memory.read_into(np.empty(0, np.uint8), runs_at(0)))
        with pytest.raises(ValueError, match="8192 bytes"):
            process_memory.read_into(np.empty(PAGE, np.uint8), runs_at(target.told["base"], (0, 2)))
        with pytest.raises(ValueError, match="read-only"):
            process_memory.read_into(memoryview(bytes(PAGE)), runs_at(target.told["base"], (0, 1)))


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_target_that_has_exited_is_an_error(reaped: bool) -> None:
    script = "base = mapping.map_anonymous(2 * PAGE); touch(base, 0, 1); tell(base=base)"
    with victim(script) as target, ProcessMemory(target.pid) as process_memory:
        target.process.kill()
        if reaped:
            target.process.wait()
        else:
            os.waitid(os.P_PID, target.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(TargetExited) as caught:
            process_memory.read_into(np.empty(2 * PAGE, np.uint8), runs_at(target.told["base"], (0, 2)))
        assert caught.value.pid == target.pid


def test_bytes_of_a_new_program_are_never_taken_for_the_old_ones() -> None:
    """The address is mapped, and readable, in the new program: process_vm_readv alone would not notice."""
    script = """
    tell()
    wait()
    os.execv(sys.executable, [sys.executable, "-c", "import sys; print('{}', flush=True); sys.stdin.readline()"])
    """
    with victim(script) as target, ProcessMemory(target.pid) as process_memory:
        target.go_and_listen()
        with open(f"/proc/{target.pid}/maps", encoding="utf-8") as file:
            start = int(file.readline().split("-")[0], 16)
        with pytest.raises(TargetExited):
            process_memory.read_into(np.empty(PAGE, np.uint8), np.array([[start, start + PAGE]], np.uint64))


def test_a_process_that_is_not_there_is_an_error() -> None:
    with pytest.raises(NoSuchTarget):
        ProcessMemory(0x7FFFFFFF)


def _dedent(script: str) -> str:
    return "\n" + "\n".join(line[4:] for line in script.splitlines())
