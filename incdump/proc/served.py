"""Whether a process serves the file system that a path is on (FUSE).

A file system of that kind has one connection to /dev/fuse, whose number is the file system's device number. Whoever has
the connection open answers for it; Linux 6.17 and later say in /proc/PID/fdinfo which one it is (fuse_dev_show_fdinfo,
fs/fuse/dev.c). While that process is stopped, every call that touches the file system waits for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from incdump.errors import TargetUnsuitable
from incdump.proc.identity import read_proc
from incdump.proc.tree import process_tree

if TYPE_CHECKING:
    from collections.abc import Iterable

    from incdump.proc.tree import Task

_FUSE_TYPES = ("fuse", "fuseblk")
_CONNECTION = b"fuse_connection:"


def refuse_served(path: str | os.PathLike[str], root: int) -> None:
    """Make sure that a path's file system goes on answering while a tree is stopped. Blocks.

    :raises TargetUnsuitable: a process of the tree serves it, or may do so.
    :raises NoSuchTarget: there is no such root.
    """
    connection = _fuse_connection(path)
    if connection is None:
        return
    if (pid := _first_that_answers(process_tree(root), connection)) is not None:
        raise TargetUnsuitable(
            f"{os.fspath(path)} is on a file system that process {pid}, which is to be stopped, serves itself (FUSE): "
            "choose an images dir elsewhere",
            pid=pid,
            path=path,
        )


def server_of(path: str | os.PathLike[str], tasks: Iterable[Task]) -> int | None:
    """The first of some processes that serves the file system which a path is on, or may do so; None: none does.

    :param path: need not exist yet: then its nearest parent is meant that does.
    """
    connection = _fuse_connection(path)
    if connection is None:
        return None
    return _first_that_answers(tasks, connection)


def _first_that_answers(tasks: Iterable[Task], connection: int) -> int | None:
    return next((task.pid for task in tasks if _answers(task.pid, connection)), None)


def _fuse_connection(path: str | os.PathLike[str]) -> int | None:
    """The number of the connection behind a path; None: it is on another kind of file system."""
    place = os.path.abspath(path)
    while not os.path.exists(place) and place != "/":
        place = os.path.dirname(place)
    device = os.stat(place).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in read_proc("/proc/self/mountinfo").decode(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split(" ")[2] == number and rest.split(" ")[0].split(".")[0] in _FUSE_TYPES:
            return os.minor(device)
    return None


def _answers(pid: int, connection: int) -> bool:
    place = f"/proc/{pid}/fd"
    try:
        names = os.listdir(place)
    except OSError:
        return False
    for name in names:
        try:
            if os.readlink(f"{place}/{name}") != "/dev/fuse":
                continue
            lines = read_proc(f"/proc/{pid}/fdinfo/{name}").splitlines()
        except OSError:  # closed since
            continue
        told = [line for line in lines if line.startswith(_CONNECTION)]
        if not told or int(told[0].removeprefix(_CONNECTION)) == connection:
            return True
    return False
