"""ptrace(2), one thin function a request.

The thread that seizes a task is its tracer: all later requests, and PTRACE_DETACH above all, must come from that very
thread. When that thread ends, the kernel detaches whatever it traces and lets it run; that is the only way to let go of
a task that could not be stopped.

Every request but `seize` is made with the GIL held (`ctypes.PyDLL`): they take a microsecond, and while a target stands
still nobody else's Python code is to come in between. `seize` may have to wait for an exec of the target, so it lets
the GIL go.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

from incdump._uapi.arch import ARCH
from incdump._uapi.libc import raise_errno

if TYPE_CHECKING:
    from incdump._uapi.arch import Registers

_PEEKDATA = 2
_CONT = 7
_DETACH = 17
_SYSCALL = 24
_SETOPTIONS = 0x4200
_GETSIGINFO = 0x4202
_GETREGSET = 0x4204
_SETREGSET = 0x4205
_SEIZE = 0x4206
_INTERRUPT = 0x4207
_PEEKSIGINFO = 0x4209
_GETSIGMASK = 0x420A
_SETSIGMASK = 0x420B
_GET_RSEQ_CONFIGURATION = 0x420F
_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211

NT_PRSTATUS = 1
NT_ARM_SYSTEM_CALL = 0x404

PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_SUSPEND_SECCOMP = 1 << 21

PTRACE_EVENT_STOP = 128
SYSCALL_STOP = 5 | 0x80
"""``si_code`` (and stop signal) at the entry to and the exit from a system call, with `PTRACE_O_TRACESYSGOOD`."""

ALL_SIGNALS = 0xFFFFFFFFFFFFFFFF


class SigInfo(ctypes.Structure):
    """``siginfo_t`` of 128 bytes: the head that every kind of it has."""

    _fields_ = (
        ("signo", ctypes.c_int),
        ("errno", ctypes.c_int),
        ("code", ctypes.c_int),
        ("rest", ctypes.c_uint8 * 116),
    )


class RseqConfiguration(ctypes.Structure):
    """``struct ptrace_rseq_configuration``: where a thread has registered its restartable-sequence area."""

    _fields_ = (
        ("rseq_abi_pointer", ctypes.c_uint64),
        ("rseq_abi_size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class _PeekSigInfoArgs(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("flags", ctypes.c_uint32), ("count", ctypes.c_int32))


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_LONGS = (ctypes.c_long,) * 5
_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = _LONGS
_syscall_without_gil = ctypes.CDLL(None, use_errno=True).syscall
_syscall_without_gil.restype = ctypes.c_long
_syscall_without_gil.argtypes = _LONGS
_NR = ARCH.sys_ptrace
_waitid = ctypes.PyDLL(None).waitid
_waitid.restype = ctypes.c_int
_waitid.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_int)
_P_PID = 1
_WNOHANG, _WSTOPPED, _WALL = 1, 2, 0x40000000


def _ptrace(request: int, tid: int, addr: int = 0, data: int = 0) -> int:
    """The raw system call, which unlike the C library's function returns what was peeked through `data`."""
    result: int = _syscall(_NR, request, tid, addr, data)
    if result < 0:
        raise_errno()
    return result


def seize(tid: int, options: int = 0) -> None:
    """Become the tracer of a thread, without stopping it.

    :raises OSError: ESRCH: no such thread. EPERM: not allowed, traced already, exiting, of the kernel, or of our own.
    """
    if _syscall_without_gil(_NR, _SEIZE, tid, 0, options) < 0:
        raise_errno()


def interrupt(tid: int) -> None:
    """Have a seized thread stop as soon as it can (PTRACE_EVENT_STOP)."""
    _ptrace(_INTERRUPT, tid)


def cont(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run; after a signal-delivery-stop, `signal` is delivered to it (0: dropped)."""
    _ptrace(_CONT, tid, 0, signal)


def cont_to_syscall(tid: int, signal: int = 0) -> None:
    """As `cont`, but up to the next entry to, or exit from, a system call."""
    _ptrace(_SYSCALL, tid, 0, signal)


def detach(tid: int, signal: int = 0) -> None:
    """Let go of a stopped thread: it runs, or is in group stop if its process is.

    :param signal: as with `cont`.
    :raises OSError: ESRCH: it is not stopped, or is dead.
    """
    _ptrace(_DETACH, tid, 0, signal)


def tgkill(pid: int, tid: int, signal: int) -> None:
    """Send a signal to one thread.

    :raises ProcessLookupError: it is gone.
    """
    if _syscall(ARCH.sys_tgkill, pid, tid, signal, 0) < 0:
        raise_errno()


def setoptions(tid: int, options: int) -> None:
    """Set PTRACE_O_* options.

    :raises OSError: EPERM or EINVAL: PTRACE_O_SUSPEND_SECCOMP needs CAP_SYS_ADMIN, and no filter of our own.
    """
    _ptrace(_SETOPTIONS, tid, 0, options)


def is_stopped(tid: int, info: SigInfo) -> bool:
    """Whether a seized thread stands in a ptrace-stop, and in which: `info` is filled in.

    The answer does not depend on who has waited for the thread: waitpid(2) in another thread of a tracer that is
    the parent, too, takes the notification of a stop away.
    """
    if _syscall(_NR, _GETSIGINFO, tid, 0, ctypes.addressof(info)) == 0:
        return True
    if ctypes.get_errno() != errno.ESRCH:
        raise_errno()
    return False


def take_notification(tid: int) -> None:
    """Take the notification of a thread's stop, if there is one, lest somebody else in this process gets it.

    Popen.poll() would take it for the end of the child. Not in a signal-delivery-stop: with the notification the signal
    would be gone if this process died now; else the kernel passes it on then.
    """
    _waitid(_P_PID, tid, None, _WSTOPPED | _WNOHANG | _WALL)


def has_pending(tid: int) -> bool:
    """Whether a signal is pending for a stopped thread alone, blocked or not; those for its process do not count."""
    info = SigInfo()
    arguments = _PeekSigInfoArgs(0, 0, 1)
    return _ptrace(_PEEKSIGINFO, tid, ctypes.addressof(arguments), ctypes.addressof(info)) > 0


def getregset(tid: int, registers: Registers) -> int:
    """Read the general registers (NT_PRSTATUS) of a stopped thread.

    :returns: bytes filled in: fewer than the array has mean that the thread runs 32-bit code.
    """
    iovec = _Iovec(ctypes.addressof(registers), ctypes.sizeof(registers))
    _ptrace(_GETREGSET, tid, NT_PRSTATUS, ctypes.addressof(iovec))
    return int(iovec.length)


def setregset(tid: int, registers: Registers) -> None:
    """Write the general registers (NT_PRSTATUS) of a stopped thread."""
    iovec = _Iovec(ctypes.addressof(registers), ctypes.sizeof(registers))
    _ptrace(_SETREGSET, tid, NT_PRSTATUS, ctypes.addressof(iovec))


def set_syscall(tid: int, number: int) -> None:
    """aarch64: have the kernel take a stopped thread to be in a system call; -1: in none, so that none is restarted."""
    value = ctypes.c_int32(number)
    iovec = _Iovec(ctypes.addressof(value), ctypes.sizeof(value))
    _ptrace(_SETREGSET, tid, NT_ARM_SYSTEM_CALL, ctypes.addressof(iovec))


def getsigmask(tid: int) -> int:
    """The signal mask of a stopped thread; bit 0 is signal 1. In sigsuspend(2): the mask to come back to."""
    mask = ctypes.c_uint64()
    _ptrace(_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def setsigmask(tid: int, mask: int) -> None:
    """Set the signal mask of a stopped thread."""
    value = ctypes.c_uint64(mask)
    _ptrace(_SETSIGMASK, tid, 8, ctypes.addressof(value))


def peek(tid: int, address: int) -> int:
    """Eight bytes of a stopped thread's memory, as an unsigned integer.

    :raises OSError: EIO: there is no memory.
    """
    word = ctypes.c_uint64()
    _ptrace(_PEEKDATA, tid, address, ctypes.addressof(word))
    return word.value


def get_rseq_configuration(tid: int) -> RseqConfiguration | None:
    """The restartable-sequence area of a stopped thread, or None when it has none or the kernel knows of none."""
    configuration = RseqConfiguration()
    try:
        _ptrace(_GET_RSEQ_CONFIGURATION, tid, ctypes.sizeof(configuration), ctypes.addressof(configuration))
    except OSError as e:
        if e.errno in (errno.EIO, errno.EINVAL):
            return None
        raise
    return configuration if configuration.rseq_abi_pointer else None


def has_syscall_user_dispatch(tid: int) -> bool:
    """Whether a stopped thread gets its own system calls back as SIGSYS (prctl PR_SET_SYSCALL_USER_DISPATCH)."""
    configuration = (ctypes.c_uint64 * 4)()
    try:
        _ptrace(_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, ctypes.sizeof(configuration), ctypes.addressof(configuration))
    except OSError as e:
        if e.errno in (errno.EIO, errno.EINVAL):  # a kernel before 6.4, which cannot tell
            return False
        raise
    return bool(configuration[0])
