"""Giving up tracking: afterwards nothing of incdump is left in the target, or beside it."""

from __future__ import annotations

from incdump.engine.threads import in_thread
from incdump.errors import NoSuchTarget
from incdump.holder.client import forget, runtime_dir
from incdump.model.arguments import check_arguments
from incdump.proc.identity import check_own_proc, read_stat
from incdump.proc.limits import names_limits
from incdump.proc.tree import process_tree
from incdump.tracking.soft_dirty import SoftDirtyLog


@names_limits
async def untrack(pid: int | None) -> list[int]:
    """Give up the tracking that ``incdump predump`` and `incdump.predump` left with the holder.

    The kernel takes all write protection off when the holder closes the userfaultfd; the holder ends by itself when it
    has nothing left to hold. The next dump of the process is a full one.

    :param pid: the root of a tree, whose processes are given up (of one that is gone as well: those that were dumped
        with it), or None for every process that this user tracks.
    :returns: the processes that were tracked until now, possibly none.
    :raises incdump.InvalidOption: `pid` cannot be one.
    :raises incdump.errors.HolderError: one of them is being dumped right now.
    """
    if pid is not None:
        check_arguments(pid=pid)
    return await in_thread(_untrack, pid)


def _tree(root: int) -> list[int]:
    """A process and all its descendants; of one that is gone, its number alone.

    :raises incdump.errors.ProcMismatch: /proc is another pid namespace's.
    """
    check_own_proc()
    try:
        return [task.pid for task in process_tree(root)]
    except NoSuchTarget:
        return [root]


def _start_time(pid: int) -> int | None:
    """Of a process; None: it is gone."""
    try:
        return read_stat(pid).start_time
    except ProcessLookupError:
        return None


def _untrack(pid: int | None) -> list[int]:
    tree = None if pid is None else _tree(pid)
    pids = set(forget(tree, None if pid is None else (pid, _start_time(pid))))
    log = SoftDirtyLog(runtime_dir())
    for logged in log.pids() if tree is None else tree:
        if log.forget(logged):
            pids.add(logged)
    return sorted(pids)
