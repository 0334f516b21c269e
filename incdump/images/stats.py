"""stats-dump: the counters of a dump, where and as CRIU leaves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from incdump.images.framing import Magic, frame, only_record
from incdump.images.messages import parse
from incdump.model.stats import DumpStats

if TYPE_CHECKING:
    import os

_TIMES = ("freezing_time", "frozen_time", "memdump_time", "memwrite_time")
_COUNTERS = (
    "pages_scanned",
    "pages_skipped_parent",
    "pages_written",
    "pages_lazy",
    "page_pipes",
    "page_pipe_bufs",
    "shpages_scanned",
    "shpages_skipped_parent",
    "shpages_written",
)
_LONGEST_TIME = 0xFFFFFFFF


def encode_stats(stats: DumpStats) -> bytes:
    """The bytes of stats-dump: the part of `DumpStats` that CRIU has too.

    Times have 32 bits there; a longer one is written as 71 minutes and 34 seconds, the longest there is.
    """
    from incdump.images._pb import stats_pb2 as pb

    dump = pb.dump_stats_entry(irmap_resolve=0)
    for name in _TIMES:
        setattr(dump, name, min(getattr(stats, name), _LONGEST_TIME))
    for name in _COUNTERS:
        setattr(dump, name, getattr(stats, name))
    return frame(Magic.STATS, [pb.stats_entry(dump=dump).SerializeToString()])


def decode_stats(data: bytes, path: str | os.PathLike[str]) -> DumpStats:
    """Decode a stats-dump, incdump's or CRIU's; what it does not hold is 0.

    :raises BadImage: it is damaged.
    """
    from incdump.images._pb import stats_pb2 as pb

    dump = parse(pb.stats_entry, only_record(data, Magic.STATS, path), path).dump
    return DumpStats(**{name: getattr(dump, name) for name in (*_TIMES, *_COUNTERS)})


def decode_restore_stats(data: bytes, path: str | os.PathLike[str]) -> dict[str, int]:
    """Decode CRIU's stats-restore: times in microseconds, and pages.

    :raises BadImage: it is damaged.
    """
    from incdump.images._pb import stats_pb2 as pb

    restored = parse(pb.stats_entry, only_record(data, Magic.STATS, path), path).restore
    return {name: getattr(restored, name) for name in ("forking_time", "restore_time", "pages_restored")}
