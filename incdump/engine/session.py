"""A chain of dumps of one process tree inside one program."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Self

from incdump.engine.dump import DumpRun
from incdump.engine.precopy import Loop, refuse_page_server
from incdump.errors import HolderError
from incdump.holder.client import OwnKeeper
from incdump.images.proved import ProvedChain
from incdump.model.arguments import check_arguments
from incdump.model.options import DumpOptions
from incdump.model.precopy import PrecopyPolicy, should_stop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType

    from incdump.engine.dump import Kind
    from incdump.engine.precopy import PrecopyResult
    from incdump.model.options import WayName
    from incdump.model.precopy import Decision, Freeze, PrecopyRound, Rule
    from incdump.model.stats import DumpResult, DumpStats


class Session:
    """Dumps one process tree again and again, and keeps the tracking itself: no holder process.

    An async context manager; when it ends, tracking ends with it, and the kernel takes every write protection off.
    Each dump builds on the one before it in the session, unless told otherwise.

    :param pid: the root of the tree.
    :param options: for every dump of the session.
    :raises incdump.InvalidOption: `pid` or `options` is of another type.
    :ivar rounds: the results so far.
    """

    def __init__(self, pid: int, options: DumpOptions | None = None) -> None:
        check_arguments(pid=pid, options=options)
        self.pid = pid
        self.options = options or DumpOptions()
        self.rounds: list[DumpResult] = []
        self._keeper = OwnKeeper()
        self._proved = ProvedChain()
        self._busy = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<Session of {self.pid}, {len(self.rounds)} rounds{', closed' if self._closed else ''}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up tracking."""
        self._closed = True
        self._keeper.close()

    async def predump(
        self,
        images_dir: str | os.PathLike[str],
        *,
        parent: str | os.PathLike[str] | EllipsisType | None = ...,
        progress: Callable[[str, DumpStats], None] | None = None,
    ) -> DumpResult:
        """A pre-dump, as `incdump.predump`.

        :param parent: the previous images dir, relative to `images_dir` or absolute; None for a full dump; left out,
            it is the session's last.
        """

        check_arguments(progress=progress)
        make = partial(self._dump, "pre-dump", images_dir, self.options, progress)
        return await self._run(images_dir, parent, make)

    async def dump(
        self,
        images_dir: str | os.PathLike[str],
        *,
        parent: str | os.PathLike[str] | EllipsisType | None = ...,
        options: DumpOptions | None = None,
        progress: Callable[[str, DumpStats], None] | None = None,
    ) -> DumpResult:
        """A dump of the frozen tree, as `incdump.dump`; `parent` as in `predump`.

        :param options: instead of the session's, for example to leave the tree stopped.
        """

        check_arguments(options=options, progress=progress)
        make = partial(self._dump, "dump", images_dir, options or self.options, progress)
        return await self._run(images_dir, parent, make)

    async def checkpoint(
        self,
        images_dir: str | os.PathLike[str],
        *,
        parent: str | os.PathLike[str] | EllipsisType | None = ...,
        options: DumpOptions | None = None,
        criu: str | None = None,
        criu_options: Sequence[str] = (),
        way: WayName = "auto",
        progress: Callable[[str, DumpStats], None] | None = None,
    ) -> DumpResult:
        """A complete checkpoint, as `incdump.checkpoint`; `parent` as in `predump`.

        :param options: instead of the session's. ``options.afterwards`` says what becomes of the tree: by the session's
            own options it runs on, unless they say otherwise, where `incdump.checkpoint` would have it killed.
        """
        from incdump.engine.checkpoint import CheckpointRun  # only where there is CRIU

        check_arguments(options=options, criu=criu, criu_options=criu_options, way=way, progress=progress)

        def make(text: str | None) -> Awaitable[DumpResult]:
            arguments = (self.pid, images_dir, text, options or self.options, self._keeper, progress)
            return CheckpointRun(*arguments, proved=self._proved).with_criu(criu, criu_options, way)

        return await self._run(images_dir, parent, make)

    def _dump(
        self,
        kind: Kind,
        images_dir: str | os.PathLike[str],
        options: DumpOptions,
        progress: Callable[[str, DumpStats], None] | None,
        parent: str | None,
    ) -> Awaitable[DumpResult]:
        keeper, proved = self._keeper, self._proved
        return DumpRun(kind, self.pid, images_dir, parent, options, keeper, progress, proved=proved).run()

    def precopy(
        self,
        images_dir: str | os.PathLike[str],
        *,
        policy: PrecopyPolicy | None = None,
        options: DumpOptions | None = None,
        rule: Rule = should_stop,
        freezes: Sequence[Freeze] = (),
        criu: str | None = None,
        criu_options: Sequence[str] = (),
        way: WayName = "auto",
    ) -> PrecopyRounds:
        """Pre-dump until the rest is small enough, round by round, then make the last dump, as `incdump.precopy`::

            rounds = session.precopy("images")
            async for done, decision in rounds:
                print(done.number, done.bytes_written, decision.why)
            print(rounds.result.downtime)

        The first round builds on the session's last dump, each other one on the one before it; all are in the session's
        `rounds`, the last dump too. Parameters are those of `incdump.precopy`, which has more on them.

        :param options: instead of the session's.
        """
        check_arguments(images_dir=images_dir, policy=policy, options=options, rule=rule, freezes=freezes)
        check_arguments(criu=criu, criu_options=criu_options, way=way)
        options = options or self.options
        refuse_page_server(options)
        loop = _SessionLoop(self, Path.cwd() / images_dir, policy or PrecopyPolicy(), options, rule, freezes)
        loop.way = way
        return PrecopyRounds(loop, criu, criu_options)

    async def _run(
        self,
        images_dir: str | os.PathLike[str],
        parent: str | os.PathLike[str] | EllipsisType | None,
        make: Callable[[str | None], Awaitable[DumpResult]],
    ) -> DumpResult:
        """:param make: makes a dump on top of a parent, and has the session's keeper to itself meanwhile."""
        check_arguments(images_dir=images_dir)
        if not isinstance(parent, EllipsisType):
            check_arguments(parent=parent)
        if self._closed:
            raise HolderError("the session is closed: open another", pid=self.pid)
        if self._busy:
            raise HolderError("another dump of this session is under way: await it first", pid=self.pid)
        self._busy = True
        try:
            result = await make(self._parent_text(images_dir, parent))
        finally:
            self._busy = False
            self._keeper.release()
        self.rounds.append(result)
        return result

    def _parent_text(
        self, images_dir: str | os.PathLike[str], parent: str | os.PathLike[str] | EllipsisType | None
    ) -> str | None:
        """The parent as the link's text: relative, so that a whole chain can be moved."""
        if parent is None:
            return None
        if not isinstance(parent, EllipsisType):
            return os.fspath(parent)
        if not self.rounds:
            return None
        return os.path.relpath(self.rounds[-1].images_dir, os.path.realpath(images_dir))


class PrecopyRounds:
    """The pre-copy loop of a session: an async iterator over its rounds, each with what was decided after it.

    The next round begins when it is asked for, and the last dump is made after the last one: what a loop's body does
    after a round whose verdict is ``"stop"`` makes the rest grow. While the body runs nothing is under way, and the
    target is not slowed down, whatever the policy. So the loop may be left by ``break`` or by an exception: then there
    is no last dump, the rounds that are complete stay, and the session can be used on. A round that fails, or is
    cancelled, ends the loop in the same way.

    Iterating raises `incdump.DidNotConverge` and `incdump.IncdumpError` as `incdump.precopy` does.
    """

    def __init__(self, loop: _SessionLoop, criu: str | None, criu_options: Sequence[str]) -> None:
        self._loop = loop
        self._rounds = loop.rounds(criu, criu_options)

    def __repr__(self) -> str:
        return f"<PrecopyRounds {len(self.result.rounds)} in {self.result.images_dir}>"

    @property
    def result(self) -> PrecopyResult:
        """What there is so far; with the last dump once the loop is over."""
        return self._loop.result

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[PrecopyRound, Decision]:
        return await anext(self._rounds)

    async def aclose(self) -> None:
        """There are to be no more rounds, and no last dump."""
        await self._rounds.aclose()


class _SessionLoop(Loop):
    """The pre-copy loop whose dumps are a session's."""

    def __init__(
        self,
        session: Session,
        path: Path,
        policy: PrecopyPolicy,
        options: DumpOptions,
        rule: Rule,
        freezes: Sequence[Freeze],
    ) -> None:
        super().__init__(session.pid, path, policy, options, rule, freezes)
        self._session = session
        self._proved = session._proved

    def _end_tracking(self) -> None:
        """It lasts as long as the session."""

    async def _predump(self, number: int, options: DumpOptions) -> DumpResult:
        path, keeper = self._path / str(number), self._in_turn(self._session._keeper)

        def make(text: str | None) -> Awaitable[DumpResult]:
            hot, proved = self._to_defer(), self._proved
            return DumpRun("pre-dump", self._pid, path, text, options, keeper, hot=hot, proved=proved).run()

        return await self._session._run(path, ..., make)

    async def _last_dump(self, number: int, criu: str | None, criu_options: Sequence[str]) -> DumpResult:
        path = self._path / str(number)

        def make(text: str | None) -> Awaitable[DumpResult]:
            arguments = (self._pid, path, text, self._options, self._session._keeper, self._note_freezing)
            if self._policy.final == "dump":
                return DumpRun("dump", *arguments, self._hot, self._proved).run()
            from incdump.engine.checkpoint import CheckpointRun  # only where there is CRIU

            run = CheckpointRun(*arguments, hot=self._hot, proved=self._proved)
            return run.with_criu(criu, criu_options, self.way)

        return await self._session._run(path, ..., make)
