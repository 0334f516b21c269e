"""inventory.img and stats-dump."""

from __future__ import annotations

import uuid
from dataclasses import asdict

import pytest

from incdump.errors import BadImage
from incdump.images._pb import inventory_pb2, stats_pb2
from incdump.images.framing import Magic, frame
from incdump.images.inventory import decode_inventory, encode_dump_inventory, encode_pre_dump_inventory
from incdump.images.stats import decode_stats, encode_stats
from incdump.model.stats import DumpStats

RUN_ID = "12345678-9abc-def0-1234-56789abcdef0"


def test_a_pre_dump_s_inventory_has_these_bytes() -> None:
    # img_version 0, dump_uptime 1_000_000, pre_dump_mode 2, empty plugins; one magic only.
    assert encode_pre_dump_inventory(1_000_000) == bytes.fromhex("16313158 0a000000 0800 40c0843d 4802 6200")


def test_a_dump_s_inventory_has_these_bytes() -> None:
    expected = (
        "16313158 50000000 0802 1001"
        "1a18 0801 1001 1801 2001 2801 3002 3803 4004 4805 5006 5807 6008"
        "2001 3000 40c0843d 5800 6200 6a24" + RUN_ID.encode().hex()
    )
    assert encode_dump_inventory(1_000_000, run_id=RUN_ID) == bytes.fromhex(expected)


def test_a_dump_s_inventory_has_no_cgroup_set_for_restore_rejects_zero() -> None:
    data = encode_dump_inventory(1)
    entry = inventory_pb2.inventory_entry.FromString(data[8:])
    assert not entry.HasField("root_cg_set")
    assert not entry.HasField("pre_dump_mode")
    uuid.UUID(entry.dump_criu_run_id)


def test_two_dumps_have_different_run_ids() -> None:
    assert encode_dump_inventory(1) != encode_dump_inventory(1)


def test_inventories_are_told_apart() -> None:
    pre_dump = decode_inventory(encode_pre_dump_inventory(5_000_000), "x")
    dump = decode_inventory(encode_dump_inventory(7_000_000, run_id=RUN_ID), "x")
    assert (pre_dump.is_pre_dump, pre_dump.dump_uptime, pre_dump.pre_dump_mode) == (True, 5_000_000, 2)
    assert (dump.is_pre_dump, dump.dump_uptime, dump.pre_dump_mode) == (False, 7_000_000, None)
    assert dump.run_id == RUN_ID


def test_criu_s_splice_pre_dump_and_untracked_dump_are_understood() -> None:
    splice = bytes.fromhex("16313158 0c000000 0800 40c0aca58e0b 4801 6200")
    assert decode_inventory(splice, "x").pre_dump_mode == 1
    untracked = bytes.fromhex("16313158 02000000 0802")
    assert decode_inventory(untracked, "x").dump_uptime is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes.fromhex("16313158"),
        bytes.fromhex("16313158 00000000"),  # no img_version
        bytes.fromhex("16313158 04000000 0800"),
        bytes.fromhex("16313158 02000000 08ff"),
        bytes.fromhex("16313158 02000000 0800 02000000 0800"),
        bytes.fromhex("19435654 16313158 02000000 0800"),
        bytes.fromhex("16313158") + b"\xff" * 40,
    ],
)
def test_a_damaged_inventory_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        decode_inventory(data, "dir/inventory.img")
    assert caught.value.path == "dir/inventory.img"


def test_stats_have_these_bytes() -> None:
    stats = DumpStats(
        freezing_time=1,
        frozen_time=2,
        memdump_time=3,
        memwrite_time=4,
        pages_scanned=500,
        pages_skipped_parent=6,
        pages_written=7,
        page_pipes=8,
        page_pipe_bufs=9,
        shpages_scanned=10,
        shpages_skipped_parent=11,
        shpages_written=12,
        total_time=99,
    )
    expected = "40591055 06330957 1f0000000a1d 0801 1002 1803 2004 28f403 3006 3807 4000 4800 5008 5809 600a 680b 700c"
    assert encode_stats(stats) == bytes.fromhex(expected)


def test_stats_come_back() -> None:
    stats = DumpStats(*range(1, 14))
    assert asdict(decode_stats(encode_stats(stats), "x")) == asdict(stats)


def test_a_time_beyond_32_bits_is_the_longest_there_is() -> None:
    decoded = decode_stats(encode_stats(DumpStats(frozen_time=1 << 40, pages_written=1 << 40)), "x")
    assert decoded.frozen_time == 0xFFFFFFFF
    assert decoded.pages_written == 1 << 40


def test_stats_with_the_common_magic_are_no_stats() -> None:
    with pytest.raises(BadImage):
        decode_stats(b"\x19CVT" + encode_stats(DumpStats())[4:], "stats-dump")


def test_a_restore_s_stats_read_as_an_empty_dump_s() -> None:
    restore = stats_pb2.restore_stats_entry(pages_compared=1, pages_skipped_cow=2, forking_time=3, restore_time=4)
    data = frame(Magic.STATS, [stats_pb2.stats_entry(restore=restore).SerializeToString()])
    assert decode_stats(data, "stats-restore") == DumpStats()
