"""Freezing real process trees: nothing runs while frozen, everything runs on after, whatever happens in between."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from incdump._uapi import ptrace
from incdump.errors import (
    AlreadyTraced,
    FreezeTimeout,
    NoSuchTarget,
    TargetDenied,
    TargetError,
    TargetExited,
    TargetUnsuitable,
)
from incdump.freeze import walk
from incdump.freeze.seize import Freezer
from incdump.proc.identity import read_stat
from tests.kernel.freeze_kit import (
    EINTR,
    ENDING,
    ERRORS,
    FOR_EVER,
    HANDLER_ENDS,
    IN_A_REGISTER,
    MAY_FAIL,
    QUIT,
    SLEEP,
    SLOWER,
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

pytestmark = pytest.mark.kernel

START = Callable[..., Victim]


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[START]:
    """Starts victims, which end with the test."""
    victims = Victims(tmp_path)
    yield victims
    victims.end()


def runs_nowhere(victim: Victim) -> bool:
    """Whether a victim's counter stands still, for a good while as processors see it."""
    before = victim.beats
    deadline = time.monotonic() + 0.03
    while time.monotonic() < deadline:
        if victim.beats != before:
            return False
    return True


def private_memory(pid: int) -> dict[int, bytes]:
    """All that a process may write to and shares with nobody, by address."""
    found = {}
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions = line.split()[:2]
            if permissions[1] == "w" and permissions[3] == "p":
                start, end = (int(word, 16) for word in span.split("-"))
                for address in range(start, end, 4096):
                    found[address] = os.pread(memory.fileno(), 4096, address)
    return found


def differences(before: dict[int, bytes], now: dict[int, bytes]) -> list[int]:
    """The addresses of pages that are not the same in both."""
    return sorted(address for address in before.keys() | now.keys() if before.get(address) != now.get(address))


def is_free(victim: Victim) -> None:
    """A victim runs, nobody traces it."""
    assert tracer_of(victim.pid) == 0
    victim.wait_for_beats()


@pytest.mark.asyncio
async def test_frozen_means_that_not_one_instruction_runs(victim: START) -> None:
    target = victim("busy", 2)
    async with Freezer() as freezer:
        for _ in range(20):
            target.wait_for_beats()
            frozen = await freezer.freeze(target.pid)
            assert runs_nowhere(target)
            assert [task.pid for task in frozen.tasks] == [target.pid]
            assert set(frozen.tasks[0].tids) == {int(tid) for tid in os.listdir(f"/proc/{target.pid}/task")}
            assert frozen.freezing_time > 0
            await freezer.thaw()
            assert freezer.frozen_time >= 30_000
    is_free(target)
    target.finish()
    assert target.slot(EINTR) == 0 or MAY_FAIL


@pytest.mark.asyncio
async def test_leaving_the_block_thaws(victim: START) -> None:
    target = victim("busy", 1)
    async with Freezer() as freezer:
        await freezer.freeze(target.pid)
    is_free(target)
    with pytest.raises(ZeroDivisionError):
        await _fail_while_frozen(target)
    is_free(target)
    target.finish()


async def _fail_while_frozen(target: Victim) -> None:
    async with Freezer() as freezer:
        await freezer.freeze(target.pid)
        raise ZeroDivisionError


@pytest.mark.asyncio
async def test_threads_and_processes_that_appear_meanwhile_are_frozen_too(victim: START) -> None:
    target = victim("churn", int(64 / min(SLOWER, 8)))
    async with Freezer(timeout=60) as freezer:
        for _ in range(15):
            target.wait_for_beats(100)
            frozen = await freezer.freeze(target.pid)
            assert runs_nowhere(target)
            for task in frozen.tasks:
                tids = {int(tid) for tid in os.listdir(f"/proc/{task.pid}/task")}
                assert {tid for tid in tids if state(task.pid, tid) not in ("Z", "X")} == set(task.tids)
                assert {state(task.pid, tid) for tid in task.tids} == {"t"}
            await freezer.thaw()
    target.finish()


@pytest.mark.asyncio
async def test_a_whole_tree_is_frozen_root_first_and_parents_before_children(victim: START) -> None:
    target = victim("shapes", "tree", 3)
    async with Freezer() as freezer:
        frozen = await freezer.freeze(target.pid)
        assert len(frozen.tasks) == 1 + 15
        assert frozen.pids[0] == target.pid
        assert runs_nowhere(target)
        for task in frozen.tasks[1:]:
            parent = read_stat(task.pid).ppid
            assert parent in frozen.pids[: frozen.pids.index(task.pid)]
        await freezer.thaw()
        assert all(tracer_of(pid) == 0 for pid in frozen.pids)
    is_free(target)


@pytest.mark.asyncio
async def test_children_are_found_without_children_files(victim: START, monkeypatch: pytest.MonkeyPatch) -> None:
    target = victim("shapes", "tree", 2)
    monkeypatch.setattr(walk, "children_of", lambda process: walk._children_by_scan(process.pid))
    async with Freezer() as freezer:
        frozen = await freezer.freeze(target.pid)
        assert len(frozen.tasks) == 1 + 7
        assert runs_nowhere(target)


@pytest.mark.asyncio
async def test_a_process_whose_leader_has_exited_is_frozen(victim: START) -> None:
    target = victim("shapes", "no leader")
    target.wait_until(lambda: target.state() == "Z")
    async with Freezer() as freezer:
        frozen = await freezer.freeze(target.pid)
        assert runs_nowhere(target)
        assert len(frozen.tasks[0].tids) == 2
        assert target.pid not in frozen.tasks[0].tids
        await freezer.thaw()
    is_free(target)


@pytest.mark.asyncio
async def test_a_kernel_worker_among_the_threads_is_frozen_too(victim: START) -> None:
    target = victim("shapes", "io worker")
    async with Freezer() as freezer:
        for _ in range(10):
            frozen = await freezer.freeze(target.pid)
            assert len(frozen.tasks[0].tids) == 2
            assert runs_nowhere(target)
            await freezer.thaw()
    is_free(target)


@pytest.mark.asyncio
async def test_a_zombie_child_is_passed_over(victim: START) -> None:
    target = victim("shapes", "zombie child")
    async with Freezer() as freezer:
        frozen = await freezer.freeze(target.pid)
        assert frozen.pids == (target.pid,)
    is_free(target)


@pytest.mark.asyncio
async def test_a_stopped_process_is_frozen_and_stays_stopped(victim: START) -> None:
    target = victim("busy", 2)
    os.kill(target.pid, signal.SIGSTOP)
    target.wait_until(lambda: target.state() == "T")
    async with Freezer() as freezer:
        frozen = await freezer.freeze(target.pid)
        assert frozen.tasks[0].state_before == "T"
        assert {state(target.pid, tid) for tid in frozen.tasks[0].tids} == {"t"}
        await freezer.thaw()
    target.wait_until(lambda: {state(target.pid, tid) for tid in frozen.tasks[0].tids} == {"T"})
    assert runs_nowhere(target)
    os.kill(target.pid, signal.SIGCONT)
    target.wait_for_beats()
    target.finish()


@pytest.mark.asyncio
async def test_a_sigcont_during_the_freeze_is_not_lost(victim: START) -> None:
    target = victim("busy", 1)
    os.kill(target.pid, signal.SIGSTOP)
    target.wait_until(lambda: target.state() == "T")
    async with Freezer() as freezer:
        await freezer.freeze(target.pid)
        os.kill(target.pid, signal.SIGCONT)
        assert runs_nowhere(target)
    is_free(target)


@pytest.mark.asyncio
async def test_left_stopped_no_instruction_runs_until_sigcont(victim: START) -> None:
    target = victim("shapes", "tree", 2)
    async with Freezer() as freezer:
        frozen = await freezer.freeze(target.pid)
        before = target.beats
        await freezer.thaw("stopped")
        assert {state(pid) for pid in frozen.pids} == {"T"}
    assert target.beats == before
    assert all(tracer_of(pid) == 0 for pid in frozen.pids)
    assert runs_nowhere(target)
    for pid in frozen.pids:
        os.kill(pid, signal.SIGCONT)
    target.wait_for_beats()
    target.wait_until(lambda: "T" not in {state(pid) for pid in frozen.pids})


@pytest.mark.asyncio
@pytest.mark.parametrize("threads", [1, 3])
async def test_left_stopped_memory_is_as_it_was_frozen_whatever_signals_are_pending(
    victim: START, threads: int
) -> None:
    target = victim("frames", threads, 1000)
    rounds = 20
    async with Freezer() as freezer:
        for _ in range(rounds):
            target.wait_for_beats()
            frozen = await freezer.freeze(target.pid)
            before, counts = private_memory(target.pid), [target.value(i) for i in range(3)]
            os.kill(target.pid, signal.SIGUSR1)
            time.sleep(0.002)  # a tick of its timer
            await freezer.thaw("stopped")
            assert {state(pid) for pid in frozen.pids} == {"T"}
            assert len(frozen.pids) == 3
            await freezer.freeze(target.pid)  # as `check --against` does
            assert differences(before, private_memory(target.pid)) == []
            await freezer.thaw()
            target.wait_until(lambda: state(target.pid) == "T")
            assert differences(before, private_memory(target.pid)) == []
            for pid in reversed(frozen.pids):
                os.kill(pid, signal.SIGCONT)
            target.wait_until(lambda c=counts: all(target.value(i) > c[i] for i in range(3)))
    assert target.value(0) == rounds
    target.finish()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["held up by the stop", "pending for the thread"])
async def test_left_stopped_memory_is_as_it_was_frozen_when_a_signal_meets_the_stop(
    victim: START, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    target = victim("frames", 1, 0)
    interrupt, sent, rounds = ptrace.interrupt, [0], [0]

    def signal_too(tid: int) -> None:
        is_first = tid == target.pid and sent[0] < rounds[0]
        sent[0] += is_first
        if is_first and kind == "held up by the stop":
            ptrace.tgkill(target.pid, tid, signal.SIGUSR1)
            target.wait_until(lambda: target.state() == "t")
        interrupt(tid)
        if is_first and kind == "pending for the thread":
            target.wait_until(lambda: target.state() == "t")
            ptrace.tgkill(target.pid, tid, signal.SIGUSR1)

    monkeypatch.setattr(ptrace, "interrupt", signal_too)
    async with Freezer() as freezer:
        for _ in range(10):
            target.wait_for_beats()
            rounds[0] += 1
            frozen = await freezer.freeze(target.pid)
            before, counted = private_memory(target.pid), target.value(0)
            assert counted == sent[0] - 1, "its frame is written, its handler has not run"
            await freezer.thaw("stopped")
            assert differences(before, private_memory(target.pid)) == []
            assert target.value(0) == counted
            for pid in frozen.pids:
                os.kill(pid, signal.SIGCONT)
            target.wait_until(lambda: target.value(0) == sent[0])
    target.finish()


@pytest.mark.asyncio
async def test_a_signal_for_one_thread_of_several_does_not_come_before_the_stop(victim: START) -> None:
    target = victim("frames", 3, 0)
    async with Freezer() as freezer:
        for turn in range(6):
            target.wait_for_beats()
            frozen = await freezer.freeze(target.pid)
            before = private_memory(target.pid)
            ptrace.tgkill(target.pid, frozen.tasks[0].tids[turn % 3], signal.SIGUSR1)
            await freezer.thaw("stopped")
            assert differences(before, private_memory(target.pid)) == []
            for pid in frozen.pids:
                os.kill(pid, signal.SIGCONT)
            target.wait_until(lambda turn=turn: target.value(0) == turn + 1)
    target.finish()


@pytest.mark.asyncio
async def test_killed_the_tree_is_gone(victim: START) -> None:
    target = victim("shapes", "tree", 2)
    async with Freezer() as freezer:
        frozen = await freezer.freeze(target.pid)
        before = target.beats
        await freezer.thaw("killed")
        assert {state(pid) for pid in frozen.pids} <= {"Z", ""}
    assert target.beats == before
    assert target.popen.wait(10) == -signal.SIGKILL, "the exit status of one's own child is one's own"


@pytest.mark.asyncio
async def test_a_frozen_child_of_our_own_is_not_taken_for_dead(victim: START) -> None:
    target = victim("busy", 2)
    async with Freezer() as freezer:
        await freezer.freeze(target.pid)
        assert target.popen.poll() is None
        await freezer.thaw()
    assert target.popen.poll() is None
    target.finish()


@pytest.mark.asyncio
async def test_signals_are_delivered_exactly_once(victim: START) -> None:
    target = victim("signals")
    sent = 0
    async with Freezer() as freezer:
        for _ in range(60):
            for _ in range(10):  # before, and while threads are being stopped
                sent += 1
                queue(target.pid, sent)
            await freezer.freeze(target.pid)
            counted = target.value(1)
            for _ in range(5):
                sent += 1
                queue(target.pid, sent)
            assert target.value(1) == counted
            await freezer.thaw()
    target.wait_until(lambda: target.value(1) == sent)
    assert target.value(2) == sent * (sent + 1) // 2
    target.finish()


@pytest.mark.asyncio
async def test_a_signal_on_its_way_when_a_thread_is_stopped_is_passed_on(
    victim: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = victim("signals")
    sent = signal_before_interrupt(target, monkeypatch, lambda: target.state() != "t")
    async with Freezer() as freezer:
        for _ in range(10):
            await freezer.freeze(target.pid)
            assert target.value(1) == sent[0] - 1
            await freezer.thaw()
            target.wait_until(lambda: target.value(1) == sent[0])
    target.finish()


@pytest.mark.asyncio
async def test_signals_that_meet_the_seizing_are_delivered_exactly_once(victim: START) -> None:
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
        async with Freezer() as freezer:
            for _ in range(300):
                await freezer.freeze(target.pid)
                await freezer.thaw()
    finally:
        stop.set()
        sender.join()
    target.wait_until(lambda: target.value(1) == sent[0])
    target.finish()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["anyio", "asyncio"])
async def test_cancelled_anywhere_nothing_stays_frozen(victim: START, kind: str) -> None:
    target = victim("churn", 16)
    chance = random.Random(5)

    async def work() -> None:
        async with Freezer() as freezer:
            for _ in range(100):
                await freezer.freeze(target.pid)
                await asyncio.sleep(0.0005)
                await freezer.thaw()

    for _ in range(40):
        delay = chance.random() * 0.02
        if kind == "anyio":
            with anyio.move_on_after(delay):
                await work()
        else:
            task = asyncio.create_task(work())
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert tracer_of(target.pid) == 0
        target.wait_for_beats()
    target.finish()


@pytest.mark.asyncio
async def test_a_cancelled_freeze_is_undone_within_the_block(victim: START) -> None:
    target = victim("shapes", "threads", 300)
    async with Freezer() as freezer:
        cancelled = 0
        for delay in (0, 0.0002, 0.0005, 0.001, 0.002, 0.004, 0.008):
            with anyio.move_on_after(delay) as scope:
                await freezer.freeze(target.pid)
            cancelled += scope.cancelled_caught
            if not scope.cancelled_caught:
                await freezer.thaw()
            await freezer._tracer.run(lambda: None)  # after what was begun, and its undoing
            is_free(target)
            await freezer.freeze(target.pid)
            await freezer.thaw()
    assert cancelled


@pytest.mark.asyncio
async def test_the_event_loop_goes_on_while_a_tree_is_being_frozen(victim: START) -> None:
    target = victim("shapes", "vfork")  # cannot be frozen at once
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(tick())
    async with Freezer() as freezer:
        await freezer.freeze(target.pid)
    task.cancel()
    assert ticks > 1


@pytest.mark.asyncio
async def test_a_vfork_parent_counts_as_frozen_when_its_child_is(victim: START) -> None:
    target = victim("shapes", "vfork")
    target.wait_for_beats()
    async with Freezer(timeout=5) as freezer:
        frozen = await freezer.freeze(target.pid)
        assert len(frozen.tasks) == 2
        assert runs_nowhere(target)
        await freezer.thaw()
        target.wait_for_beats()
        assert all(tracer_of(pid) == 0 for pid in frozen.pids)
        await freezer.freeze(target.pid)
        await freezer.thaw("stopped")
        assert runs_nowhere(target)
        for pid in frozen.pids:
            os.kill(pid, signal.SIGCONT)
        target.wait_for_beats()
        target.set(QUIT, 1)
        target.wait_until(lambda: target.value(1) == 1)
        await freezer.freeze(target.pid)
        await freezer.thaw("killed")
    assert target.popen.wait(10) == -signal.SIGKILL


@pytest.mark.asyncio
async def test_a_program_that_spawns_others_all_the_time_is_frozen(victim: START) -> None:
    target = victim("shapes", "spawner")
    async with Freezer() as freezer:
        for _ in range(100):
            await freezer.freeze(target.pid)
            assert all(state(pid) in ("t", "D") for pid in [target.pid])
            await freezer.thaw()
    target.finish()


@pytest.mark.asyncio
async def test_an_exec_by_any_thread_meanwhile_is_survived(victim: START) -> None:
    target = victim("shapes", "exec", 20)
    async with Freezer(timeout=20) as freezer:
        for _ in range(100):
            frozen = await freezer.freeze(target.pid)
            assert {state(target.pid, tid) for tid in frozen.tasks[0].tids} == {"t"}
            before = target.beats
            assert target.beats == before
            await freezer.thaw()
    is_free(target)
    assert target.slot(ERRORS) == 0


@pytest.mark.asyncio
async def test_a_target_that_exits_meanwhile_is_reported_as_such(victim: START) -> None:
    for i in range(40):
        target = victim("churn", 2)
        timer = threading.Timer(0.0002 * i, os.kill, (target.pid, signal.SIGKILL))
        timer.start()
        async with Freezer() as freezer:
            try:
                for _ in range(1000):
                    await freezer.freeze(target.pid)
                    await freezer.thaw()
                raise AssertionError("it was to exit")
            except (TargetExited, TargetUnsuitable):
                pass
        timer.join()
        assert target.popen.wait(10) == -signal.SIGKILL


@pytest.mark.asyncio
async def test_a_target_killed_while_frozen_can_be_thawed(victim: START) -> None:
    target = victim("busy", 2)
    async with Freezer() as freezer:
        await freezer.freeze(target.pid)
        target.popen.kill()
        await freezer.thaw()
    assert target.popen.wait(10) == -signal.SIGKILL


@contextmanager
def zombie() -> Iterator[int]:
    """A child that has exited, not reaped yet."""
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    yield child.pid
    child.wait()


@pytest.mark.asyncio
async def test_what_cannot_be_frozen_is_refused_with_its_reason(victim: START) -> None:
    async with Freezer() as freezer:
        with pytest.raises(NoSuchTarget):
            await freezer.freeze(0x7FFFFFF0)
        with pytest.raises(TargetUnsuitable, match="incdump itself"):
            await freezer.freeze(os.getpid())
        with pytest.raises((TargetUnsuitable, TargetDenied), match=r"incdump itself|trace process 1:"):
            await freezer.freeze(os.getppid())
        with pytest.raises((TargetUnsuitable, TargetDenied)):
            await freezer.freeze(2)
        with zombie() as child, pytest.raises(TargetUnsuitable, match="zombie"):
            await freezer.freeze(child)
        assert tracer_of(os.getppid()) == 0


@pytest.mark.asyncio
async def test_a_traced_process_anywhere_in_the_tree_is_refused_and_nothing_stays_frozen(victim: START) -> None:
    target = victim("shapes", "tree", 2)
    async with Freezer() as freezer:
        pids = (await freezer.freeze(target.pid)).pids
        await freezer.thaw()
        async with Freezer() as other:
            await other.freeze(pids[-1])
            with pytest.raises(AlreadyTraced) as raised:
                await freezer.freeze(target.pid)
            assert raised.value.pid == pids[-1]
            assert {tracer_of(pid) for pid in pids[:-1]} == {0}
            with pytest.raises(AlreadyTraced):
                await freezer.freeze(pids[-1])
        await freezer.freeze(target.pid)
    is_free(target)


@pytest.mark.asyncio
async def test_a_thread_that_does_not_stop_is_a_timeout_and_all_is_thawed(
    victim: START, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = victim("shapes", "vfork")
    target.wait_for_beats()
    monkeypatch.setattr(walk.TreeWalk, "_in_vfork", lambda self, thread: False)
    async with Freezer(timeout=0.1) as freezer:
        with pytest.raises(FreezeTimeout, match="uninterruptible") as raised:
            await freezer.freeze(target.pid)
        assert raised.value.pid == target.pid
        is_free(target)


FREEZE_FOR_EVER = """
import asyncio, os, random, signal, sys, time
from incdump.freeze.seize import Freezer
chance = random.Random(11)
async def freeze_for_ever():
    async with Freezer() as freezer:
        while True:
            await freezer.freeze(int(sys.argv[1]))
            await asyncio.sleep(0.0002)
            await freezer.thaw()
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        asyncio.run(freeze_for_ever())
    time.sleep(0.001 + 0.008 * chance.random())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("killed", flush=True)
"""


def test_killed_at_any_moment_the_freezer_leaves_a_running_target(victim: START) -> None:
    target = victim("busy", 2)
    freezer = subprocess.Popen(
        [sys.executable, "-c", FREEZE_FOR_EVER, str(target.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with freezer:
        assert freezer.stdin is not None
        assert freezer.stdout is not None
        for _ in range(50):
            freezer.stdin.write(b"\n")
            freezer.stdin.flush()
            assert freezer.stdout.readline() == b"killed\n"
            is_free(target)
    target.finish()


FREEZE_WITH_A_SIGNAL = """
import asyncio, os, signal, sys
from pathlib import Path
from incdump._uapi import ptrace
from incdump.freeze.seize import Freezer
pid, interrupt = int(sys.argv[1]), ptrace.interrupt
def signal_first(tid):
    os.kill(pid, signal.SIGUSR1)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "t":  # in signal-delivery-stop
        pass
    interrupt(tid)
ptrace.interrupt = signal_first
async def freeze():
    async with Freezer() as freezer:
        await freezer.freeze(pid)
        print("frozen", flush=True)
        await asyncio.sleep(60)
asyncio.run(freeze())
"""
COUNT_SIGNALS = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
print("ready", flush=True)
while True:
    time.sleep(60)
"""


def test_killed_while_it_holds_a_signal_the_freezer_does_not_take_it_along() -> None:
    with subprocess.Popen([sys.executable, "-c", COUNT_SIGNALS], stdout=subprocess.PIPE) as target:
        assert target.stdout is not None
        assert target.stdout.readline() == b"ready\n"
        freezer = subprocess.Popen(
            [sys.executable, "-c", FREEZE_WITH_A_SIGNAL, str(target.pid)], stdout=subprocess.PIPE
        )
        with freezer:
            assert freezer.stdout is not None
            assert freezer.stdout.readline() == b"frozen\n"
            assert state(target.pid) == "t"
            freezer.kill()
        try:
            assert select.select([target.stdout], [], [], 10)[0], "the signal is lost"
            assert target.stdout.readline() == b"handled\n"
        finally:
            target.kill()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "call",
    ["nanosleep", "clock_nanosleep", "poll with a timeout", "futex with a timeout", "select with a timeout"],
)
async def test_a_sleep_ends_when_it_was_to_end(victim: START, call: str) -> None:
    target = victim("waits", call, SLEEP)
    async with Freezer() as freezer:
        while target.beats == 0:
            try:
                await freezer.freeze(target.pid)
                await freezer.thaw()
            except TargetError:
                break
            await asyncio.sleep(0.005)
    assert target.popen.wait(10) == 0
    assert (target.value(1), target.beats) == (0, 1)
    assert target.value(3) >= SLEEP - 5  # and it has ended: begun anew at each stop it would never


ENDLESS = ["read", "poll", "ppoll", "select", "pselect", "epoll_wait", "epoll_pwait"]


@pytest.mark.asyncio
@pytest.mark.parametrize("call", [*ENDLESS, "futex", "sigwait", "sigsuspend"])
async def test_an_endless_wait_goes_on_and_ends_with_what_it_waits_for(victim: START, call: str) -> None:
    target = victim("waits", call)
    target.wait_until(lambda: target.value(0) == 1 and target.state() == "S")
    async with Freezer() as freezer:
        for i in range(20):
            await freezer.freeze(target.pid)
            if i == 19:
                _end_wait(target, call)
            await freezer.thaw()
            assert target.beats == 0 or i == 19
        assert target.popen.wait(10) == 0
    if call == "futex" and target.value(1):
        assert target.value(2) == errno.EAGAIN, "it went to sleep again, and saw that the word has changed"
    else:
        assert target.value(1) == {"sigwait": signal.SIGUSR1, "futex": 0, "sigsuspend": 0}.get(call, 1)


@pytest.mark.asyncio
@pytest.mark.parametrize("call", HANDLER_ENDS)
async def test_a_handler_of_a_signal_that_comes_meanwhile_ends_the_wait(victim: START, call: str) -> None:
    target = victim("waits", call, 600_000)
    target.wait_until(lambda: target.value(0) == 1 and target.state() == "S")
    async with Freezer() as freezer:
        for i in range(3):
            await freezer.freeze(target.pid)
            if i == 2:
                os.kill(target.pid, signal.SIGUSR2)
            await freezer.thaw()
            target.wait_until(lambda: target.state() in "SZ")  # it waits again
        assert target.popen.wait(10) == 0
    assert (target.result(), target.value(2), target.value(4)) == (-1, errno.EINTR, 1)


@pytest.mark.asyncio
async def test_each_signal_ends_one_wait_and_nothing_else_does(victim: START) -> None:
    target = victim("signalled")
    with signals_one_by_one(target):
        async with Freezer() as freezer:
            for _ in range(300):
                await freezer.freeze(target.pid)
                await freezer.thaw()


@pytest.mark.asyncio
@pytest.mark.parametrize("call", TIMED)
async def test_a_wait_with_an_end_goes_on_and_ends_with_what_it_waits_for(victim: START, call: str) -> None:
    target = timed(victim, call, FOR_EVER)
    async with Freezer() as freezer:
        for _ in range(10):
            await freezer.freeze(target.pid)
            await freezer.thaw()
            sleeps_again(target)
            assert target.beats == 0, (target.result(), target.value(2))
    assert target.popen.stdin is not None
    target.popen.stdin.write(b"x")
    target.popen.stdin.flush()
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(2)) == (in_time(call), 0)


FREEZE_AND_HOLD = """
import asyncio, sys
from incdump.freeze.seize import Freezer
async def freeze():
    async with Freezer() as freezer:
        await freezer.freeze(int(sys.argv[1]))
        print("frozen", flush=True)
        await asyncio.sleep(60)
asyncio.run(freeze())
"""


@pytest.mark.skipif(MAY_FAIL, reason="there it may fail with EINTR")
@pytest.mark.parametrize("call", ["recv", "connect", *IN_A_REGISTER, "sigtimedwait"])
def test_killed_while_it_holds_the_tree_the_freezer_leaves_waits_that_go_on(victim: START, call: str) -> None:
    target = timed(victim, call, FOR_EVER)
    for _ in range(2):
        command = [sys.executable, "-c", FREEZE_AND_HOLD, str(target.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as freezer:
            assert freezer.stdout is not None
            assert freezer.stdout.readline() == b"frozen\n"
            freezer.kill()
        sleeps_again(target)
    assert target.popen.stdin is not None
    target.popen.stdin.write(b"x")
    target.popen.stdin.flush()
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(2)) == (in_time(call), 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("call", ENDING)
async def test_a_wait_with_an_end_ends_in_time_however_often_it_is_stopped(victim: START, call: str) -> None:
    target = timed(victim, call, SLEEP)
    began = time.monotonic()
    async with Freezer() as freezer:
        while target.beats == 0:
            with contextlib.suppress(TargetError):
                await freezer.freeze(target.pid)
                await freezer.thaw()
            sleeps_again(target, SLEEP / 20)
            assert time.monotonic() < began + 20 * SLEEP / 1000
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(2)) in timed_out(call)
    assert SLEEP - 5 <= target.value(3) < 2 * SLEEP + 200 * SLOWER


@pytest.mark.asyncio
@pytest.mark.parametrize("call", IN_A_REGISTER)
async def test_a_timeout_in_a_register_that_nobody_looks_at_is_made_shorter_by_what_has_passed(
    victim: START, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    as_slow_as_the_machine(monkeypatch)
    target = timed(victim, call, 4 * SLEEP)
    async with Freezer() as freezer:
        for _ in range(2):
            sleeps_again(target, SLEEP / 2)
            await freezer.freeze(target.pid)
            time.sleep(SLEEP / 2000)  # which passes for the wait as well
            await freezer.thaw()
    assert target.popen.wait(30) == 0
    assert (target.result(), target.value(2)) == (0, 0)
    assert 4 * SLEEP - 5 <= target.value(3) < 4.9 * SLEEP


@pytest.mark.asyncio
async def test_a_timeout_in_a_register_that_the_program_may_look_at_is_left_alone(victim: START) -> None:
    target = timed(victim, "epoll_pwait by itself", SLEEP)
    sleeps_again(target, SLEEP / 2)
    async with Freezer() as freezer:
        await freezer.freeze(target.pid)
        await freezer.thaw()
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(5)) == (0, SLEEP)
    assert SLEEP - 5 <= target.value(3) < 2.5 * SLEEP


@pytest.mark.asyncio
@pytest.mark.parametrize("call", TIMED)
async def test_a_handler_ends_a_wait_with_an_end_even_one_that_restarts_calls(victim: START, call: str) -> None:
    target = timed(victim, call, FOR_EVER)
    async with Freezer() as freezer:
        for i in range(3):
            await freezer.freeze(target.pid)
            if i == 2:
                os.kill(target.pid, signal.SIGUSR2)
            await freezer.thaw()
            sleeps_again(target)
    assert target.popen.wait(10) == 0
    assert (target.result(), target.value(2), target.value(4)) == (-1, errno.EINTR, 1)


def _end_wait(target: Victim, call: str) -> None:
    """Let happen, while the target is frozen, what it waits for."""
    assert target.popen.stdin is not None
    if call in ENDLESS:
        os.write(target.popen.stdin.fileno(), b"x")
    elif call == "futex":
        # the word lies in memory that we share: FUTEX_WAKE
        target.set(14, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.addressof(ctypes.c_char.from_buffer(target._board)) + 14 * 8
        number = 202 if os.uname().machine == "x86_64" else 98
        libc.syscall(number, ctypes.c_void_p(address), 1, 1, None, None, 0)
        target.set(14, 1)
    else:
        os.kill(target.pid, signal.SIGUSR1)
