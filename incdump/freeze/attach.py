"""Becoming the tracer of a thread, and why that may be refused.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import errno
import threading

from incdump._uapi import ptrace
from incdump.errors import AlreadyTraced, TargetDenied, TargetError
from incdump.freeze.choice import read_status, read_thread_stat

ATTEMPTS = 5
"""How often a refused PTRACE_SEIZE is tried: the kernel says EPERM of a leader that is dead at that moment, and in
whose place, in mid-exec, there will be another."""


def seize(pid: int, tid: int) -> bool:
    """Become the tracer of a thread, if we are not already; it runs on.

    :returns: False: it has exited.
    :raises AlreadyTraced: somebody else traces it.
    :raises TargetDenied: the kernel does not let us.
    """
    for attempt in range(ATTEMPTS):
        try:
            ptrace.seize(tid)
            break
        except OSError as e:
            try:
                if e.errno == errno.ESRCH or read_thread_stat(pid, tid).state in "ZXx":
                    return False
                if is_ours(pid, tid):  # under a new id, after an exec
                    break
                if attempt == ATTEMPTS - 1:
                    raise _refusal(pid, tid, e) from None
            except ProcessLookupError:
                return False
    return True


def interrupt(tid: int) -> bool:
    """Have a seized thread stop as soon as it can.

    :returns: False: it has exited.
    """
    try:
        ptrace.interrupt(tid)
    except ProcessLookupError:
        return False
    return True


def is_ours(pid: int, tid: int) -> bool:
    """Whether the calling thread is the tracer of a thread.

    :raises ProcessLookupError: it is gone.
    """
    return tracer_of(pid, tid) == threading.get_native_id()


def tracer_of(pid: int, tid: int) -> int:
    """Which thread traces a thread; 0: none.

    :raises ProcessLookupError: it is gone.
    """
    return int(read_status(pid, tid).get("TracerPid", "0"))


def _refusal(pid: int, tid: int, error: OSError) -> TargetError:
    tracer = tracer_of(pid, tid)
    if tracer:
        message = f"process {pid} is traced by process {tracer}: detach that first"
        return AlreadyTraced(message, pid=pid, errno=error.errno)
    message = f"not allowed to trace process {pid}: run as its user or as root (or see kernel.yama.ptrace_scope)"
    return TargetDenied(message, pid=pid, errno=error.errno)
