"""Text for people: facts and tables, with rich on a terminal, plain anywhere else.

On a terminal, however narrow, nothing is cut: columns of names and numbers have the room that they need, their
headings are wrapped where that saves some, and the rest is for running text, which is folded. rich is loaded for a
terminal only.
"""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from incdump.cli.invocation import one_line, output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table
    from rich.text import Text

Kind: TypeAlias = Literal["name", "number", "text"]

_WIDTH = 100
_FRAME = 4
"""Columns of a frame: a line and a space at each side."""
_GAP = 2
_LEAST_TEXT = 20
"""Columns that running text should have; gaps are narrower before it has less."""


class Fact(NamedTuple):
    """One line of a report."""

    name: str
    value: str
    note: str = ""


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


@output()
def show_facts(title: str, facts: Sequence[Fact]) -> None:
    """Print a title, and a line for each fact: name, value to the right, note."""
    if is_terminal():
        print_panel(grid(("name", "number", "text"), None, [cells(fact, bold=1) for fact in facts]), title)
        return
    print(one_line(title))
    name_width = max(len(fact.name) for fact in facts)
    value_width = max(len(fact.value) for fact in facts)
    for name, value, note in facts:
        print(f"  {name:<{name_width}}  {one_line(value):>{value_width}}  {one_line(note)}".rstrip())


@output()
def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under column titles; a column of numbers is one whose title begins with a space."""
    if is_terminal():
        kinds: list[Kind] = ["number" if column.startswith(" ") else "text" for column in columns]
        print_panel(grid(kinds, [column.strip() for column in columns], [cells(row) for row in rows]), title)
        return
    print(one_line(title))
    shown = [[column.strip() for column in columns], *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(row[n]) for row in shown) for n in range(len(columns))]
    for row in shown:
        padded = [
            f"{cell:>{width}}" if column.startswith(" ") else f"{cell:<{width}}"
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        print(f"  {'  '.join(padded)}".rstrip())


@output()
def show_verdicts(title: str, rows: Sequence[tuple[str, bool, Sequence[str]]]) -> None:
    """Print what works and what does not: a name, yes or no, and lines of explanation for each."""
    name_width = max(len(name) for name, _, _ in rows)
    if is_terminal():
        shown = []
        for name, works, lines in rows:
            row = cells([name, "works" if works else "no", "\n".join(map(one_line, lines))])
            row[1].stylize("bold green" if works else "bold red")
            shown.append(row)
        print_panel(grid(("name", "name", "text"), None, shown), title)
        return
    print(title)
    for name, works, lines in rows:
        head = f"  {name:<{name_width}}  {'works' if works else 'no':<5}  "
        for line in lines:
            print(textwrap.fill(one_line(line), _WIDTH, initial_indent=head, subsequent_indent=" " * (len(head) + 2)))
            head = " " * len(head)


def cells(texts: Sequence[str], bold: int = -1) -> list[Text]:
    """Cells in which nothing is markup."""
    from rich.text import Text

    return [Text(text, style="bold" if n == bold else "") for n, text in enumerate(texts)]


def grid(
    kinds: Sequence[Kind], headings: Sequence[str] | None, rows: Sequence[Sequence[Text]], width: int = 0
) -> Table:
    """A table for `print_panel` in which nothing is cut.

    :param kinds: of the columns: a name and a number are on one line, whatever it costs the others; text is folded.
    :param width: of the terminal; 0: it is asked.
    """
    from rich.table import Table

    width = width or terminal_width()
    natural = widths(headings, rows, wrapped=False)
    fixed = [n for n, kind in enumerate(kinds) if kind != "text"]
    is_wide = framed(natural, _GAP) <= width
    least = natural if is_wide else widths(headings, rows, wrapped=True)
    gap = _GAP if is_wide or framed([least[n] for n in fixed], _GAP) + _LEAST_TEXT <= width else 1
    if headings and len(fixed) == len(kinds):
        _widen(least, headings, width - framed(least, gap))
    table = Table.grid(padding=(0, gap))
    for n, kind in enumerate(kinds):
        side: Literal["right", "left"] = "right" if kind == "number" else "left"
        table.add_column(justify=side, width=least[n] if n in fixed else None, overflow="fold")
    if headings is not None:
        from rich.text import Text

        table.add_row(*(Text(heading, style="bold") for heading in headings))
    for row in rows:
        table.add_row(*row)
    return table


def widths(headings: Sequence[str] | None, rows: Sequence[Sequence[Text]], *, wrapped: bool) -> list[int]:
    """What each column needs.

    :param wrapped: with headings that are wrapped between words.
    """
    heads = [max(map(len, heading.split() if wrapped else [heading]), default=0) for heading in headings or ()]
    rows = [*rows, cells([" " * width for width in heads])] if heads else rows
    return [max(cell_width(cell.plain) for cell in column) for column in zip(*rows, strict=True)]


def cell_width(text: str) -> int:
    """Columns of a terminal that a text's longest line takes."""
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")))


def _widen(columns: list[int], headings: Sequence[str], spare: int) -> None:
    """Share out what room is left, a column of the terminal each time to the heading that takes the most lines."""

    def lines(n: int) -> int:
        return len(textwrap.wrap(headings[n], columns[n]))

    for _ in range(spare):
        tallest = max(range(len(columns)), key=lines)
        if lines(tallest) <= 1:
            return
        columns[tallest] += 1


def framed(columns: Sequence[int], gap: int) -> int:
    """How wide columns are in a frame, with a gap between them."""
    return sum(columns) + gap * (len(columns) - 1) + _FRAME


def terminal_width() -> int:
    """Columns of the terminal."""
    from rich.console import Console

    return Console().width


def print_panel(table: Table, title: str) -> None:
    """Print a table of rich's, in a frame, on a terminal. A title that is too long for the frame stands above it."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    shown = Text(one_line(title), overflow="fold")
    if shown.cell_len > console.width - _FRAME - 2:
        console.print(shown)
        console.print(Panel(table, expand=False))
    else:
        console.print(Panel(table, title=shown, title_align="left", expand=False))


def bytes_text(size: int) -> str:
    """A number of bytes for people: ``"1.3 MiB"``."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


def time_text(microseconds: int) -> str:
    """A time for people: ``"0.6 ms"``, ``"1.24 s"``."""
    if microseconds >= 1_000_000:
        return f"{microseconds / 1e6:.2f} s"
    return f"{microseconds / 1e3:.1f} ms"


def count_text(number: int, one: str, many: str) -> str:
    """A number of things: ``"1 page"``, ``"1,024 pages"``."""
    return f"{number:,} {one if number == 1 else many}"
