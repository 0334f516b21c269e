"""Shared memory segments of real processes: found once each, opened, and read with their holes."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from incdump import kerndat
from incdump.model.vmas import VmaKind
from incdump.proc import shmem
from incdump.proc.maps import parse_maps, read_vmas
from incdump.proc.shmem import Segment, SegmentFile, find_segments
from tests.kernel.victims import Victim, victim

if TYPE_CHECKING:
    from incdump.model.runs import Runs

pytestmark = pytest.mark.kernel

PAGE = 4096

SCRIPT = """
anonymous = mmap.mmap(-1, 16 * PAGE)
anonymous[3 * PAGE] = 7
anonymous[9 * PAGE : 11 * PAGE] = bytes([9]) * (2 * PAGE)
fd = os.memfd_create("a name")
os.ftruncate(fd, 10 * PAGE + 100)
memfd = mmap.mmap(fd, 0)
again = mmap.mmap(fd, 2 * PAGE, offset=8 * PAGE)
memfd[0] = 1
again[PAGE] = 2
os.pwrite(fd, b"end", 10 * PAGE + 97)
pid = os.fork()
if pid == 0:
    sys.stdin.readline()
    os._exit(0)
at = lambda m: ctypes.addressof(ctypes.c_char.from_buffer(m))
tell(child=pid, anonymous=at(anonymous), memfd=at(memfd), again=at(again), fd=fd)
"""


def segments_of(target: Victim) -> tuple[Segment, ...]:
    return find_segments({pid: read_vmas(pid, flags=False) for pid in (target.pid, target.told["child"])})


def offsets(runs: Runs) -> list[tuple[int, int]]:
    return [(a // PAGE, b // PAGE) for a, b in runs.tolist()]


def needs_map_files() -> None:
    if not kerndat.map_files().works:
        pytest.skip(f"map_files cannot be opened: {kerndat.map_files().why}")


def test_each_segment_is_found_once_with_all_its_mappings() -> None:
    with victim(SCRIPT) as target:
        found = {segment.name: segment for segment in segments_of(target)}
        assert set(found) == {"/dev/zero (deleted)", "/memfd:a name (deleted)"}
        anonymous, memfd = found["/dev/zero (deleted)"], found["/memfd:a name (deleted)"]
        assert {(m.pid, m.start, m.pgoff) for m in anonymous.mappings} == {
            (pid, target.told["anonymous"], 0) for pid in (target.pid, target.told["child"])
        }
        assert {(m.pid, m.start, m.pgoff) for m in memfd.mappings} == {
            (pid, target.told[name], pgoff)
            for pid in (target.pid, target.told["child"])
            for name, pgoff in (("memfd", 0), ("again", 8 * PAGE))
        }
        assert (anonymous.size, memfd.size) == (16 * PAGE, 11 * PAGE)
        assert memfd.id == os.stat(f"/proc/{target.pid}/fd/{target.told['fd']}").st_ino
        assert not memfd.is_sysv
        assert anonymous.kind == memfd.kind == VmaKind.SHMEM


def test_a_segment_is_read_with_its_holes() -> None:
    needs_map_files()
    with victim(SCRIPT) as target:
        found = {segment.name: segment for segment in segments_of(target)}
        with found["/dev/zero (deleted)"].open() as file:
            assert offsets(file.populated()) == [(3, 4), (9, 11)]
            buffer = np.full(16 * PAGE, 0xEE, np.uint8)
            file.read_into(buffer, np.array([[0, 16 * PAGE]], np.uint64))
            assert buffer[3 * PAGE] == 7
            assert (buffer[9 * PAGE : 11 * PAGE] == 9).all()
            assert buffer.sum() == 7 + 9 * 2 * PAGE
        with found["/memfd:a name (deleted)"].open() as file:
            assert offsets(file.populated()) == [(0, 1), (9, 11)]
            assert file.size == 11 * PAGE
            buffer = np.full(2 * PAGE, 0xEE, np.uint8)
            file.read_into(buffer.data, np.array([[0, PAGE], [10 * PAGE, 11 * PAGE]], np.uint64))
            assert buffer[0] == 1
            assert bytes(buffer[PAGE + 97 : PAGE + 101]) == b"end\0"
            assert not buffer[PAGE + 100 :].any()


def test_a_memfd_is_opened_through_a_descriptor_where_map_files_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    can_open = shmem._can_open
    monkeypatch.setattr(shmem, "_can_open", lambda path, file: "map_files" not in path and can_open(path, file))
    with victim(SCRIPT) as target:
        found = {segment.name: segment for segment in segments_of(target)}
        memfd, anonymous = found["/memfd:a name (deleted)"], found["/dev/zero (deleted)"]
        assert memfd.path is not None
        assert "/fd/" in memfd.path
        with memfd.open() as file:
            assert offsets(file.populated()) == [(0, 1), (9, 11)]
        assert anonymous.path is None
        assert anonymous.size == 16 * PAGE


def test_a_removed_sysv_segment_is_found_by_its_shmid() -> None:
    needs_map_files()
    script = """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    shmid = libc.shmget(0, 5 * PAGE, 0o1600)
    address = libc.shmat(shmid, None, 0)
    ctypes.memset(address + 2 * PAGE, 5, PAGE)
    libc.shmctl(shmid, 0, None)  # IPC_RMID
    tell(shmid=shmid, child=os.getpid())
    """
    with victim(script) as target:
        if target.told["shmid"] < 0:
            pytest.skip("no SysV shared memory in this kernel")
        (segment,) = segments_of(target)
        assert segment.is_sysv
        assert segment.id == target.told["shmid"]
        assert segment.size == 5 * PAGE
        with segment.open() as file:
            assert offsets(file.populated()) == [(2, 3)]


def test_a_shmid_that_is_also_an_inode_number_makes_two_segments() -> None:
    text = (
        b"10000-12000 rw-s 00000000 00:01 42 /memfd:x (deleted)\n"
        b"20000-23000 rw-s 00001000 00:01 42 /SYSV00000000 (deleted)\n"
    )
    segments = find_segments({0x7FFFFFFF: parse_maps(text)})
    assert [(s.id, s.is_sysv, s.size, s.path) for s in segments] == [
        (42, False, 0x2000, None),
        (42 + (1 << 32), True, 0x4000, None),
    ]


def test_a_file_that_shrank_reads_as_zero_beyond_its_end() -> None:
    fd = os.memfd_create("x")
    os.write(fd, b"\1" * (3 * PAGE))
    with SegmentFile(fd) as file:
        runs = file.populated()
        assert offsets(runs) == [(0, 3)]
        os.ftruncate(fd, PAGE)
        buffer = np.full(3 * PAGE, 0xEE, np.uint8)
        file.read_into(buffer, runs)
        assert buffer[:PAGE].all()
        assert not buffer[PAGE:].any()
        os.ftruncate(fd, 0)
        assert offsets(file.populated()) == []


def test_untouched_memory_has_no_extents() -> None:
    shared = mmap.mmap(-1, 1 << 20)
    needs_map_files()
    (segment,) = (s for s in find_segments({os.getpid(): read_vmas(os.getpid(), flags=False)}) if s.size == 1 << 20)
    with segment.open() as file:
        assert len(file.populated()) == 0
    shared.close()
