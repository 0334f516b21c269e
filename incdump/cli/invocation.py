"""What a command needs to know of how it was called, and how it says that something went wrong."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from incdump.cli.completion import files
from incdump.cli.groups import grouped
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
    :ivar quiet: print no results in text, and show no progress.
    :ivar arguments: all that stood on the command line after the program's name.
    """

    json: bool = False
    verbosity: int = 0
    quiet: bool = False
    arguments: tuple[str, ...] = ()

    @property
    def shows_progress(self) -> bool:
        """Whether progress is shown, where there is a terminal to show it on; lines of ``-v`` take its place."""
        return not self.quiet and not self.verbosity

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


def is_quiet() -> bool:
    """Whether the command under way was told to be quiet."""
    ctx = click.get_current_context(silent=True)
    invocation = None if ctx is None else ctx.find_object(Invocation)
    return invocation is not None and invocation.quiet


@contextmanager
def output() -> Iterator[None]:
    """Where results are printed, as text, on stdout; nowhere with ``--quiet``.

    :raises incdump.errors.IncdumpError: it cannot be written.
    """
    if is_quiet():
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            yield
    else:
        with _stdout():
            yield


@contextmanager
def _stdout() -> Iterator[None]:
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
    with _stdout():
        print(json.dumps(value))


def one_line(text: str) -> str:
    """A text as one line that does nothing to a terminal: what is not printable is shown as Python would."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Command(click.Command):
    """A command whose options are shown in groups, and which takes CRIU's spelling of verbosity, ``-v4``."""

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first sentence of the command's help, all of it: lists of commands are folded, not cut."""
        return re.split(r"(?<=\.)\s", " ".join((self.help or "").split()), maxsplit=1)[0].rstrip(".")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each group."""
        for title, options in grouped(self.get_params(ctx)):
            shown = [option for option in options if isinstance(option, click.Option)]
            records = [record for option in shown if (record := option.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

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
    "--criu",
    metavar="PATH",
    shell_complete=files,
    help="CRIU's program, 4.1 or later.  [default: $INCDUMP_CRIU, else where it is installed]",
)
way_option = click.option(
    "--way",
    type=click.Choice(WAYS),
    default="auto",
    show_default=True,
    help="How CRIU is kept from the memory: on a leash (seccomp user notification), by a library that is loaded "
    "into it, or by its own lazy dump, which stops the tree for longer. auto: the first that can be used here.",
)
criu_arguments = click.argument("criu_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- CRIU-OPTION...]")


def verbose_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """How much a command says."""
    return _verbose_option(_quiet_option(function))


_verbose_option = click.option(
    "-v",
    "--verbose",
    count=True,
    expose_value=False,
    callback=_set("verbosity"),
    help="Say what is being done; twice: with counters. -vN, as in CRIU, is -v N times.",
)
_quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_set("quiet"),
    help="Show no progress, and no results but --json's; warnings and errors are still said.",
)
