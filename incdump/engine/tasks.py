"""Task groups: what they raise, and work that is to end with something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


def first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception that made the graph fail: the first that is not a cancellation's echo."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return first_cause(error)
        return error
    return group


async def done_before(end: Callable[[], Awaitable[object]], job: Callable[[], Awaitable[T]]) -> list[T]:
    """Do something, and cancel it when something else comes to its end.

    :returns: its result, the only one in the list; empty if it was cancelled for that.
    """
    done: list[T] = []

    async def watch() -> None:
        await end()
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            done.append(await job())
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_cause(group) from None
    return done
