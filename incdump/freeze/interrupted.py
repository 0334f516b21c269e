"""Waits that a stop has interrupted, and that are to go on as if nothing had been.

On x86_64 the kernel decides after the stop what becomes of an interrupted call, so it is enough to set its result
(`incdump._uapi.arch.Arch.spare_eintr`). On aarch64 it has decided before a tracer gets to see the thread:

- Most calls it has rewound: pc is at the instruction again, x0 holds the first argument again.
- A wait that fails with EINTR (epoll_pwait, rt_sigtimedwait, semop) has that in x0, and its first argument is in no
  register set. Such a wait is rewound here.

It must have been our stop that made the wait fail, and not a signal whose handler returns at that very moment. That is
certain of a thread that was seen waiting there when we were its tracer already (`look`): a signal would have shown.
What /proc/TID/syscall said then is the argument. Of a thread that got there afterwards some kernels still tell it, once
they are told by NT_ARM_SYSTEM_CALL that the thread is in the call (Linux 6.12.107, not 6.12.117); if it is an epoll
descriptor, our stop is taken to have been the reason: had the thread come from a handler, it would be the argument of
sigreturn. In all other cases the wait does fail with EINTR, as signal(7) allows; it must never go on when a handler has
run.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from incdump._uapi import ptrace
from incdump._uapi.arch import ARCH
from incdump._uapi.procfile import read_small
from incdump.freeze.choice import read_status

if TYPE_CHECKING:
    from incdump._uapi.arch import Registers

_STEP = len(ARCH.instruction)
_EPOLL_LINK = "anon_inode:[eventpoll]"


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that a thread sleeps in.

    :ivar first: its first argument.
    :ivar sp: the stack pointer; `pc` is behind the instruction.
    """

    number: int
    first: int
    sp: int
    pc: int


def look(pid: int, tid: int) -> Call | None:
    """The call that a thread sleeps in, which we trace but have not interrupted; None where it need not be known.

    :returns: None, too, of a thread that runs or is gone.
    """
    return None if ARCH.orig >= 0 else _read_call(pid, tid)


def _read_call(pid: int, tid: int) -> Call | None:
    try:
        words = read_small(f"/proc/{pid}/task/{tid}/syscall").split()
    except OSError:  # gone; not allowed; a kernel without it
        return None
    if len(words) < 9:
        return None
    return Call(int(words[0]), int(words[1], 16), int(words[7], 16), int(words[8], 16))


def was_waiting(registers: Registers, seen: Call | None, pc: int) -> bool:
    """Whether a stopped thread comes from the call that it was seen in; `pc` is behind that call's instruction."""
    return seen is not None and (seen.number, seen.sp, seen.pc) == (registers[ARCH.number], registers[ARCH.sp], pc)


def spare_eintr(pid: int, tid: int, registers: Registers, seen: Call | None) -> bool:
    """Change the registers of a thread, just stopped, so that a wait for ever goes on which the stop made fail.

    :param seen: what `look` told before the stop.
    :returns: whether they were changed, and are to be set.
    :raises ProcessLookupError: the thread was killed.
    """
    if ARCH.orig >= 0:
        return ARCH.spare_eintr(registers)
    number, pc = registers[ARCH.number], registers[ARCH.pc]
    if not ARCH.is_spoilt(registers, number) or not is_instruction(tid, pc - _STEP):
        return False
    call = seen if was_waiting(registers, seen, pc) else _epoll_wait(pid, tid, number)
    if call is None:
        return False
    registers[ARCH.result] = call.first
    registers[ARCH.pc] = pc - _STEP
    return True


def fail_after_all(tid: int, registers: Registers) -> None:
    """aarch64: undo `spare_eintr` for a thread that a signal handler is about to run in: it has to see EINTR."""
    ptrace.getregset(tid, registers)
    ARCH.set_result(registers, -errno.EINTR)
    registers[ARCH.pc] += _STEP
    ptrace.setregset(tid, registers)


def has_handler(pid: int, tid: int, number: int) -> bool:
    """Whether a signal makes a handler of the process run.

    :raises ProcessLookupError: it is gone.
    """
    return bool(int(read_status(pid, tid)["SigCgt"], 16) >> number - 1 & 1)


def is_instruction(tid: int, address: int) -> bool:
    """Whether the memory of a stopped thread has a system call instruction at an address."""
    try:
        return ptrace.peek(tid, address).to_bytes(8, "little").startswith(ARCH.instruction)
    except ProcessLookupError:
        raise
    except OSError:  # no memory there
        return False


def _epoll_wait(pid: int, tid: int, number: int) -> Call | None:
    """The wait that a stopped thread comes from, if the kernel tells its argument, and that is an epoll descriptor."""
    if number not in ARCH.epoll_waits:
        return None
    ptrace.set_syscall(tid, number)
    try:
        call = _read_call(pid, tid)
    finally:
        ptrace.set_syscall(tid, -1)
    if call is None:
        return None
    with contextlib.suppress(OSError):
        if os.readlink(f"/proc/{pid}/task/{tid}/fd/{call.first & 0xFFFFFFFF}") == _EPOLL_LINK:
            return call
    return None
