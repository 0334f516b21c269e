"""The task graph of a dump: bounded, in any order, over with the first error, and never running behind one's back."""

from __future__ import annotations

import asyncio
import itertools
import threading
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING

import anyio
import numpy as np
import pytest

from incdump.classify import Classified
from incdump.engine import pipeline as module
from incdump.engine.pipeline import CHUNKS_AHEAD, CHUNKS_AT_ONCE, WINDOWS_AHEAD, WINDOWS_AT_ONCE, PageOwner, Pipeline
from incdump.errors import ImagesIOError, NoSuchTarget, TargetExited
from incdump.model.regions import Window
from incdump.model.stats import DumpStats
from incdump.page_pipe import CHUNK_PAGES, Chunk, cut
from tests.unit.pagesets import PAGE, categories_of, entries_of, pages_of, regions_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from numpy.typing import NDArray

WAIT = 10.0


class Trace:
    """What all owners of a test did, step by step; something may happen at a step.

    :ivar running: how many calls are under way now.
    :ivar steps: what was done, in order.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.steps: list[str] = []
        self.at_step: Callable[[int, str], None] = lambda _number, _name: None

    def do(self, name: str, function: Callable[[], object] = lambda: None) -> None:
        """One step: count it as running until it is over."""
        with self.lock:
            self.running += 1
            self.steps.append(name)
            number = len(self.steps)
        try:
            self.at_step(number, name)
            function()
        finally:
            with self.lock:
                self.running -= 1


class Owner:
    """A process of one page per window, or more; it notes what is written."""

    def __init__(self, trace: Trace, windows: Iterable[range], name: str = "") -> None:
        self.exited = False
        self.name = name
        self.written: dict[int, int] = {}
        self.buffers: list[NDArray[np.uint8]] = []
        self._trace = trace
        self._windows = windows
        self._nr_pages = 0

    def windows(self) -> Iterator[Window]:
        """Each range of page numbers as a window."""
        for pages in self._windows:
            window = Window(pages.start * PAGE, pages.stop * PAGE, regions_of(dict.fromkeys(pages, 8)))
            self._trace.do(f"{self.name}window")
            yield window

    def classify(self, window: Window) -> Classified:
        """Every page is to be written."""
        pages = categories_of(window.regions)
        entries = entries_of(dict.fromkeys(pages, 4))
        self._trace.do(f"{self.name}classify")
        return Classified(entries, len(pages), 0, len(pages), 0)

    def chunks(self, classified: Classified) -> Iterator[Chunk]:
        """Cut as ever."""
        first, self._nr_pages = self._nr_pages, self._nr_pages + classified.pages
        return cut(classified.entries, first)

    def write(self, chunk: Chunk, buffer: NDArray[np.uint8]) -> None:
        """Note the place of each page."""

        def note() -> None:
            self.buffers.append(buffer)
            for nth, page in enumerate(sorted(pages_of(chunk.runs))):
                self.written[page] = chunk.first_page + nth

        self._trace.do(f"{self.name}write", note)

    def count(self, classified: Classified, stats: DumpStats) -> None:
        """Count pages."""
        stats.pages_scanned += classified.scanned


def one_page_windows(number: int) -> list[range]:
    """Windows of one page each, not touching."""
    return [range(2 * n, 2 * n + 1) for n in range(number)]


def graph(writers: int = 2, stats: DumpStats | None = None, progress: Callable[[], None] = lambda: None) -> Pipeline:
    """A pipeline."""
    return Pipeline(writers, stats or DumpStats(), progress)


async def settle() -> None:
    """Wait until no task can go on by itself: whatever would go on now that should not has had its chance."""
    for _ in range(3):
        await anyio.wait_all_tasks_blocked()
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def held_back(pipeline: Pipeline, owners: Iterable[PageOwner], gate: threading.Event) -> AsyncIterator[None]:
    """A run whose writers wait for a gate, which opens at the end."""
    async with anyio.create_task_group() as group:
        group.start_soon(pipeline.run, owners)
        try:
            yield
        finally:
            gate.set()


@pytest.mark.asyncio
@pytest.mark.parametrize("writers", [1, 2, 4])
async def test_every_page_of_every_owner_is_written_at_its_place(writers: int) -> None:
    trace, stats, ticks = Trace(), DumpStats(), []
    owners = [Owner(trace, [range(7 * n, 7 * n + size) for n in range(9)]) for size in (1, 5, 6)]
    big = Owner(trace, [range(5000), range(6000, 6001)])
    await graph(writers, stats, lambda: ticks.append(1)).run([*owners, big])
    for owner, size in zip(owners, (1, 5, 6), strict=True):
        assert owner.written == {7 * n + i: size * n + i for n in range(9) for i in range(size)}
    assert big.written == {**{n: n for n in range(5000)}, 6000: 5000}
    assert stats.pages_scanned == 9 * 12 + 5001
    assert stats.page_pipes == stats.page_pipe_bufs == trace.steps.count("write") == 27 + -(-5000 // CHUNK_PAGES) + 1
    assert 1 <= len(ticks) <= stats.page_pipes


@pytest.mark.asyncio
async def test_no_owners_and_owners_without_pages_are_no_trouble() -> None:
    await graph().run([])
    await graph().run([Owner(Trace(), [])])


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(5))
async def test_the_order_in_which_chunks_are_written_does_not_matter(seed: int) -> None:
    """Every write waits for others to overtake it."""
    random, trace = Random(seed), Trace()
    waiting: list[threading.Event] = []
    lock = threading.Lock()

    def overtake(_number: int, name: str) -> None:
        if name != "write":
            return
        mine = threading.Event()
        with lock:
            waiting.append(mine)
            if len(waiting) >= 3:
                random.shuffle(waiting)
                for event in waiting:
                    event.set()
                waiting.clear()
        mine.wait(0.005)  # the last ones have nobody to wait for

    trace.at_step = overtake
    owner = Owner(trace, one_page_windows(40))
    await graph(4).run([owner])
    assert owner.written == {2 * n: n for n in range(40)}


@pytest.mark.asyncio
@pytest.mark.parametrize("writers", [1, 3])
async def test_a_slow_writer_holds_the_reader_back(writers: int) -> None:
    trace, gate = Trace(), threading.Event()
    trace.at_step = lambda _number, name: None if name != "write" else _wait_for(gate)
    endless = (range(2 * n, 2 * n + 1) for n in itertools.takewhile(lambda _: not gate.is_set(), itertools.count()))
    async with held_back(graph(writers), [Owner(trace, endless)], gate):
        # Chunks with each writer, those ahead, one in the classifier's hands; windows ahead, some in the reader's.
        others = CHUNKS_AHEAD + 1 + WINDOWS_AHEAD
        await until(lambda: trace.steps.count("window") > writers + others)
        await settle()
        assert trace.steps.count("window") <= writers * CHUNKS_AT_ONCE + others + WINDOWS_AT_ONCE
        assert trace.steps.count("write") == writers


def _wait_for(event: threading.Event) -> None:
    assert event.wait(WAIT)


@pytest.mark.asyncio
async def test_windows_are_read_while_earlier_ones_are_written() -> None:
    trace, gate = Trace(), threading.Event()
    trace.at_step = lambda _number, name: None if name != "a write" else _wait_for(gate)
    owners = [Owner(trace, one_page_windows(1), "a "), Owner(trace, one_page_windows(2), "b ")]
    async with held_back(graph(1), owners, gate):
        await until(lambda: trace.steps.count("b classify") == trace.steps.count("b window") == 2)
        assert trace.steps.count("b write") == 0
    assert trace.steps.count("b write") == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("writers", [1, 3])
async def test_there_is_one_buffer_per_writer_however_much_is_written(
    monkeypatch: pytest.MonkeyPatch, writers: int
) -> None:
    made: list[NDArray[np.uint8]] = []

    def make_buffer(pages: int) -> NDArray[np.uint8]:
        made.append(np.empty(pages * PAGE, np.uint8))
        return made[-1]

    monkeypatch.setattr(module, "make_buffer", make_buffer)
    owners = [Owner(Trace(), [range(20_000)]), Owner(Trace(), one_page_windows(100))]
    await graph(writers).run(owners)
    assert [len(buffer) for buffer in made] == [CHUNK_PAGES * PAGE] * writers
    used = {id(buffer) for owner in owners for buffer in owner.buffers}
    assert used <= {id(buffer) for buffer in made}


@pytest.mark.asyncio
async def test_as_many_writers_work_at_once_as_were_asked_for_each_with_its_own_buffer() -> None:
    trace, together = Trace(), threading.Barrier(3)

    def meet(_number: int, name: str) -> None:
        if name == "write" and trace.steps.count("write") <= 3:
            together.wait(WAIT)

    trace.at_step = meet
    owner = Owner(trace, one_page_windows(60))
    await graph(3).run([owner])
    assert len(owner.written) == 60
    assert len({id(buffer) for buffer in owner.buffers}) == 3


@pytest.mark.asyncio
@pytest.mark.parametrize("writers", [1, 3])
@pytest.mark.parametrize("nth", [1, 2, 20, 60])
@pytest.mark.parametrize("stage", ["window", "classify", "write"])
async def test_the_first_error_ends_everything_and_is_the_one_raised(stage: str, nth: int, writers: int) -> None:
    trace, errors = Trace(), list[ImagesIOError]()

    def fail(_number: int, name: str) -> None:
        if name == stage and trace.steps.count(stage) >= nth:
            errors.append(ImagesIOError(stage))
            raise errors[-1]

    trace.at_step = fail
    with pytest.raises(ImagesIOError) as caught:
        await graph(writers).run([Owner(trace, one_page_windows(100))])
    done = len(trace.steps)
    assert caught.value is errors[0]
    assert trace.running == 0
    await settle()
    assert len(trace.steps) == done


@pytest.mark.asyncio
async def test_of_two_errors_the_first_is_raised_though_the_other_ends_later() -> None:
    trace, failed = Trace(), threading.Event()

    def fail(_number: int, name: str) -> None:
        if name == "classify" and trace.steps.count("classify") == 2:
            failed.set()
            raise ImagesIOError("first")
        if name == "write":
            _wait_for(failed)
            raise ImagesIOError("second")

    trace.at_step = fail
    with pytest.raises(ImagesIOError, match="first"):
        await graph(2).run([Owner(trace, one_page_windows(100))])
    assert trace.running == 0


@pytest.mark.asyncio
async def test_an_error_waits_for_the_threads_that_are_still_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOWS_AT_ONCE", 1)
    trace, gate, reading = Trace(), threading.Event(), threading.Event()

    def steps(_number: int, name: str) -> None:
        if name == "window" and trace.steps.count("window") == 3:
            reading.set()
            _wait_for(gate)
        if name == "write":
            _wait_for(reading)
            raise ImagesIOError("writing failed")

    trace.at_step = steps
    run = asyncio.create_task(graph(1).run([Owner(trace, one_page_windows(100))]))
    await until(lambda: "write" in trace.steps and trace.running == 1)
    await settle()
    assert not run.done()
    gate.set()
    with pytest.raises(ImagesIOError, match="writing failed"):
        await run
    assert trace.running == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("nth", [1, 5])
@pytest.mark.parametrize("error", [TargetExited("gone", pid=7), NoSuchTarget("gone", pid=7)])
async def test_an_owner_that_exits_while_it_is_read_is_passed_over(nth: int, error: Exception) -> None:
    trace = Trace()

    def leave(_number: int, name: str) -> None:
        if name == "a window" and trace.steps.count(name) == nth:
            raise error

    trace.at_step = leave
    gone, alive = Owner(trace, one_page_windows(30), "a "), Owner(trace, one_page_windows(30), "b ")
    await graph().run([gone, alive])
    assert gone.exited
    assert trace.steps.count("a window") == nth
    assert not alive.exited
    assert len(alive.written) == 30


@pytest.mark.asyncio
async def test_an_owner_that_exits_while_it_is_written_is_neither_written_nor_read_any_more() -> None:
    trace = Trace()

    def leave(_number: int, name: str) -> None:
        if name == "a write":
            raise TargetExited("gone", pid=7)

    trace.at_step = leave
    endless = (range(2 * n, 2 * n + 1) for n in itertools.count())
    gone, alive = Owner(trace, endless, "a "), Owner(trace, one_page_windows(30), "b ")
    await graph(1).run([gone, alive])
    assert gone.exited
    assert trace.steps.count("a write") == 1
    assert len(alive.written) == 30


@pytest.mark.asyncio
async def test_the_next_owner_is_not_touched_before_the_windows_of_the_last_are_read() -> None:
    trace = Trace()

    def owners() -> Iterator[Owner]:
        for name in "abc":
            trace.do(f"prepare {name}")
            yield Owner(trace, one_page_windows(3), f"{name} ")

    await graph().run(owners())
    read = [step for step in trace.steps if step.startswith("prepare") or step.endswith("window")]
    expected = [[f"prepare {name}", *[f"{name} window"] * 3] for name in "abc"]
    assert read == list(itertools.chain(*expected))


@pytest.mark.asyncio
async def test_reading_and_writing_happen_in_threads_and_classifying_in_the_event_loop() -> None:
    trace, threads = Trace(), dict[str, set[bool]]()
    loop_thread = threading.get_ident()

    def note(_number: int, name: str) -> None:
        threads.setdefault(name, set()).add(threading.get_ident() == loop_thread)

    trace.at_step = note
    await graph().run([Owner(trace, one_page_windows(20))])
    assert threads == {"window": {False}, "classify": {True}, "write": {False}}


WAYS = ("task", "twice", "every task", "scope", "timeout")


class CancelAt:
    """Cancels a run at one of its steps, and keeps that step's thread busy until the cancellation has got about."""

    TURNS = 40

    def __init__(self, how: str, step: int) -> None:
        self.how = how
        self.step = step
        self.loop = asyncio.get_running_loop()
        self.scope = anyio.CancelScope()
        self.timeout = asyncio.timeout(None)
        self.task: asyncio.Task[None] | None = None
        self._test = asyncio.current_task()
        self.reached = False
        self._got_about = threading.Event()

    def __call__(self, number: int, name: str) -> None:
        """To be called at each step."""
        if number != self.step:
            return
        self.reached = True
        if name == "classify":
            self._cancel(0)
            return
        self.loop.call_soon_threadsafe(self._cancel, 0)
        _wait_for(self._got_about)

    def _cancel(self, turn: int) -> None:
        assert self.task is not None
        if turn == 0 or (turn == 7 and self.how == "twice"):
            if self.how == "scope":
                self.scope.cancel()
            elif self.how == "timeout":
                self.timeout.reschedule(self.loop.time())
            elif self.how == "every task":  # as an event loop does that is shut down
                for task in asyncio.all_tasks() - {self._test}:
                    task.cancel()
            else:
                self.task.cancel()
        if turn < self.TURNS:
            self.loop.call_soon(self._cancel, turn + 1)
        else:
            self._got_about.set()


@pytest.mark.asyncio
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 9, 14, 20, 33, 50, 80])
@pytest.mark.parametrize("how", WAYS)
async def test_cancelled_at_any_point_it_leaves_no_thread_at_work(how: str, step: int) -> None:
    trace, left = Trace(), []
    cancel = CancelAt(how, step)
    trace.at_step = cancel

    async def run() -> None:
        with cancel.scope:
            async with cancel.timeout:
                try:
                    await graph(3).run([Owner(trace, one_page_windows(60)), Owner(trace, one_page_windows(60))])
                finally:
                    left.append(trace.running)

    cancel.task = asyncio.create_task(run())
    await asyncio.wait([cancel.task])
    done = len(trace.steps)
    assert cancel.reached
    assert left == [0]
    assert done < 360
    if how == "scope":
        assert cancel.task.exception() is None
    elif how == "timeout":
        assert isinstance(cancel.task.exception(), TimeoutError)
    else:
        assert cancel.task.cancelled()
    await settle()
    assert len(trace.steps) == done


@pytest.mark.asyncio
async def test_cancelled_before_it_began_it_does_nothing() -> None:
    trace = Trace()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await graph().run([Owner(trace, one_page_windows(60))])
    assert scope.cancelled_caught
    assert trace.steps == []


@pytest.mark.asyncio
async def test_the_times_of_a_run_that_failed_are_counted_too() -> None:
    trace, stats = Trace(), DumpStats()
    trace.at_step = lambda _number, _name: (_ for _ in ()).throw(ImagesIOError("failed"))
    with pytest.raises(ImagesIOError):
        await graph(2, stats).run([Owner(trace, one_page_windows(3))])
    assert stats.memdump_time > 0
    assert stats.memwrite_time == 0


@pytest.mark.asyncio
async def test_a_stage_whose_next_one_is_cancelled_first_tells_of_the_cancellation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It finds nobody who takes its chunks: that is no error of its own."""
    gone = asyncio.Event()

    async def leave(self: Pipeline, chunks: AsyncIterator[object], buffer: object) -> None:
        chunks.close()  # type: ignore[attr-defined]
        gone.set()
        await anyio.sleep_forever()

    monkeypatch.setattr(Pipeline, "_write_chunks", leave)
    trace = Trace()
    task = asyncio.ensure_future(graph().run([Owner(trace, one_page_windows(8))]))
    await asyncio.wait_for(gone.wait(), WAIT)
    while "classify" not in trace.steps:
        await asyncio.sleep(0.001)
    await settle()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, WAIT)
