"""The task graph of a dump.

    read_windows ──▶ classify_windows ──▶ write_chunks × N
      (thread)          (event loop)        (threads)

Each arrow is a bounded anyio memory object stream, so a slow disk holds the readers back and memory use does not grow
with the target. All processes and segments of a dump go through one graph, one after the other: while the last pages of
one are being written, the next is being scanned.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

import anyio

from incdump.engine.tasks import first_cause
from incdump.engine.threads import in_thread
from incdump.errors import NoSuchTarget, TargetExited
from incdump.model.runs import page_count
from incdump.page_pipe import CHUNK_PAGES
from incdump.xfer.local import make_buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy as np
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
    from numpy.typing import NDArray

    from incdump.classify import Classified
    from incdump.model.regions import Window
    from incdump.model.stats import DumpStats
    from incdump.page_pipe import Chunk

T = TypeVar("T")

WINDOWS_AHEAD = 2
"""Windows read while one is classified."""
WINDOWS_AT_ONCE = 64
"""Windows that the reader hands over in one go while they are small: a hop from its thread costs as much as to scan a
small process."""
READING_AT_ONCE = 5e-3
"""Seconds after which it hands over what it has."""
CHUNKS_AHEAD = 256
"""Chunks classified while the writers are busy; they hold addresses, not pages."""
CHUNKS_AT_ONCE = 64
"""Chunks that a writer takes along in one go when they queue up: a hop to its thread costs half a copy."""


class PageOwner(Protocol):
    """A process or a segment whose pages are dumped.

    :ivar exited: set when it turns out to be gone; what is left to do for it is then passed over.
    """

    exited: bool

    def windows(self) -> Iterator[Window]:
        """What is populated, and what was written. Called, and drawn on, in a worker thread."""

    def classify(self, window: Window) -> Classified:
        """Decide what becomes of a window's pages."""

    def chunks(self, classified: Classified) -> Iterator[Chunk]:
        """Fix the pages' places in the image."""

    def write(self, chunk: Chunk, buffer: NDArray[np.uint8]) -> None:
        """Copy a chunk. Called in worker threads, several at once."""

    def count(self, classified: Classified, stats: DumpStats) -> None:
        """Add a window to the counters."""


class Pipeline:
    """One run of the graph over a number of owners. Its buffers are made with it: before the target is frozen.

    :ivar under_way: set when the first chunk is being copied, or all windows were read: other work in Python would have
        held that up.
    """

    def __init__(
        self,
        writers: int,
        stats: DumpStats,
        progress: Callable[[], None],
        break_off: Callable[[], None] | None = None,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        """
        :param writers: one writer gets the chunks in order.
        :param report: called, in whatever thread, after each window and each chunk.
        :param break_off: see `incdump.engine.threads.in_thread`; for writers that may block for long.
        """
        self._writers = writers
        self._stats = stats
        self._progress = progress
        self._break_off = break_off
        self._report = report
        self._busy = 0.0
        self._first_write = self._last_write = 0.0
        self._buffers = [make_buffer(CHUNK_PAGES) for _ in range(writers)]
        self.under_way = anyio.Event()
        self._reading = anyio.CapacityLimiter(1)
        self._writing = anyio.CapacityLimiter(writers)

    async def run(self, owners: Iterable[PageOwner]) -> None:
        """Dump all pages of all owners.

        :param owners: drawn on in the reader's thread: preparing an owner may block.
        :raises incdump.errors.IncdumpError: of the stage that failed first; nothing is running any more then.
        """
        windows_in, windows_out = anyio.create_memory_object_stream[tuple[PageOwner, "Window"]](WINDOWS_AHEAD)
        chunks_in, chunks_out = anyio.create_memory_object_stream[tuple[PageOwner, "Chunk"]](CHUNKS_AHEAD)
        began = time.perf_counter()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._read_windows, owners, windows_in)
                tasks.start_soon(self._classify_windows, windows_out, chunks_in)
                for buffer in self._buffers:
                    tasks.start_soon(self._write_chunks, chunks_out.clone(), buffer)
                chunks_out.close()
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        finally:
            self._stats.scan_time += int(self._busy * 1e6)
            self._stats.memdump_time += int((time.perf_counter() - began) * 1e6)
            self._stats.memwrite_time += int((self._last_write - self._first_write) * 1e6)

    async def _read_windows(
        self, owners: Iterable[PageOwner], out: MemoryObjectSendStream[tuple[PageOwner, Window]]
    ) -> None:
        with out:
            source = _all_windows(owners)
            while items := await in_thread(_draw, source, limiter=self._reading, break_off=self._break_off):
                self._report()
                for item in items:
                    await _hand_over(out, item)
            self.under_way.set()

    async def _classify_windows(
        self,
        windows: MemoryObjectReceiveStream[tuple[PageOwner, Window]],
        out: MemoryObjectSendStream[tuple[PageOwner, Chunk]],
    ) -> None:
        with windows, out:
            async for owner, window in windows:
                started = time.perf_counter()
                classified = owner.classify(window)
                owner.count(classified, self._stats)
                chunks = list(owner.chunks(classified))
                self._busy += time.perf_counter() - started
                for chunk in chunks:
                    self._stats.page_pipes += 1
                    self._stats.page_pipe_bufs += len(chunk.runs)
                    try:
                        out.send_nowait((owner, chunk))
                    except (anyio.WouldBlock, anyio.BrokenResourceError):
                        await _hand_over(out, (owner, chunk))  # a turn of the loop each: not for every one

    async def _write_chunks(
        self, chunks: MemoryObjectReceiveStream[tuple[PageOwner, Chunk]], buffer: NDArray[np.uint8]
    ) -> None:
        with chunks:
            async for item in chunks:
                self._first_write = self._first_write or time.perf_counter()
                self.under_way.set()
                items = [item, *self._queued(chunks)]
                await in_thread(self._write, items, buffer, limiter=self._writing, break_off=self._break_off)
                self._last_write = time.perf_counter()
                self._progress()

    def _write(self, items: list[tuple[PageOwner, Chunk]], buffer: NDArray[np.uint8]) -> None:
        for owner, chunk in items:
            if owner.exited:
                continue
            try:
                owner.write(chunk, buffer)
            except TargetExited:
                owner.exited = True
            self._report()

    def _queued(self, chunks: MemoryObjectReceiveStream[tuple[PageOwner, Chunk]]) -> Iterator[tuple[PageOwner, Chunk]]:
        """A fair share of the chunks that wait to be written."""
        share = chunks.statistics().current_buffer_used // self._writers
        for _ in range(min(share, CHUNKS_AT_ONCE - 1)):
            yield chunks.receive_nowait()


async def _hand_over(out: MemoryObjectSendStream[T], item: T) -> None:
    """Send to the next stage. If that is gone it has failed, or was cancelled a moment before this one: what it raised
    is to be told, not that nobody takes this item."""
    try:
        await out.send(item)
    except anyio.BrokenResourceError:
        await anyio.sleep_forever()  # until this stage is cancelled as well


def _all_windows(owners: Iterable[PageOwner]) -> Iterator[tuple[PageOwner, Window]]:
    for owner in owners:
        try:
            for window in owner.windows():
                if owner.exited:
                    break
                yield owner, window
        except (TargetExited, NoSuchTarget):
            owner.exited = True


def _draw(source: Iterator[tuple[PageOwner, Window]]) -> list[tuple[PageOwner, Window]]:
    """The next windows: one, or as many small ones as take no longer to read than it takes to hand them over."""
    items: list[tuple[PageOwner, Window]] = []
    until = time.perf_counter() + READING_AT_ONCE
    for item in islice(source, WINDOWS_AT_ONCE):
        items.append(item)
        if page_count(item[1].regions) >= CHUNK_PAGES or time.perf_counter() >= until:
            break
    return items
