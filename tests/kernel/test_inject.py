"""One system call in a real process, which must not notice: not by its registers, signals, waits or descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from incdump._uapi import ptrace
from incdump._uapi.arch import ARCH, ARCHS, ERESTART_RESTARTBLOCK, ERESTARTNOHAND, ERESTARTSYS
from incdump.errors import AlreadyTraced, InjectionFailed, NoSuchTarget, TargetExited, TargetUnsuitable
from incdump.freeze import inject
from incdump.freeze.choice import candidates
from incdump.freeze.inject import Held, inject_userfaultfd
from incdump.freeze.interrupted import spare_eintr
from incdump.freeze.seize import Freezer
from tests.kernel.freeze_kit import (
    EINTR,
    ENDING,
    ERRORS,
    FOR_EVER,
    HANDLER_ENDS,
    IN_A_REGISTER,
    MAY_FAIL,
    SLEEP,
    SLOWER,
    SOURCES,
    TIMED,
    Victim,
    Victims,
    as_slow_as_the_machine,
    in_time,
    queue,
    signal_before_interrupt,
    signals_one_by_one,
    sleeps_again,
    state,
    timed,
    timed_out,
    tracer_of,
)
from tests.targets import build

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kernel

START = Callable[..., Victim]
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | 1
ANYBODY = "anon_inode:[userfaultfd]"


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[START]:
    """Starts victims, which end with the test."""
    victims = Victims(tmp_path)
    yield victims
    victims.end()


def inject_once(pid: int) -> int:
    """Inject, see that what comes is a userfaultfd, close it; microseconds."""
    fd, stopped = inject_userfaultfd(pid, FLAGS)
    try:
        assert os.readlink(f"/proc/self/fd/{fd}") == ANYBODY
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    finally:
        os.close(fd)
    return stopped


def is_free(target: Victim) -> None:
    """A victim runs, nobody traces it."""
    assert {tracer_of(int(tid)) for tid in os.listdir(f"/proc/{target.pid}/task")} == {0}
    target.wait_for_beats()


def is_group_stopped(pid: int) -> bool:
    """Whether all threads of a process are stopped by a signal."""
    return {state(pid, int(tid)) for tid in os.listdir(f"/proc/{pid}/task")} == {"T"}


def test_the_descriptor_is_a_userfaultfd_of_the_target_and_none_is_left_there(victim: START) -> None:
    target = victim("signals")
    before = target.fds()
    fd, stopped = inject_userfaultfd(target.pid, FLAGS)
    assert os.readlink(f"/proc/self/fd/{fd}") == ANYBODY
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert not os.get_inheritable(fd)
    assert target.fds() == before
    api = (ctypes.c_uint64 * 3)(0xAA, 0, 0)
    fcntl.ioctl(fd, 0xC018AA3F, api)
    with open(f"/proc/{target.pid}/maps") as maps:
        start = next(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith("[stack]"))
    fcntl.ioctl(fd, 0xC020AA00, (ctypes.c_uint64 * 4)(start, 4096, 1, 0))  # UFFDIO_REGISTER, for missing pages
    os.close(fd)
    assert 0 < stopped < 10_000_000
    is_free(target)
    target.finish()


def test_a_copy_of_a_held_userfaultfd_that_came_by_fork_is_closed_and_nothing_else_is(victim: START) -> None:
    held, _ = inject_userfaultfd(victim("busy", 2).pid, FLAGS)
    other, _ = inject_userfaultfd(victim("busy", 2).pid, FLAGS)
    with build.cat(pass_fds=(held, other)) as child:
        before = set(os.listdir(f"/proc/{child.pid}/fd"))
        assert {str(held), str(other)} <= before
        fd, _ = inject_userfaultfd(child.pid, FLAGS, held=[Held(os.getpid(), held)])
        os.close(fd)
        assert set(os.listdir(f"/proc/{child.pid}/fd")) == before - {str(held)}
        assert child.poll() is None
    os.close(held)
    os.close(other)


def test_a_thousand_injections_into_a_busy_target_change_nothing_it_can_see(victim: START) -> None:
    target = victim("busy", 2)
    before = target.fds()
    for _ in range(1000):
        inject_once(target.pid)
    assert target.fds() == before
    is_free(target)
    target.finish()
    assert target.slot(EINTR) == 0 or MAY_FAIL


def test_a_thread_that_computes_keeps_every_register(victim: START, monkeypatch: pytest.MonkeyPatch) -> None:
    target = victim("busy", 3)
    chosen: set[int] = set()

    def running(pid: int) -> list[inject.Candidate]:
        found: list[int] = []
        for tid in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
            with open(f"/proc/{pid}/task/{tid}/syscall") as file:
                if file.read().strip() == "running":
                    found.append(tid)
        chosen.update(found)
        return [inject.Candidate(tid, 0) for tid in found] or list(candidates(pid))

    monkeypatch.setattr(inject, "candidates", running)
    for _ in range(1000):
        inject_once(target.pid)
    assert len(chosen) >= 2
    target.finish()


@pytest.mark.parametrize(
    "call",
    ["nanosleep", "clock_nanosleep", "poll with a timeout", "futex with a timeout", "select with a timeout"],
)
def test_a_sleep_ends_when_it_was_to_end(victim: START, call: str) -> None:
    target = victim("waits", call, SLEEP)
    target.wait_until(lambda: target.value(0) == 1 and target.state() == "S")
    times = 0
    while not target.beats:
        try:
            inject_once(target.pid)
        except (TargetExited, TargetUnsuitable, InjectionFailed, NoSuchTarget):
            break
        times += 1
        time.sleep(0.005)
    assert target.popen.wait(10) == 0
    assert times
    assert (target.value(1), target.beats) == (0, 1)
    assert target.value(3) >= SLEEP - 5  # and it has ended: begun anew at each stop it would never


ENDLESS = ["read", "poll", "ppoll", "select", "pselect", "epoll_wait", "epoll_pwait"]


@pytest.mark.parametrize("call", ENDLESS)
def test_an_endless_wait_goes_on_and_ends_with_what_it_waits_for(victim: START, call: str) -> None:
    target = victim("waits", call)
    target.wait_until(lambda: target.value(0) == 1 and target.state() == "S")
    assert target.popen.stdin is not None
    pipe = target.popen.stdin.fileno()
    for _ in range(20):
        inject_once(target.pid)
    assert target.beats == 0
    fd, _ = inject_userfaultfd(target.pid, FLAGS, on_stopped=lambda: void(os.write(pipe, b"x")))
    os.close(fd)
    assert target.popen.wait(10) == 0
    assert target.value(1) == 1


@pytest.mark.parametrize("call", ["sigwait", "sigsuspend"])
def test_a_wait_for_a_signal_ends_with_the_signal(victim: START, call: str) -> None:
    target = victim("waits", call)
    target.wait_until(lambda: target.value(0) == 1 and target.state() == "S")
    for _ in range(20):
        inject_once(target.pid)
    assert target.beats == 0
    fd, _ = inject_userfaultfd(target.pid, FLAGS, on_stopped=lambda: os.kill(target.pid, signal.SIGUSR1))
    os.close(fd)
    assert target.popen.wait(10) == 0
    assert target.value(1) == (signal.SIGUSR1 if call == "sigwait" else 0)


@pytest.mark.parametrize("call", HANDLER_ENDS)
def test_a_handler_of_a_signal_that_comes_meanwhile_ends_the_wait(victim: START, call: str) -> None:
    target = victim("waits", call, 600_000)
    target.wait_until(lambda: target.value(0) == 1 and target.state() == "S")
    for _ in range(3):
        inject_once(target.pid)
        target.wait_until(lambda: target.state() == "S")  # it waits again
    fd, _ = inject_userfaultfd(target.pid, FLAGS, on_stopped=lambda: os.kill(target.pid, signal.SIGUSR2))
    os.close(fd)
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(2), target.value(4)) == (-1, errno.EINTR, 1)


@pytest.mark.parametrize("call", TIMED)
def test_a_wait_with_an_end_goes_on_and_ends_with_what_it_waits_for(victim: START, call: str) -> None:
    target = timed(victim, call, FOR_EVER)
    for _ in range(10):
        inject_once(target.pid)
        sleeps_again(target)
        assert target.beats == 0, (target.result(), target.value(2))
    assert target.popen.stdin is not None
    target.popen.stdin.write(b"x")
    target.popen.stdin.flush()
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(2)) == (in_time(call), 0)


@pytest.mark.parametrize("call", ENDING)
def test_a_wait_with_an_end_ends_in_time_however_often_it_is_stopped(victim: START, call: str) -> None:
    target = timed(victim, call, SLEEP)
    began = time.monotonic()
    while target.beats == 0:
        with contextlib.suppress(TargetExited, TargetUnsuitable, InjectionFailed, NoSuchTarget):
            inject_once(target.pid)
        sleeps_again(target, SLEEP / 20)
        assert time.monotonic() < began + 20 * SLEEP / 1000
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(2)) in timed_out(call)
    assert SLEEP - 5 <= target.value(3) < 2 * SLEEP + 200 * SLOWER


@pytest.mark.parametrize("call", IN_A_REGISTER)
def test_a_timeout_in_a_register_that_nobody_looks_at_is_made_shorter_by_what_has_passed(
    victim: START, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    as_slow_as_the_machine(monkeypatch)
    target = timed(victim, call, 4 * SLEEP)
    for _ in range(2):
        sleeps_again(target, SLEEP)
        inject_once(target.pid)
    assert target.popen.wait(30) == 0
    assert (target.result(), target.value(2)) == (0, 0)
    assert 4 * SLEEP - 5 <= target.value(3) < 4.9 * SLEEP


def test_a_timeout_in_a_register_that_the_program_may_look_at_is_left_alone(victim: START) -> None:
    target = timed(victim, "epoll_pwait by itself", SLEEP)
    sleeps_again(target, SLEEP / 2)
    inject_once(target.pid)
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(5)) == (0, SLEEP)
    assert SLEEP - 5 <= target.value(3) < 2.5 * SLEEP


@pytest.mark.parametrize("call", TIMED)
def test_a_handler_ends_a_wait_with_an_end_even_one_that_restarts_calls(victim: START, call: str) -> None:
    target = timed(victim, call, FOR_EVER)
    for _ in range(2):
        inject_once(target.pid)
        sleeps_again(target)
    fd, _ = inject_userfaultfd(target.pid, FLAGS, on_stopped=lambda: os.kill(target.pid, signal.SIGUSR2))
    os.close(fd)
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(2), target.value(4)) == (-1, errno.EINTR, 1)


def test_each_signal_ends_one_wait_and_nothing_else_does(victim: START) -> None:
    target = victim("signalled")
    with signals_one_by_one(target):
        for _ in range(300):
            inject_once(target.pid)


def void(_: object) -> None:
    """Take a value and give nothing."""


def test_signals_that_come_meanwhile_are_delivered_exactly_once_and_as_sent(victim: START) -> None:
    target = victim("signals")
    sent = 0
    for _ in range(100):
        for _ in range(3):
            sent += 1
            queue(target.pid, sent)
        fd, _ = inject_userfaultfd(target.pid, FLAGS, on_stopped=lambda n=sent + 1: queue(target.pid, n))
        os.close(fd)
        sent += 1
    target.wait_until(lambda: target.value(1) == sent)
    target.finish()  # sees its mask, its handlers and an ignored SIGTRAP as they were, too


def test_a_signal_on_its_way_when_the_thread_is_stopped_is_delivered_first(
    victim: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = victim("signals")
    when = lambda: bool(tracer_of(target.pid)) and target.state() != "t"  # noqa: E731
    sent = signal_before_interrupt(target, monkeypatch, when)
    for i in range(1, 11):
        inject_once(target.pid)
        assert sent == [i]
        target.wait_until(lambda: target.value(1) == sent[0])
    target.finish()


def test_a_storm_of_signals_is_delivered_exactly_once(victim: START) -> None:
    target = victim("signals")
    stop = threading.Event()
    sent = [0]

    def send() -> None:
        while not stop.is_set():
            queue(target.pid, sent[0] + 1)
            sent[0] += 1
            target.wait_until(lambda: target.value(1) >= sent[0] - 50)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for _ in range(300):
            inject_once(target.pid)
    finally:
        stop.set()
        sender.join()
    target.wait_until(lambda: target.value(1) == sent[0])
    target.finish()


def test_a_stopped_target_stays_stopped(victim: START) -> None:
    target = victim("busy", 1)
    os.kill(target.pid, signal.SIGSTOP)
    target.wait_until(lambda: is_group_stopped(target.pid))
    before = target.beats
    for _ in range(20):
        inject_once(target.pid)
        target.wait_until(lambda: is_group_stopped(target.pid))
    assert target.beats == before
    os.kill(target.pid, signal.SIGCONT)
    target.wait_for_beats()
    target.finish()


def test_a_sigstop_that_comes_meanwhile_takes_its_effect(victim: START) -> None:
    target = victim("busy", 1)
    for _ in range(20):
        fd, _ = inject_userfaultfd(target.pid, FLAGS, on_stopped=lambda: os.kill(target.pid, signal.SIGSTOP))
        os.close(fd)
        target.wait_until(lambda: is_group_stopped(target.pid))
        os.kill(target.pid, signal.SIGCONT)
        target.wait_for_beats()
    target.finish()


def test_a_strict_seccomp_filter_does_not_see_the_calls(victim: START) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs CAP_SYS_ADMIN for PTRACE_O_SUSPEND_SECCOMP")
    target = victim("seccomp")
    for _ in range(50):
        inject_once(target.pid)
        target.wait_for_beats()
    target.finish()


def test_a_seccomp_filter_that_cannot_be_suspended_is_refused(victim: START, monkeypatch: pytest.MonkeyPatch) -> None:
    target = victim("seccomp")
    setoptions = ptrace.setoptions

    def unprivileged(tid: int, options: int) -> None:
        if options & ptrace.PTRACE_O_SUSPEND_SECCOMP:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        setoptions(tid, options)

    monkeypatch.setattr(ptrace, "setoptions", unprivileged)
    with pytest.raises(InjectionFailed, match="seccomp") as raised:
        inject_userfaultfd(target.pid, FLAGS)
    assert raised.value.pid == target.pid
    is_free(target)
    target.finish()
    other = victim("busy", 1)
    inject_once(other.pid)  # has no filter, so there is nothing to suspend
    other.finish()


def test_a_restartable_sequence_is_aborted_not_gone_on_with(victim: START) -> None:
    target = victim("rseq")
    for _ in range(300):
        inject_once(target.pid)
    is_free(target)
    assert target.value(0) > 0, "no injection has met a restartable sequence"
    assert target.value(1) == 0
    target.finish()


def test_syscall_user_dispatch_is_refused(victim: START) -> None:
    target = victim("dispatch")
    with pytest.raises(InjectionFailed, match="dispatch"):
        inject_userfaultfd(target.pid, FLAGS)
    is_free(target)
    target.finish()


def test_a_call_that_fails_says_why_and_leaves_the_target_as_it_was(victim: START) -> None:
    target = victim("busy", 1)
    before = target.fds()
    with pytest.raises(InjectionFailed, match="EINVAL") as raised:
        inject_userfaultfd(target.pid, 0x70000000)
    assert raised.value.errno == errno.EINVAL
    assert target.fds() == before
    is_free(target)
    target.finish()


def test_a_descriptor_that_cannot_be_copied_is_closed_in_the_target(
    victim: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = victim("busy", 1)
    before = target.fds()

    def fails(pidfd: int, fd: int) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(inject, "pidfd_getfd", fails)
    with pytest.raises(InjectionFailed, match="pidfd_getfd") as raised:
        inject_userfaultfd(target.pid, FLAGS)
    assert raised.value.errno == errno.EPERM
    assert target.fds() == before
    is_free(target)
    target.finish()


def test_an_error_at_any_step_puts_the_registers_back(victim: START, monkeypatch: pytest.MonkeyPatch) -> None:
    target = victim("busy", 3, "descriptors may appear")
    steps = ["getregset", "setoptions", "peek", "getsigmask", "setsigmask", "setregset", "cont_to_syscall"]
    for name in steps:
        for nth in range(1, 5):
            with monkeypatch.context() as patch:
                _fail_at(patch, name, nth)
                with contextlib.suppress(InjectionFailed):
                    inject_once(target.pid)
            is_free(target)
    target.finish()


def _fail_at(patch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    """Have the nth call of a ptrace request fail, unless it is to put something back."""
    real = getattr(ptrace, name)
    let_go = inject._Thread.let_go
    calls = [0]

    def request(*args: object) -> object:
        calls[0] += 1
        if calls[0] == nth:
            raise OSError(errno.EIO, "made to fail")
        return real(*args)

    def harmless(thread: inject._Thread) -> None:
        calls[0] = 1000
        let_go(thread)

    patch.setattr(ptrace, name, request)
    patch.setattr(inject._Thread, "let_go", harmless)


def test_what_the_callback_raises_is_raised_and_the_target_runs_on(victim: START) -> None:
    target = victim("busy", 1)

    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inject_userfaultfd(target.pid, FLAGS, on_stopped=fails)
    is_free(target)
    target.finish()


def test_an_interrupt_of_the_caller_waits_for_the_injection_to_end(victim: START) -> None:
    target = victim("busy", 1)
    before = sorted(os.listdir("/proc/self/fd"))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            inject_userfaultfd(target.pid, FLAGS, on_stopped=lambda: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert sorted(os.listdir("/proc/self/fd")) == before
    is_free(target)
    target.finish()


def test_a_kernel_worker_is_never_chosen(victim: START) -> None:
    target = victim("shapes", "io worker")
    assert len(os.listdir(f"/proc/{target.pid}/task")) == 2
    assert [candidate.tid for candidate in candidates(target.pid)] == [target.pid]
    inject_once(target.pid)
    is_free(target)


def test_a_thread_that_exits_when_it_has_been_chosen_is_passed_over(
    victim: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = victim("busy", 1)
    gone = subprocess.Popen(["true"])
    gone.wait()
    chosen = lambda pid: [inject.Candidate(gone.pid, 0), *candidates(pid)]  # noqa: E731
    monkeypatch.setattr(inject, "candidates", chosen)
    inject_once(target.pid)
    is_free(target)
    target.finish()
    monkeypatch.setattr(inject, "candidates", lambda pid: [inject.Candidate(pid, 0)])
    with pytest.raises(TargetExited):
        inject_userfaultfd(target.pid, FLAGS)


def test_a_process_whose_leader_has_exited_is_injected(victim: START) -> None:
    target = victim("shapes", "no leader")
    target.wait_until(lambda: target.state() == "Z")
    try:
        inject_once(target.pid)
    except InjectionFailed as e:  # a kernel without PIDFD_THREAD cannot copy from it
        assert e.errno in (errno.ESRCH, errno.EBADF)  # noqa: PT017
    is_free(target)


def test_a_target_that_is_killed_meanwhile_has_exited(victim: START) -> None:
    target = victim("busy", 1)
    with pytest.raises(TargetExited):
        inject_userfaultfd(target.pid, FLAGS, on_stopped=target.popen.kill)
    assert target.popen.wait(10) == -signal.SIGKILL


def test_what_cannot_be_injected_is_refused_with_its_reason(victim: START) -> None:
    with pytest.raises(NoSuchTarget):
        inject_userfaultfd(0x7FFFFFF0, FLAGS)
    with pytest.raises(TargetUnsuitable):
        inject_userfaultfd(os.getpid(), FLAGS)
    with pytest.raises(TargetUnsuitable):
        inject_userfaultfd(2, FLAGS)
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(TargetUnsuitable):
        inject_userfaultfd(child.pid, FLAGS)
    child.wait()


@pytest.mark.asyncio
async def test_a_traced_process_is_refused(victim: START) -> None:
    target = victim("busy", 1)
    async with Freezer() as freezer:
        await freezer.freeze(target.pid)
        with pytest.raises(AlreadyTraced) as raised:
            await asyncio.to_thread(inject_userfaultfd, target.pid, FLAGS)
        assert raised.value.pid == target.pid
    is_free(target)
    target.finish()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit programs are tested on x86_64")
def test_a_32_bit_process_is_refused(tmp_path: Path) -> None:
    try:
        compiler = build.compiler()
    except build.NoCompilerError as e:
        pytest.skip(str(e))
    binary = tmp_path / "pause32"
    source = SOURCES / "freeze_pause32.s"
    if subprocess.run([compiler, "-m32", "-nostdlib", "-static", "-o", binary, source], capture_output=True).returncode:
        pytest.skip("the compiler makes no 32-bit programs")
    try:
        child = subprocess.Popen([binary])
    except OSError:
        pytest.skip("the kernel runs no 32-bit programs")
    with child:
        with pytest.raises(TargetUnsuitable, match="32-bit"):
            inject_userfaultfd(child.pid, FLAGS)
        assert tracer_of(child.pid) == 0
        child.kill()


def test_the_injection_needs_nothing_big() -> None:
    program = (
        "import sys, incdump.freeze.inject; "
        "print([m for m in ('numpy', 'anyio', 'asyncio', 'google', 'rich', 'click') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"[]\n"


@pytest.mark.parametrize("name", ARCHS)
def test_a_call_goes_to_the_registers_that_the_architecture_says(name: str) -> None:
    arch = ARCHS[name]
    registers = arch.registers()
    registers[arch.flags] = 0xFFFF
    arch.to_call(registers, 0x7F0000001234, 77, 1, 2, 3)
    assert registers[arch.pc] == 0x7F0000001234
    assert registers[arch.number] == 77
    assert [registers[i] for i in arch.arguments] == [1, 2, 3, 0, 0, 0]
    assert not registers[arch.flags] & arch.flags_cleared
    registers[arch.result] = (1 << 64) - errno.EPERM
    assert arch.result_of(registers) == -errno.EPERM


def test_only_a_wait_that_failed_is_made_again() -> None:
    result, number = ARCH.result, ARCH.orig if ARCH.orig >= 0 else ARCH.number
    for call, failed in ((ARCH.sys_close, -errno.EINTR), (next(iter(ARCH.epoll_waits)), -errno.EBADF)):
        registers = ARCH.registers()
        registers[number] = call
        ARCH.set_result(registers, failed)
        assert spare_eintr(os.getpid(), threading.get_native_id(), registers, None) is None
        assert ctypes.c_int64(registers[result]).value == failed
    assert ARCH.name == platform.machine()
    assert ERRORS == 0


@pytest.mark.parametrize(
    ("number", "flags", "timeout", "code", "code_if_seen"),
    [
        (63, 0, 0, ERESTARTSYS, ERESTARTSYS),  # read
        (73, 0, 0, ERESTARTNOHAND, ERESTARTNOHAND),  # ppoll
        (22, 0, 0, ERESTARTNOHAND, ERESTARTNOHAND),  # epoll_pwait
        (101, 0, 0, None, ERESTART_RESTARTBLOCK),  # nanosleep
        (115, 0, 0, None, ERESTART_RESTARTBLOCK),  # clock_nanosleep
        (115, 1, 0, ERESTARTNOHAND, ERESTARTNOHAND),  # until a time
        (128, 0, 0, ERESTART_RESTARTBLOCK, ERESTART_RESTARTBLOCK),  # restart_syscall
        (98, 0x80, 0, ERESTARTSYS, ERESTARTSYS),  # futex: wait
        (98, 0x89, 0x7000, None, ERESTART_RESTARTBLOCK),  # with a timeout
        (98, 0x81, 0, None, None),  # wake
        (172, 0, 0, None, None),  # getpid
    ],
)
def test_what_a_rewound_call_returned_is_known(
    number: int, flags: int, timeout: int, code: int | None, code_if_seen: int | None
) -> None:
    arch = ARCHS["aarch64"]
    registers = arch.registers()
    registers[arch.number] = number
    registers[arch.arguments[1]] = flags
    registers[arch.arguments[3]] = timeout
    assert arch.restart_of(registers, was_waiting=False) == code
    assert arch.restart_of(registers, was_waiting=True) == code_if_seen
