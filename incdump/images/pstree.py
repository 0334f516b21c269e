"""pstree.img: who is whose child."""

from __future__ import annotations

from typing import TYPE_CHECKING

from incdump.images.framing import Magic, frame, unframe
from incdump.images.messages import parse

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from incdump.images._pb.pstree_pb2 import pstree_entry
    from incdump.proc.tree import Task


def encode_pstree(tasks: Sequence[Task]) -> bytes:
    """The bytes of pstree.img.

    :param tasks: the tree, the root first, parents before children, as `incdump.proc.tree.process_tree` has it.
    """
    from incdump.images._pb import pstree_pb2 as pb

    vpid_of = {task.pid: task.vpid for task in tasks}
    records = []
    for index, task in enumerate(tasks):
        # The root's parent is outside of the tree; so is that of a process which was handed to another reaper.
        ppid = vpid_of.get(task.ppid, 0) if index else 0
        threads = [task.vpid, *(tid for tid in task.vtids if tid != task.vpid)]
        entry = pb.pstree_entry(pid=task.vpid, ppid=ppid, pgid=task.pgid, sid=task.sid, threads=threads)
        records.append(entry.SerializeToString())
    return frame(Magic.PSTREE, records)


def decode_pstree(data: bytes, path: str | os.PathLike[str]) -> list[pstree_entry]:
    """The entries of a pstree.img, incdump's or CRIU's.

    :raises BadImage: it is damaged.
    """
    from incdump.images._pb import pstree_pb2 as pb

    return [parse(pb.pstree_entry, record, path) for record in unframe(data, Magic.PSTREE, path)]
