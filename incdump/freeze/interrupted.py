"""Waits that a stop has interrupted, and that are to go on as if nothing had been.

Most waits the kernel goes on with by itself. Some fail with EINTR after any stop: epoll, rt_sigtimedwait, semop,
semtimedop, io_getevents, io_uring_enter, and calls on a socket with a timeout (SO_RCVTIMEO, SO_SNDTIMEO). These are
made again here; one whose time has an end is to end as nearly as can be when it was to:

- epoll_wait and epoll_pwait have their timeout in a register. Called by a C library's function, after which nobody
  looks at that register, they get what is left of it, if it is known how long they have waited (`asleep`).
- All others wait for the whole of their time again: the timeout is in the program's memory, in its socket, or in
  a register that it may look at. When the wait began, or was first seen, is noted where the program never looks, in the
  upper half of the call's number (x86_64: the kernel takes 32 bits of it, and the result takes its place) or of its
  first argument, an int (aarch64, likewise). At the first stop after the end of its time it ends, timed out. So
  however often it is stopped it lasts less than twice its time; three times, if when it began is not known. On
  aarch64 nothing can be noted for rt_sigtimedwait and io_getevents: each stop begins them anew.

A connect(2) that was made again and still runs out of time says EALREADY, where it would have said EINPROGRESS.

On x86_64 the kernel decides after the stop what becomes of an interrupted call, so it is enough to set its result. On
aarch64 it has decided before a tracer gets to see the thread:

- Most calls it has rewound: pc is at the instruction again, x0 holds the first argument again.
- A wait that fails with EINTR has that in x0, and its first argument is in no register set. Such a wait is rewound
  here.

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
import ctypes
import errno
import os
import socket
import struct
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from incdump._uapi import ptrace
from incdump._uapi.arch import ARCH, ERESTARTNOHAND
from incdump._uapi.pidfd import open_for_thread, pidfd_getfd
from incdump._uapi.procfile import read_small
from incdump.freeze.asleep import now_ms, switches_of
from incdump.freeze.choice import read_status

if TYPE_CHECKING:
    from incdump._uapi.arch import Registers
    from incdump.freeze.asleep import Sleep

_STEP = len(ARCH.instruction)
_LOW = 0xFFFFFFFF
_MOST = 0x7FFFFFFF  # of a mark: CRIU takes a negative number for no call at all
_EPOLL_LINK = "anon_inode:[eventpoll]"
_SOCKET_LINK = "socket:["
_SO_TIMEO = {"in": socket.SO_RCVTIMEO, "out": socket.SO_SNDTIMEO}

_EXT_ARG, _ABS_TIMER, _EXT_ARG_REG = 1 << 3, 1 << 5, 1 << 6  # IORING_ENTER_*

_syscall = ctypes.PyDLL(None).syscall
_syscall.argtypes = (ctypes.c_long,)
_syscall.restype = ctypes.c_long


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


@dataclass(frozen=True, slots=True)
class Spared:
    """What `spare_eintr` has made of a thread's registers.

    :ivar is_again: the wait is made again; else its time is over, and it says so.
    :ivar pc: the program counter they have.
    :ivar shortened: index of the register with a timeout that was made shorter; -1: none was.
    :ivar at: when that was done, `now_ms`.
    """

    is_again: bool
    pc: int
    shortened: int = -1
    at: int = 0


def spare_eintr(
    pid: int, tid: int, registers: Registers, seen: Call | None, sleep: Sleep | None = None
) -> Spared | None:
    """Change the registers of a thread, just stopped, so that a wait goes on which the stop made fail.

    Whatever becomes of us afterwards, the registers are right as they are.

    :param seen: what `look` told before the stop.
    :param sleep: since when it slept, as was seen before.
    :returns: what was changed, and is to be set; None: nothing.
    :raises ProcessLookupError: the thread was killed.
    """
    if ARCH.result_of(registers) != -errno.EINTR:
        return None
    call = _call_of(pid, tid, registers, seen)
    if call is None:
        return None
    wait = _Wait(pid, tid, call, registers, sleep)
    if not wait.has_end():
        wait.make_again(0)
    elif wait.take_off():
        wait.make_again(0)
        return Spared(True, registers[ARCH.pc], ARCH.arguments[wait.index], now_ms())
    elif wait.mark and wait.is_over():
        ARCH.set_timed_out(registers, call.number)
        return Spared(False, call.pc)
    else:
        wait.make_again(wait.mark or wait.began())
    return Spared(True, registers[ARCH.pc])


def take_off_stop(tid: int, registers: Registers, spared: Spared) -> None:
    """Take the time that a thread was stopped off a timeout that was made shorter when it was stopped.

    Nothing is done if it does not make that wait any more, as a signal's handler is to run.

    :raises ProcessLookupError: it was killed.
    """
    if spared.shortened < 0:
        return
    ptrace.getregset(tid, registers)
    is_to_come = registers[ARCH.pc] == spared.pc and (ARCH.orig < 0 or ARCH.result_of(registers) == -ERESTARTNOHAND)
    if is_to_come:
        registers[spared.shortened] = max(0, registers[spared.shortened] - (now_ms() - spared.at))
        ptrace.setregset(tid, registers)


def _call_of(pid: int, tid: int, registers: Registers, seen: Call | None) -> Call | None:
    """The call that a thread comes from, if it is one to be made again, and its first argument is known."""
    pc = registers[ARCH.pc]
    if ARCH.orig >= 0:
        number = registers[ARCH.orig] & _LOW
        call: Call | None = Call(number, registers[ARCH.arguments[0]], registers[ARCH.sp], pc)
    else:
        number = registers[ARCH.number]
        if not _may_be_made_again(number) or not is_instruction(tid, pc - _STEP):
            return None
        call = seen if was_waiting(registers, seen, pc) else _epoll_wait(pid, tid, number)
    if call is None or not _may_be_made_again(number):
        return None
    if number in ARCH.socket_waits and not _is_descriptor(pid, tid, call.first, _SOCKET_LINK):
        return None
    return call


def _may_be_made_again(number: int) -> bool:
    return number in ARCH.waits_with_eintr or number in ARCH.socket_waits


class _Wait:
    """A wait that failed, of a stopped thread.

    :ivar mark: when it began, as an earlier stop has noted, ms modulo 2**31; 0: there was none.
    """

    def __init__(self, pid: int, tid: int, call: Call, registers: Registers, sleep: Sleep | None) -> None:
        self.pid, self.tid, self.call, self.registers = pid, tid, call, registers
        self.now = now_ms() & _MOST
        self.index, self.kind = ARCH.waits_with_eintr.get(call.number, (0, "socket"))
        is_marked = _takes_mark(call.number)
        self.mark = (registers[ARCH.orig] if ARCH.orig >= 0 else call.first) >> 32 if is_marked else 0
        self.sleep = sleep if sleep is not None and sleep.place == (call.number, call.sp, call.pc) else None
        if self.sleep is not None and switches_of(pid, tid) != self.sleep.switches + 1:
            self.sleep = None  # it has been awake since

    def has_end(self) -> bool:
        """Whether it does not wait for ever; a socket's wait for ever the kernel makes again itself."""
        if self.kind == "none":
            return False
        if self.kind == "socket":
            return True
        value = self._argument()
        if self.kind == "io_uring":
            flags = self.registers[ARCH.arguments[3]]
            return bool(flags & _EXT_ARG and not flags & _ABS_TIMER and (flags & _EXT_ARG_REG or self._io_uring_end()))
        return not value & 0x80000000 if self.kind == "int" else value != 0

    def _argument(self) -> int:
        """The argument that is, or points to, the timeout."""
        return self.registers[ARCH.arguments[self.index]]

    def _io_uring_end(self) -> int:
        """Address of the timeout of io_uring_enter(2), ``struct io_uring_getevents_arg``; 0: none."""
        with contextlib.suppress(OSError):
            return ptrace.peek(self.tid, self._argument() + 16)
        return 0

    def began(self) -> int:
        """When it began, or was seen at the latest; as `mark`."""
        return self.now if self.sleep is None else self.sleep.began & _MOST

    def take_off(self) -> bool:
        """Take what it has waited off its timeout, if that is in a register that nobody looks at afterwards.

        :returns: whether that could be done.
        """
        if self.kind != "int" or self.sleep is None or not self.sleep.in_library:
            return False
        index = ARCH.arguments[self.index]
        waited = self.now - (self.mark or self.began()) & _MOST
        self.registers[index] = max(0, (self.registers[index] & 0x7FFFFFFF) - waited)
        return True

    def is_over(self) -> bool:
        """Whether it has waited for all of its time, from its mark on; an unknown time is not over."""
        with contextlib.suppress(OSError, ValueError):
            timeout = self._timeout()
            return 0 < timeout <= (self.now - self.mark & _MOST)
        return False

    def _timeout(self) -> int:
        """Milliseconds; 0: there is none, or it is not known.

        :raises OSError: it cannot be read.
        """
        if self.kind == "int":
            return self._argument() & 0x7FFFFFFF
        if self.kind == "io_uring" and self.registers[ARCH.arguments[3]] & _EXT_ARG_REG:
            return 0  # it is in memory that the ring alone knows of
        if self.kind != "socket":
            address = self._argument() if self.kind == "pointer" else self._io_uring_end()
            return ptrace.peek(self.tid, address) * 1000 + -(-ptrace.peek(self.tid, address + 8) // 1_000_000)
        pidfd = open_for_thread(self.pid, self.tid)
        try:
            copy = socket.socket(fileno=pidfd_getfd(pidfd, self.call.first & _LOW))
        finally:
            os.close(pidfd)
        with copy:
            option = _SO_TIMEO[ARCH.socket_waits[self.call.number]]
            seconds, micros = struct.unpack("qq", copy.getsockopt(socket.SOL_SOCKET, option, 16))
        return int(seconds) * 1000 - (-int(micros) // 1000)

    def make_again(self, mark: int) -> None:
        """Have it made again, with a mark (0: without one)."""
        number, first = self.call.number, self.call.first
        marked = (mark or 1) << 32 if mark and _takes_mark(number) else 0
        if ARCH.orig >= 0:
            self.registers[ARCH.orig] = number | marked
            ARCH.set_result(self.registers, -ERESTARTNOHAND)
            return
        self.registers[ARCH.result] = first & _LOW | marked if _takes_mark(number) else first
        self.registers[ARCH.pc] = self.call.pc - _STEP


@cache
def _takes_mark(number: int) -> bool:
    """Whether the kernel takes no notice of the upper half of what a mark goes into.

    x86_64: the number, of which it has taken 32 bits since Linux 5.13.
    """
    if ARCH.orig < 0:
        return number in ARCH.int_waits or number in ARCH.socket_waits
    return number >= 0 and _takes_half_of_number()


@cache
def _takes_half_of_number() -> bool:
    return bool(_syscall(ARCH.sys_getpid | 1 << 32) == os.getpid())


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
    return call if _is_descriptor(pid, tid, call.first, _EPOLL_LINK) else None


def _is_descriptor(pid: int, tid: int, fd: int, kind: str) -> bool:
    """Whether a thread's descriptor is of a kind: what its link begins with."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/task/{tid}/fd/{fd & _LOW}").startswith(kind)
    return False
