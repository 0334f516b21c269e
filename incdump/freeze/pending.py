"""Signals that are pending for a thread that is stopped, and how it comes to be left stopped before them.

The kernel takes pending signals in this order: those that a fault has raised, those for the thread alone, those for its
process; within each the lowest number first. A handler's frame is written to memory as soon as its signal is taken. So
a process that SIGSTOP is to leave as it was when it was frozen must come to that signal before all others:

- SIGSTOP is sent to one thread, not to the process: it comes before timers, SIGCHLD, and what kill(2) has sent.
- That thread is let go first. The kernel then has all others stop before they take any signal.
- What would come even before that takes effect while the tree is being frozen, so its frame is written before anything
  is read: a signal that the stop held up, and one that is pending for the thread alone (`comes_before_stop`).

The mask is left alone: whoever kills incdump in between would leave the target without signals. There remains a signal
below SIGSTOP that is sent with tgkill(2) to the only thread of a process while it is frozen: that one comes first.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from incdump._uapi import ptrace
from incdump.freeze.choice import read_status
from incdump.freeze.stops import SLOW, Backoff

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_DELIVERIES = 8
"""How many signals take effect in one thread while it is being stopped, lest a flood of them goes on for ever."""

_BEFORE_STOP = (1 << signal.SIGSTOP - 1) - 1 | 1 << signal.SIGSYS - 1  # faults come first, and SIGSYS can be one


def comes_before_stop(pid: int, tid: int) -> bool:
    """Whether a stopped thread would take another signal before a SIGSTOP that is sent to it alone.

    :raises ProcessLookupError: it is gone.
    """
    if not ptrace.has_pending(tid):
        return False
    status = read_status(pid, tid)
    return bool(int(status["SigPnd"], 16) & ~int(status["SigBlk"], 16) & _BEFORE_STOP)


def take_next(tid: int, held: int, info: ptrace.SigInfo) -> None:
    """Have a stopped thread take its next signal, and stop again before it runs.

    :param held: the signal that its stop holds up; 0: there is none, but `comes_before_stop`.
    :raises ProcessLookupError: it is gone.
    """
    if not held:
        ptrace.cont(tid)
        backoff = Backoff()
        while not ptrace.is_stopped(tid, info) and backoff.pause() < SLOW:
            pass
        ptrace.interrupt(tid)
        return
    ptrace.interrupt(tid)
    ptrace.cont(tid, held)


def send_stop(pid: int, tids: Iterable[int]) -> int:
    """Send SIGSTOP to that of a process's stopped threads which comes to it before any other signal.

    :returns: the thread, which is to be let go before the others; 0: there is none, so it was sent to the process.
    :raises ProcessLookupError: the process is gone.
    """
    alive = []
    for tid in tids:
        try:
            alive.append((comes_before_stop(pid, tid), tid))
        except ProcessLookupError:
            continue
        if not alive[-1][0]:
            break
    for _, tid in sorted(alive):
        try:
            ptrace.tgkill(pid, tid, signal.SIGSTOP)
        except ProcessLookupError:
            continue
        return tid
    os.kill(pid, signal.SIGSTOP)
    return 0
