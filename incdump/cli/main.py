"""The command ``incdump``: what is common to all its commands.

Each command is a module of its own, loaded when it is called; see `COMMANDS`. A command raises what goes wrong. Here
it becomes one line on stderr, an exit code (`incdump.errors` has the table) and, with ``--json``, an object on stdout.
Signals end a command cleanly (`incdump.cli.signals`): the exit code is 128 plus the signal's number.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click

import incdump
from incdump.cli.invocation import Invocation, one_line
from incdump.cli.signals import Stopped
from incdump.errors import IncdumpError
from incdump.proc.identity import check_page_size
from incdump.proc.limits import limit_of, raise_open_files

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = (
    "predump", "dump", "checkpoint", "restore", "precopy", "migrate", "receive", "check", "untrack", "holder",
    "page-server", "doctor",
)  # fmt: skip
ALIASES = {"pre-dump": "predump", "pre-copy": "precopy"}
"""CRIU's name, and the field's, for what is one word here."""

USAGE_ERROR = 2
OTHER_ERROR = 1


class Commands(click.Group):
    """Commands by the names of their modules."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"incdump.cli.{name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in (*COMMANDS, *ALIASES) and not args[0].startswith("-"):
            ctx.fail(f"no such command: {args[0]} (there are {', '.join(COMMANDS)})")
        return super().resolve_command(ctx, args)


@click.command(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: incdump predump -t 1234 -D images/1",
)
@click.version_option(incdump.__version__, prog_name="incdump", message="%(prog)s %(version)s")
@click.pass_context
def command_line(ctx: click.Context) -> int | None:
    """Dump the memory of running processes, again and again, each time only what changed.

    The images are CRIU's. The target runs on while it is pre-dumped, and whatever goes wrong.
    """
    if ctx.invoked_subcommand is not None:
        return None
    click.echo(ctx.get_help(), err=True)
    return USAGE_ERROR


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param args: the arguments; None for those of this process, which then has nothing else to do.
    :returns: the exit code.
    """
    _prepare_process()
    if args is not None:
        return _run(args)
    # The collector would walk the loaded modules, which hold no garbage, a dozen times over: while they are loaded
    # (20 ms), and when Python ends (40 ms), unless they are taken from its sight.
    gc.set_threshold(200_000)
    code = _run(args)
    gc.freeze()
    return code


def _run(args: Sequence[str] | None) -> int:
    invocation = Invocation(arguments=tuple(sys.argv[1:] if args is None else args))
    try:
        check_page_size()
        code = command_line.main(args, prog_name="incdump", standalone_mode=False, obj=invocation)
    except click.ClickException as error:
        return _usage_error(error)
    except (click.Abort, KeyboardInterrupt):
        # Before, or after, the part in which signals are handled by `incdump.cli.signals`.
        stopped = Stopped(signal.SIGINT)
        invocation.fail(stopped, str(stopped))
        return stopped.exit_code
    except Stopped as stopped:
        invocation.fail(stopped, str(stopped))
        return stopped.exit_code
    except IncdumpError as error:
        error = limit_of(error) or error
        invocation.fail(error, str(error))
        return error.exit_code
    except BrokenPipeError:
        return OTHER_ERROR  # nobody has read the whole of a help text
    except Exception as error:
        if (limit := limit_of(error)) is None:
            return _unexpected(error, invocation)
        invocation.fail(limit, str(limit))
        return limit.exit_code
    return code if isinstance(code, int) else 0


def _usage_error(error: click.ClickException) -> int:
    """One line, and where to read on."""
    message = one_line(error.format_message()).rstrip(".")
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx is not None else "incdump"
    print(f"incdump: error: {message[:1].lower()}{message[1:]} (see `{path} --help`)", file=sys.stderr)
    return USAGE_ERROR


def _unexpected(error: Exception, invocation: Invocation) -> int:
    """Something that incdump has no error class for: its own fault, until shown otherwise."""
    text = f"unexpected {type(error).__name__}: {error}; please report this"
    invocation.fail(error, text if invocation.verbosity else f"{text}, with what the same command says with -v")
    if invocation.verbosity:
        import traceback

        traceback.print_exception(error)
    return OTHER_ERROR


def _prepare_process() -> None:
    """Make this process fit for work, before NumPy is loaded and before any file is opened."""
    # OpenBLAS, which NumPy brings along and nothing here uses, starts a thread per processor and touches memory for
    # each of them: half of NumPy's start-up time on two processors, more on more.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise_open_files()
    # Started with a closed standard stream, the next file opened would take its number, and messages would go there.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal's encoding has not


if __name__ == "__main__":
    sys.exit(main())
