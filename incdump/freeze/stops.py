"""The stops of a traced thread: which one it is, and waiting for it.

What PTRACE_GETSIGINFO tells decides, never what waitpid(2) returns: the notification of a stop goes to whichever thread
waits first, and a program that dumps its own child may well wait for that child elsewhere.

=========================  ==================================  ====================================================
stop                       ``si_signo``, ``si_code``           let go with
=========================  ==================================  ====================================================
interrupted                SIGTRAP, SIGTRAP | EVENT_STOP << 8  no signal
group stop                 SIGSTOP..., same | EVENT_STOP << 8  no signal: it goes on being stopped
signal-delivery-stop       the signal's own                    that signal, else it is lost
system call entry or exit  SIGTRAP, SIGTRAP | 0x80             no signal
=========================  ==================================  ====================================================

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from incdump._uapi.ptrace import PTRACE_EVENT_STOP, SYSCALL_STOP, SigInfo, is_stopped, take_notification

if TYPE_CHECKING:
    from collections.abc import Callable

SPIN = 40e-6
"""Seconds of looking at threads without a pause: one that runs on another processor stops within that."""
YIELD = 200e-6
"""Seconds up to which the processor is offered to others between looks: they may be the very threads waited for."""
SLOW = 2e-3
"""Seconds after which a stop takes so long that something may be in its way."""
LONGEST_PAUSE = 1e-3
"""Seconds between looks at threads that take their time."""


def is_event_stop(info: SigInfo) -> bool:
    """Whether the stop is one that PTRACE_INTERRUPT, or a group stop, has brought about."""
    return bool(info.code == (info.signo | PTRACE_EVENT_STOP << 8))


def is_group_stop(info: SigInfo) -> bool:
    """Whether the thread's process is stopped by a signal (SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU), tracer or not."""
    return is_event_stop(info) and info.signo != signal.SIGTRAP


def is_syscall_stop(info: SigInfo) -> bool:
    """Whether the thread stands at the entry to a system call, or at the exit from it."""
    return bool(info.signo == signal.SIGTRAP and info.code == SYSCALL_STOP)


def held_signal(info: SigInfo) -> int:
    """The signal that the stop holds up, to be passed on when the thread is let go; 0: none."""
    return 0 if is_event_stop(info) or is_syscall_stop(info) else int(info.signo)


class Backoff:
    """Pauses between looks at something that will happen soon: none, then short ones, then longer ones."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._pause = 10e-6

    @property
    def elapsed(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    def pause(self) -> float:
        """Wait for as long as the time waited so far suggests.

        :returns: seconds waited so far.
        """
        elapsed = self.elapsed
        if elapsed >= YIELD:
            time.sleep(self._pause)
            self._pause = min(LONGEST_PAUSE, self._pause * 1.3)
        elif elapsed >= SPIN:
            os.sched_yield()
        return elapsed


def wait_for_stop(tid: int, info: SigInfo, timeout: float, is_gone: Callable[[], bool]) -> bool:
    """Wait until a seized thread is stopped; `info` then tells how.

    :param timeout: seconds.
    :param is_gone: asked now and then, whether the thread has exited.
    :returns: False: not stopped in time, or gone.
    """
    backoff = Backoff()
    while not is_stopped(tid, info):
        elapsed = backoff.pause()
        if elapsed > SLOW and (elapsed > timeout or is_gone()):
            return False
    take_notification(tid)
    return True
