"""``incdump holder``: the process that keeps track of writes between two commands, run where it is wanted."""

from __future__ import annotations

import os

import click

from incdump.cli.invocation import Command, Invocation, json_option, output, print_json, verbose_option

_EXAMPLE = """\b
Examples:
  incdump holder
  systemd-run --property=Type=notify incdump holder
"""


@click.command("holder", cls=Command, epilog=_EXAMPLE)
@json_option
@verbose_option
@click.pass_obj
def command(invocation: Invocation) -> None:
    """Keep track of what processes write between two commands, until SIGTERM or Ctrl-C.

    Commands start such a process by themselves when they need one; it ends with the container or the unit that they
    were run in. Run this before them, as a unit of its own or beside them, and they use it instead. It does not end
    with its last target. What it tracks when it ends is dumped whole the next time.

    With --json: an object when it is ready.
    """
    from incdump.holder.foreground import serve

    def ready(path: str) -> None:
        if invocation.json:
            print_json({"event": "ready", "pid": os.getpid(), "socket": path})
            return
        with output():
            print(f"holder ready: process {os.getpid()} serves {path}")

    serve(ready)
