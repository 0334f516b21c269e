"""Memory that somebody else has yet to supply: lazy restores, postcopy migrations, memory that comes on demand.

A mapping that a userfaultfd has registered for missing (or minor) faults is filled by whoever has that userfaultfd,
when a page is touched (Documentation/admin-guide/mm/userfaultfd.rst; VmFlags ``um`` and ``ui``). A page of it that is
not present is not untouched: its contents are elsewhere. A dump without them would pass for a whole one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from incdump.errors import LazyMemory, NoSuchTarget, TargetExited
from incdump.model.runs import canonical, page_count, subtract
from incdump.model.vmas import VmaFlag
from incdump.proc.maps import read_vmas
from incdump.proc.pagemap import make_reader
from incdump.proc.tree import process_tree

if TYPE_CHECKING:
    from incdump.model.vmas import VmaTable


def check_tree_supplied(root: int) -> None:
    """The same for every process of a tree, with its mappings read anew. Blocks.

    :raises LazyMemory: some are.
    :raises NoSuchTarget: there is no such root.
    """
    for task in process_tree(root):
        if task.state != "Z":
            with suppress(TargetExited, NoSuchTarget):
                check_supplied(task.pid, read_vmas(task.pid, flags=True))


def check_supplied(pid: int, vmas: VmaTable) -> None:
    """Make sure that no page of a process is still to come from elsewhere. Blocks, for as long as such mappings take.

    :param vmas: its mappings, with flags.
    :raises LazyMemory: some are.
    :raises TargetExited: it exited.
    """
    lazy = vmas.select((vmas.flags & np.uint64(VmaFlag.UFFD_MISSING | VmaFlag.UFFD_MINOR)) != 0)
    if not len(lazy):
        return
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = [window.regions[:, :2] for window in make_reader().windows(fd, lazy)]
    finally:
        os.close(fd)
    missing = subtract(canonical(lazy.spans()), canonical(np.concatenate(there)) if there else lazy.spans()[:0])
    if len(missing):
        first = int(missing[0, 0])
        raise LazyMemory(
            f"process {pid} waits for {page_count(missing):,} pages, from {first:#x} on, that another program has yet "
            "to supply (userfaultfd: a lazy restore, for example): dump it when they are there",
            pid=pid,
            vaddr=first,
        )
