"""The rounds of a pre-copy loop, as they come: one live table on a terminal, a line each elsewhere, or JSON objects.

The table is drawn by the event loop, not by a thread of rich's, and not while the target stands still: drawing takes
milliseconds, in which no page would be copied.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from incdump.cli.invocation import one_line, output, print_json
from incdump.cli.text import (
    bytes_text,
    cells,
    framed,
    grid,
    is_terminal,
    print_panel,
    show_table,
    time_text,
    widths,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleRenderable
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.table import Table
    from rich.text import Text

    from incdump.cli.invocation import Invocation
    from incdump.model.precopy import Decision, PrecopyPolicy, PrecopyRound
    from incdump.model.stats import DumpStats, FreezePart

_SHARE = 7
"""Of `round_texts`, the share of the allowed downtime."""
_EVERY = 0.2
"""Seconds between two drawings of the table."""
_OTHER_LINES = 8
"""Of a terminal's lines: borders, headings, the step under way."""
_LEAST = ("pages", "copied/s", "written/s", "time", "bytes")
"""Columns of the table that are left out, in this order, where there is no room for all."""
_HEADINGS = ("round", "pages", "bytes", "time", "written/s", "copied/s", "downtime", "")
_WIDTHS = (5, 10, 10, 9, 11, 11, 9, 0)
_PARTS = {
    "freezing": ("freezing", "until every thread stood"),
    "scan": ("scan", "looking for what to copy, nothing being copied"),
    "copy": ("copying", "from the first page to the last"),
    "waited": ("waiting for CRIU", "which writes all else"),
    "in_place": ("putting together", "one images dir of CRIU's images and incdump's"),
    "criu": ("CRIU alone", "before it looks for pages, and when it may go on"),
    "restore": ("restore there", "until the tree stood there, complete"),
    "switch": ("switch", "until the news that it runs there"),
    "rest": ("the rest", "what else is to be read, and letting go"),
}


class Rounds:
    """What is told while a pre-copy loop runs.

    `round` and `progress` are for `incdump.precopy` to call; `step` says what else is being done.

    :param title: what is being done, one line.
    """

    def __init__(self, invocation: Invocation, policy: PrecopyPolicy, title: str) -> None:
        self._json = invocation.json
        self._is_live = not invocation.json and invocation.shows_progress and is_terminal()
        self._policy = policy
        self._title = title
        self._told: list[tuple[PrecopyRound, Decision]] = []
        self._what = "beginning"
        self._stats: DumpStats | None = None
        self._since = time.monotonic()
        self._stands_still = False
        self._live: Live | None = None
        self._console: Console
        self._spinner: Spinner
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the live table for the rest of this block, on a terminal. For use within an event loop.

        In the end, whatever that is, the whole table is left there.
        """
        if not self._is_live:
            yield
            return
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._spinner = Spinner("dots")
        self._console = Console()
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            get_renderable=self._renderable,
        )
        self._live.start()
        self._draw_again()
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._live.stop()
            self._live = None
            if self._told:
                self._leave_table()

    def round(self, done: PrecopyRound, decision: Decision) -> None:
        """A round is complete."""
        self._told.append((done, decision))
        if self._json:
            print_json({"event": "round", **asdict(done), **decision.as_dict()})
        elif self._live is not None:
            self.step(decision.why)
        else:
            if done.number == 1:
                self._line(_HEADINGS)
            slowed, left = _slowed(done), _left_for_last(done)
            why = decision.why + (f", slowed down by {slowed}" if slowed else "")
            why += f", {left} left for the last dump" if left else ""
            self._line((*round_texts(done, decision, self._policy)[:-1], why))

    def progress(self, step: str, stats: DumpStats) -> None:
        """A dump is at a step, in the engine's words; see `incdump.dump`."""
        if self._live is None:
            return
        from incdump.cli.progress import STEPS

        is_last = bool(self._told) and self._told[-1][1].verdict == "stop"
        which = "the last dump" if is_last else f"round {len(self._told) + 1}"
        what = f"{which}: {STEPS.get(step, step)}"
        if what != self._what:
            self._begin(what)
        self._stats = stats
        if step == "freezing":
            self._draw()
            self._stands_still = True
        elif not is_last:  # the tracker soft-dirty stops the tree for the scan only
            self._stands_still = False

    def step(self, what: str) -> None:
        """Something else than a dump is being done, in words; what stood still does so no more."""
        self._begin(what)
        self._stats, self._stands_still = None, False
        self._draw()

    def _begin(self, what: str) -> None:
        self._what, self._since = what, time.monotonic()

    # -- lines ----------------------------------------------------------------------------------------------------

    @output()
    def _line(self, cells: tuple[str, ...]) -> None:
        text = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
        print(one_line(text).rstrip(), flush=True)

    # -- the table ------------------------------------------------------------------------------------------------

    def _draw_again(self) -> None:
        import asyncio

        self._draw()
        self._timer = asyncio.get_running_loop().call_later(_EVERY, self._draw_again)

    @output()
    def _draw(self) -> None:
        if self._live is not None and not self._stands_still:
            self._live.refresh()

    def _renderable(self) -> ConsoleRenderable:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        table = self._table(max(3, self._console.height - _OTHER_LINES))
        counters = ""
        if self._stats is not None:
            from incdump.cli.progress import counters_text

            counters = f": {counters_text(self._stats)}"
        step = one_line(f"{self._what}, {time.monotonic() - self._since:.1f} s{counters}")
        self._spinner.update(text=Text(step, no_wrap=True, overflow="ellipsis"))  # what is cut is the counters' end
        panel = Panel(table, title=Text(one_line(self._title)), title_align="left", expand=False)
        return Group(panel, self._spinner) if self._told else self._spinner

    @output()
    def _leave_table(self) -> None:
        print_panel(self._table(len(self._told)), self._title)

    def _table(self, rows: int) -> Table:
        """The last so many rounds."""
        shown = self._told[-rows:]
        texts = [round_texts(done, decision, self._policy) for done, decision in shown]
        names = ["round", "pages", "bytes", "time", "written/s", "copied/s", "stopped now", _of(self._policy)]
        for name, told_of in (("slowed", _slowed), ("left for last", _left_for_last)):
            if any(told_of(done) for done, _ in self._told):
                names.append(name)
                texts = [(*row, told_of(done)) for row, (done, _) in zip(texts, shown, strict=True)]
        rows_of = [cells(row) for row in texts]
        for row, (_, decision) in zip(rows_of, shown, strict=True):
            row[_SHARE].stylize(_style(decision, self._policy))
        kept = self._kept(names, rows_of)
        names, rows_of = [names[n] for n in kept], [[row[n] for n in kept] for row in rows_of]
        if len(shown) < len(self._told):
            rows_of.insert(0, cells(["…", *[""] * (len(names) - 1)]))
        return grid(["number"] * len(names), names, rows_of, self._console.width)

    def _kept(self, names: Sequence[str], rows: Sequence[Sequence[Text]]) -> list[int]:
        """The columns that there is room for: what decides is never among those that are left out."""
        needed = widths(names, rows, wrapped=True)
        kept = list(range(len(names)))
        for name in _LEAST:
            if framed([needed[n] for n in kept], 1) <= self._console.width:
                break
            kept.remove(names.index(name))
        return kept


def _slowed(done: PrecopyRound) -> str:
    return f"{done.throttled:.0%}" if done.throttled else ""


def _left_for_last(done: PrecopyRound) -> str:
    return bytes_text(done.bytes_deferred) if done.bytes_deferred else ""


def round_texts(done: PrecopyRound, decision: Decision, policy: PrecopyPolicy) -> tuple[str, ...]:
    """A round for people.

    :returns: number, pages, bytes, time, written and copied in a second, estimated downtime, its share of what is
        allowed.
    """
    now = decision.estimate

    def rate(value: float | None) -> str:
        return "" if value is None else bytes_text(int(value))

    return (
        str(done.number),
        f"{done.bytes_written >> 12:,}",
        bytes_text(done.bytes_written),
        time_text(int(done.seconds * 1e6)),
        rate(now.dirty_rate),
        rate(now.bandwidth),
        "" if now.downtime is None else time_text(int(now.downtime * 1e6)),
        "" if now.downtime is None else f"{now.downtime / policy.downtime:,.0%}",
    )


def _of(policy: PrecopyPolicy) -> str:
    return f"of {allowed_text(policy)}"


def allowed_text(policy: PrecopyPolicy) -> str:
    """The downtime that is allowed: ``"300 ms"``, ``"2 s"``."""
    return f"{policy.downtime * 1e3:g} ms" if policy.downtime < 1 else f"{policy.downtime:g} s"


def _style(decision: Decision, policy: PrecopyPolicy) -> str:
    downtime = decision.estimate.downtime
    if downtime is None:
        return ""
    return "green" if downtime <= policy.downtime else "yellow" if downtime <= 3 * policy.downtime else "red"


def show_freeze(title: str, parts: Sequence[FreezePart]) -> None:
    """Print how the time divides for which the target stood still.

    :param parts: as from `incdump.freeze_parts`; names that are not among its own are shown as they are.
    """
    whole = sum(part.microseconds for part in parts)
    rows = [part_texts(part, whole) for part in parts]
    show_table(title, ("part", " time", " share", ""), [*rows, ("in all", time_text(whole), "", "")])


def part_texts(part: FreezePart, whole: int) -> tuple[str, str, str, str]:
    """A part of a freeze for people: its name, its length, its share of the whole, and what it is."""
    name, note = _PARTS.get(part.name, (part.name, ""))
    share = part.microseconds / whole if whole else 0.0
    return name, time_text(part.microseconds), f"{share:.1%}", note
