"""What differs by machine architecture, in one place: `ARCH` is the running machine's.

System call numbers (asm/unistd.h), the layout of the register set NT_PRSTATUS (asm/ptrace.h: ``struct
user_regs_struct`` of x86_64, ``struct user_pt_regs`` of aarch64), the system call instruction, the size of the address
space. Registers are held in ctypes arrays of u64, `Registers`, in the order of the register set.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

    Registers: TypeAlias = "ctypes.Array[ctypes.c_uint64]"

Timeout: TypeAlias = Literal["none", "int", "pointer", "io_uring"]
"""How a waiting call takes its timeout: not at all, as an int (negative: for ever), by pointer (NULL: for ever), or as
io_uring_enter(2) does."""

ERESTARTSYS, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 514, 516
"""Kernel-internal results of an interrupted call (include/linux/errno.h): make it again unless a signal handler without
SA_RESTART, or any handler, has run; or go on with it by restart_syscall(2)."""

Direction: TypeAlias = Literal["in", "out"]
"""Which of a socket's timeouts bounds a call: SO_RCVTIMEO or SO_SNDTIMEO."""

_TIMER_ABSTIME = 1
_FUTEX_WAITS, _FUTEX_COMMAND = (0, 9), 127  # FUTEX_WAIT and FUTEX_WAIT_BITSET; what is no flag


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """One architecture.

    :ivar name: as uname(2) has it.
    :ivar core_mtype: ``core_entry.mtype`` in CRIU's images.
    :ivar elf_machine: ``e_machine`` of its ELF files.
    :ivar audit_arch: AUDIT_ARCH_* as a seccomp filter sees it.
    :ivar task_size: one past the last address that PAGEMAP_SCAN takes.
    :ivar nr_registers: u64 words in NT_PRSTATUS.
    :ivar pc: index of the program counter; `sp` of the stack pointer.
    :ivar number: index of the register that takes a system call's number.
    :ivar arguments: indexes of the registers that take its arguments.
    :ivar result: index of the register with its result.
    :ivar orig: index of orig_rax, -1 where there is no such thing: there NT_ARM_SYSTEM_CALL stands in for it.
    :ivar flags: index of the processor flags; `flags_cleared` are those that must be off for an injected call.
    :ivar instruction: bytes of the system call instruction; its address is a multiple of `alignment`.
    :ivar waits_with_eintr: numbers of waiting calls that fail with EINTR when a thread is stopped for a tracer, and the
        index and kind of their timeout (signal(7), "Interruption of system calls ... by stop signals").
    :ivar socket_waits: numbers of calls that do so on a socket with a timeout, and which of its timeouts that is; the
        socket is their first argument, and many of them are also made on what is no socket.
    :ivar timed_out: what such calls return at the end of their time, as -errno, where it is not -EAGAIN.
    :ivar epoll_waits: of these, the ones whose first argument is an epoll descriptor.
    :ivar int_waits: of `waits_with_eintr`, those whose first argument is an int, of which the kernel takes 32 bits.
    :ivar waits_well: numbers of waiting calls that the kernel goes on with after such a stop, as if nothing had been.
    :ivar waits_restarted: of these, the ones that a debugger's change of registers makes start from the beginning,
        unless it says that they are to go on.
    :ivar restarts: numbers of calls that the kernel has rewound when a tracer gets to see them, and what they returned.
    :ivar vforks: numbers of the calls that may be vfork(2) or work like it.
    """

    name: str
    core_mtype: int
    elf_machine: int
    audit_arch: int
    task_size: int

    nr_registers: int
    pc: int
    sp: int
    number: int
    arguments: tuple[int, ...]
    result: int
    orig: int
    flags: int
    flags_cleared: int
    instruction: bytes
    alignment: int

    sys_close: int
    sys_setgroups: int
    sys_getpid: int
    sys_ioctl: int
    sys_ptrace: int
    sys_futex: int
    sys_tgkill: int
    sys_clock_nanosleep: int
    sys_restart_syscall: int
    sys_process_vm_readv: int
    sys_kcmp: int
    sys_seccomp: int
    sys_bpf: int
    sys_fcntl: int
    sys_userfaultfd: int
    sys_pidfd_open: int = 434
    sys_pidfd_getfd: int = 438
    sys_process_madvise: int = 440

    waits_with_eintr: Mapping[int, tuple[int, Timeout]] = field(default_factory=dict)
    socket_waits: Mapping[int, Direction] = field(default_factory=dict)
    timed_out: Mapping[int, int] = field(default_factory=dict)
    epoll_waits: frozenset[int] = frozenset()
    int_waits: frozenset[int] = frozenset()
    waits_well: frozenset[int] = frozenset()
    waits_restarted: frozenset[int] = frozenset()
    restarts: Mapping[int, int] = field(default_factory=dict)
    vforks: frozenset[int] = frozenset()

    def registers(self) -> Registers:
        """Room for one thread's registers."""
        return (ctypes.c_uint64 * self.nr_registers)()

    def to_call(self, registers: Registers, at: int, number: int, *arguments: int) -> None:
        """Change registers so that a thread that goes on with them makes a system call, and nothing else is restarted.

        :param at: address of a system call instruction in the thread's memory.
        """
        registers[self.pc] = at
        registers[self.number] = number
        for index, value in zip(self.arguments, arguments, strict=False):
            registers[index] = value
        registers[self.flags] &= ~self.flags_cleared & 0xFFFFFFFFFFFFFFFF
        if self.orig >= 0:
            registers[self.orig] = 0xFFFFFFFFFFFFFFFF

    def result_of(self, registers: Registers) -> int:
        """A system call's result: negative is -errno."""
        return ctypes.c_int64(registers[self.result]).value

    def set_timed_out(self, registers: Registers, number: int) -> None:
        """Have a waiting call return what it does at the end of its time."""
        self.set_result(registers, self.timed_out.get(number, -errno.EAGAIN))

    def set_result(self, registers: Registers, result: int) -> None:
        """Set what a system call returns."""
        registers[self.result] = result & 0xFFFFFFFFFFFFFFFF

    def restart_of(self, registers: Registers, *, was_waiting: bool) -> int | None:
        """What a call returned that the kernel has rewound since: an ERESTART code; None: not known, or no matter.

        :param registers: pc is at the system call instruction.
        :param was_waiting: the thread was seen to wait in this very call, so it was interrupted there; else it may be
            about to make it.
        """
        number = registers[self.number]
        flags, timeout = (registers[self.arguments[i]] for i in (1, 3))
        code = self.restarts.get(number)
        if number == self.sys_clock_nanosleep and flags & _TIMER_ABSTIME:
            code = ERESTARTNOHAND
        if number == self.sys_futex:
            code = ERESTART_RESTARTBLOCK if timeout else ERESTARTSYS
            if flags & _FUTEX_COMMAND not in _FUTEX_WAITS:
                return None
        needs_proof = code == ERESTART_RESTARTBLOCK and number != self.sys_restart_syscall
        return code if was_waiting or not needs_proof else None


_X86_64 = Arch(
    name="x86_64",
    core_mtype=1,
    elf_machine=62,
    audit_arch=0xC000003E,
    task_size=0x7FFFFFFFF000,
    # r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base
    # ds es fs gs
    nr_registers=27,
    pc=16,
    sp=19,
    number=10,
    arguments=(14, 13, 12, 7, 9, 8),
    result=10,
    orig=15,
    flags=18,
    flags_cleared=0x100,  # TF: the program single-steps itself
    instruction=b"\x0f\x05",
    alignment=1,
    sys_close=3,
    sys_setgroups=116,
    sys_getpid=39,
    sys_ioctl=16,
    sys_ptrace=101,
    sys_futex=202,
    sys_tgkill=234,
    sys_clock_nanosleep=230,
    sys_restart_syscall=219,
    sys_process_vm_readv=310,
    sys_kcmp=312,
    sys_seccomp=317,
    sys_bpf=321,
    sys_fcntl=72,
    sys_userfaultfd=323,
    waits_with_eintr={
        65: (0, "none"),  # semop
        128: (2, "pointer"),  # rt_sigtimedwait
        208: (4, "pointer"),  # io_getevents
        220: (3, "pointer"),  # semtimedop
        232: (3, "int"),  # epoll_wait
        281: (3, "int"),  # epoll_pwait
        426: (4, "io_uring"),  # io_uring_enter
        441: (3, "pointer"),  # epoll_pwait2
    },
    # recvfrom recvmsg recvmmsg accept accept4 read readv; sendto sendmsg sendmmsg connect write writev sendfile
    socket_waits={
        **dict.fromkeys((45, 47, 299, 43, 288, 0, 19), "in"),
        **dict.fromkeys((44, 46, 307, 42, 1, 20, 40), "out"),
    },
    timed_out={**dict.fromkeys((208, 232, 281, 441), 0), 42: -errno.EINPROGRESS, 426: -errno.ETIME},
    epoll_waits=frozenset({232, 281, 441}),
    int_waits=frozenset({65, 220, 232, 281, 426, 441}),
    # read poll select pause nanosleep wait4 rt_sigsuspend futex clock_nanosleep waitid pselect6 ppoll
    waits_well=frozenset({0, 7, 23, 34, 35, 61, 130, 202, 230, 247, 270, 271}),
    vforks=frozenset({56, 58, 435}),  # clone vfork clone3
)

_AARCH64 = Arch(
    name="aarch64",
    core_mtype=3,
    elf_machine=183,
    audit_arch=0xC00000B7,
    task_size=1 << 48,
    # x0..x30 sp pc pstate
    nr_registers=34,
    pc=32,
    sp=31,
    number=8,
    arguments=(0, 1, 2, 3, 4, 5),
    result=0,
    orig=-1,
    flags=33,
    flags_cleared=0xC00,  # BTYPE: the svc is no landing place of an indirect branch
    instruction=b"\x01\x00\x00\xd4",
    alignment=4,
    sys_close=57,
    sys_setgroups=159,
    sys_getpid=172,
    sys_ioctl=29,
    sys_ptrace=117,
    sys_futex=98,
    sys_tgkill=131,
    sys_clock_nanosleep=115,
    sys_restart_syscall=128,
    sys_process_vm_readv=270,
    sys_kcmp=272,
    sys_seccomp=277,
    sys_bpf=280,
    sys_fcntl=25,
    sys_userfaultfd=282,
    waits_with_eintr={
        4: (4, "pointer"),  # io_getevents
        22: (3, "int"),  # epoll_pwait
        137: (2, "pointer"),  # rt_sigtimedwait
        192: (3, "pointer"),  # semtimedop
        193: (0, "none"),  # semop
        426: (4, "io_uring"),  # io_uring_enter
        441: (3, "pointer"),  # epoll_pwait2
    },
    # recvfrom recvmsg recvmmsg accept accept4 read readv; sendto sendmsg sendmmsg connect write writev sendfile
    socket_waits={
        **dict.fromkeys((207, 212, 243, 202, 242, 63, 65), "in"),
        **dict.fromkeys((206, 211, 269, 203, 64, 66, 71), "out"),
    },
    timed_out={**dict.fromkeys((4, 22, 441), 0), 203: -errno.EINPROGRESS, 426: -errno.ETIME},
    epoll_waits=frozenset({22, 441}),
    int_waits=frozenset({22, 192, 193, 426, 441}),
    # read pselect6 ppoll waitid futex nanosleep clock_nanosleep restart_syscall rt_sigsuspend wait4
    waits_well=frozenset({63, 72, 73, 95, 98, 101, 115, 128, 133, 260}),
    waits_restarted=frozenset({98, 101, 115, 128}),
    restarts={
        **dict.fromkeys((63, 64, 65, 66), ERESTARTSYS),  # read write readv writev
        **dict.fromkeys((202, 206, 207, 211, 212, 242), ERESTARTSYS),  # accept sendto recvfrom sendmsg recvmsg accept4
        **dict.fromkeys((95, 260), ERESTARTSYS),  # waitid wait4
        **dict.fromkeys((4, 22, 137, 192, 193, 426, 441), ERESTARTNOHAND),  # waits_with_eintr, when spared
        **dict.fromkeys((72, 73, 133), ERESTARTNOHAND),  # pselect6 ppoll rt_sigsuspend
        **dict.fromkeys((101, 115, 128), ERESTART_RESTARTBLOCK),  # nanosleep clock_nanosleep restart_syscall
    },
    vforks=frozenset({220, 435}),
)

ARCHS: Mapping[str, Arch] = {arch.name: arch for arch in (_X86_64, _AARCH64)}
"""All architectures that incdump knows, by name."""


def _running() -> Arch:
    """The running machine's."""
    machine = os.uname().machine
    if machine not in ARCHS or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise ImportError(f"incdump runs on {' and '.join(ARCHS)} (64-bit), not on {machine}")
    return ARCHS[machine]


ARCH = _running()
