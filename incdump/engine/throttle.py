"""Slowing a process tree down, by stopping it for a part of each tenth of a second.

It is stopped by ptrace, as for a dump (`incdump.freeze.seize`): whoever is killed, the kernel lets it go, and nothing
is left that would have to be undone. A quota of a cgroup would stay.
"""

from __future__ import annotations

import threading
import time
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
_STALLED = 2.0
"""Seconds after which the tree is let go if the event loop does not see to it (it may wait for the tree)."""


class Throttle:
    """Slows a tree down.

    :ivar problem: why it no longer works, or None.
    :ivar turn: held while the tree is stopped. Whoever has to trace it too takes it first, for as long as that takes.
    """

    def __init__(self, pid: int, *, timeout: float) -> None:
        """
        :param timeout: seconds to wait for every thread to stop.
        """
        self._pid = pid
        self._timeout = timeout
        self._step = 0
        self._next_stop = 0.0
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
        """The next step, for whatever is done `at_work` from now on."""
        self._step = min(self._step + 1, len(STEPS) - 1)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """While a block of code runs, the tree is slowed down as far as `tighten` has said; before and after, it runs.

        Of the time of all such blocks it is stopped for that part, however short they are.
        """
        if not self.part or self.problem is not None:
            yield
            return
        async with (
            Freezer(timeout=self._timeout, stall_timeout=_STALLED) as freezer,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._run, freezer)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    async def _run(self, freezer: Freezer) -> None:
        try:
            while True:
                await anyio.sleep(max(0.0, self._next_stop - time.monotonic()))
                if self.turn.acquire(blocking=False):
                    try:
                        await self._stop_for(freezer, self.part * _PERIOD)
                    finally:
                        self.turn.release()
                else:
                    await anyio.sleep((1 - self.part) * _PERIOD)
        except IncdumpError as error:  # it has exited, or somebody else traces it: the next round tells
            self.problem = error

    async def _stop_for(self, freezer: Freezer, seconds: float) -> None:
        await freezer.freeze(self._pid)
        began = time.monotonic()
        try:
            await anyio.sleep(seconds)
        finally:
            with anyio.CancelScope(shield=True):
                await freezer.thaw()
            ended = time.monotonic()
            # A block that ends early has the tree stopped for less; it then runs on for less before the next stop.
            self._next_stop = ended + (ended - began) * (1 - self.part) / self.part
