"""core-PID.img: what a task is.

CRIU has registers, credentials and timers there. incdump's own are for whoever looks into a dump (``crit x DIR ps``):
its name, its blocked signals; there is nothing in them to restore a task from, and CRIU refuses to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from incdump._uapi.arch import ARCH
from incdump.images.framing import Magic, frame, unframe
from incdump.images.messages import parse

if TYPE_CHECKING:
    import os

    from incdump.model.core import TaskCore

_ALIVE = 1


def encode_core(task: TaskCore) -> bytes:
    """The bytes of a core-PID.img without registers."""
    from incdump.images._pb import core_pb2 as pb

    tc = pb.task_core_entry(
        task_state=_ALIVE,
        exit_code=0,
        personality=task.personality,
        flags=task.flags,
        blk_sigset=task.blocked_signals,
        comm=task.comm,
    )
    return frame(Magic.CORE, [pb.core_entry(mtype=ARCH.core_mtype, tc=tc).SerializeToString()])


def has_registers(data: bytes, path: str | os.PathLike[str]) -> bool:
    """Whether a task can be restored from this core-PID.img.

    :raises BadImage: it is damaged.
    """
    from incdump.images._pb import core_pb2 as pb

    cores = [parse(pb.core_entry, record, path) for record in unframe(data, Magic.CORE, path)]
    return bool(cores) and (cores[0].HasField("thread_info") or cores[0].HasField("ti_aarch64"))
