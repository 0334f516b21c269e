"""What incdump's encoders write, read by CRIU's own Python code."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from incdump.images.files import FileTable
from incdump.images.inventory import encode_dump_inventory, encode_pre_dump_inventory
from incdump.images.mm import encode_mm
from incdump.images.pagemap import encode_pagemap
from incdump.images.pstree import encode_pstree
from incdump.images.stats import encode_stats
from incdump.model.runs import PAGE_SIZE
from incdump.model.stats import DumpStats
from incdump.model.vmas import VmaKind
from incdump.proc.maps import read_vmas
from incdump.proc.mm_info import read_mm_info
from incdump.proc.shmem import find_segments
from incdump.proc.tree import process_tree

if TYPE_CHECKING:
    from tests.criu.pycriu import Pycriu

ROOT = Path(__file__).parents[2]

LOAD = """
import json, sys
from pycriu import images
with open(sys.argv[1], "rb") as file:
    print(json.dumps(images.load(file, pretty=False)))
"""

ROUND_TRIP = """
import sys
from pycriu import images
data = open(sys.argv[1], "rb").read()
sys.exit(images.dumps(images.loads(data)) != data)
"""

BESIDE = """
import importlib, sys
modules = [f"incdump.images._pb.{name}_pb2" for name in ("pagemap", "inventory", "mm", "pstree", "stats", "files")]
order = [*modules, "pycriu.images"] if sys.argv[1] == "first" else ["pycriu.images", *modules]
for name in order:
    importlib.import_module(name)
from incdump.images._pb import pagemap_pb2
from pycriu import images
print(pagemap_pb2.pagemap_entry(vaddr=1).vaddr)
"""


def load(pycriu: Pycriu, path: Path, data: bytes) -> dict[str, Any]:
    """An image as pycriu has it: its magic's name and its entries."""
    path.write_bytes(data)
    loaded = json.loads(pycriu.run(LOAD, path))
    assert isinstance(loaded, dict)
    return loaded


def test_a_pagemap(pycriu: Pycriu, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pages = rng.integers(1, 5000, 2000).astype(np.uint64)
    vaddr = (np.cumsum(pages + np.uint64(1)) - pages) * np.uint64(PAGE_SIZE)
    entries = np.stack((vaddr, pages, rng.choice(np.array([1, 4, 6], np.uint64), 2000)), axis=1)
    loaded = load(pycriu, tmp_path / "pagemap-1.img", encode_pagemap(77, entries))
    assert loaded["magic"] == "PAGEMAP"
    assert loaded["entries"][0] == {"pages_id": 77}
    assert [[e["vaddr"], e["nr_pages"], e["flags"]] for e in loaded["entries"][1:]] == entries.tolist()


def test_a_pre_dump_s_inventory(pycriu: Pycriu, tmp_path: Path) -> None:
    loaded = load(pycriu, tmp_path / "inventory.img", encode_pre_dump_inventory(123_450_000))
    assert loaded["magic"] == "INVENTORY"
    (entry,) = loaded["entries"]
    assert entry["img_version"] == 0
    assert entry["dump_uptime"] == 123_450_000
    assert entry["pre_dump_mode"] == 2


def test_a_dump_s_inventory(pycriu: Pycriu, tmp_path: Path) -> None:
    (entry,) = load(pycriu, tmp_path / "inventory.img", encode_dump_inventory(123_450_000))["entries"]
    assert (entry["img_version"], entry["fdinfo_per_id"], entry["ns_per_id"]) == (2, True, True)
    assert entry["root_ids"]["vm_id"] == 1
    assert entry["root_ids"]["cgroup_ns_id"] == 7
    assert "root_cg_set" not in entry


def test_stats(pycriu: Pycriu, tmp_path: Path) -> None:
    stats = DumpStats(*range(1, 14))
    loaded = load(pycriu, tmp_path / "stats-dump", encode_stats(stats))
    assert loaded["magic"] == "STATS"
    dump = loaded["entries"][0]["dump"]
    for name in ("freezing_time", "frozen_time", "memdump_time", "memwrite_time", "pages_scanned", "pages_written"):
        assert dump[name] == getattr(stats, name)
    assert dump["shpages_written"] == stats.shpages_written


def test_the_process_tree(pycriu: Pycriu, tmp_path: Path) -> None:
    tasks = process_tree(os.getpid())
    loaded = load(pycriu, tmp_path / "pstree.img", encode_pstree(tasks))
    assert loaded["magic"] == "PSTREE"
    assert [(entry["pid"], entry["pgid"], entry["sid"]) for entry in loaded["entries"]] == [
        (task.vpid, task.pgid, task.sid) for task in tasks
    ]
    pycriu.run(ROUND_TRIP, tmp_path / "pstree.img")


def test_an_address_space_and_its_files(pycriu: Pycriu, tmp_path: Path) -> None:
    pid = os.getpid()
    fd = os.memfd_create("segment")
    os.truncate(fd, 8192)
    with mmap.mmap(fd, 8192), mmap.mmap(-1, 4096):
        vmas = read_vmas(pid, flags=True)
        table = FileTable(find_segments({pid: vmas}))
        files = table.add_process(pid, vmas)
    os.close(fd)
    (mm,) = load(pycriu, tmp_path / "mm-1.img", encode_mm(read_mm_info(pid), vmas, files))["entries"]
    named = load(pycriu, tmp_path / "files.img", table.encode_files())
    memfds = load(pycriu, tmp_path / "memfd.img", table.encode_memfds())
    assert (named["magic"], memfds["magic"]) == ("FILES", "MEMFD_INODE")

    by_id = {entry["id"]: entry for entry in named["entries"]}
    assert by_id[mm["exe_file_id"]]["reg"]["name"] == os.readlink("/proc/self/exe")
    by_start = {vma["start"]: vma for vma in mm["vmas"]}
    for start, kind, name in zip(vmas.start.tolist(), vmas.kind.tolist(), vmas.names, strict=True):
        if kind in (VmaKind.FILE_PRIVATE, VmaKind.FILE_SHARED):
            assert by_id[by_start[start]["shmid"]]["reg"]["name"] == name.removesuffix(" (deleted)")
        if name.startswith("/memfd:segment"):
            inode_id = by_id[by_start[start]["shmid"]]["memfd"]["inode_id"]
            assert [m["name"] for m in memfds["entries"] if m["inode_id"] == inode_id] == ["segment"]
    assert all(vma["fd"] == -1 for vma in mm["vmas"])
    pycriu.run(ROUND_TRIP, tmp_path / "files.img")


@pytest.mark.parametrize("order", ["first", "last"])
def test_both_load_in_one_process(pycriu: Pycriu, order: str) -> None:
    assert pycriu.run(BESIDE, order, more_path=(ROOT,)) == "1\n"
