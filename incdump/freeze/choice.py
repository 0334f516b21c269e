"""Which thread of a process makes a system call for us, and from where in its memory.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from dataclasses import dataclass

from incdump._uapi.arch import ARCH
from incdump.errors import InjectionFailed, TargetDenied, TargetUnsuitable
from incdump.proc.identity import PF_EXITING, PF_KTHREAD, Stat, no_such_target, parse_stat, read_proc, read_stat

PF_IO_WORKER = 0x00000010
PF_USER_WORKER = 0x00004000
_NEVER_IN_USER_MODE = PF_KTHREAD | PF_IO_WORKER | PF_USER_WORKER | PF_EXITING

MOST_CANDIDATES = 16
"""Threads considered, in search of the best one."""

_AT_SYSINFO_EHDR = 33
_VDSO_SIZE = 16384
_LOOKS = (0.0, 20e-6, 100e-6, 500e-6)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A thread that may do.

    :ivar rank: how much it would be disturbed: 0 is not at all.
    :ivar has_seccomp: whether a seccomp filter stands over it.
    """

    tid: int
    rank: int
    has_seccomp: bool = False


def read_status(pid: int, tid: int) -> dict[str, str]:
    """/proc/PID/task/TID/status as a mapping of field name to text.

    :raises ProcessLookupError: it is gone.
    """
    text = os.fsdecode(read_proc(f"/proc/{pid}/task/{tid}/status"))
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def read_thread_stat(pid: int, tid: int) -> Stat:
    """One thread's stat file; unlike a process's it does not sum up over all threads.

    :raises ProcessLookupError: it is gone.
    """
    return parse_stat(read_proc(f"/proc/{pid}/task/{tid}/stat"))


def is_gone(pid: int, tid: int) -> bool:
    """Whether a thread has exited (a zombie has)."""
    try:
        return read_thread_stat(pid, tid).state in "ZXx"
    except ProcessLookupError:
        return True


def has_exited(pid: int) -> bool:
    """Whether a process is gone, or a zombie.

    In mid-exec by a thread that is not the leader, /proc shows for a moment the dead leader, of no thread group any
    more, before the thread in its place: that is looked at again.
    """
    for pause in _LOOKS:
        time.sleep(pause)
        with contextlib.suppress(ProcessLookupError):
            stat = read_stat(pid)
            if not stat.is_dead or stat.num_threads:
                return stat.is_dead
    return True


def candidates(pid: int) -> list[Candidate]:
    """The threads of a process that may run a system call for us, the best first.

    :raises NoSuchTarget: there is no such process.
    :raises TargetUnsuitable: it has no thread that could, being a kernel thread or a zombie.
    :raises TargetDenied: it may not be looked at.
    """
    try:
        tids = sorted((int(name) for name in os.listdir(f"/proc/{pid}/task")), key=lambda tid: (tid != pid, tid))
    except FileNotFoundError as e:
        raise no_such_target(pid, e.errno) from None
    found: list[Candidate] = []
    for tid in tids:
        try:
            candidate = _look_at(pid, tid)
        except ProcessLookupError:
            continue
        if candidate is not None:
            found.append(candidate)
            if candidate.rank == 0 or len(found) == MOST_CANDIDATES:
                break
    if not found:
        raise _no_memory(pid)
    return sorted(found, key=lambda candidate: candidate.rank)


def _look_at(pid: int, tid: int) -> Candidate | None:
    """Rank one thread; None: it never runs in user mode, or never again."""
    stat = read_thread_stat(pid, tid)
    if stat.state in "ZXx" or stat.flags & _NEVER_IN_USER_MODE:
        return None
    has_seccomp = read_status(pid, tid).get("Seccomp", "0") != "0"
    try:
        words = read_proc(f"/proc/{pid}/task/{tid}/syscall").split()
    except PermissionError:
        raise _denied(pid) from None
    except FileNotFoundError:  # a kernel without it
        words = []
    if stat.state == "D":
        return Candidate(tid, 5, has_seccomp)
    if not words or words[0] == b"running":
        return Candidate(tid, 1, has_seccomp)
    number = int(words[0])
    if number in ARCH.waits_restarted:
        return Candidate(tid, 2, has_seccomp)
    rank = 0 if number in ARCH.waits_well else 4 if number in ARCH.waits_with_eintr else 3
    return Candidate(tid, rank, has_seccomp)


def find_instruction(pid: int, tid: int) -> int:
    """The address of a system call instruction in a process's vDSO: nothing needs to be written to its memory.

    :param tid: a thread that is alive; the leader may not be.
    :raises NoSuchTarget: the thread is gone.
    :raises TargetUnsuitable: a 32-bit process, or one without memory; a thread that has exited has none.
    :raises TargetDenied: its memory may not be read.
    :raises InjectionFailed: it has no vDSO.
    """
    try:
        text, base = _read_vdso(pid, tid)
    except PermissionError:
        raise _denied(pid) from None
    except ProcessLookupError as e:
        raise no_such_target(pid, e.errno) from None
    if not text.startswith(b"\x7fELF"):
        raise InjectionFailed(f"process {pid} has no vDSO to run a system call from", pid=pid)
    if text[4] != 2 or struct.unpack_from("<H", text, 18)[0] != ARCH.elf_machine:
        raise TargetUnsuitable(f"process {pid} is a 32-bit program: incdump handles 64-bit ones only", pid=pid)
    offset = text.find(ARCH.instruction)
    while offset % ARCH.alignment and offset >= 0:
        offset = text.find(ARCH.instruction, offset + 1)
    if offset < 0:
        raise InjectionFailed(f"the vDSO of process {pid} holds no system call instruction", pid=pid)
    return base + offset


def _read_vdso(pid: int, tid: int) -> tuple[bytes, int]:
    """The vDSO's bytes and address: where the auxiliary vector says, or (it can be moved) where maps does."""
    where = f"/proc/{pid}/task/{tid}"
    try:
        memory = os.open(f"{where}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise ProcessLookupError(e.errno, e.strerror) from None
    try:
        auxv = read_proc(f"{where}/auxv")
        if not auxv:
            raise _no_memory(pid)
        base = dict(struct.iter_unpack("<QQ", auxv[: len(auxv) & ~15])).get(_AT_SYSINFO_EHDR, 0)
        text = _read_at(memory, base)
        if not text.startswith(b"\x7fELF"):
            maps = (line for line in read_proc(f"{where}/maps").splitlines() if line.endswith(b"[vdso]"))
            base = int(next(maps, b"0-").split(b"-")[0], 16)
            text = _read_at(memory, base)
        return text, base
    except FileNotFoundError as e:
        raise ProcessLookupError(e.errno, e.strerror) from None
    finally:
        os.close(memory)


def _read_at(memory: int, base: int) -> bytes:
    """As much as there is of the mapping at an address; nothing at address 0."""
    if not base:
        return b""
    try:
        return os.pread(memory, _VDSO_SIZE, base)
    except OSError as e:
        if e.errno != errno.EIO:
            raise
        return b""


def _no_memory(pid: int) -> TargetUnsuitable:
    return TargetUnsuitable(f"process {pid} has no memory of its own: it is a zombie or a kernel thread", pid=pid)


def _denied(pid: int) -> TargetDenied:
    message = f"not allowed to look into process {pid}: run as its user or as root (CAP_SYS_PTRACE)"
    return TargetDenied(message, pid=pid, errno=errno.EPERM)
