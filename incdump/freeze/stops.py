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

import contextlib
import ctypes
import os
import signal
import time
from typing import TYPE_CHECKING

from incdump._uapi.libc import libc
from incdump._uapi.ptrace import PTRACE_EVENT_STOP, SYSCALL_STOP, SigInfo, is_stopped, take_notification

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SPIN = 40e-6
"""Seconds of looking at threads without a pause: one that runs on another processor stops within that."""
FIRST_PAUSE = 10e-6
MISSED = 200e-6
"""Seconds after which to look even without a SIGCHLD: another thread may have got it."""
SLOW = 2e-3
"""Seconds after which a stop takes so long that something may be in its way."""
LONGEST_PAUSE = 1e-3
"""Seconds between looks at threads that take their time."""

_PR_SET_TIMERSLACK = 29
_STOPS = (4, 5)  # CLD_TRAPPED, CLD_STOPPED


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


def sleep_exactly() -> None:
    """Have the calling thread's sleeps of 10 us last 10 us, and not 60 (timer slack)."""
    libc.prctl(_PR_SET_TIMERSLACK, *map(ctypes.c_ulong, (1, 0, 0, 0)))


@contextlib.contextmanager
def in_real_time() -> Iterator[None]:
    """Run the calling thread before all that is not real-time, as far as we may (CAP_SYS_NICE), for some milliseconds.

    Others stand still because of it. A target that computes, in a session (autogroup) of its own, was seen to keep its
    tracer from its processor for seconds.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


class Backoff:
    """Pauses between looks at something that will happen soon: none, then short ones, then longer ones."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._pause = FIRST_PAUSE

    @property
    def elapsed(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    def pause(self) -> float:
        """Wait for as long as the time waited so far suggests.

        :returns: seconds waited so far.
        """
        elapsed = self.elapsed
        if elapsed >= SPIN:
            # Not sched_yield(2): since EEVDF each call costs a whole time slice, and a hundred put us off for seconds.
            time.sleep(self._pause)
            self._pause = min(LONGEST_PAUSE, self._pause * 1.3)
        return elapsed


def wait_for_stop(tid: int, info: SigInfo, timeout: float, is_gone: Callable[[], bool]) -> bool:
    """Wait until a seized thread is stopped; `info` then tells how.

    The calling thread has to have SIGCHLD blocked: the kernel then wakes it with that signal, and the processor is free
    meanwhile for the very thread that is waited for.

    :param timeout: seconds.
    :param is_gone: asked now and then, whether the thread has exited.
    :returns: False: not stopped in time, or gone.
    """
    began = time.monotonic()
    # With a handler the signal is for that one; ignored, there is none.
    sleep = _sleep_until_sigchld if signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL else time.sleep
    while not is_stopped(tid, info):
        elapsed = time.monotonic() - began
        if elapsed > SLOW and (elapsed > timeout or is_gone()):
            return False
        sleep(min(LONGEST_PAUSE, max(MISSED if sleep is _sleep_until_sigchld else FIRST_PAUSE, elapsed / 4)))
    if not held_signal(info):
        take_notification(tid)
    return True


def _sleep_until_sigchld(seconds: float) -> None:
    """Sleep until a traced thread has stopped, or for so long; the death of a child is left to others to hear of."""
    notice = signal.sigtimedwait((signal.SIGCHLD,), seconds)
    if notice is not None and notice.si_code not in _STOPS:
        os.kill(os.getpid(), signal.SIGCHLD)
