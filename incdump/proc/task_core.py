"""What /proc says of a task besides its memory, as a `TaskCore`."""

from __future__ import annotations

from incdump.model.core import TaskCore
from incdump.proc.identity import parse_stat, read_proc, reading


def read_task_core(pid: int) -> TaskCore:
    """Read it.

    :raises NoSuchTarget: there is no such process.
    :raises TargetDenied: its files may not be read.
    """
    with reading(pid):
        stat = parse_stat(read_proc(f"/proc/{pid}/stat"))
        personality = int(read_proc(f"/proc/{pid}/personality"), 16)
        status = read_proc(f"/proc/{pid}/status")
    blocked = next(line for line in status.splitlines() if line.startswith(b"SigBlk:"))
    return TaskCore(
        comm=stat.comm,
        flags=stat.flags,
        personality=personality,
        blocked_signals=int(blocked.split()[1], 16),
    )
