"""User namespaces of processes."""

from __future__ import annotations

import os
from contextlib import suppress

from incdump.errors import TargetUnsuitable
from incdump.model.owner import MappedRoot, outside
from incdump.proc.identity import read_proc
from incdump.proc.tree import missing


def mapped_root(pid: int) -> MappedRoot | None:
    """The root of the user namespace that a process is in; None: that is the caller's own. Blocks.

    :raises TargetUnsuitable: that namespace has no root, or one that is nobody here.
    :raises NoSuchTarget: there is no such process.
    """
    try:
        if os.stat(f"/proc/{pid}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino:
            return None
        uid, gid = (_outside(f"/proc/{pid}/{name}") for name in ("uid_map", "gid_map"))
    except OSError as error:
        raise missing(pid, error.errno) from error
    if uid is None or gid is None:
        raise TargetUnsuitable(
            f"process {pid} is in a user namespace in which nobody of here is root (/proc/{pid}/uid_map, gid_map): "
            "CRIU could not restore it",
            pid=pid,
        )
    return MappedRoot(uid, gid)


def mapped_root_if_any(pid: int) -> MappedRoot | None:
    """The same; None where there is no root either."""
    with suppress(TargetUnsuitable):
        return mapped_root(pid)
    return None


def _outside(path: str) -> int | None:
    rows = [tuple(map(int, line.split())) for line in read_proc(path).decode().splitlines()]
    return outside((first, lower, count) for first, lower, count in rows)
