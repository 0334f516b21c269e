"""``incdump receive``: takes process trees that ``incdump migrate`` sends, and brings them to life."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from incdump.cli.address import ADDRESS
from incdump.cli.completion import directories
from incdump.cli.durations import time_option
from incdump.cli.invocation import (
    Command,
    Invocation,
    criu_arguments,
    criu_option,
    error_fields,
    json_option,
    one_line,
    output,
    print_json,
    verbose_option,
)
from incdump.cli.policy import hook_timeout_option
from incdump.cli.progress import Arrivals
from incdump.cli.signals import Stopped, run
from incdump.cli.text import bytes_text, time_text
from incdump.cli.tls import take_tls, tls_options

if TYPE_CHECKING:
    from incdump.engine.arrival import MigrationReport
    from incdump.engine.page_server import SessionReport
    from incdump.engine.receive import Receiver

_EXAMPLE = """\b
Examples:
  incdump receive -D arriving --listen 192.0.2.7:7777 --restore
  incdump migrate -t 1234 192.0.2.7:7777        (on the other host)
"""


@click.command("receive", cls=Command, epilog=_EXAMPLE)
@click.option(
    "-D",
    "--images-dir",
    default=".",
    metavar="DIR",
    show_default="the working directory",
    help="Where the images go; made if it does not exist. Each migration has a directory of its own there.",
    shell_complete=directories,
)
@click.option(
    "--listen",
    type=ADDRESS,
    default="127.0.0.1:0",
    metavar="ADDRESS:PORT",
    show_default=True,
    help="Port 0: any free one. Whoever can connect is believed, unless there is --tls.",
)
@click.option("--restore", is_flag=True, help="Bring the tree to life here; else its images are kept.")
@click.option("--once", is_flag=True, help="End after one migration, whose rounds go to DIR/1, DIR/2, ...")
@click.option(
    "--hook",
    metavar="COMMAND",
    help="Called at each step, with INCDUMP_STEP: restore, ready, runs or failed. To move an address along.",
)
@hook_timeout_option
@click.option("--max-bytes", type=click.IntRange(min=0), metavar="N", help="Refuse more bytes of pages in a round.")
@time_option("--timeout", "30s", "How long the source may be silent.")
@criu_option
@tls_options
@criu_arguments
@json_option
@verbose_option
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    images_dir: str,
    listen: tuple[str, int],
    restore: bool,
    once: bool,
    hook: str | None,
    hook_timeout: float,
    max_bytes: int | None,
    timeout: float,
    criu: str | None,
    criu_options: tuple[str, ...],
    **given: Any,
) -> None:
    """Receive process trees from `incdump migrate`, and run them here.

    The images come as the rounds run. At the end the tree is restored by `criu restore`, which gets what stands after
    --, and stands there until the source has stopped it for good. A migration that fails leaves nothing.

    With --json: an object a line, when it listens, for each round, and at the end of each migration.
    """
    if not images_dir or "\0" in images_dir:
        raise click.BadParameter("an empty name", param_hint="-D")
    if not restore and (criu is not None or criu_options):
        raise click.UsageError("--criu, and what stands after --, is for --restore: add it")
    tls = take_tls(given)
    from incdump.engine.arrival import ReceiverOptions
    from incdump.engine.receive import Receiver

    options = ReceiverOptions(
        address=listen[0],
        port=listen[1],
        restore=restore,
        once=once,
        criu=criu,
        criu_options=criu_options,
        hook=take_hook(hook),
        hook_timeout=hook_timeout,
        max_bytes=max_bytes,
        timeout=timeout,
        tls=tls,
    )
    receiver = Receiver(images_dir, options)
    try:
        run(lambda: _serve(invocation, receiver))
    except Stopped as stopped:
        if receiver.was_receiving:
            raise Stopped(stopped.number, "the migration under way has failed, the tree goes on where it was") from None
        # Else it was told to end, and nothing was lost by that.


def take_hook(text: str | None) -> tuple[str, ...]:
    """The words of --hook.

    :raises click.BadParameter: there are none.
    """
    if text is None:
        return ()
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--hook") from error
    if not words or "\0" in text:
        raise click.BadParameter("an empty name", param_hint="--hook")
    return words


async def _serve(invocation: Invocation, receiver: Receiver) -> None:
    async with receiver:
        if invocation.json:
            print_json({"event": "listening", "address": receiver.host, "port": receiver.port})
        else:
            with output():
                print(f"listening on {receiver.host} port {receiver.port}")
        arrivals = Arrivals(lambda: receiver.arriving, show=invocation.shows_progress)
        came = [0, 0.0]  # bytes of pages and seconds, of the migration that is under way

        def on_session(report: SessionReport) -> None:
            arrivals.clear()
            came[:] = came[0] + (report.pages << 12), came[1] + report.seconds
            _tell_session(invocation, report)

        def on_migration(report: MigrationReport) -> None:
            arrivals.clear()
            _tell_migration(invocation, report, f"{bytes_text(int(came[0]))} in {time_text(int(came[1] * 1e6))}")
            came[:] = 0, 0.0

        with arrivals.shown():
            await receiver.serve(on_session, on_migration)


def _tell_session(invocation: Invocation, report: SessionReport) -> None:
    if invocation.json:
        error = {} if report.error is None else error_fields(report.error, str(report.error))
        print_json({"event": "session"} | asdict(report) | {"error": None} | error)
    elif report.error is not None:
        click.echo(f"round of {report.client} dropped: {one_line(str(report.error))}", err=True)
    elif invocation.verbosity:
        with output():
            print(f"round into {report.images_dir}: {report.pages:,} pages, {time_text(int(report.seconds * 1e6))}")


def _tell_migration(invocation: Invocation, report: MigrationReport, came: str) -> None:
    """
    :param came: how much came, and how long that took.
    """
    if invocation.json:
        error = {} if report.error is None else error_fields(report.error, str(report.error))
        fields: dict[str, Any] = {
            "event": "migration",
            "source": report.source,
            "pid": report.pid,
            "comm": report.comm,
            "rounds": report.rounds,
            "images_dir": report.images_dir,
            "outcome": report.outcome,
            "restored": None if report.restored is None else report.restored.as_dict(),
            "warning": report.warning,
            "error": None,
        }
        print_json(fields | error)
        return
    name = f"{one_line(report.comm)} ({report.pid}) from {report.source}"
    if report.error is not None:
        click.echo(f"{name} did not arrive: {one_line(str(report.error))}", err=True)
    else:
        what = "runs" if report.outcome == "runs" else "is stored"
        with output():
            print(f"{name} {what}: {report.rounds} rounds, {came}, the last in {report.images_dir}")
    if report.warning is not None:
        click.echo(f"warning: {one_line(report.warning)}", err=True)
