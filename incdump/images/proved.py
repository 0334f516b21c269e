"""A chain that grows, proved level by level: what was proved and has not changed since is not read again.

A loop makes many dumps, each on top of the one before, and each has to know that its parent chain holds. To read all of
it every time would make a round the longer the more there were. So a `ProvedChain` remembers what the newest level
covers, and of every level the marks by which a changed one is told: device, inode, size and times of its inventory and
pagemaps, device, inode and size of its pages images (a page server gives back disk space inside them), and where its
parent link leads. The next time the new level is read and proved against what is remembered; of those below it only the
marks are looked at, a system call for each file. If one of them is not as it was, all is read as the first time.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from incdump.images.chain import load_tables, prove_levels
from incdump.images.new_dir import FINISHED, PARENT
from incdump.model.runs import empty_runs

if TYPE_CHECKING:
    from incdump.images.chain import Table, Tables
    from incdump.images.images_dir import ImagesDir, Kind
    from incdump.model.runs import Runs

    Covered: TypeAlias = dict[tuple[Kind, int], Runs]
    _Stamp: TypeAlias = tuple[int, ...] | None

_PAGES = "pages-"
_TICK = 20_000_000
"""Nanoseconds, at least two ticks of the clock that files' times are taken from. Who changes a file within the tick in
which it was written leaves its times as they are, so a level is remembered only when it is older than that."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """By what a level is known again; some hundred bytes for each process in it."""

    path: str
    names: tuple[str, ...]
    stamps: tuple[_Stamp, ...]
    is_settled: bool

    @classmethod
    def of(cls, level: ImagesDir) -> _Mark:
        """Mark a level. To be done before it is read: what changes meanwhile is then noticed the next time."""
        path = os.fspath(level.path)
        names = tuple(name for name in level.names() if name in FINISHED or name.startswith(("pagemap-", _PAGES)))
        stamps = _stamps(path, names)
        changed = max((stamp[-1] for stamp in stamps if stamp is not None), default=0)
        return cls(path, names, stamps, changed + _TICK < time.time_ns())

    def holds(self) -> bool:
        """Whether the level is as it was."""
        return _stamps(self.path, self.names) == self.stamps


def _stamps(path: str, names: tuple[str, ...]) -> tuple[_Stamp, ...]:
    """Of the directory that the parent link leads to, and of the files; None for what is not there."""
    found: list[_Stamp] = []
    for name in (PARENT, *names):
        try:
            at = os.stat(f"{path}/{name}")
        except OSError:
            found.append(None)
            continue
        if name == PARENT:
            found.append((at.st_dev, at.st_ino, 0))
        elif name.startswith(_PAGES):
            found.append((at.st_dev, at.st_ino, at.st_mode, at.st_size, 0))
        else:
            found.append((at.st_dev, at.st_ino, at.st_mode, at.st_size, at.st_mtime_ns, at.st_ctime_ns))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Known:
    """A chain that was proved.

    :ivar identity: of the newest level.
    :ivar tables: of the newest level, without its holes.
    :ivar marks: of all levels, the newest first.
    """

    identity: tuple[int, int]
    tables: Tables
    marks: tuple[_Mark, ...]

    def is_of(self, level: ImagesDir) -> bool:
        """Whether this is the newest level."""
        return level.identity == self.identity

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return all(mark.holds() for mark in self.marks)


class ProvedChain:
    """What a program has proved of the chain that it makes. Good for any other chain, too, which is then read."""

    def __init__(self, *, elsewhere: bool = True) -> None:
        """
        :param elsewhere: whether pages that were sent to a page server may be missing: there they are.
        """
        self._elsewhere = elsewhere
        self._known: _Known | None = None

    def __repr__(self) -> str:
        known = self._known
        return "<ProvedChain>" if known is None else f"<ProvedChain {known.marks[0].path}, {len(known.marks)} levels>"

    def prove(self, images: ImagesDir) -> Covered:
        """Prove a directory and all it stands on. Blocks.

        :returns: of each pagemap of the directory, the pages that it covers.
        :raises incdump.errors.ImagesError: as `incdump.images.chain.check_chain`. The next time all is read.
        """
        known, self._known = self._known, None
        if known is not None and not known.holds():
            known = None
        if known is not None and known.is_of(images):
            self._known = known
            return _covered(known.tables)
        walk = _Walk(known, elsewhere=self._elsewhere)
        self._known = walk.prove(images)
        return walk.covered


class _Walk:
    """One way down a chain, as far as it has to be read.

    :ivar covered: of the level in which it began.
    """

    def __init__(self, known: _Known | None, *, elsewhere: bool) -> None:
        self._known = known
        self._elsewhere = elsewhere
        self._began = False
        self._identity: tuple[int, int] | None = None  # of the newest level that is settled
        self._tables: Tables = {}  # its
        self._marks: list[_Mark] = []  # its, and of those below it
        self.covered: Covered = {}

    def prove(self, images: ImagesDir) -> _Known | None:
        """Prove the chain; returns what is to be remembered."""
        below: tuple[_Mark, ...] = ()
        for _, parent in prove_levels(images, self._load, elsewhere=self._elsewhere):
            if self._known is not None and parent is not None and self._known.is_of(parent):
                below = self._known.marks
                break
        if self._identity is None:
            return self._known
        return _Known(self._identity, self._tables, (*self._marks, *below))

    def _load(self, level: ImagesDir) -> Tables:
        if self._known is not None and self._known.is_of(level):
            return self._known.tables
        mark = _Mark.of(level)
        tables = load_tables(level)
        if not self._began:
            self._began = True
            self.covered = _covered(tables)
        if self._identity is None and mark.is_settled:
            self._identity = level.identity
            self._tables = {key: _without_holes(table) for key, table in tables.items()}
        if self._identity is not None:
            self._marks.append(mark)
        return tables


def _covered(tables: Tables) -> Covered:
    return {key: table.pagemap.covered for key, table in tables.items()}


def _without_holes(table: Table) -> Table:
    """What children are proved against."""
    return table._replace(pagemap=table.pagemap._replace(holes=empty_runs()))
