"""One end of a migration's conversation (`incdump.xfer.control`), as the event loop sees it."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from incdump.engine.tasks import done_before, first_cause
from incdump.engine.threads import in_thread
from incdump.errors import ConnectionLost, IncdumpError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from incdump.xfer.control import Control

T = TypeVar("T")

_BEATS = 8
"""In the time after which silence means that the other is gone."""
_LONGEST_BEAT = 0.5
_UNHEARD = 16
"""Messages that wait to be heard: neither end has more to say unasked."""


class Conversation:
    """Made by `conversation`."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._in, self._out = anyio.create_memory_object_stream[dict[str, Any]](_UNHEARD)
        self._lost = anyio.Event()
        self._error: IncdumpError = ConnectionLost(f"{control.other} hung up")

    async def say(self, what: str, **fields: object) -> None:
        """Say something.

        :raises incdump.errors.ConnectionLost: the other is gone, or takes nothing.
        """
        await in_thread(self._control.say, {"say": what, **fields}, break_off=self._control.hang_up)

    async def hear(self) -> dict[str, Any]:
        """Wait for something that the other says.

        :raises incdump.errors.ConnectionLost: it is gone.
        :raises incdump.errors.ProtocolError: it makes no sense.
        """
        try:
            return await self._out.receive()
        except anyio.EndOfStream:
            raise self._error from None

    async def unless_lost(self, job: Callable[[], Awaitable[T]]) -> T:
        """Do something that is in vain when the other is gone: then it is cancelled.

        :raises incdump.errors.IncdumpError: so it was.
        """
        done = await done_before(self._lost.wait, job)
        if not done:
            raise self._error
        return done[0]

    async def listen(self) -> None:
        """Take what comes, for `hear`."""
        try:
            with self._in:
                while True:
                    if not self._control.has_more():
                        with anyio.fail_after(self._control.timeout):
                            await anyio.wait_readable(self._control.connection)
                    message = await in_thread(self._control.hear, break_off=self._control.hang_up)
                    if message["say"] != "wait":
                        self._in.send_nowait(message)
        except anyio.WouldBlock:
            self._error = ProtocolError(f"{self._control.other} says more than it was asked")
        except TimeoutError:
            self._error = self._control.silence()
        except OSError:
            pass  # closed
        except IncdumpError as error:
            self._error = error
        finally:
            self._lost.set()

    def close(self) -> None:
        """Close the connection."""
        self._control.close()
        self._in.close()
        self._out.close()

    async def beat(self) -> None:
        """Say all the time that one is still there."""
        with suppress(ConnectionLost):  # who listens notices
            while True:
                await anyio.sleep(min(self._control.timeout / _BEATS, _LONGEST_BEAT))
                await self.say("wait")


@asynccontextmanager
async def conversation(control: Control) -> AsyncIterator[Conversation]:
    """Talk to the other end; the connection is closed when the context ends.

    Who is cancelled within it can still say a last word: the connection is in order until the context ends.
    """
    talk = Conversation(control)
    try:
        async with anyio.create_task_group() as tasks:
            scopes = [anyio.CancelScope(shield=True) for _ in range(2)]
            for scope, job in zip(scopes, (talk.listen, talk.beat), strict=True):
                tasks.start_soon(_within, scope, job)
            try:
                yield talk
            finally:
                for scope in scopes:
                    scope.cancel()
    except BaseExceptionGroup as group:
        raise first_cause(group) from None
    finally:
        talk.close()


async def _within(scope: anyio.CancelScope, job: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await job()
