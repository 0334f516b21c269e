"""``incdump checkpoint``: a complete checkpoint, made with CRIU, as an increment on a chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from incdump.cli.dumping import dump_options, page_server_options, run_dump
from incdump.cli.invocation import Command, Invocation, criu_arguments, criu_option, way_option

if TYPE_CHECKING:
    from incdump.model.options import Afterwards, WayName

_EXAMPLE = """\b
Examples:
  incdump checkpoint -t 1234 -D images/1 --leave-running
  incdump checkpoint -t 1234 -D images/4 --prev-images-dir ../3 -- --tcp-established
"""


@click.command("checkpoint", cls=Command, epilog=_EXAMPLE)
@dump_options
@page_server_options
@criu_option
@click.option("-R", "--leave-running", is_flag=True, help="Let the tree go on afterwards.")
@click.option("-s", "--leave-stopped", is_flag=True, help="Leave it stopped, as by SIGSTOP.")
@way_option
@criu_arguments
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    criu: str | None,
    leave_running: bool,
    leave_stopped: bool,
    way: WayName,
    criu_options: tuple[str, ...],
    **given: Any,
) -> None:
    """Checkpoint a process tree for `incdump restore` (or `criu restore`).

    CRIU dumps everything but the memory, incdump the memory: with --prev-images-dir only what was written since. The
    tree is killed afterwards, as by `criu dump`, unless told otherwise. What stands after -- goes to `criu dump`.
    """
    if leave_running and leave_stopped:
        raise click.UsageError("only one of --leave-running and --leave-stopped can be had")
    afterwards: Afterwards = "stopped" if leave_stopped else "running" if leave_running else "killed"
    run_dump("checkpoint", invocation, afterwards=afterwards, criu=criu, way=way, criu_options=criu_options, **given)
