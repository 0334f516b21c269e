"""Parsing of /proc/PID/maps and smaps, on texts with everything odd that turns up there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.errors import NoSuchTarget
from incdump.model.vmas import Prot, VmaFlag, VmaKind, VmaTable
from incdump.proc.maps import learn_flags, parse_maps, parse_smaps, read_known_vmas, read_vmas, reread_vmas, shmem_dev

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHMEM_DEV = 1

CASES = [
    ("rw-p", "00:00", 0, "", VmaKind.ANON),
    ("rw-p", "00:00", 0, "[heap]", VmaKind.ANON),
    ("rw-p", "00:00", 0, "[stack]", VmaKind.ANON),
    ("rw-p", "00:00", 0, "[anon:a name: with blanks]", VmaKind.ANON),
    ("rw-p", "00:06", 5, "/dev/zero", VmaKind.ANON),
    ("r-xp", "08:01", 11, "/usr/bin/a program", VmaKind.FILE_PRIVATE),
    ("r--p", "08:01", 11, "/tmp/gone (deleted)", VmaKind.FILE_PRIVATE),
    ("rw-s", "08:01", 11, "/var/lib/db", VmaKind.FILE_SHARED),
    ("rw-s", "00:01", 1030, "/dev/zero (deleted)", VmaKind.SHMEM),
    ("rw-p", "00:01", 1030, "/dev/zero (deleted)", VmaKind.FILE_PRIVATE),
    ("rw-s", "00:01", 1031, "[anon_shmem:named]", VmaKind.SHMEM),
    ("rw-s", "00:01", 1032, "/memfd:with blank (deleted)", VmaKind.SHMEM),
    ("rw-p", "00:01", 1032, "/memfd:with blank (deleted)", VmaKind.FILE_PRIVATE),
    ("rw-s", "00:01", 3, "/SYSV0000002a (deleted)", VmaKind.SHMEM),
    ("rw-s", "00:0f", 1032, "/memfd:huge (deleted)", VmaKind.HUGETLB_SHARED),
    ("rw-s", "00:0f", 4, "/SYSV00000000 (deleted)", VmaKind.HUGETLB_SHARED),
    ("rw-s", "08:01", 12, "/memfd:x (deleted)", VmaKind.FILE_SHARED),
    ("rw-s", "08:01", 12, "/SYSV00000000", VmaKind.FILE_SHARED),
    ("rw-s", "00:21", 12, "/memfd:x", VmaKind.FILE_SHARED),
    ("rw-p", "00:0f", 77, "/anon_hugepage (deleted)", VmaKind.HUGETLB),
    ("rw-s", "00:0f", 78, "/anon_hugepage (deleted)", VmaKind.HUGETLB_SHARED),
    ("rw-s", "00:10", 79, "/[aio] (deleted)", VmaKind.AIO_RING),
    ("rw-s", "00:11", 80, "anon_inode:[io_uring]", VmaKind.DEVICE),
    ("rw-s", "00:11", 80, "anon_inode:[perf_event]", VmaKind.DEVICE),
    ("r--p", "00:00", 0, "[vvar]", VmaKind.VVAR),
    ("r--p", "00:00", 0, "[vvar_vclock]", VmaKind.VVAR),
    ("r-xp", "00:00", 0, "[vdso]", VmaKind.VDSO),
    ("--xp", "00:00", 0, "[uprobes]", VmaKind.UPROBES),
    ("--xp", "00:00", 0, "[vsyscall]", VmaKind.VSYSCALL),
]


def line(start: int, end: int, perms: str, pgoff: int, dev: str, inode: int, name: str) -> bytes:
    """A line as the kernel prints it (seq_file pads to column 73 when a name follows)."""
    head = f"{start:08x}-{end:08x} {perms} {pgoff:08x} {dev} {inode} "
    return os.fsencode(head.ljust(73) + name if name else head) + b"\n"


def maps_of(cases: list[tuple[str, str, int, str, VmaKind]]) -> bytes:
    return b"".join(
        line(0x1000 * (2 * i + 1), 0x1000 * (2 * i + 2), perms, 0, dev, inode, name)
        for i, (perms, dev, inode, name, _) in enumerate(cases)
    )


def smaps_block(header: bytes, flags: str) -> bytes:
    return header + f"Size:                  4 kB\nRss:  4 kB\nProtectionKey:         0\nVmFlags: {flags} \n".encode()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]} {case[3] or 'no name'}")
def test_the_kind_follows_from_permissions_device_inode_and_name(case: tuple[str, str, int, str, VmaKind]) -> None:
    table = parse_maps(maps_of([case]), shmem_dev=SHMEM_DEV)
    assert VmaKind(table.kind[0]) == case[4]
    assert table.names == (case[3],)


def test_kinds_are_the_same_in_one_long_table() -> None:
    table = parse_maps(maps_of(CASES), shmem_dev=SHMEM_DEV)
    assert [VmaKind(kind) for kind in table.kind] == [case[4] for case in CASES]


def test_without_the_shmem_device_any_device_of_major_zero_counts() -> None:
    table = parse_maps(maps_of([("rw-s", "00:2b", 5, "/memfd:x (deleted)", VmaKind.SHMEM)]))
    assert table.kind[0] == VmaKind.SHMEM


def test_columns_are_read_at_their_full_width() -> None:
    text = line(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, "rwxs", 0x123456789000, "fe:1002b", 2**63 + 5, "/x")
    table = parse_maps(line(0x400000, 0x401000, "---p", 0, "00:00", 0, "") + text)
    assert table.start.tolist() == [0x400000, 0xFFFFFFFFFF600000]
    assert table.end.tolist() == [0x401000, 0xFFFFFFFFFF601000]
    assert table.prot.tolist() == [0, Prot.READ | Prot.WRITE | Prot.EXEC]
    assert table.shared.tolist() == [False, True]
    assert table.pgoff.tolist() == [0, 0x123456789000]
    assert table.dev.tolist() == [0, 0xFE << 20 | 0x1002B]
    assert table.inode.tolist() == [0, 2**63 + 5]


def test_a_newline_in_a_path_comes_back_and_other_bytes_survive() -> None:
    header = line(0x1000, 0x2000, "r--p", 0, "08:01", 3, "")
    text = header[:-1].ljust(73) + b"/a\\012b  c\xff-:x (deleted)\n"
    assert os.fsencode(parse_maps(text).names[0]) == b"/a\nb  c\xff-:x (deleted)"


def test_no_text_is_a_table_of_no_mappings() -> None:
    for table in (parse_maps(b""), parse_smaps(b"")):
        assert len(table) == 0
        assert table.names == ()


def test_smaps_flags_are_read_and_unknown_ones_ignored() -> None:
    text = smaps_block(line(0x1000, 0x2000, "rw-p", 0, "00:00", 0, ""), "rd wr mr mw me ac sd hg zz")
    text += smaps_block(line(0x2000, 0x3000, "rw-p", 0, "00:00", 0, "[stack]"), "rd wr gd lo")
    table = parse_smaps(text)
    assert table.has_flags
    assert table.flags.tolist() == [VmaFlag.SOFT_DIRTY | VmaFlag.HUGEPAGE, VmaFlag.GROWSDOWN | VmaFlag.LOCKED]
    assert table.names == ("", "[stack]")


def test_flags_make_hugetlb_and_device_mappings_known() -> None:
    blocks = [
        (line(0x1000, 0x2000, "rw-p", 0, "00:0f", 3, "/dev/hugepages/x"), "rd wr ht", VmaKind.HUGETLB),
        (line(0x2000, 0x3000, "rw-s", 0, "00:0f", 4, "/memfd:h (deleted)"), "rd wr sh ht", VmaKind.HUGETLB_SHARED),
        (line(0x3000, 0x4000, "rw-s", 0, "00:06", 5, "/dev/nvidia0"), "rd wr sh io pf", VmaKind.DEVICE),
        (line(0x4000, 0x5000, "rw-p", 0, "00:06", 5, "/dev/mem"), "rd wr pf", VmaKind.DEVICE),
        (line(0x5000, 0x6000, "r--p", 0, "00:00", 0, "[vvar]"), "rd mr pf io de dd", VmaKind.VVAR),
        (line(0x6000, 0x7000, "rw-p", 0, "00:00", 0, ""), "rd wr ss", VmaKind.ANON),
    ]
    table = parse_smaps(b"".join(smaps_block(header, flags) for header, flags, _ in blocks))
    assert [VmaKind(kind) for kind in table.kind] == [kind for _, _, kind in blocks]


def test_a_path_that_looks_like_vmflags_does_not_end_a_mapping() -> None:
    header = line(0x1000, 0x2000, "r--p", 0, "08:01", 3, "/VmFlags: io pf")
    table = parse_smaps(smaps_block(header, "rd mr"))
    assert table.names == ("/VmFlags: io pf",)
    assert table.kind[0] == VmaKind.FILE_PRIVATE


def spans(table: VmaTable) -> list[tuple[int, int, str]]:
    return list(zip(table.start.tolist(), table.end.tolist(), table.names, strict=True))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([(1, 3, "a"), (1, 5, "b")], [(1, 5, "b")]),
        ([(1, 3, "a"), (2, 5, "b")], [(1, 2, "a"), (2, 5, "b")]),
        ([(1, 2, "a"), (3, 4, "b"), (1, 6, "c"), (6, 7, "d")], [(1, 6, "c"), (6, 7, "d")]),
        ([(1, 9, "a"), (3, 4, "b"), (9, 10, "c")], [(1, 3, "a"), (3, 4, "b"), (9, 10, "c")]),
    ],
)
def test_of_mappings_that_overlap_the_later_line_wins(
    lines: list[tuple[int, int, str]], expected: list[tuple[int, int, str]]
) -> None:
    text = b"".join(line(a << 12, b << 12, "rw-p", 0, "08:01", 1, name) for a, b, name in lines)
    assert spans(parse_maps(text)) == [(a << 12, b << 12, name) for a, b, name in expected]


rows = st.lists(
    st.tuples(
        st.integers(1, 1 << 30),
        st.integers(1, 1 << 16),
        st.sampled_from(["rw-p", "---p", "r-xs", "rwxp"]),
        st.integers(0, 1 << 40),
        st.integers(0, 1 << 40),
        st.sampled_from(["", "/a", "/b c - d:e", "[heap]"]),
    ),
    max_size=20,
)


@given(rows)
def test_what_the_kernel_prints_is_what_is_parsed(rows: list[tuple[int, int, str, int, int, str]]) -> None:
    text, expected, at = b"", [], 0
    for gap, pages, perms, pgoff, inode, name in rows:
        start = at + (gap << 12)
        at = start + (pages << 12)
        text += line(start, at, perms, pgoff << 12, "08:01", inode, name)
        expected.append((start, at, perms[3] == "s", pgoff << 12, inode, name))
    table = parse_maps(text)
    columns = (table.start, table.end, table.shared, table.pgoff, table.inode)
    assert list(zip(*(column.tolist() for column in columns), table.names, strict=True)) == expected


@pytest.mark.parametrize("flags", [False, True])
def test_our_own_mappings_are_read(flags: bool) -> None:
    table = read_vmas(os.getpid(), flags=flags)
    assert table.has_flags == flags
    assert (table.start[1:] >= table.end[:-1]).all()
    kinds = {VmaKind(kind) for kind in table.kind}
    assert {VmaKind.ANON, VmaKind.FILE_PRIVATE, VmaKind.VDSO, VmaKind.VVAR} <= kinds
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        stacks = [entry for entry in file if re.search(r"\[stack\]$", entry)]
    assert stacks
    assert "[stack]" in table.names


def test_a_memfd_of_ours_is_on_the_shmem_device() -> None:
    fd = os.memfd_create("x")
    try:
        dev = os.fstat(fd).st_dev
    finally:
        os.close(fd)
    assert shmem_dev() == os.major(dev) << 20 | os.minor(dev)


def test_a_process_that_is_not_there_is_an_error() -> None:
    with pytest.raises(NoSuchTarget) as caught:
        read_vmas(0x7FFFFFFF, flags=False)
    assert caught.value.pid == 0x7FFFFFFF


MAPPER = """
import mmap, os, sys
kept = []
for line in sys.stdin.buffer:
    if line == b"parasite\\n":
        fd = os.memfd_create("CRIUMFD")
        os.truncate(fd, 8192)
        kept.append(mmap.mmap(fd, 8192))
    elif line == b"anon\\n":
        kept.append(mmap.mmap(-1, 8192, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    elif line == b"file\\n":
        with open(sys.executable, "rb") as file:
            kept.append(mmap.mmap(file.fileno(), 8192, access=mmap.ACCESS_COPY))
    os.write(1, b".")
"""


@pytest.fixture
def mapper() -> Iterator[Callable[[str], int]]:
    """A process that maps what it is told to; calling this returns its pid."""
    with subprocess.Popen([sys.executable, "-c", MAPPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def tell(what: str) -> int:
            process.stdin.write(f"{what}\n".encode())  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            assert os.read(process.stdout.fileno(), 1) == b"."  # type: ignore[union-attr]
            return process.pid

        for _ in range(3):
            tell("nothing")
        yield tell
        process.kill()


def test_mappings_that_are_the_same_are_not_read_again(mapper: Callable[[str], int]) -> None:
    known = read_known_vmas(mapper("nothing"))
    assert reread_vmas(mapper("nothing"), known) is known.vmas
    again = reread_vmas(mapper("anon"), known)
    assert again is not known.vmas
    assert again.has_flags
    assert len(again) >= len(known.vmas)


def test_flags_of_new_anonymous_mappings_may_be_guessed(mapper: Callable[[str], int]) -> None:
    pid = mapper("nothing")
    known = read_known_vmas(pid)
    guess = reread_vmas(mapper("anon"), known, may_guess=True)
    truth = read_vmas(pid, flags=True)
    guessed = (guess.flags & np.uint64(VmaFlag.GUESSED)) != 0
    assert 1 <= guessed.sum() <= 3
    assert guess.names == truth.names
    for column in ("start", "end", "prot", "shared", "pgoff", "dev", "inode", "kind"):
        assert np.array_equal(getattr(guess, column), getattr(truth, column))
    assert np.array_equal(guess.flags[~guessed], truth.flags[~guessed])
    assert np.array_equal(learn_flags(pid, guess).flags, truth.flags)


def test_flags_of_other_new_mappings_are_read(mapper: Callable[[str], int]) -> None:
    known = read_known_vmas(mapper("nothing"))
    again = reread_vmas(mapper("file"), known, may_guess=True)
    assert again is not known.vmas
    assert not (again.flags & np.uint64(VmaFlag.GUESSED)).any()


def test_flags_that_were_guessed_of_a_process_that_is_gone_stay_as_they_are(mapper: Callable[[str], int]) -> None:
    pid = mapper("nothing")
    known = read_known_vmas(pid)
    guess = reread_vmas(mapper("anon"), known, may_guess=True)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert np.array_equal(learn_flags(pid, guess).flags, guess.flags & ~np.uint64(VmaFlag.GUESSED))


def test_what_criu_maps_into_a_process_is_no_change(mapper: Callable[[str], int]) -> None:
    known = read_known_vmas(mapper("nothing"))
    assert reread_vmas(mapper("parasite"), known) is known.vmas
    assert reread_vmas(mapper("anon"), known) is not known.vmas


def test_what_an_earlier_criu_has_left_behind_belongs_to_the_process(mapper: Callable[[str], int]) -> None:
    known = read_known_vmas(mapper("parasite"))
    assert "/memfd:CRIUMFD (deleted)" in known.vmas.names
    assert reread_vmas(mapper("parasite"), known) is known.vmas
