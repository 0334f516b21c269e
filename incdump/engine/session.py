"""A chain of dumps of one process tree inside one program."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from incdump.engine.dump import DumpRun
from incdump.errors import HolderError
from incdump.holder.client import OwnKeeper
from incdump.model.options import DumpOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from incdump.engine.dump import Kind
    from incdump.model.stats import DumpResult, DumpStats

_LAST = object()


class Session:
    """Dumps one process tree again and again, and keeps the tracking itself: no holder process.

    An async context manager; when it ends, tracking ends with it, and the kernel takes every write protection off.
    Each dump builds on the one before it in the session, unless told otherwise.

    :param pid: the root of the tree.
    :param options: for every dump of the session.
    :ivar rounds: the results so far.
    """

    def __init__(self, pid: int, options: DumpOptions | None = None) -> None:
        self.pid = pid
        self.options = options or DumpOptions()
        self.rounds: list[DumpResult] = []
        self._keeper = OwnKeeper()
        self._busy = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<Session of {self.pid}, {len(self.rounds)} rounds{', closed' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up tracking."""
        self._closed = True
        self._keeper.close()

    async def predump(
        self,
        images_dir: str | os.PathLike[str],
        *,
        parent: str | os.PathLike[str] | object | None = _LAST,
        progress: Callable[[str, DumpStats], None] | None = None,
    ) -> DumpResult:
        """A pre-dump, as `incdump.predump`.

        :param parent: the previous images dir, relative to `images_dir` or absolute; None for a full dump; left out,
            it is the session's last.
        """
        return await self._run("pre-dump", images_dir, parent, self.options, progress)

    async def dump(
        self,
        images_dir: str | os.PathLike[str],
        *,
        parent: str | os.PathLike[str] | object | None = _LAST,
        options: DumpOptions | None = None,
        progress: Callable[[str, DumpStats], None] | None = None,
    ) -> DumpResult:
        """A dump of the frozen tree, as `incdump.dump`; `parent` as in `predump`.

        :param options: instead of the session's, for example to leave the tree stopped.
        """
        return await self._run("dump", images_dir, parent, options or self.options, progress)

    async def _run(
        self,
        kind: Kind,
        images_dir: str | os.PathLike[str],
        parent: object,
        options: DumpOptions,
        progress: Callable[[str, DumpStats], None] | None,
    ) -> DumpResult:
        if self._closed:
            raise HolderError("the session is closed: open another", pid=self.pid)
        if self._busy:
            raise HolderError("another dump of this session is under way: await it first", pid=self.pid)
        self._busy = True
        try:
            text = self._parent_text(images_dir, parent)
            run = DumpRun(kind, self.pid, images_dir, text, options, self._keeper, progress)
            result = await run.run()
        finally:
            self._busy = False
            self._keeper.release()
        self.rounds.append(result)
        return result

    def _parent_text(self, images_dir: str | os.PathLike[str], parent: object) -> str | None:
        """The parent as the link's text: relative, so that a whole chain can be moved."""
        if parent is None:
            return None
        if parent is not _LAST:
            assert isinstance(parent, (str, os.PathLike))
            return os.fspath(parent)
        if not self.rounds:
            return None
        return os.path.relpath(self.rounds[-1].images_dir, os.path.realpath(images_dir))
