"""``incdump untrack``: gives up tracking."""

from __future__ import annotations

import click

from incdump.cli.completion import processes
from incdump.cli.invocation import Command, Invocation, json_option, output, print_json, verbose_option

_EXAMPLE = """\b
Examples:
  incdump untrack 1234
  incdump untrack --all
"""


@click.command("untrack", cls=Command, epilog=_EXAMPLE)
@click.argument("pid", type=click.IntRange(min=1), required=False, metavar="PID", shell_complete=processes)
@click.option("--all", "every", is_flag=True, help="Every process that this user tracks.")
@json_option
@verbose_option
@click.pass_obj
def command(invocation: Invocation, pid: int | None, every: bool) -> None:
    """Give up tracking what process PID writes.

    Nothing of incdump is left in the process, or beside it: the holder process ends when it has nothing left to hold.
    The next dump of the process is a whole one.
    """
    if (pid is None) != every:
        raise click.UsageError("name a PID, or --all" if pid is None else "either a PID or --all, not both")
    from incdump.cli.signals import run
    from incdump.engine.untrack import untrack

    untracked = run(lambda: untrack(pid))
    if invocation.json:
        print_json({"untracked": untracked})
        return
    with output():
        if untracked:
            print(f"no longer tracked: {', '.join(map(str, untracked))}")
        else:
            print("no process was tracked" if pid is None else f"process {pid} was not tracked")
