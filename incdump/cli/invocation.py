"""What a command needs to know of how it was called, and how it says that something went wrong."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from incdump.cli.target import hint_at_target
from incdump.errors import IncdumpError
from incdump.model.options import WAYS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(slots=True)
class Invocation:
    """The options that all commands have; click's context object.

    :ivar json: print one JSON object on stdout, and nothing else.
    :ivar verbosity: how often ``-v`` was given.
    """

    json: bool = False
    verbosity: int = 0

    def fail(self, error: BaseException, text: str) -> None:
        """Say that the command failed: a line on stderr, and with ``--json`` an object on stdout."""
        print(f"incdump: error: {one_line(text)}", file=sys.stderr)
        if self.json:
            with suppress(IncdumpError):  # that is what may just have been said
                print_json(error_fields(error, text))


def error_fields(error: BaseException, text: str) -> dict[str, Any]:
    """An error as the fields of a JSON object."""
    fields: dict[str, Any] = {"error": text, "kind": type(error).__name__}
    if isinstance(error, IncdumpError):
        fields |= {"pid": error.pid, "vaddr": error.vaddr, "path": error.path, "errno": error.errno_name}
    return fields


@contextmanager
def output() -> Iterator[None]:
    """Where stdout is written to. A reader that has left is no error: what was to be done is done.

    :raises incdump.errors.IncdumpError: it cannot be written.
    """
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would be tried again at exit, and complained about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise IncdumpError(f"cannot write the output: {error.strerror}", errno=error.errno) from error


def print_json(value: dict[str, Any]) -> None:
    """Print an object on one line of stdout."""
    with output():
        print(json.dumps(value))


def one_line(text: str) -> str:
    """A text as one line that does nothing to a terminal: what is not printable is shown as Python would."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Command(click.Command):
    """A command that takes CRIU's spelling of verbosity, ``-v4``, for ``-vvvv``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes_target = any("--tree" in parameter.opts for parameter in self.params)
        if takes_target and (hint := hint_at_target(args)):
            ctx.fail(hint)
        return super().parse_args(ctx, [spelt for arg in args for spelt in _spell_out(arg)])


def _spell_out(arg: str) -> list[str]:
    if len(arg) == 3 and arg.startswith("-v") and arg[2] in "0123456789":
        return ["-v"] * int(arg[2])
    return [arg]


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(ctx: click.Context, _parameter: click.Parameter, value: Any) -> None:
        setattr(ctx.ensure_object(Invocation), name, value)

    return store


json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_set("json"), help="Print one JSON object instead of text."
)
criu_option = click.option(
    "--criu", metavar="PATH", help="CRIU's program, 4.1 or later.  [default: $INCDUMP_CRIU, else where it is installed]"
)
way_option = click.option(
    "--way",
    type=click.Choice(WAYS),
    default="auto",
    show_default=True,
    help="How CRIU is kept from the memory: on a leash (seccomp user notification), or by its own lazy dump, which "
    "stops the tree for longer. auto: the first that can be used here.",
)
criu_arguments = click.argument("criu_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- CRIU-OPTION...]")
verbose_option = click.option(
    "-v",
    "--verbose",
    count=True,
    expose_value=False,
    callback=_set("verbosity"),
    help="Say what is being done; twice: with counters. -vN, as in CRIU, is -v N times.",
)
