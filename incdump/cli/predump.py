"""``incdump predump``: the target runs on while its memory is dumped."""

from __future__ import annotations

from typing import Any

import click

from incdump.cli.dumping import dump_options, page_server_options, run_dump
from incdump.cli.invocation import Command, Invocation

_EXAMPLE = """\b
Examples:
  incdump predump -t 1234 -D images/1
  incdump predump -t 1234 -D images/2 --prev-images-dir ../1
"""


@click.command("predump", cls=Command, epilog=_EXAMPLE)
@dump_options
@page_server_options
@click.option("-R", "--leave-running", is_flag=True, expose_value=False, hidden=True)  # what a pre-dump always does
@click.pass_obj
def command(invocation: Invocation, /, **given: Any) -> None:
    """Dump the memory of a process tree while it runs on.

    The images may be torn, as the target writes meanwhile: they are to be the parent of a later dump, which then has
    less to write. From now on a small holder process keeps track of what the target writes, until the target exits or
    `incdump untrack` is called.
    """
    run_dump("pre-dump", invocation, **given)
