"""Giving up tracking: afterwards nothing of incdump is left in the target, or beside it."""

from __future__ import annotations

from incdump.engine.threads import in_thread
from incdump.holder.client import forget
from incdump.holder.wire import runtime_dir
from incdump.tracking.soft_dirty import SoftDirtyLog


async def untrack(pid: int | None) -> list[int]:
    """Give up the tracking that ``incdump predump`` and `incdump.predump` left with the holder.

    The kernel takes all write protection off when the holder closes the userfaultfd; the holder ends by itself when it
    has nothing left to hold. The next dump of the process is a full one.

    :param pid: the process, or None for every one that this user tracks.
    :returns: the processes that were tracked until now, possibly none.
    :raises incdump.errors.HolderError: one of them is being dumped right now.
    """
    return await in_thread(_untrack, pid)


def _untrack(pid: int | None) -> list[int]:
    pids = set(forget(pid))
    log = SoftDirtyLog(runtime_dir())
    for logged in log.pids() if pid is None else [pid]:
        if log.forget(logged):
            pids.add(logged)
    return sorted(pids)
