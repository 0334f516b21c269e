"""``incdump dump``: one moment of a whole process tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from incdump.cli.dumping import dump_options, page_server_options, run_dump
from incdump.cli.invocation import Command, Invocation

if TYPE_CHECKING:
    from incdump.model.options import Afterwards

_EXAMPLE = """\b
Examples:
  incdump dump -t 1234 -D images/1
  incdump dump -t 1234 -D images/3 --prev-images-dir ../2 --leave-stopped
"""


@click.command("dump", cls=Command, epilog=_EXAMPLE)
@dump_options
@page_server_options
@click.option("-R", "--leave-running", is_flag=True, help="Let the tree go on afterwards: the default.")
@click.option("-s", "--leave-stopped", is_flag=True, help="Leave it stopped, as by SIGSTOP.")
@click.option("--kill", is_flag=True, help="Kill it once the images are complete (what CRIU does by default).")
@click.pass_obj
def command(invocation: Invocation, /, leave_running: bool, leave_stopped: bool, kill: bool, **given: Any) -> None:
    """Freeze a process tree, dump its memory, and let it go on.

    The images hold one moment of all its processes. With --prev-images-dir only what was written since is read and
    written, so the tree is frozen for that long only.
    """
    if leave_running + leave_stopped + kill > 1:
        raise click.UsageError("only one of --leave-running, --leave-stopped and --kill can be had")
    afterwards: Afterwards = "stopped" if leave_stopped else "killed" if kill else "running"
    run_dump("dump", invocation, afterwards=afterwards, **given)
