"""``incdump check``: proves a chain of images, alone or against the live process."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from incdump.cli.completion import directories, processes
from incdump.cli.dumping import stall_timeout_option
from incdump.cli.durations import time_option
from incdump.cli.invocation import (
    Command,
    Invocation,
    error_fields,
    json_option,
    one_line,
    print_json,
    verbose_option,
)
from incdump.errors import BadImage, BrokenChain, CheckError, ParentMismatch, UnfinishedImages

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from incdump.engine.check import AgainstReport
    from incdump.images.chain import ChainReport

T = TypeVar("T")

_EXAMPLE = """\b
Examples:
  incdump check images/3
  incdump dump -t 1234 -D images/3 --leave-stopped && incdump check images/3 --against 1234
"""


@click.command("check", cls=Command, epilog=_EXAMPLE)
@click.argument("images_dir", metavar="DIR", shell_complete=directories)
@click.option(
    "--against",
    type=click.IntRange(min=1),
    metavar="PID",
    shell_complete=processes,
    help="Freeze this tree and compare every page of it.",
)
@time_option("--timeout", "10s", "With --against: how long to wait for every thread to stop.")
@stall_timeout_option
@json_option
@verbose_option
@click.pass_obj
def command(invocation: Invocation, images_dir: str, against: int | None, timeout: float, stall_timeout: float) -> None:
    """Prove a chain of images dirs, DIR being the newest.

    Every directory of it is finished, every file is whole, and every page that a directory leaves to its parent is
    there. With --against, every page is compared with the process, which is expected to be in the very state that was
    dumped: one that `incdump dump --leave-stopped` left stopped.
    """
    if not images_dir or "\0" in images_dir:
        raise click.BadParameter("an empty name", param_hint="DIR")
    show = invocation.shows_progress and not invocation.json
    report = _check(images_dir, show=show)
    timeouts = {"freeze_timeout": timeout, "stall_timeout": stall_timeout}
    compared = None if against is None else _compare(images_dir, against, timeouts, show=show)
    ok = compared is None or compared.ok
    error = None if ok else CheckError(_complaint(images_dir, against, compared), pid=against, path=images_dir)
    if invocation.json:
        print_json(_as_dict(report, compared) | ({} if error is None else error_fields(error, str(error))))
        invocation.json = False  # that was the one object
    else:
        _show(report, compared, against)
    if error is not None:
        raise error


def _check(images_dir: str, *, show: bool) -> ChainReport:
    """The chain's report.

    :param show: progress may be shown, if there is a terminal to show it on.
    :raises incdump.errors.ImagesError: what is wrong; its exit code is that of `CheckError` if it could be read at all.
    """
    from incdump.engine.check import check

    try:
        if not (show and sys.stderr.isatty()):
            return check(images_dir)
        return _waiting("proving the chain", partial(_in_thread, check, images_dir))
    except (BadImage, BrokenChain, ParentMismatch, UnfinishedImages) as error:
        error.exit_code = CheckError.exit_code
        raise


def _compare(images_dir: str, pid: int, timeouts: dict[str, float], *, show: bool) -> AgainstReport:
    from incdump.cli.signals import run
    from incdump.engine.check import check_against

    job = partial(check_against, images_dir, pid, **timeouts)
    return _waiting("comparing every page", job) if show and sys.stderr.isatty() else run(job)


def _waiting(what: str, job: Callable[[], Awaitable[T]]) -> T:
    """Run a job, and show that it takes its time, if it does."""
    from incdump.cli.progress import Waiting
    from incdump.cli.signals import run

    async def with_progress() -> T:
        with Waiting(what).shown():
            return await job()

    return run(with_progress)


async def _in_thread(function: Callable[..., T], *arguments: object) -> T:
    from incdump.engine.threads import in_thread

    return await in_thread(function, *arguments)


def _complaint(images_dir: str, pid: int | None, report: AgainstReport | None) -> str:
    from incdump.cli.text import count_text

    assert report is not None
    kinds = (
        (report.pages_wrong, "with other bytes"),
        (report.pages_missing, "missing in the images"),
        (report.pages_stray, "in the images only"),
    )
    found = ", ".join(f"{count_text(number, 'page', 'pages')} {what}" for number, what in kinds if number)
    return f"{images_dir} is not what process {pid} holds: {found}"


def _as_dict(report: ChainReport, compared: AgainstReport | None) -> dict[str, Any]:
    """One JSON object: pages are 4 KiB, bytes are bytes."""
    levels = [asdict(level) | {"path": str(level.path)} for level in report.levels]
    fields: dict[str, Any] = {"ok": compared is None or compared.ok, "levels": levels}
    fields["warnings"] = list(report.warnings)
    fields["against"] = None if compared is None else asdict(compared) | {"ok": compared.ok}
    return fields


def _show(report: ChainReport, compared: AgainstReport | None, pid: int | None) -> None:
    from incdump.cli.text import Fact, bytes_text, count_text, show_facts, show_table

    rows = [
        (
            str(level.path),
            f"{len(level.pids):,}",
            f"{level.pages_present:,}",
            f"{level.pages_in_parent:,}",
            bytes_text(level.bytes),
        )
        for level in report.levels
    ]
    columns = ("images dir", " processes", " pages in it", " left to its parent", " size")
    show_table(f"the chain holds: {count_text(len(rows), 'finished directory', 'finished directories')}", columns, rows)
    for warning in report.warnings:
        click.echo(f"warning: {one_line(warning)}", err=True)
    if compared is None:
        return
    facts = [
        Fact("processes", f"{compared.processes:,}"),
        Fact("pages compared", f"{compared.pages_compared:,}"),
        Fact("pages wrong", f"{compared.pages_wrong:,}", "other bytes than the process has"),
        Fact("pages missing", f"{compared.pages_missing:,}", "the process has them, the images do not"),
        Fact("pages stray", f"{compared.pages_stray:,}", "the images have them, the process has not mapped them"),
    ]
    facts += [Fact("", "", line) for line in compared.first]
    show_facts(f"compared with process {pid}: {'every page is right' if compared.ok else 'NOT the same'}", facts)
