"""What a process is confined by that stands in a checkpoint's way: a frozen cgroup, a seccomp filter.

In a cgroup that is frozen (cgroup v2's cgroup.freeze, v1's freezer) a tracer can seize a process but not have it run
anything: CRIU would wait for its first injected call for ever, and a CRIU that is killed then leaves a process that
dies of SIGTRAP when it is thawed. A process under a seccomp filter can only be worked on by a tracer that is under none
itself (PTRACE_O_SUSPEND_SECCOMP, kernel/ptrace.c).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from incdump.proc.identity import read_proc

if TYPE_CHECKING:
    from collections.abc import Iterable

    from incdump.proc.tree import Task


def frozen_cgroup(pid: int) -> str | None:
    """The directory of the frozen cgroup that a process is in; None: it is in none, or it cannot be seen.

    A cgroup whose ancestor is frozen is frozen, too, and says so itself.

    :raises ProcessLookupError: the process is gone.
    """
    memberships = read_proc(f"/proc/{pid}/cgroup").decode(errors="surrogateescape").splitlines()
    for number, controllers, path in (line.split(":", 2) for line in memberships):
        if number == "0":
            place = _mounted("cgroup2", None, path)
            if place is not None and _is_frozen(place):
                return place
        elif "freezer" in controllers.split(","):
            place = _mounted("cgroup", "freezer", path)
            if place is not None and _read(os.path.join(place, "freezer.state")).strip() in ("FROZEN", "FREEZING"):
                return place
    return None


def _is_frozen(place: str) -> bool:
    """Whether a cgroup of version 2 is frozen, or about to be: it, or one above it, has been told to."""
    if "frozen 1" in _read(os.path.join(place, "cgroup.events")).splitlines():
        return True
    while os.path.exists(told := os.path.join(place, "cgroup.freeze")):
        if _read(told).strip() == "1":
            return True
        place = os.path.dirname(place)
    return False


def _mounted(kind: str, controller: str | None, path: str) -> str | None:
    """Where a cgroup is mounted here; None: nowhere."""
    for line in read_proc("/proc/self/mountinfo").decode(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        file_system, _, options = rest.split(" ", 2)
        if file_system != kind or (controller is not None and controller not in options.split(" ")[-1].split(",")):
            continue
        root, place = fields.split(" ")[3:5]
        inner = os.path.relpath(path, root)
        if inner == ".." or inner.startswith("../"):
            continue
        return os.path.normpath(os.path.join(place.encode().decode("unicode_escape"), inner))
    return None


def _read(path: str) -> str:
    try:
        return read_proc(path).decode()
    except OSError:
        return ""


def filtered(tasks: Iterable[Task]) -> int | None:
    """The first process of some that has a thread under a seccomp filter, or in strict mode; None: there is none."""
    for task in tasks:
        for tid in task.threads:
            status = _read(f"/proc/{task.pid}/task/{tid}/status").splitlines()
            if any(line.startswith("Seccomp:") and line.split()[1] != "0" for line in status):
                return task.pid
    return None


def hidepid() -> str | None:
    """The hidepid option of /proc as it is mounted here, ``"invisible"`` or ``"2"``; None: nothing is hidden.

    proc(5): 0 or off hides nothing.
    """
    found = None
    for line in _read("/proc/self/mountinfo").splitlines():
        words, _, filesystem = line.partition(" - ")
        kind, *_, options = filesystem.split(" ")
        if kind == "proc" and words.split(" ")[4] == "/proc":
            given = [option.removeprefix("hidepid=") for option in options.split(",") if option.startswith("hidepid=")]
            found = given[0] if given else None  # the last line is the mount that is seen
    return None if found in ("0", "off") else found
