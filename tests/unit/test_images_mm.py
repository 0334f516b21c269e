"""mm-PID.img, pstree.img, files.img, memfd.img: golden bytes, CRIU's values for each kind of mapping, real targets."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incdump.errors import BadImage, NoSuchTarget, TargetExited
from incdump.images._pb import mm_pb2
from incdump.images.build_id import read_build_id
from incdump.images.files import FileTable, MappedFiles, decode_files, decode_memfds
from incdump.images.framing import Magic, frame
from incdump.images.mm import Status, decode_mm, encode_mm, encode_vmas
from incdump.images.pstree import decode_pstree, encode_pstree
from incdump.model.mm import MmInfo
from incdump.model.runs import empty_runs
from incdump.model.vmas import VmaFlag, VmaKind, VmaTable
from incdump.proc.maps import parse_maps, read_vmas
from incdump.proc.mm_info import anonymous_pages, read_mm_info
from incdump.proc.shmem import Segment, SegmentMapping, find_segments
from incdump.proc.tree import Task, process_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INFO = MmInfo(
    start_code=1,
    end_code=2,
    start_data=3,
    end_data=4,
    start_stack=5,
    start_brk=6,
    brk=7,
    arg_start=8,
    arg_end=9,
    env_start=10,
    env_end=11,
    auxv=(33, 300),
    thp_disabled=False,
)


def vma_table(*rows: dict[str, object]) -> VmaTable:
    """A table of VMAs of one page each, two pages apart unless rows say otherwise."""

    def column(name: str, default: object, dtype: type) -> np.ndarray:
        return np.array([row.get(name, default) for row in rows], dtype)

    start = np.array([row.get("start", 0x10000 + 0x2000 * i) for i, row in enumerate(rows)], np.uint64)
    return VmaTable(
        start=start,
        end=np.array([row.get("end", int(s) + 0x1000) for row, s in zip(rows, start, strict=True)], np.uint64),
        prot=column("prot", 3, np.uint8),
        shared=column("shared", False, np.bool_),
        pgoff=column("pgoff", 0, np.uint64),
        dev=column("dev", 0, np.uint64),
        inode=column("inode", 0, np.uint64),
        kind=column("kind", VmaKind.ANON, np.uint8),
        flags=column("flags", 0, np.uint64),
        names=tuple(str(row.get("name", "")) for row in rows),
        has_flags=True,
    )


def mapped(vmas: VmaTable, shmid: int = 0, *, is_file: bool = False) -> MappedFiles:
    return MappedFiles(1, np.full(len(vmas), shmid, np.uint64), np.full(len(vmas), is_file))


def entry_of(row: dict[str, object], shmid: int = 0, *, is_file: bool = False) -> mm_pb2.vma_entry:
    vmas = vma_table(row)
    entries = mm_pb2.mm_entry.FromString(encode_mm(INFO, vmas, mapped(vmas, shmid, is_file=is_file))[12:]).vmas
    assert len(entries) == 1
    return entries[0]


class TestMm:
    def test_it_has_these_bytes(self) -> None:
        vmas = vma_table({"flags": VmaFlag.DONTDUMP})
        expected = (
            "19435654 20284957 3b000000"
            "0801 1002 1803 2004 2805 3006 3807 4008 4809 500a 580b 6001 6821 68ac02"
            "7219 08808004 1080a004 1800 2000 2803 3022 388104 4001 48808004"
            "880100"
        )
        assert encode_mm(INFO, vmas, mapped(vmas)) == bytes.fromhex(expected)

    def test_everything_comes_back(self) -> None:
        vmas = vma_table({"pgoff": 0x123000, "prot": 5}, {})
        entry = decode_mm(encode_mm(INFO, vmas, mapped(vmas, 9, is_file=True)), "x")
        assert [getattr(entry, field.name) for field in entry.DESCRIPTOR.fields[:11]] == list(range(1, 12))
        assert entry.exe_file_id == 1
        assert list(entry.mm_saved_auxv) == [33, 300]
        assert [(v.start, v.end, v.pgoff, v.shmid, v.prot, v.fd) for v in entry.vmas] == [
            (0x10000, 0x11000, 0x123000, 9, 5, -1),
            (0x12000, 0x13000, 0, 9, 3, -1),
        ]
        assert not entry.HasField("dumpable")
        assert entry.HasField("thp_disabled")
        assert not entry.thp_disabled

    def test_the_heap_s_end_stands_in_for_an_unknown_brk(self) -> None:
        info = MmInfo(**{name: getattr(INFO, name) for name in INFO.__slots__} | {"brk": 0})
        vmas = vma_table({}, {"name": "[heap]"})
        assert decode_mm(encode_mm(info, vmas, mapped(vmas)), "x").mm_brk == 0x13000
        assert decode_mm(encode_mm(info, vma_table(), mapped(vma_table())), "x").mm_brk == 6

    @pytest.mark.parametrize(
        ("row", "status", "flags"),
        [
            ({}, 0x201, 0x22),
            ({"name": "[heap]"}, 0x221, 0x22),
            ({"name": "[stack]", "flags": VmaFlag.GROWSDOWN}, 0x201, 0x122),
            ({"flags": VmaFlag.LOCKED}, 0x201, 0x2022),
            ({"flags": VmaFlag.NORESERVE}, 0x201, 0x4022),
            ({"flags": VmaFlag.DROPPABLE}, 0x201, 0x28),
            ({"flags": VmaFlag.SHADOW_STACK}, 0x8201, 0x22),
            ({"kind": VmaKind.VDSO, "name": "[vdso]"}, 0x209, 0x22),
            ({"kind": VmaKind.VVAR, "name": "[vvar]"}, 0x1201, 0x22),
            ({"kind": VmaKind.VSYSCALL, "name": "[vsyscall]"}, 0x204, 0x22),
            ({"kind": VmaKind.AIO_RING, "name": "/[aio] (deleted)", "shared": True}, 0x2000, 0x1),
            ({"kind": VmaKind.HUGETLB}, 0x201, 0x54040022),
            ({"kind": VmaKind.SHMEM, "shared": True, "name": "/SYSV00000000 (deleted)"}, 0x501, 0x21),
            ({"kind": VmaKind.SHMEM, "shared": True, "name": "/dev/zero (deleted)"}, 0x101, 0x21),
        ],
    )
    def test_each_kind_of_memory_has_criu_s_values(self, row: dict[str, object], status: int, flags: int) -> None:
        entry = entry_of(row)
        assert (hex(entry.status), hex(entry.flags)) == (hex(status), hex(flags))
        assert not entry.HasField("fdflags")

    @pytest.mark.parametrize(
        ("row", "status", "flags", "fdflags"),
        [
            ({"kind": VmaKind.FILE_PRIVATE}, 0x41, 0x2, os.O_RDONLY),
            ({"kind": VmaKind.FILE_SHARED, "shared": True, "prot": 1}, 0x81, 0x1, os.O_RDONLY),
            ({"kind": VmaKind.FILE_SHARED, "shared": True, "prot": 3}, 0x81, 0x1, os.O_RDWR),
            ({"kind": VmaKind.SHMEM, "shared": True}, 0x4081, 0x1, os.O_RDWR),
            ({"kind": VmaKind.HUGETLB_SHARED, "shared": True}, 0x4081, 0x54040001, os.O_RDWR),
            ({"kind": VmaKind.HUGETLB}, 0x41, 0x54040002, os.O_RDONLY),
            ({"kind": VmaKind.DEVICE, "shared": True}, 0x81, 0x1, os.O_RDWR),
            ({"kind": VmaKind.DEVICE}, 0x41, 0x2, os.O_RDONLY),
        ],
    )
    def test_each_kind_of_file_has_criu_s_values(
        self, row: dict[str, object], status: int, flags: int, fdflags: int
    ) -> None:
        entry = entry_of(row, 77, is_file=True)
        assert (hex(entry.status), hex(entry.flags)) == (hex(status), hex(flags))
        assert (entry.shmid, entry.fdflags) == (77, fdflags)
        assert entry.HasField("fdflags")

    @pytest.mark.parametrize(
        ("flag", "advice"),
        [
            (VmaFlag.RAND_READ, 1),
            (VmaFlag.SEQ_READ, 2),
            (VmaFlag.DONTCOPY, 10),
            (VmaFlag.MERGEABLE, 12),
            (VmaFlag.HUGEPAGE, 14),
            (VmaFlag.NOHUGEPAGE, 15),
            (VmaFlag.DONTDUMP, 16),
            (VmaFlag.WIPEONFORK, 18),
        ],
    )
    def test_advice_is_one_bit_each(self, flag: VmaFlag, advice: int) -> None:
        assert entry_of({"flags": flag}).madv == 1 << advice
        assert entry_of({"flags": flag | VmaFlag.RAND_READ}).madv == 1 << advice | 2
        assert not entry_of({}).HasField("madv")

    def test_vvar_and_vvar_vclock_are_one_and_uprobes_are_none(self) -> None:
        vmas = vma_table(
            {"start": 0x1000, "end": 0x5000, "kind": VmaKind.VVAR, "name": "[vvar]"},
            {"start": 0x5000, "end": 0x7000, "kind": VmaKind.VVAR, "name": "[vvar_vclock]"},
            {"start": 0x7000, "end": 0x9000, "kind": VmaKind.VDSO, "name": "[vdso]"},
            {"start": 0x9000, "end": 0xA000, "kind": VmaKind.UPROBES, "name": "[uprobes]"},
            {"start": 0xA000, "end": 0xB000},
            {"start": 0xB000, "end": 0xC000},
        )
        entry = decode_mm(encode_mm(INFO, vmas, mapped(vmas)), "x")
        assert [(v.start, v.end) for v in entry.vmas] == [
            (0x1000, 0x7000),
            (0x7000, 0x9000),
            (0xA000, 0xB000),
            (0xB000, 0xC000),
        ]

    def test_guards_follow_the_mappings(self) -> None:
        vmas = vma_table({}, {})
        guards = np.array([[0x10000, 0x11000], [0x20000, 0x22000]], np.uint64)
        entry = decode_mm(encode_mm(INFO, vmas, mapped(vmas), guards), "x")
        assert [(v.start, v.end, v.prot, v.flags, v.status, v.fd) for v in entry.vmas[2:]] == [
            (0x10000, 0x11000, 0, 0, 0x10000, -1),
            (0x20000, 0x22000, 0, 0, 0x10000, -1),
        ]

    def test_without_flags_the_stack_still_grows_down(self) -> None:
        vmas = parse_maps(b"7ffc1000-7ffc3000 rw-p 00000000 00:00 0    [stack]\n")
        assert decode_mm(encode_mm(INFO, vmas, mapped(vmas)), "x").vmas[0].flags == 0x122

    @settings(deadline=None)
    @given(st.lists(st.tuples(*[st.integers(0, (1 << 64) - 1)] * 3, st.integers(0, 7), st.booleans()), max_size=30))
    def test_columns_are_encoded_as_protobuf_encodes_entries(self, rows: list[tuple[int, int, int, int, bool]]) -> None:
        vmas = vma_table(
            *({"start": s, "end": e, "pgoff": p, "prot": r, "shared": h, "flags": s & 0x1FFF} for s, e, p, r, h in rows)
        )
        encoded = encode_vmas(vmas, mapped(vmas, 1 << 40, is_file=True), empty_runs())
        decoded = mm_pb2.mm_entry()
        decoded.MergeFromString(encoded)
        assert [(v.start, v.end, v.pgoff, v.prot) for v in decoded.vmas] == [row[:4] for row in rows]
        assert decoded.SerializePartialToString() == encoded

    def test_damage_is_reported(self) -> None:
        with pytest.raises(BadImage) as caught:
            decode_mm(frame(Magic.MM, [b"\x08\x01"]), "dir/mm-1.img")
        assert caught.value.path == "dir/mm-1.img"


class TestPstree:
    TASKS = (
        Task(100, 1, 1, 1, 1, "S", "root", 0, (100, 90), (1, 7), False),
        Task(200, 100, 2, 1, 1, "S", "child", 0, (200,), (2,), True),
        Task(300, 999, 3, 0, 0, "Z", "dead", 0, (), (), True),
    )

    def test_it_has_these_bytes(self) -> None:
        assert encode_pstree(self.TASKS) == bytes.fromhex(
            "19435654 30302750"
            "0c000000 0801 1000 1801 2001 2801 2807"
            "0a000000 0802 1001 1801 2001 2802"
            "0a000000 0803 1000 1800 2000 2803"
        )

    def test_it_comes_back(self) -> None:
        entries = decode_pstree(encode_pstree(self.TASKS), "x")
        assert [(e.pid, e.ppid, list(e.threads)) for e in entries] == [(1, 0, [1, 7]), (2, 1, [2]), (3, 0, [3])]

    def test_the_root_s_parent_is_outside(self) -> None:
        task = process_tree(os.getpid())[0]
        entry = decode_pstree(encode_pstree([task]), "x")[0]
        assert (entry.pid, entry.ppid) == (task.vpid, 0)
        assert entry.threads[0] == task.vpid


class TestFiles:
    def test_a_mapped_file_is_described(self, tmp_path: Path) -> None:
        path = tmp_path / "data \udcff file"
        path.write_bytes(bytes(5000))
        path.chmod(0o640)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            vmas = read_vmas(os.getpid(), flags=False)
            table = FileTable()
            files = table.add_process(os.getpid(), vmas)
            assert len(mapping) == 5000
        row = vmas.names.index(os.fspath(path))
        assert files.is_file[row]
        entries = {entry.id: entry for entry in decode_files(table.encode_files(), "x")}
        reg = entries[int(files.shmid[row])].reg
        assert (reg.name, reg.size, reg.mode) == (os.fsencode(path), 5000, 0o100640)
        assert (reg.flags, reg.pos, list(reg.build_id)) == (0, 0, [])

    def test_the_executable_has_the_id_of_its_mappings(self) -> None:
        vmas = read_vmas(os.getpid(), flags=False)
        table = FileTable()
        files = table.add_process(os.getpid(), vmas)
        exe = os.readlink("/proc/self/exe")
        assert {int(files.shmid[i]) for i, name in enumerate(vmas.names) if name == exe} == {files.exe_id}
        entry = next(e for e in decode_files(table.encode_files(), "x") if e.id == files.exe_id)
        assert entry.reg.name == os.fsencode(exe)
        assert entry.reg.size == os.stat(exe).st_size

    def test_files_are_listed_once_for_all_processes(self) -> None:
        vmas = read_vmas(os.getpid(), flags=False)
        table = FileTable()
        first, again = (table.add_process(os.getpid(), vmas) for _ in range(2))
        assert np.array_equal(first.shmid, again.shmid)
        ids = [entry.id for entry in decode_files(table.encode_files(), "x")]
        assert ids == list(range(1, len(ids) + 1))

    def test_a_deleted_file_is_described_without_the_note(self, tmp_path: Path) -> None:
        if not _map_files_work():
            pytest.skip("/proc/PID/map_files takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN")
        path = tmp_path / "gone"
        path.write_bytes(bytes(4096))
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
            path.unlink()
            table = FileTable()
            table.add_process(os.getpid(), read_vmas(os.getpid(), flags=False))
        names = {entry.reg.name: entry.reg.size for entry in decode_files(table.encode_files(), "x")}
        assert names[os.fsencode(path)] == 4096

    def test_a_file_that_cannot_be_looked_at_keeps_its_name(self) -> None:
        vmas = vma_table({"kind": VmaKind.FILE_PRIVATE, "inode": 5, "name": "/no/such/file"})
        table = FileTable()
        files = table.add_process(1 << 22, vmas)
        assert files.exe_id == 0
        (entry,) = decode_files(table.encode_files(), "x")
        assert entry.reg.name == b"/no/such/file"
        assert not entry.reg.HasField("size")

    def test_another_file_of_that_name_is_not_described(self, tmp_path: Path) -> None:
        path = tmp_path / "replaced"
        path.write_bytes(bytes(4096))
        inode = path.stat().st_ino
        for number, size in ((inode, True), (inode + 1, False)):
            vmas = vma_table({"kind": VmaKind.FILE_PRIVATE, "inode": number, "name": str(path), "start": 0x10000})
            table = FileTable()
            files = table.add_process(os.getpid(), vmas)
            entries = {entry.id: entry for entry in decode_files(table.encode_files(), "x")}
            assert entries[int(files.shmid[0])].reg.HasField("size") is size

    def test_anonymous_huge_pages_are_no_file(self) -> None:
        vmas = vma_table(
            {"kind": VmaKind.HUGETLB, "inode": 5, "name": "/anon_hugepage (deleted)"},
            {"kind": VmaKind.HUGETLB, "inode": 6, "name": "/dev/hugepages/x"},
        )
        files = FileTable().add_process(1 << 22, vmas)
        assert files.is_file.tolist() == [False, True]

    def test_a_memfd_is_a_memfd_and_shared_memory_one_called_dev_zero(self) -> None:
        fd = os.memfd_create("segment", os.MFD_ALLOW_SEALING)
        os.truncate(fd, 8192)
        with mmap.mmap(fd, 8192), mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS):
            vmas = read_vmas(os.getpid(), flags=False)
            segments = find_segments({os.getpid(): vmas})
            table = FileTable(segments)
            files = table.add_process(os.getpid(), vmas)
            inode = os.fstat(fd).st_ino
        os.close(fd)
        inodes = {memfd.shmid: memfd for memfd in decode_memfds(table.encode_memfds(), "x")}
        assert (inodes[inode].name, inodes[inode].size, inodes[inode].seals) == (b"segment", 8192, 0)
        assert b"/dev/zero" in {memfd.name for memfd in inodes.values()}
        opened = {entry.id: entry for entry in decode_files(table.encode_files(), "x")}
        row = next(i for i, name in enumerate(vmas.names) if name.startswith("/memfd:segment"))
        entry = opened[int(files.shmid[row])]
        assert entry.memfd.inode_id == inode
        assert (entry.type, files.is_file[row]) == (18, True)

    def test_a_sysv_segment_is_no_file(self) -> None:
        mapping = SegmentMapping(7, 0x10000, 0x11000, 0)
        segment = Segment(5, "/SYSV00000000 (deleted)", VmaKind.SHMEM, 4096, None, (mapping,))
        table = FileTable([segment])
        row = {"kind": VmaKind.SHMEM, "shared": True, "inode": 5, "name": segment.name}
        files = table.add_process(7, vma_table(row))
        assert (files.shmid.tolist(), files.is_file.tolist()) == ([5], [False])
        assert decode_memfds(table.encode_memfds(), "x") == []

    def test_a_segment_whose_number_does_not_fit_is_named_by_the_mapping(self) -> None:
        mapping = SegmentMapping(7, 0x10000, 0x11000, 0)
        segment = Segment((1 << 32) + 5, "/dev/zero (deleted)", VmaKind.SHMEM, 4096, None, (mapping,))
        table = FileTable([segment])
        vmas = vma_table({"kind": VmaKind.SHMEM, "shared": True, "inode": 5, "name": segment.name})
        files = table.add_process(7, vmas)
        assert files.shmid.tolist() == [(1 << 32) + 5]
        entry = decode_mm(encode_mm(INFO, vmas, files), "x").vmas[0]
        assert entry.status == Status.REGULAR | Status.ANON_SHARED

    def test_files_have_these_bytes(self) -> None:
        vmas = vma_table({"kind": VmaKind.FILE_PRIVATE, "inode": 5, "name": "/x"})
        table = FileTable()
        table.add_process(1 << 22, vmas)
        assert table.encode_files() == bytes.fromhex(
            "19435654 38313056 1c000000 0801 1001 1a16 0801 1000 1800 2a0a 0800 1000 1800 2000 2800 3202 2f78"
        )

    def test_memfds_have_these_bytes(self) -> None:
        mapping = SegmentMapping(7, 0x10000, 0x11000, 0)
        table = FileTable([Segment(5, "/memfd:m (deleted)", VmaKind.SHMEM, 4096, None, (mapping,))])
        assert table.encode_memfds() == bytes.fromhex(
            "19435654 99344548 10000000 0a016d 1000 1800 208020 2805 3000 3805"
        )
        assert table.encode_files() == bytes.fromhex(
            "19435654 38313056 1b000000 0812 1001 a20114 0801 1002 1800 220a 0800 1000 1800 2000 2800 2805"
        )


def _map_files_work() -> bool:
    name = os.listdir("/proc/self/map_files")
    try:
        return bool(name) and os.stat(f"/proc/self/map_files/{name[0]}").st_size >= 0
    except OSError:
        return False


class TestBuildId:
    def elf(self, path: Path, notes: bytes, *, bits: int = 64) -> int:
        if bits == 64:
            head = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, 1, 0, 0, 0)
            program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(notes), len(notes), 4)
        else:
            head = b"\x7fELF\x01\x01\x01".ljust(28, b"\0") + struct.pack("<IIIHHHHHH", 52, 0, 0, 52, 32, 1, 0, 0, 0)
            program = struct.pack("<IIIIIIII", 4, 84, 0, 0, len(notes), len(notes), 4, 4)
        path.write_bytes(head + program + notes)
        return os.open(path, os.O_RDONLY)

    @staticmethod
    def note(kind: int, name: bytes, text: bytes) -> bytes:
        padded = [part + bytes(-len(part) % 4) for part in (name, text)]
        return struct.pack("<III", len(name), len(text), kind) + b"".join(padded)

    @pytest.mark.parametrize("bits", [32, 64])
    def test_it_is_found_behind_other_notes(self, tmp_path: Path, bits: int) -> None:
        text = bytes(range(20))
        notes = self.note(1, b"GNU\0", b"abi") + self.note(3, b"Go\0", b"x") + self.note(3, b"GNU\0", text)
        fd = self.elf(tmp_path / "elf", notes, bits=bits)
        assert struct.pack("<5I", *read_build_id(fd)) == text
        os.close(fd)

    def test_any_cut_or_garbage_is_survived(self, tmp_path: Path) -> None:
        path = tmp_path / "elf"
        os.close(self.elf(path, self.note(3, b"GNU\0", bytes(20))))
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        for size in range(len(whole)):
            for data in (whole[:size], whole[:size] + rng.bytes(len(whole) - size), whole[:size] + b"\xff" * 80):
                path.write_bytes(data)
                fd = os.open(path, os.O_RDONLY)
                assert len(read_build_id(fd)) <= 16384
                os.close(fd)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has started and waits."""
    code = "import sys; sys.stdout.write('ready'); sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"ready"
        yield process
        process.kill()


class TestMmInfo:
    def test_it_agrees_with_the_mappings(self, sleeper: subprocess.Popen[bytes]) -> None:
        info = read_mm_info(sleeper.pid)
        vmas = read_vmas(sleeper.pid, flags=True)
        named = {name: (int(vmas.start[i]), int(vmas.end[i])) for i, name in enumerate(vmas.names)}
        stack, heap = named["[stack]"], named["[heap]"]
        for address in (info.start_stack, info.arg_start, info.arg_end - 1, info.env_start, info.env_end - 1):
            assert stack[0] <= address < stack[1]
        assert heap[0] - 0x1000 < info.start_brk <= heap[0]
        assert 0 < info.start_code < info.end_code < 1 << 57
        assert 0 < info.start_data < info.end_data
        assert info.brk == 0
        entry = decode_mm(encode_mm(info, vmas, FileTable().add_process(sleeper.pid, vmas)), "x")
        assert entry.mm_brk == heap[1]
        assert entry.exe_file_id > 0

    def test_the_auxiliary_vector_is_whole(self, sleeper: subprocess.Popen[bytes]) -> None:
        auxv = read_mm_info(sleeper.pid).auxv
        pairs = dict(zip(auxv[::2], auxv[1::2], strict=True))
        assert pairs[6] == mmap.PAGESIZE
        assert auxv[-2:] == (0, 0)

    def test_thp_is_as_prctl_says(self) -> None:
        assert read_mm_info(os.getpid()).thp_disabled in (False, None)
        libc = ctypes.CDLL(None)
        assert libc.prctl(41, 1, 0, 0, 0) == 0
        try:
            assert read_mm_info(os.getpid()).thp_disabled in (True, None)
        finally:
            assert libc.prctl(41, 0, 0, 0, 0) == 0

    def test_a_process_that_is_not_there_is_no_target(self, sleeper: subprocess.Popen[bytes]) -> None:
        sleeper.kill()
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises((TargetExited, NoSuchTarget)):
            read_mm_info(sleeper.pid)
        sleeper.wait()
        with pytest.raises(NoSuchTarget) as caught:
            read_mm_info(sleeper.pid)
        assert caught.value.pid == sleeper.pid


class TestAnonymousPages:
    def test_memory_counts_once_it_was_touched_but_for_the_kernels_lag(self) -> None:
        before = anonymous_pages(os.getpid())
        with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            assert abs(anonymous_pages(os.getpid()) - before) < 1000
            memory[:] = bytes(len(memory))
            assert abs(anonymous_pages(os.getpid()) - before - (64 << 8)) < 1000

    def test_a_process_without_memory_has_none(self, sleeper: subprocess.Popen[bytes]) -> None:
        sleeper.kill()
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
        assert anonymous_pages(sleeper.pid) == 0
        sleeper.wait()
        with pytest.raises(NoSuchTarget):
            anonymous_pages(sleeper.pid)


def test_a_real_process_s_mappings_come_back(sleeper: subprocess.Popen[bytes]) -> None:
    vmas = read_vmas(sleeper.pid, flags=True)
    table = FileTable(find_segments({sleeper.pid: vmas}))
    files = table.add_process(sleeper.pid, vmas)
    entry = decode_mm(encode_mm(read_mm_info(sleeper.pid), vmas, files), "x")
    by_start = {v.start: v for v in entry.vmas}
    ids = {e.id for e in decode_files(table.encode_files(), "x")}
    for start, end, prot, kind, name in zip(
        vmas.start.tolist(), vmas.end.tolist(), vmas.prot.tolist(), vmas.kind.tolist(), vmas.names, strict=True
    ):
        if name == "[vvar_vclock]":
            continue
        assert by_start[start].end == end or name == "[vvar]"
        assert by_start[start].prot == prot
        if kind in (VmaKind.FILE_PRIVATE, VmaKind.FILE_SHARED):
            assert by_start[start].shmid in ids
