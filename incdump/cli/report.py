"""``--report FILE``: a picture of a pre-copy loop, gathered while it runs and drawn when it is over.

It is also drawn when the loop failed, for that is when it tells most. That it cannot be drawn at all is found out
before anything is done to the target; the library that draws is loaded in the end, when nothing stands still any more.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import incdump
from incdump.cli.completion import files
from incdump.cli.invocation import Invocation
from incdump.errors import IncdumpError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from incdump.model.precopy import Decision, MappingWrites, PrecopyPolicy, PrecopyRound
    from incdump.model.stats import DumpResult, FreezePart

FORMATS = ("svg", "png", "html")
_LIBRARY = "matplotlib"


@dataclass(slots=True)
class LastDump:
    """The dump for which the target was stopped.

    :ivar at: when that began, seconds since the loop began.
    :ivar bytes_written: to the images, or over the network.
    :ivar parts: how the time divides for which it stood still.
    """

    at: float
    bytes_written: int
    parts: list[FreezePart]

    @property
    def downtime(self) -> float:
        """Seconds for which the target stood still."""
        return sum(part.microseconds for part in self.parts) / 1e6


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a report comes from.

    :ivar host: the host's name, its kernel and machine.
    :ivar date: when the loop began, with the offset of its time zone.
    :ivar command: as it was given.
    :ivar version: incdump's.
    """

    host: str
    date: str
    command: str
    version: str

    @classmethod
    def now(cls, arguments: Sequence[str]) -> Origin:
        """Of a command that begins now.

        :param arguments: what stood on the command line after the program's name.
        """
        name = os.uname()
        return cls(
            host=f"{name.nodename} ({name.sysname} {name.release}, {name.machine})",
            date=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            command=shlex.join(("incdump", *arguments)),
            version=incdump.__version__,
        )


@dataclass(slots=True)
class Record:
    """A pre-copy loop, as it was told of.

    :ivar pid: the root of the tree.
    :ivar comm: its command name.
    :ivar origin: where and when it was made, and by what command.
    :ivar rounds: the pre-dumps.
    :ivar decisions: what was decided after each.
    :ivar written: which mappings each dump wrote, that of each round and that of the last dump if there was one.
    :ivar last: None if the loop ended without a last dump.
    :ivar processes: how many were dumped, most recently.
    :ivar tracker: which one was used.
    :ivar failure: why the loop failed; None if it did not.
    """

    pid: int
    comm: str
    policy: PrecopyPolicy
    origin: Origin
    rounds: list[PrecopyRound] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    written: list[list[MappingWrites]] = field(default_factory=list)
    last: LastDump | None = None
    processes: int = 0
    tracker: str = ""
    failure: str | None = None

    @property
    def ended(self) -> float:
        """When all was over, seconds since the loop began."""
        rounds = self.rounds[-1].ended if self.rounds else 0.0
        return rounds if self.last is None else max(rounds, self.last.at + self.last.downtime)


class Report:
    """A report to be.

    :ivar path: the file; None once it turned out that it cannot be written.
    """

    def __init__(self, path: str, file_format: str, arguments: Sequence[str] = ()) -> None:
        """
        :param file_format: one of `FORMATS`.
        :param arguments: of the command that makes it.
        """
        self.path: str | None = path
        self._format = file_format
        self._arguments = arguments
        self._record: Record

    @contextmanager
    def of(self, pid: int, comm: str, policy: PrecopyPolicy, warn: Callable[[str], None]) -> Iterator[None]:
        """Gather what is told in this block, and write the report at its end, whatever that is.

        :param warn: told why there is no report. It is no reason to fail: what was to be done to the target is done.
        """
        self._record = Record(pid, comm, policy, Origin.now(self._arguments))
        try:
            yield
        except BaseException as error:
            self._record.failure = str(error)
            raise
        finally:
            self._try_write(warn)

    def round(self, done: PrecopyRound, decision: Decision) -> None:
        """A round is complete; see `incdump.precopy`."""
        self._record.rounds.append(done)
        self._record.decisions.append(decision)

    def written(self, result: DumpResult, mappings: list[MappingWrites]) -> None:
        """What a dump wrote; see `incdump.precopy`."""
        self._record.written.append(mappings)
        self._record.tracker, self._record.processes = result.tracker, len(result.pids)

    def last_dump(self, result: DumpResult, at: float | None, parts: Sequence[FreezePart]) -> None:
        """The dump for which the target was stopped.

        :param at: when, seconds since the loop began; None if that is not known.
        :param parts: how the time divides for which it stood still; more than `incdump.freeze_parts` knows of, if it
            stood still for more than the dump.
        """
        stats = result.stats
        pages = stats.pages_written + stats.shpages_written
        self._record.last = LastDump(self._record.ended if at is None else at, pages << 12, list(parts))

    def _try_write(self, warn: Callable[[str], None]) -> None:
        path = self.path
        self.path = None
        if path is None or not self._record.rounds:
            return warn("there is no report: no round was complete")
        try:
            _replace(path, render(self._record, self._format))
        except Exception as error:
            return warn(f"there is no report: {error}")
        self.path = path
        return None


def render(record: Record, file_format: str) -> bytes:
    """The report as a file's contents."""
    if file_format == "html":
        from incdump.cli.report_page import page

        return page(record).encode()
    from incdump.cli.report_figure import picture

    return picture(record, file_format)


def _replace(path: str, data: bytes) -> None:
    """Write a file that is whole or as it was before. Addresses are nobody else's business: it is its owner's alone."""
    fd, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)[:100]}.", dir=os.path.dirname(path))
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _take_report(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Report | None:
    """The option's value, once it is sure that there can be such a report."""
    if value is None:
        return None

    def refuse(why: str) -> click.BadParameter:
        return click.BadParameter(why, param=parameter)

    if not value or "\0" in value:
        raise refuse("an empty name")
    file_format = Path(value).suffix[1:].lower()
    if file_format not in FORMATS:
        raise refuse(f"{value} ends in none of {', '.join(f'.{name}' for name in FORMATS)}")
    path = os.path.abspath(value)
    if os.path.isdir(path):
        raise refuse(f"{path} is a directory")
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(path)):
            pass
    except OSError as error:
        raise refuse(f"cannot write to {os.path.dirname(path)}: {error.strerror}") from None
    if find_spec(_LIBRARY) is None:
        raise IncdumpError(
            f"--report needs {_LIBRARY}, which is not installed: in incdump's checkout, pip install '.[report]'"
        )
    return Report(path, file_format, ctx.ensure_object(Invocation).arguments)


report_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--report",
    metavar="FILE",
    callback=_take_report,
    shell_complete=files,
    help="Draw what happened: rounds, rates, downtimes, which mappings were written when. FILE ends in .svg, .png or "
    ".html.",
)
"""``--report``, for a click command."""
