"""``incdump page-server``: receives pages from ``criu dump --page-server`` and its like."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from incdump.cli.completion import directories, parents
from incdump.cli.durations import time_option
from incdump.cli.invocation import (
    Command,
    Invocation,
    error_fields,
    json_option,
    one_line,
    output,
    print_json,
    verbose_option,
)
from incdump.cli.progress import Arrivals
from incdump.cli.signals import Stopped, run
from incdump.cli.tls import take_tls, tls_options

if TYPE_CHECKING:
    from incdump.engine.page_server import PageServer, SessionReport

_EXAMPLE = """\b
Examples:
  incdump page-server -D images --once --port 9999
  criu dump -t 1234 -D rest --page-server --address 127.0.0.1 --port 9999
"""


@click.command("page-server", cls=Command, epilog=_EXAMPLE)
@click.option(
    "-D",
    "--images-dir",
    default=".",
    metavar="DIR",
    show_default="the working directory",
    help="Where the pages go; made if it does not exist, refused if it holds images.",
    shell_complete=directories,
)
@click.option(
    "--address",
    default="127.0.0.1",
    metavar="ADDRESS",
    show_default=True,
    help="Where to listen. Whoever can connect is believed, unless there is --tls.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, metavar="PORT", show_default=True, help="0: any free one."
)
@click.option(
    "--prev-images-dir",
    "parent",
    metavar="DIR",
    shell_complete=parents,
    help="The parent images of the first session, relative to DIR of -D.",
)
@click.option("--auto-dedup", is_flag=True, help="Parent images give back the disk space of pages that come again.")
@click.option("--once", is_flag=True, help="Serve one session, into DIR itself, and end.")
@click.option(
    "--rounds", type=click.IntRange(min=1), metavar="N", help="End after N sessions, which go to DIR/1, DIR/2, ..."
)
@click.option("--max-bytes", type=click.IntRange(min=0), metavar="N", help="Refuse more bytes of pages in a session.")
@time_option("--timeout", "120s", "How long a client may be silent.")
@click.option(
    "--status-fd",
    type=click.IntRange(min=0),
    metavar="FD",
    help="Write a zero byte there, and close it, when listening.",
)
@tls_options
@json_option
@verbose_option
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    images_dir: str,
    address: str,
    port: int,
    parent: str | None,
    auto_dedup: bool,
    once: bool,
    rounds: int | None,
    max_bytes: int | None,
    timeout: float,
    status_fd: int | None,
    **given: Any,
) -> None:
    """Receive pages over the network, from CRIU or whoever speaks its page-server protocol.

    With --once DIR is that of the one session. Otherwise each goes to a directory of its own, DIR/1, DIR/2 and so on,
    with the one before as its parent, until SIGTERM or Ctrl-C. A session that breaks leaves nothing.

    With --json: an object a line, when it listens and at each session's end.
    """
    if once and rounds is not None:
        raise click.UsageError("either --once or --rounds, not both")
    for name, text in (("-D", images_dir), ("--prev-images-dir", parent), ("--address", address)):
        if text == "" or (text is not None and "\0" in text):
            raise click.BadParameter("an empty name", param_hint=name)
    tls = take_tls(given)
    from incdump.engine.page_server import PageServer, PageServerOptions

    options = PageServerOptions(
        address=address,
        port=port,
        rounds=1 if once else rounds,
        auto_dedup=auto_dedup,
        max_bytes=max_bytes,
        timeout=timeout,
        own_dirs=not once,
        tls=tls,
    )
    server = PageServer(images_dir, parent=parent, options=options)
    try:
        run(lambda: _serve(invocation, server, status_fd))
    except Stopped as stopped:
        if server.was_serving:
            raise Stopped(stopped.number, "the session under way was dropped, nothing of it is left") from None
        # Else it was told to end, and nothing was lost by that.


async def _serve(invocation: Invocation, server: PageServer, status_fd: int | None) -> None:
    async with server:
        _tell_listening(invocation, server)
        if status_fd is not None:
            _tell_status(status_fd)
        arrivals = Arrivals(lambda: server.arriving, show=invocation.shows_progress)

        def on_session(report: SessionReport) -> None:
            arrivals.clear()
            _tell_session(invocation, report)

        with arrivals.shown():
            await server.serve(on_session)


def _tell_listening(invocation: Invocation, server: PageServer) -> None:
    if invocation.json:
        print_json({"event": "listening", "address": server.host, "port": server.port})
        return
    with output():
        print(f"listening on {server.host} port {server.port}")


def _tell_status(fd: int) -> None:
    try:
        os.write(fd, b"\0")
        os.close(fd)
    except OSError as error:
        raise click.BadParameter(f"cannot write to it: {error.strerror}", param_hint="--status-fd") from error


def _tell_session(invocation: Invocation, report: SessionReport) -> None:
    if invocation.json:
        error = {} if report.error is None else error_fields(report.error, str(report.error))
        fields: dict[str, Any] = asdict(report) | {"error": None} | error
        print_json({"event": "session"} | fields)
        return
    if report.error is not None:
        click.echo(f"session of {report.client} dropped: {one_line(str(report.error))}", err=True)
        return
    from incdump.cli.text import bytes_text, count_text, time_text

    came = f" ({bytes_text(report.pages << 12)} in {time_text(int(report.seconds * 1e6))})"
    holes = f", {report.holes:,} left to the parent images" if report.holes else ""
    punched = f", {bytes_text(report.punched)} given back by the parent images" if report.punched else ""
    with output():
        print(
            f"session of {report.client} complete: {count_text(report.pages, 'page', 'pages')} of "
            f"{count_text(report.images, 'image', 'images')} into {report.images_dir}{came}{holes}{punched}"
        )
    if report.warning is not None:
        click.echo(f"warning: {one_line(report.warning)}", err=True)
