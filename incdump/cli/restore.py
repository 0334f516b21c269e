"""``incdump restore``: proves a chain, and has CRIU bring it back to life."""

from __future__ import annotations

import click

from incdump.cli.completion import directories, files
from incdump.cli.invocation import (
    Command,
    Invocation,
    criu_arguments,
    criu_option,
    json_option,
    print_json,
    verbose_option,
)
from incdump.cli.signals import run

_EXAMPLE = """\b
Examples:
  incdump restore -D images/4 -d --pidfile root.pid
  incdump restore -D images/4 -- --tcp-established
"""


@click.command("restore", cls=Command, epilog=_EXAMPLE)
@click.option(
    "-D",
    "--images-dir",
    default=".",
    metavar="DIR",
    show_default="the working directory",
    help="The checkpoint.",
    shell_complete=directories,
)
@click.option("-d", "--restore-detached", is_flag=True, help="Return when the tree runs, not when it has ended.")
@click.option("--pidfile", metavar="FILE", shell_complete=files, help="Write the root's pid there.")
@criu_option
@criu_arguments
@json_option
@verbose_option
@click.pass_obj
def command(
    invocation: Invocation,
    images_dir: str,
    restore_detached: bool,
    pidfile: str | None,
    criu: str | None,
    criu_options: tuple[str, ...],
) -> None:
    """Bring a checkpoint back to life.

    The whole chain is proved first; then `criu restore` does it. What stands after -- goes to it.
    """
    if not images_dir or "\0" in images_dir:
        raise click.BadParameter("an empty name", param_hint="-D")
    from incdump.engine.restore import restore

    result = run(
        lambda: restore(images_dir, detached=restore_detached, pidfile=pidfile, criu=criu, criu_options=criu_options)
    )
    if invocation.json:
        print_json(result.as_dict())
        return
    from incdump.cli.text import Fact, show_facts, time_text

    show_facts(
        f"restore of {result.images_dir}",
        [
            Fact("process", f"{result.pid}", "the root of the tree"),
            Fact("pages restored", f"{result.pages_restored:,}"),
            Fact(
                "time in all",
                time_text(result.restore_time),
                f"{result.criu}; forking {time_text(result.forking_time)}",
            ),
        ],
    )
