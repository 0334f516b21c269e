"""The oracle finds what is wrong: shown with images from a naive dumper, then damaged in one way at a time."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pytest

from tests import oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.targets.build import Target

pytestmark = pytest.mark.kernel

Entry: TypeAlias = tuple[int, int, int]  # vaddr, pages, flags


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def message(**fields: int) -> bytes:
    body = b"".join(varint(int(name[1:]) << 3) + varint(value) for name, value in fields.items())
    return struct.pack("<I", len(body)) + body


def write_pagemap(path: Path, pages_id: int, entries: list[Entry]) -> None:
    body = message(f1=pages_id) + b"".join(message(f1=vaddr, f2=nr, f4=flags, f5=nr) for vaddr, nr, flags in entries)
    path.write_bytes(struct.pack("<II", oracle.COMMON_MAGIC, oracle.PAGEMAP_MAGIC) + body)


class NaiveDump:
    """Dumps a stopped tree page by page: every page that reads as something else than zeros, and the vDSO."""

    def __init__(self, directory: Path, pids: dict[int, int]) -> None:
        self.directory = directory
        self.pids = pids
        directory.mkdir(mode=0o700)
        self.next_id = 1
        self.entries: dict[str, list[Entry]] = {}
        self.pages: dict[str, Path] = {}
        self.root = next(iter(pids))
        segments: set[int] = set()
        for vpid, pid in pids.items():
            self.dump(f"pagemap-{vpid}.img", self.private_pages(pid))
            for vma in oracle.read_vmas(pid):
                if vma.segment and vma.inode not in segments:
                    segments.add(vma.inode)
                    self.dump(f"pagemap-shmem-{vma.inode}.img", self.segment_pages(pid, vma))
        (directory / "inventory.img").write_bytes(struct.pack("<I", oracle.INVENTORY_MAGIC) + message(f1=2))

    def dump(self, name: str, pages: Iterator[tuple[int, bytes]]) -> None:
        entries = []
        self.pages[name] = self.directory / f"pages-{self.next_id}.img"
        with self.pages[name].open("wb") as out:
            for vaddr, content in pages:
                entries.append((vaddr, 1, oracle.PE_PRESENT))
                out.write(content)
        self.entries[name] = entries
        write_pagemap(self.directory / name, self.next_id, entries)
        self.next_id += 1

    @staticmethod
    def private_pages(pid: int) -> Iterator[tuple[int, bytes]]:
        with open(f"/proc/{pid}/pagemap", "rb", 0) as pagemap, open(f"/proc/{pid}/mem", "rb", 0) as memory:
            for vma in oracle.read_vmas(pid):
                if not vma.private or vma.end - vma.start > 1 << 30:
                    continue
                for vaddr in range(vma.start, vma.end, 4096):
                    (entry,) = struct.unpack("<Q", os.pread(pagemap.fileno(), 8, vaddr // 4096 * 8))
                    own = entry >> 63 and not entry >> 61 & 1 and not entry >> 58 & 1
                    if own or vma.name == "[vdso]":
                        content = os.pread(memory.fileno(), 4096, vaddr)
                        if content != bytes(4096):
                            yield vaddr, content

    @staticmethod
    def segment_pages(pid: int, vma: oracle.Vma) -> Iterator[tuple[int, bytes]]:
        content = Path(f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}").read_bytes()
        for offset in range(0, len(content), 4096):
            if content[offset : offset + 4096] != bytes(4096):
                yield offset, content[offset : offset + 4096]

    @property
    def name(self) -> str:
        """The root's pagemap."""
        return f"pagemap-{self.root}.img"

    def rewrite(self, change: Callable[[list[Entry]], list[Entry]], name: str | None = None) -> None:
        name = name or self.name
        pages_id = int(self.pages[name].stem.removeprefix("pages-"))
        write_pagemap(self.directory / name, pages_id, change(list(self.entries[name])))

    def compare(self) -> oracle.Report:
        return oracle.compare(self.directory, self.pids)


@pytest.fixture
def frozen(churn: Callable[..., Target]) -> Iterator[tuple[Target, dict[int, int]]]:
    target = churn(seed=11, threads=2, processes=2, mib=4, ops="all,-sparse")
    target.step(300)
    with oracle.stopped_tree(target.pid) as pids:
        yield target, pids


@pytest.fixture
def dump(frozen: tuple[Target, dict[int, int]], images_root: Path) -> NaiveDump:
    dump = NaiveDump(images_root / "1", frozen[1])
    assert dump.compare().ok, dump.compare()
    return dump


def writable_page(dump: NaiveDump, target: Target) -> int:
    """The row of a page of the root that was written by the target."""
    with_name = [v for v in oracle.read_vmas(target.pid) if v.perms == "rw-p" and not v.name]
    for row, (vaddr, _, _) in enumerate(dump.entries[dump.name]):
        if any(v.start <= vaddr < v.end for v in with_name):
            return row
    raise AssertionError("no page of anonymous memory")


def test_images_of_a_naive_dumper_are_right(frozen: tuple[Target, dict[int, int]], images_root: Path) -> None:
    report = NaiveDump(images_root / "1", frozen[1]).compare()
    assert report.ok, report
    assert len(frozen[1]) >= 2
    assert report.compared > 200
    assert report.shmem_compared > 100
    assert str(report).startswith("ok: ")


def test_a_flipped_byte_is_a_wrong_page(dump: NaiveDump, frozen: tuple[Target, dict[int, int]]) -> None:
    row = writable_page(dump, frozen[0])
    with dump.pages[dump.name].open("r+b") as f:
        f.seek(row * 4096 + 77)
        byte = f.read(1)
        f.seek(row * 4096 + 77)
        f.write(bytes([byte[0] ^ 1]))
    report = dump.compare()
    assert report.counts == {"wrong": 1}
    assert report.findings[0].vaddr == dump.entries[dump.name][row][0]
    assert "NOT ok" in str(report)


def test_a_dropped_page_is_missing(dump: NaiveDump, frozen: tuple[Target, dict[int, int]]) -> None:
    row = writable_page(dump, frozen[0])
    vaddr = dump.entries[dump.name][row][0]
    data = dump.pages[dump.name].read_bytes()
    dump.pages[dump.name].write_bytes(data[: row * 4096] + data[(row + 1) * 4096 :])
    dump.rewrite(lambda entries: entries[:row] + entries[row + 1 :])
    report = dump.compare()
    assert report.counts == {"missing": 1}
    assert report.findings[0].vaddr == vaddr


def test_a_shifted_offset_is_many_wrong_pages(dump: NaiveDump) -> None:
    data = dump.pages[dump.name].read_bytes()
    dump.pages[dump.name].write_bytes(data[4096:] + data[:4096])
    assert dump.compare().counts["wrong"] > 50


def test_a_truncated_pages_file_is_a_format_error(dump: NaiveDump) -> None:
    data = dump.pages[dump.name].read_bytes()
    dump.pages[dump.name].write_bytes(data[:-1])
    assert dump.compare().counts["format"] == 1


def test_entries_out_of_order_are_a_format_error(dump: NaiveDump) -> None:
    dump.rewrite(lambda entries: [entries[1], entries[0], *entries[2:]])
    assert dump.compare().counts["format"] == 1


def test_a_page_where_nothing_is_mapped_is_outside(dump: NaiveDump) -> None:
    with dump.pages[dump.name].open("ab") as f:
        f.write(bytes(4096))
    dump.rewrite(lambda entries: [*entries, (0x7FFFFFFFE000, 1, oracle.PE_PRESENT)])
    assert dump.compare().counts == {"outside": 1}


def test_a_page_of_an_unmodified_file_with_other_bytes_is_stray(dump: NaiveDump) -> None:
    text = next(v for v in oracle.read_vmas(dump.pids[dump.root]) if v.perms == "r-xp")
    row = next(n for n, entry in enumerate(dump.entries[dump.name]) if entry[0] >= text.start)
    data = dump.pages[dump.name].read_bytes()
    dump.pages[dump.name].write_bytes(data[: row * 4096] + b"x" * 4096 + data[row * 4096 :])
    dump.rewrite(lambda entries: [*entries[:row], (text.start, 1, oracle.PE_PRESENT), *entries[row:]])
    assert dump.compare().counts == {"stray": 1}


def test_a_wrong_byte_of_a_shared_segment_is_found(dump: NaiveDump) -> None:
    name = next(name for name in dump.entries if "shmem" in name and dump.entries[name])
    data = bytearray(dump.pages[name].read_bytes())
    data[5] ^= 0xFF
    dump.pages[name].write_bytes(data)
    assert dump.compare().counts == {"shmem": 1}


def test_a_pagemap_of_a_process_that_is_not_in_the_tree_is_extra(dump: NaiveDump) -> None:
    write_pagemap(dump.directory / "pagemap-1.img", 999, [])
    assert dump.compare().counts == {"extra": 1}


def test_a_missing_inventory_is_a_format_error(dump: NaiveDump) -> None:
    (dump.directory / "inventory.img").unlink()
    assert dump.compare().counts == {"format": 1}


def test_a_process_that_runs_is_refused(churn: Callable[..., Target], images_root: Path) -> None:
    target = churn(mib=1, free_run=True, ops="write")
    with pytest.raises(ValueError, match="not frozen"):
        oracle.compare(images_root, {target.pid: target.pid})


class TestChain:
    """A second directory in which every page of the root is a hole in the first."""

    @pytest.fixture
    def child(self, dump: NaiveDump, images_root: Path) -> NaiveDump:
        child = NaiveDump(images_root / "2", dump.pids)
        (child.directory / "parent").symlink_to("../1")
        child.pages[child.name].write_bytes(b"")
        child.rewrite(lambda entries: [(vaddr, nr, oracle.PE_PARENT) for vaddr, nr, _ in entries])
        report = child.compare()
        assert report.ok, report
        assert report.from_parents == len(child.entries[child.name])
        return child

    def test_a_stale_page_in_the_parent_is_wrong(self, child: NaiveDump, dump: NaiveDump) -> None:
        data = np.fromfile(dump.pages[dump.name], np.uint8)
        data[-1] ^= 1
        data.tofile(dump.pages[dump.name])
        report = child.compare()
        assert report.counts == {"wrong": 1}
        assert "/1/pages-" in str(report)

    def test_a_page_that_the_parent_lacks_is_a_hole(self, child: NaiveDump, dump: NaiveDump) -> None:
        data = dump.pages[dump.name].read_bytes()
        dump.pages[dump.name].write_bytes(data[:-4096])
        dump.rewrite(lambda entries: entries[:-1])
        assert child.compare().counts == {"hole": 1, "missing": 1}

    def test_a_parent_without_that_process_is_all_holes(self, child: NaiveDump, dump: NaiveDump) -> None:
        (dump.directory / dump.name).unlink()
        assert child.compare().counts["hole"] == len(dump.entries[dump.name])

    def test_a_parent_that_is_gone_is_all_holes(self, child: NaiveDump, dump: NaiveDump) -> None:
        (child.directory / "parent").unlink()
        (child.directory / "parent").symlink_to("../nowhere")
        assert child.compare().counts["hole"] == len(dump.entries[dump.name])


def test_markers_of_write_protection_on_untouched_pages_are_no_pages() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 323, "aarch64": 282}.get(os.uname().machine)
    fd = libc.syscall(number, os.O_CLOEXEC | 1) if number else -1
    if fd < 0:
        pytest.skip("needs userfaultfd")
    try:
        area = mmap.mmap(-1, 8 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area[3 * 4096] = 1
        view = np.frombuffer(area, np.uint8)
        start = int(view.ctypes.data)
        unpopulated_and_async = 1 << 13 | 1 << 15
        try:
            fcntl.ioctl(fd, 0xC018AA3F, struct.pack("<QQQ", 0xAA, unpopulated_and_async, 0))
            fcntl.ioctl(fd, 0xC020AA00, struct.pack("<QQQQ", start, len(area), 2, 0))
            fcntl.ioctl(fd, 0xC018AA06, struct.pack("<QQQ", start, len(area), 1))
        except OSError as error:
            pytest.skip(f"needs asynchronous write protection by userfaultfd: {error.strerror}")
        vma = next(v for v in oracle.read_vmas(os.getpid()) if v.start <= start < v.end)
        swapped = oracle.read_pagemap(os.getpid(), start, start + len(area)) >> np.uint64(62) & np.uint64(1)
        assert swapped.sum() == 7
        required = oracle.required_pages(os.getpid(), vma)
        assert [int(a) - start for a in required if start <= int(a) < start + len(area)] == [3 * 4096]
    finally:
        os.close(fd)


def test_entries_in_the_old_style_are_understood(tmp_path: Path) -> None:
    body = message(f1=7) + message(f1=0x1000, f2=2) + message(f1=0x5000, f2=1, f3=1)
    path = tmp_path / "pagemap-1.img"
    path.write_bytes(struct.pack("<II", oracle.COMMON_MAGIC, oracle.PAGEMAP_MAGIC) + body)
    assert oracle.read_entries(path) == (7, [(0x1000, 2, oracle.PE_PRESENT), (0x5000, 1, oracle.PE_PARENT)])
