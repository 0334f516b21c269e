"""What /proc says of a task besides its memory, as a `TaskCore`."""

from __future__ import annotations

from incdump.errors import TargetDenied
from incdump.model.core import TaskCore
from incdump.proc.identity import no_such_target, parse_stat, read_proc


def read_task_core(pid: int) -> TaskCore:
    """Read it.

    :raises NoSuchTarget: there is no such process.
    :raises TargetDenied: its files may not be read.
    """
    try:
        stat = parse_stat(read_proc(f"/proc/{pid}/stat"))
        personality = int(read_proc(f"/proc/{pid}/personality"), 16)
        status = read_proc(f"/proc/{pid}/status")
    except PermissionError as error:
        message = f"no permission to read process {pid}: run as its user or as root (CAP_SYS_PTRACE)"
        raise TargetDenied(message, pid=pid, errno=error.errno) from None
    except (ProcessLookupError, FileNotFoundError) as error:
        raise no_such_target(pid, error.errno) from None
    blocked = next(line for line in status.splitlines() if line.startswith(b"SigBlk:"))
    return TaskCore(
        comm=stat.comm,
        flags=stat.flags,
        personality=personality,
        blocked_signals=int(blocked.split()[1], 16),
    )
