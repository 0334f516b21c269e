"""Text for people: facts and tables, with rich on a terminal, plain anywhere else.

rich is loaded for a terminal only.
"""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, NamedTuple

from incdump.cli.invocation import one_line, output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table

_WIDTH = 100


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
        table = _grid(("left", "right", "left"))
        for fact in facts:
            table.add_row(*_cells(fact, bold=1))
        print_panel(table, title)
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
        table = _grid(["right" if column.startswith(" ") else "left" for column in columns])
        table.add_row(*[f"[bold]{column.strip()}[/]" for column in columns])
        for row in rows:
            table.add_row(*_cells(row))
        print_panel(table, title)
        return
    print(one_line(title))
    shown = [[column.strip() for column in columns], *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(len(row[n]) for row in shown) for n in range(len(columns))]
    for row in shown:
        cells = [
            f"{cell:>{width}}" if column.startswith(" ") else f"{cell:<{width}}"
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        print(f"  {'  '.join(cells)}".rstrip())


@output()
def show_verdicts(title: str, rows: Sequence[tuple[str, bool, Sequence[str]]]) -> None:
    """Print what works and what does not: a name, yes or no, and lines of explanation for each."""
    name_width = max(len(name) for name, _, _ in rows)
    if is_terminal():
        table = _grid(("left", "left", "left"))
        for name, works, lines in rows:
            mark = "[bold green]works[/]" if works else "[bold red]no[/]"
            table.add_row(*_cells([name]), mark, *_cells(["\n".join(map(one_line, lines))]))
        print_panel(table, title)
        return
    print(title)
    for name, works, lines in rows:
        head = f"  {name:<{name_width}}  {'works' if works else 'no':<5}  "
        for line in lines:
            print(textwrap.fill(one_line(line), _WIDTH, initial_indent=head, subsequent_indent=" " * (len(head) + 2)))
            head = " " * len(head)


def _grid(justify: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for side in justify:
        table.add_column(justify="right" if side == "right" else "left")
    return table


def _cells(texts: Sequence[str], bold: int = -1) -> list[RenderableType]:
    """Cells in which nothing is markup."""
    from rich.text import Text

    return [Text(text, style="bold" if n == bold else "") for n, text in enumerate(texts)]


def print_panel(table: Table, title: str) -> None:
    """Print a table of rich's, in a frame, on a terminal."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console().print(Panel(table, title=Text(one_line(title)), title_align="left", expand=False))


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
