"""What processes have in common: an address space (vfork), or pages that are copied on write (fork, KSM).

Pages that are shared copy-on-write need care: process_vm_readv(2) pins what it reads, and the kernel takes a page that
is mapped more than once out of the sharing before it lets anybody pin it (gup_must_unshare() in mm/internal.h). The
target's memory would grow by what is read; of a private huge page, when the pool has no other one, the copy would be
taken from the child, which dies of it. /proc/PID/mem pins nothing. `incdump.proc.memory` chooses between the two.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cmp_to_key, partial
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

from incdump._uapi.kcmp import KCMP_VM, order, shares
from incdump.proc.identity import read_proc, read_stat

if TYPE_CHECKING:
    from collections.abc import Iterable

    from incdump.proc.tree import Task


def shares_address_space(pid: int, other: int) -> bool:
    """Ask kcmp(2); False where it cannot be told (another user's process, a kernel without it)."""
    return other > 0 and shares(pid, other, KCMP_VM)


def sharing_address_space(pids: Iterable[int]) -> dict[int, int]:
    """Which of some processes run in the memory of another one: for each of these, the first that does.

    Where that cannot be told (see `shares_address_space`) a process is left out.
    """
    alike: dict[tuple[int, int] | None, list[int]] = {}
    for pid in pids:
        alike.setdefault(_mark(pid), []).append(pid)
    found: dict[int, int] = {}
    compare = cmp_to_key(partial(order, what=KCMP_VM))
    for group in alike.values():
        pairs: Iterable[tuple[int, int]]
        try:
            pairs = pairwise(sorted(group, key=compare))
        except OSError:  # one has exited: each with each, then
            pairs = combinations(group, 2)
        for one, other in pairs:
            if other not in found and shares_address_space(one, other):
                found[other] = found.get(one, one)
    return found


def may_share_pages(tasks: Iterable[Task]) -> set[int]:
    """The processes among these that may share pages, copy-on-write, with any other one of the machine.

    A fork keeps the addresses of program and stack, which exec draws at random: who has the same ones may share pages.
    Costs a read of /proc/PID/stat for each process of the machine.

    :returns: their pids. A process is left out only if it shares nothing now.
    """
    marks = {int(name): _mark(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    count = Counter(marks.values())
    found = set()
    for task in tasks:
        mark = marks.get(task.pid)
        if task.forked or mark is None or count[mark] > 1 or _has_merged_pages(task.pid):
            found.add(task.pid)
    return found


def _mark(pid: int) -> tuple[int, int] | None:
    """Where a process's program and stack begin; None if that is not to be seen."""
    try:
        stat = read_stat(pid)
    except OSError:
        return None
    return (stat.start_code, stat.start_stack) if stat.start_stack else None


def _has_merged_pages(pid: int) -> bool:
    """Whether KSM has merged pages of a process (/proc/PID/ksm_merging_pages, Linux 5.19)."""
    try:
        return int(read_proc(f"/proc/{pid}/ksm_merging_pages")) > 0
    except (OSError, ValueError):
        return False
