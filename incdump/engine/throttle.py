"""Slowing a process tree down, by stopping it for a part of each tenth of a second.

It is stopped by ptrace, as for a dump (`incdump.freeze.seize`): whoever is killed, the kernel lets it go, and nothing
is left that would have to be undone. A quota of a cgroup would stay.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from incdump.errors import IncdumpError
from incdump.freeze.seize import Freezer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
"""Parts of the time for which the tree is stopped, one after the other."""
_PERIOD = 0.1


class Throttle:
    """Slows a tree down. An async context manager: leaving it lets the tree go.

    :ivar problem: why it no longer works, or None.
    :ivar turn: held while the tree is stopped. Whoever has to trace it too takes it first, for as long as that takes.
    """

    def __init__(self, pid: int, *, timeout: float) -> None:
        """
        :param timeout: seconds to wait for every thread to stop.
        """
        self._pid = pid
        self._freezer = Freezer(timeout=timeout)
        self._step = 0
        self._changed = asyncio.Event()
        self.problem: IncdumpError | None = None
        self.turn = threading.Lock()

    @property
    def part(self) -> float:
        """The part of the time for which the tree is stopped, 0 to 1."""
        return STEPS[self._step]

    @property
    def is_at_its_end(self) -> bool:
        """Whether it cannot be slowed down any further."""
        return self._step == len(STEPS) - 1 or self.problem is not None

    def tighten(self) -> None:
        """The next step."""
        self._step = min(self._step + 1, len(STEPS) - 1)
        self._changed.set()

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """While a block of code runs, the tree is slowed down as far as `tighten` has said. After it, it is not."""
        async with self._freezer, anyio.create_task_group() as tasks:
            tasks.start_soon(self._run)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    async def _run(self) -> None:
        while not self.part:
            self._changed.clear()
            await self._changed.wait()
        try:
            while True:
                if self.turn.acquire(blocking=False):
                    try:
                        await self._stop_for(self.part * _PERIOD)
                    finally:
                        self.turn.release()
                await anyio.sleep((1 - self.part) * _PERIOD)
        except IncdumpError as error:  # it has exited, or somebody else traces it: the next round tells
            self.problem = error

    async def _stop_for(self, seconds: float) -> None:
        await self._freezer.freeze(self._pid)
        try:
            await anyio.sleep(seconds)
        finally:
            with anyio.CancelScope(shield=True):
                await self._freezer.thaw()
