"""One system call, userfaultfd(2), made by a thread of the target: how its address space gets a userfaultfd.

The steps, all in a thread of our own that ends afterwards (the kernel then lets go of whatever it still traces):

1. Before anything is stopped: choose the thread, find a system call instruction in the vDSO, open a pidfd.
2. PTRACE_SEIZE and PTRACE_INTERRUPT it. A signal on its way to it is delivered first: its handler's frame is set up, no
   instruction of it runs. A stopped (SIGSTOP) target stays stopped to everybody else.
3. Save registers and signal mask; block all signals.
4. Go to the instruction with the number and arguments in registers, up to the exit of the call (PTRACE_SYSCALL: unlike
   single-stepping it sends no SIGTRAP, which would reset a handler that the target has blocked or ignores).
5. Copy the descriptor with pidfd_getfd(2), and have the thread close its own with a second call. If another thread
   forks in between, the child has it too, until it has a call made itself: then that copy is closed as well.
6. Put everything back, detach. The kernel looks at the registers again on the way out, and restarts the system call
   that the stop interrupted, if it was in one.

A thread stopped inside a restartable sequence goes on at that sequence's abort handler, which is where the kernel
sends every thread that was taken off its processor there. A wait that the stop made fail with EINTR is
made again (`incdump.freeze.interrupted`).

On aarch64 the kernel has already rewound an interrupted call when a tracer gets to see it. At the exit of our own call
the thread is made to look as if the interrupted one had just returned there, with the result that stands for what it
is, so that the kernel decides once more, and knows of signals that came meanwhile. The first argument it takes from
where no register set reaches (orig_x0): what x0 held at the entry to our call, before a tracer had changed it or after
that (Linux 6.12.107 and 6.12.117 differ). So the last call of all is getpid(2), with x0 as it was.

Nothing here may be loaded with NumPy or anyio: the small holder process uses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from incdump._uapi import ptrace
from incdump._uapi.arch import ARCH, ERESTARTNOHAND
from incdump._uapi.kcmp import same_file
from incdump._uapi.pidfd import open_for_thread, pidfd_getfd
from incdump.errors import (
    InjectionFailed,
    NoSuchTarget,
    TargetExited,
    TargetUnsuitable,
)
from incdump.freeze.asleep import sleeps_in
from incdump.freeze.attach import interrupt, seize
from incdump.freeze.choice import Candidate, candidates, find_instruction, has_exited, is_gone
from incdump.freeze.interrupted import Call, is_instruction, look, spare_eintr, was_waiting
from incdump.freeze.stops import held_signal, in_real_time, is_event_stop, is_syscall_stop, sleep_exactly, wait_for_stop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

STOP_TIMEOUT = 1.0
"""Seconds to wait for one thread to stop, before another is tried."""
CALL_TIMEOUT = 5.0
"""Seconds to wait for an injected call, before it is given up and the registers are put back."""

_UFFD_LINK = "anon_inode:[userfaultfd]"


class _Unstoppable(Exception):
    """The thread did not stop in time, or has exited: another may do."""


class Held(NamedTuple):
    """A userfaultfd that was made before.

    :ivar pid: of the process that holds it.
    :ivar fd: its descriptor there.
    """

    pid: int
    fd: int


def inject_userfaultfd(
    pid: int, flags: int, *, held: Sequence[Held] = (), on_stopped: Callable[[], None] | None = None
) -> tuple[int, int]:
    """Have process `pid` create a userfaultfd for its address space, and take it over.

    :param flags: of userfaultfd(2): ``O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY``.
    :param held: userfaultfds of which the process closes the copies it may have (from its parent, see above).
    :param on_stopped: called when the thread stands still and nothing has been changed yet; what it raises is raised.
    :returns: the descriptor, close-on-exec, which the caller closes; and the microseconds for which one thread of the
        target was kept from running.
    :raises NoSuchTarget: there is no such process.
    :raises TargetExited: it exited meanwhile.
    :raises TargetUnsuitable: a kernel thread, a zombie, a 32-bit process, this very process.
    :raises TargetDenied: not allowed to trace it.
    :raises AlreadyTraced: somebody else traces it.
    :raises InjectionFailed: it could not be stopped, or the call failed (``errno``); its registers are its own again.
    """
    if pid == os.getpid():
        raise TargetUnsuitable(f"process {pid} is this very process: it needs no injection", pid=pid)
    work = _Work(pid, flags, held, on_stopped)
    try:
        _run_to_the_end(work)
        if work.error is not None:
            raise work.error
    except BaseException:
        if work.fd >= 0:
            os.close(work.fd)
        raise
    return work.fd, work.stopped


def _run_to_the_end(work: _Work) -> None:
    """Run it in a thread, whatever is raised here meanwhile (KeyboardInterrupt), and raise that then."""
    interrupted: BaseException | None = None
    try:
        threading.Thread(target=work.run, name=f"inject-{work.pid}", daemon=True).start()
    except RuntimeError:  # no thread can be made
        raise
    except BaseException as e:
        interrupted = e
    done = False
    while not done:
        try:
            done = work.done.wait()
        except BaseException as e:
            interrupted = e
    if interrupted is not None:
        raise interrupted


class _Work:
    """What the thread does, and what came of it."""

    def __init__(self, pid: int, flags: int, held: Sequence[Held], on_stopped: Callable[[], None] | None) -> None:
        self.pid = pid
        self.flags = flags
        self.held = held
        self.on_stopped = on_stopped
        self.fd = -1
        self.stopped = 0
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        """The body of the thread. Signals are for others; the garbage collector rests while the target waits."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        sleep_exactly()
        collects = gc.isenabled()
        gc.disable()
        try:
            with in_real_time():
                self._try_each()
        except BaseException as e:
            self.error = e
        finally:
            if collects:
                gc.enable()
            self.done.set()

    def _try_each(self) -> None:
        """Try the threads of the target, the best one first, until one has done it."""
        for candidate in candidates(self.pid):
            try:
                self._try(candidate)
                return
            except _Unstoppable:
                continue
        if has_exited(self.pid):
            raise TargetExited(f"process {self.pid} exited", pid=self.pid)
        raise InjectionFailed(
            f"no thread of process {self.pid} stopped within {STOP_TIMEOUT:g} s: is its cgroup frozen, its disk gone?",
            pid=self.pid,
        )

    def _try(self, candidate: Candidate) -> None:
        """Do it with one thread."""
        try:
            at = find_instruction(self.pid, candidate.tid)
        except (NoSuchTarget, TargetUnsuitable):
            if is_gone(self.pid, candidate.tid):
                raise _Unstoppable from None
            raise
        pidfd = _open_pidfd(self.pid, candidate.tid)
        copies = _copies(candidate.tid, self.held)
        try:
            thread = _Thread(self.pid, candidate, at)
            began = time.monotonic_ns()
            try:
                with _ptrace_errors(self.pid):
                    thread.stop()
                if self.on_stopped is not None:
                    self.on_stopped()
                with _ptrace_errors(self.pid):
                    self.fd, problem = thread.make_userfaultfd(pidfd, self.flags, copies)
            finally:
                thread.let_go()
                self.stopped = (time.monotonic_ns() - began) // 1000
        finally:
            os.close(pidfd)
        self._check(problem)

    def _check(self, problem: str) -> None:
        """Make sure of what was got, now that nobody waits for it."""
        if self.fd < 0:
            number = -self.fd
            raise InjectionFailed(
                f"{problem} in process {self.pid}: {os.strerror(number)} ({errno.errorcode.get(number, number)})"
                + (": allow userfaultfd in its seccomp profile" if number == errno.EPERM else ""),
                pid=self.pid,
                errno=number,
            )
        if os.readlink(f"/proc/self/fd/{self.fd}") != _UFFD_LINK:  # the thread has a descriptor table of its own
            raise InjectionFailed(f"the threads of process {self.pid} do not share their descriptors", pid=self.pid)


@contextlib.contextmanager
def _ptrace_errors(pid: int) -> Iterator[None]:
    """Give a type to what no request should say of a stopped thread, unless it is killed."""
    try:
        yield
    except ProcessLookupError as e:
        raise TargetExited(f"process {pid} was killed", pid=pid, errno=e.errno) from None
    except OSError as e:
        message = f"tracing process {pid} failed: {e.strerror}; it runs on as it was, try again"
        raise InjectionFailed(message, pid=pid, errno=e.errno) from e


def _open_pidfd(pid: int, tid: int) -> int:
    """A pidfd for the thread.

    :raises _Unstoppable: it is gone.
    """
    try:
        return open_for_thread(pid, tid)
    except OSError as e:
        if e.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
            raise _Unstoppable from None
        raise


def _copies(tid: int, held: Sequence[Held]) -> list[tuple[int, Held]]:
    """The descriptors of a thread that are copies of userfaultfds that are held."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{tid}/fd") if held else ():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{tid}/fd/{name}") == _UFFD_LINK:
                    found.append(int(name))
    return [(fd, other) for fd in found for other in held if same_file(tid, fd, other.pid, other.fd)]


@dataclass(slots=True)
class _Saved:
    """What is put back."""

    registers: ctypes.Array[ctypes.c_uint64]
    mask: int


class _Thread:
    """The thread of the target. Buffers are made here, before it is stopped."""

    def __init__(self, pid: int, candidate: Candidate, at: int) -> None:
        self.pid = pid
        self.tid = candidate.tid
        self.candidate = candidate
        self.at = at
        self.info = ptrace.SigInfo()
        self.own = ARCH.registers()
        self.ours = ARCH.registers()
        self.seen_in: Call | None = None
        self.sleep = sleeps_in([(pid, self.tid)]).get(self.tid)
        self.restart: int | None = None
        self.saved: _Saved | None = None
        self.is_at_exit = False
        self.is_stopped = False

    def stop(self) -> None:
        """Seize it, and stop it where no signal is being delivered.

        :raises TargetError: it is another's, or not for us.
        :raises _Unstoppable: it has exited, or does not stop.
        """
        if not seize(self.pid, self.tid):
            raise _Unstoppable
        self.seen_in = look(self.pid, self.tid)
        if not interrupt(self.tid):
            raise _Unstoppable
        self._wait(STOP_TIMEOUT)
        while not is_event_stop(self.info):
            ptrace.interrupt(self.tid)
            ptrace.cont(self.tid, held_signal(self.info))
            self._wait(STOP_TIMEOUT)

    def _wait(self, timeout: float) -> None:
        self.is_stopped = False
        if not wait_for_stop(self.tid, self.info, timeout, lambda: is_gone(self.pid, self.tid)):
            raise _Unstoppable
        self.is_stopped = True

    def make_userfaultfd(self, pidfd: int, flags: int, copies: Sequence[tuple[int, Held]]) -> tuple[int, str]:
        """Make the call, copy its result, close the original.

        :param copies: descriptors to be closed as well, if they still are copies of these.
        :returns: our descriptor; or -errno and what failed.
        :raises InjectionFailed: nothing was changed, it would not have been safe.
        :raises TargetExited: the target was killed meanwhile.
        """
        self._take_over()
        theirs = self._call(ARCH.sys_userfaultfd, flags)
        if theirs < 0:
            return theirs, "userfaultfd() failed"
        try:
            ours = pidfd_getfd(pidfd, theirs)
        except OSError as e:
            ours = -(e.errno or errno.EIO)
        try:
            self._call(ARCH.sys_close, theirs)
            for fd, other in copies:
                if same_file(self.tid, fd, other.pid, other.fd):
                    self._call(ARCH.sys_close, fd)
        except BaseException:
            if ours >= 0:
                os.close(ours)
            raise
        return ours, "pidfd_getfd() failed"

    def _take_over(self) -> None:
        """Save its state and see to it that nothing else happens to it."""
        if ptrace.getregset(self.tid, self.own) != ctypes.sizeof(self.own):
            raise TargetUnsuitable(
                f"process {self.pid} runs 32-bit code: incdump handles 64-bit ones only", pid=self.pid
            )
        self._suspend_seccomp()
        if ptrace.has_syscall_user_dispatch(self.tid):
            raise self._unsafe("has its system calls dispatched to itself (PR_SET_SYSCALL_USER_DISPATCH)")
        word = ptrace.peek(self.tid, self.at).to_bytes(8, "little")
        if not self.own[ARCH.pc] or not word.startswith(ARCH.instruction):
            raise self._unsafe("has called exec() just now, try again")
        self._leave_rseq()
        spared = spare_eintr(self.pid, self.tid, self.own, self.seen_in, self.sleep)
        if ARCH.orig < 0 and (spared is None or spared.is_again):
            self._find_restart(is_spared=spared is not None)
        saved = _Saved(self.own, ptrace.getsigmask(self.tid))
        self.saved = saved  # from here on `let_go` puts it back
        ptrace.setsigmask(self.tid, ptrace.ALL_SIGNALS)

    def _unsafe(self, why: str) -> InjectionFailed:
        return InjectionFailed(f"no system call can be run in process {self.pid}: it {why}", pid=self.pid)

    def _suspend_seccomp(self) -> None:
        """Keep the thread's seccomp filter, which may kill it, from seeing the calls."""
        try:
            ptrace.setoptions(self.tid, ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_SUSPEND_SECCOMP)
        except OSError as e:
            if self.candidate.has_seccomp:
                raise InjectionFailed(
                    f"process {self.pid} has a seccomp filter: only root (CAP_SYS_ADMIN), itself free, may suspend it",
                    pid=self.pid,
                    errno=e.errno,
                ) from None
            ptrace.setoptions(self.tid, ptrace.PTRACE_O_TRACESYSGOOD)

    def _leave_rseq(self) -> None:
        """Out of a restartable sequence to its abort handler, as the kernel does on the way back to user mode."""
        rseq = ptrace.get_rseq_configuration(self.tid)
        if rseq is None:
            return
        try:
            sequence = ptrace.peek(self.tid, rseq.rseq_abi_pointer + 8)
            if not sequence:
                return
            version_and_flags, start, length, abort = (
                ptrace.peek(self.tid, sequence + offset) for offset in (0, 8, 16, 24)
            )
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            raise self._unsafe("has a broken rseq area") from None
        if not 0 <= self.own[ARCH.pc] - start < length:
            return
        if version_and_flags:
            raise self._unsafe("is in a restartable sequence of an unknown kind")
        self.own[ARCH.pc] = abort

    def _find_restart(self, *, is_spared: bool) -> None:
        """aarch64: what the call returned that the kernel, or we, have rewound."""
        pc = self.own[ARCH.pc]
        if is_instruction(self.tid, pc):
            waited = was_waiting(self.own, self.seen_in, pc + len(ARCH.instruction))
            self.restart = ERESTARTNOHAND if is_spared else ARCH.restart_of(self.own, was_waiting=waited)

    def _call(self, number: int, *arguments: int) -> int:
        """Run one system call.

        :returns: its result, negative is -errno.
        """
        self.is_at_exit = False
        ctypes.memmove(self.ours, self.own, ctypes.sizeof(self.own))
        if ARCH.orig >= 0:
            ARCH.to_call(self.ours, self.at, number, *arguments)
        else:
            ARCH.to_call(self.ours, self.at, number)
        self._set_registers(self.ours)
        self._to_syscall_stop()
        ptrace.getregset(self.tid, self.ours)
        if self.ours[ARCH.orig if ARCH.orig >= 0 else ARCH.number] != number:
            raise self._unsafe("went elsewhere")
        if ARCH.orig < 0:
            ARCH.to_call(self.ours, self.ours[ARCH.pc], number, *arguments)
            ptrace.setregset(self.tid, self.ours)
        self._to_syscall_stop()
        self.is_at_exit = True
        ptrace.getregset(self.tid, self.ours)
        return ARCH.result_of(self.ours)

    def _to_syscall_stop(self) -> None:
        """Let it run to the entry to the call, or the exit from it; a SIGSTOP that comes meanwhile takes its effect."""
        passed_on = 0
        while True:
            ptrace.cont_to_syscall(self.tid, passed_on)
            try:
                self._wait(CALL_TIMEOUT)
            except _Unstoppable:
                self._give_up()
            if is_syscall_stop(self.info):
                return
            passed_on = held_signal(self.info)
            if passed_on not in (0, signal.SIGSTOP):
                raise self._unsafe(f"got {signal.Signals(passed_on).name} out of it")

    def _give_up(self) -> None:
        """The call takes too long, so the thread cannot run at all: take it back from where it is."""
        if not is_gone(self.pid, self.tid):
            ptrace.interrupt(self.tid)
            if wait_for_stop(self.tid, self.info, 10 * CALL_TIMEOUT, lambda: is_gone(self.pid, self.tid)):
                self.is_stopped = True
                if is_syscall_stop(self.info):
                    return
                raise self._unsafe("is stopped for good (a frozen cgroup?)")
        raise TargetExited(f"process {self.pid} was killed", pid=self.pid)

    def _set_registers(self, registers: ctypes.Array[ctypes.c_uint64]) -> None:
        ptrace.setregset(self.tid, registers)
        if ARCH.orig < 0:
            ptrace.set_syscall(self.tid, -1)

    def _put_back(self, registers: ctypes.Array[ctypes.c_uint64]) -> None:
        """Its own registers; on aarch64, after a call: as those of one with its first argument, interrupted."""
        if self.restart is not None and self.is_at_exit:
            with contextlib.suppress(InjectionFailed):
                self._call(ARCH.sys_getpid)
        if self.restart is None or not self.is_at_exit:
            self._set_registers(registers)
            return
        ctypes.memmove(self.ours, registers, ctypes.sizeof(registers))
        ARCH.set_result(self.ours, -self.restart)
        self.ours[ARCH.pc] += len(ARCH.instruction)
        ptrace.setregset(self.tid, self.ours)
        ptrace.set_syscall(self.tid, self.ours[ARCH.number])

    def let_go(self) -> None:
        """Put everything back and detach; a thread that was killed, or never stopped, is left to the end of our own."""
        if not self.is_stopped:
            return
        with contextlib.ExitStack() as steps:  # each is taken, whatever becomes of the others; the last one first
            steps.enter_context(contextlib.suppress(ProcessLookupError))
            steps.callback(ptrace.detach, self.tid, held_signal(self.info))
            if self.saved is not None:
                steps.callback(ptrace.setsigmask, self.tid, self.saved.mask)
                steps.callback(self._put_back, self.saved.registers)
