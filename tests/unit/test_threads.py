"""However `in_thread` returns, its function has ended, or never began."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from random import Random
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from incdump.engine.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

WAIT = 10.0


class Work:
    """A blocking function that can be watched, and ends when it is told to."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> str:
        """Block until told to end."""
        self.began.set()
        try:
            assert self.go_on.wait(WAIT)
            return "done"
        finally:
            self.ended.set()

    @property
    def running(self) -> bool:
        """Whether it is blocking a thread right now."""
        return self.began.is_set() and not self.ended.is_set()


async def happened(event: threading.Event) -> None:
    """Wait for something that a thread does."""
    assert await asyncio.get_running_loop().run_in_executor(None, event.wait, WAIT)


async def turns(number: int) -> None:
    """Let the event loop go round some times: cancellations get where they have to."""
    for _ in range(number):
        await asyncio.sleep(0)


class Cancelling:
    """A call of `in_thread` in a task of its own, and one way to cancel it."""

    def __init__(self, how: str, limiter: anyio.CapacityLimiter | None = None) -> None:
        self.how = how
        self.limiter = limiter
        self.work = Work()
        self.scope = anyio.CancelScope()
        self.timeout = asyncio.timeout(None)
        self.running_on_return: bool | None = None
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with AsyncExitStack() as stack:
            if self.how == "scope":
                stack.enter_context(self.scope)
            if self.how == "timeout":
                await stack.enter_async_context(self.timeout)
            if self.how == "task group":
                group = await stack.enter_async_context(anyio.create_task_group())
                self.scope = group.cancel_scope
            try:
                await in_thread(self.work, limiter=self.limiter)
            finally:
                self.running_on_return = self.work.running

    def cancel(self) -> None:
        """Do it."""
        match self.how:
            case "scope" | "task group":
                self.scope.cancel()
            case "timeout":
                self.timeout.reschedule(asyncio.get_running_loop().time())
            case _:
                self.task.cancel()

    async def cancelled(self) -> None:
        """Wait for its end, which is a cancellation's."""
        expected: tuple[type[BaseException], ...] = ()
        if self.how == "timeout":
            expected = (TimeoutError,)
        elif self.how in ("task", "twice"):
            expected = (asyncio.CancelledError,)
        if expected:
            with pytest.raises(expected):
                await self.task
        else:
            await self.task


WAYS = ("task", "twice", "scope", "timeout", "task group")


@asynccontextmanager
async def full_limiter() -> AsyncIterator[anyio.CapacityLimiter]:
    """A limiter whose only token is taken meanwhile."""
    limiter = anyio.CapacityLimiter(1)
    await limiter.acquire_on_behalf_of("somebody")
    yield limiter
    limiter.release_on_behalf_of("somebody")


@pytest.mark.asyncio
async def test_it_returns_what_the_function_returns_and_passes_its_arguments() -> None:
    def add(a: int, b: int) -> tuple[int, int]:
        return a + b, threading.get_ident()

    total, thread = await in_thread(add, 2, 3)
    assert total == 5
    assert thread != threading.get_ident()


@pytest.mark.asyncio
async def test_it_raises_what_the_function_raises() -> None:
    def fail() -> None:
        raise LookupError("this one")

    with pytest.raises(LookupError, match="this one"):
        await in_thread(fail)


@pytest.mark.asyncio
async def test_the_event_loop_runs_on_meanwhile() -> None:
    work = Work()
    task = asyncio.create_task(in_thread(work))
    await happened(work.began)
    await turns(10)
    assert not task.done()
    work.go_on.set()
    assert await task == "done"


@pytest.mark.asyncio
@pytest.mark.parametrize("how", WAYS)
async def test_cancelled_while_it_runs_it_returns_when_the_function_has_ended(how: str) -> None:
    call = Cancelling(how)
    await happened(call.work.began)
    call.cancel()
    await turns(50)
    assert not call.task.done()
    if how == "twice":
        for _ in range(20):
            call.cancel()
            await turns(3)
        assert not call.task.done()
    call.work.go_on.set()
    await call.cancelled()
    assert call.running_on_return is False
    assert call.work.ended.is_set()


@pytest.mark.asyncio
@pytest.mark.parametrize("how", WAYS)
async def test_cancelled_before_it_gets_a_thread_the_function_never_begins(how: str) -> None:
    async with full_limiter() as limiter:
        call = Cancelling(how, limiter)
        call.work.go_on.set()
        await turns(10)
        call.cancel()
        await call.cancelled()
        assert limiter.statistics().tasks_waiting == 0
    # The token is free again, and taken by others: nothing that was called off comes after all.
    assert await in_thread(lambda: "next", limiter=limiter) == "next"
    assert not call.work.began.is_set()


@pytest.mark.asyncio
async def test_cancelled_at_once_the_function_never_begins() -> None:
    call = Cancelling("task")
    call.work.go_on.set()
    await turns(1)
    call.cancel()
    await call.cancelled()
    await in_thread(lambda: None)
    assert not call.work.began.is_set()


@pytest.mark.asyncio
async def test_a_thread_that_comes_late_to_a_cancelled_call_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has the call already, and has only not got round to it yet."""
    handed_over: list[Callable[[], object]] = []

    async def run_sync(function: Callable[[], object], **_: object) -> None:
        handed_over.append(function)
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(anyio.to_thread, "run_sync", run_sync)
    call = Cancelling("task")
    call.work.go_on.set()
    await turns(3)
    call.cancel()
    await call.cancelled()
    with suppress(RuntimeError):
        handed_over[0]()
    assert not call.work.began.is_set()


@pytest.mark.asyncio
async def test_a_function_that_fails_after_it_was_cancelled_has_ended_too() -> None:
    class Failing(Work):
        def __call__(self) -> str:
            super().__call__()
            raise OSError("too late")

    call = Cancelling("task")
    call.work.go_on.set()
    await call.task
    work = Failing()
    task = asyncio.create_task(in_thread(work))
    await happened(work.began)
    task.cancel()
    await turns(10)
    work.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended.is_set()


@pytest.mark.asyncio
async def test_a_cancelled_scope_within_a_cancelled_task_waits_as_well() -> None:
    work = Work()
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await in_thread(work)

    task = asyncio.create_task(run())
    await happened(work.began)
    for cancel in (scope.cancel, task.cancel, scope.cancel, task.cancel):
        cancel()
        await turns(20)
        assert not task.done()
    work.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.ended.is_set()


@pytest.mark.asyncio
async def test_no_more_functions_run_at_once_than_the_limiter_has_tokens() -> None:
    limiter = anyio.CapacityLimiter(2)
    works = [Work() for _ in range(6)]
    tasks = [asyncio.create_task(in_thread(work, limiter=limiter)) for work in works]
    await happened(works[0].began)
    await happened(works[1].began)
    await turns(20)
    for nth, work in enumerate(works):
        assert sum(w.running for w in works) <= 2
        await happened(work.began)
        work.go_on.set()
        assert await tasks[nth] == "done"


class Counts:
    """How often a function began and ended."""

    def __init__(self, length: float) -> None:
        self.began = self.ended = 0
        self._length = length

    def __call__(self) -> None:
        """Take some time."""
        self.began += 1
        threading.Event().wait(self._length)
        self.ended += 1


async def cancel_soon(how: str, delay: float, function: Counts, limiter: anyio.CapacityLimiter) -> None:
    """Call a function, and cancel the call in some way after some time."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    with anyio.CancelScope() as scope:
        async with asyncio.timeout(None) as timeout:
            ways: dict[str, Callable[[], object]] = {
                "task": task.cancel,
                "twice": lambda: (task.cancel(), loop.call_soon(task.cancel)),
                "scope": scope.cancel,
                "timeout": lambda: timeout.reschedule(loop.time()),
                "never": lambda: None,
            }
            timer = loop.call_later(delay, ways[how])
            try:
                await in_thread(function, limiter=limiter)
            finally:
                timer.cancel()


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(6))
async def test_under_stress_nothing_runs_after_its_call_returned(seed: int) -> None:
    """Some hundred calls, four at a time for three threads, cancelled in every way at any time."""
    random = Random(seed)
    limiter, callers = anyio.CapacityLimiter(3), anyio.CapacityLimiter(4)
    functions: list[Counts] = []
    late: list[str] = []

    async def call(how: str, delay: float, length: float) -> None:
        functions.append(function := Counts(length))
        async with callers:
            task = asyncio.create_task(cancel_soon(how, delay, function, limiter))
            await asyncio.wait([task])
        if function.began != function.ended:
            late.append(how)
        assert task.cancelled() or task.exception() is None or isinstance(task.exception(), TimeoutError)

    async with anyio.create_task_group() as group:
        for _ in range(150):
            how = random.choice(("task", "twice", "scope", "timeout", "never"))
            group.start_soon(call, how, random.random() / 300, random.random() / 500)
    counted = [(f.began, f.ended) for f in functions]
    await in_thread(lambda: None)
    assert late == []
    assert [(f.began, f.ended) for f in functions] == counted
    assert set(counted) <= {(0, 0), (1, 1)}
    assert (1, 1) in counted
