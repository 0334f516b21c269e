"""``incdump precopy``: pre-dumps until the rest is small enough, and the last dump."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from incdump.cli.dumping import (
    stall_timeout_option,
    target_options,
    thp_option,
    track_for_option,
    wait_for_lazy_option,
)
from incdump.cli.invocation import (
    Command,
    Invocation,
    criu_arguments,
    criu_option,
    json_option,
    print_json,
    verbose_option,
    way_option,
)
from incdump.cli.log import Log
from incdump.cli.loop import Audience, end_fields, show_end
from incdump.cli.policy import freeze_timeout_option, policy_options, take_policy
from incdump.cli.report import Report, report_option
from incdump.cli.signals import run
from incdump.model.options import DumpOptions
from incdump.model.precopy import FINALS
from incdump.model.stats import freeze_parts
from incdump.proc.tree import check_target

if TYPE_CHECKING:
    from incdump.engine.precopy import PrecopyResult
    from incdump.model.options import Afterwards, WayName
    from incdump.model.precopy import PrecopyPolicy
    from incdump.model.stats import FreezePart

_EXAMPLE = """\b
Examples:
  incdump precopy -t 1234 -D images
  incdump precopy -t 1234 -D images --downtime 50ms --timeout 10m --on-timeout throttle --final checkpoint
  incdump precopy -t 1234 -D images --report precopy.html
"""


@click.command("precopy", cls=Command, epilog=_EXAMPLE)
@target_options
@policy_options
@click.option("--final", type=click.Choice(FINALS), default="dump", show_default=True, help="What comes last.")
@criu_option
@way_option
@click.option("-R", "--leave-running", is_flag=True, help="Let the tree go on afterwards: the default.")
@click.option("-s", "--leave-stopped", is_flag=True, help="Leave it stopped, as by SIGSTOP.")
@click.option("--kill", is_flag=True, help="Kill it once the last images are complete.")
@freeze_timeout_option
@stall_timeout_option
@wait_for_lazy_option
@track_for_option
@thp_option
@report_option
@criu_arguments
@json_option
@verbose_option
@click.pass_obj
def command(
    invocation: Invocation,
    /,
    pid: int,
    images_dir: str,
    final: Any,
    criu: str | None,
    way: WayName,
    criu_options: tuple[str, ...],
    leave_running: bool,
    leave_stopped: bool,
    kill: bool,
    freeze_timeout: float,
    report: Report | None,
    **given: Any,
) -> None:
    """Pre-dump a process tree again and again, until it need be stopped for a moment only; then make the last dump.

    The rounds go to DIR/1, DIR/2 and so on, each on top of the one before; DIR/latest is a link to the newest. After
    each it is worked out how long the target would stand still if it were stopped now.

    With --json: an object a line, one for each round, and one at the end.
    """
    if leave_running + leave_stopped + kill > 1:
        raise click.UsageError("only one of --leave-running, --leave-stopped and --kill can be had")
    if not images_dir or "\0" in images_dir:
        raise click.BadParameter("an empty name", param_hint="-D")
    if criu_options and final != "checkpoint":
        raise click.UsageError("what stands after -- is for CRIU: it needs --final checkpoint")
    afterwards: Afterwards = "stopped" if leave_stopped else "killed" if kill else "running"
    policy = take_policy(given, final)
    options = DumpOptions(
        **given,
        freeze_timeout=freeze_timeout,
        afterwards=afterwards,
    )
    with Log(invocation.verbosity, None, images_dir) as log:
        target = check_target(pid)  # before the engine is loaded: who named a wrong process hears of it at once
        log.line(f"pre-copy of process {pid} into {images_dir}")
        title = f"pre-copy of process {pid} ({target.comm}) into {images_dir}"
        audience = Audience(invocation, log, policy, report, title)
        with_criu = {"criu": criu, "criu_options": criu_options, "way": way}
        with nullcontext() if report is None else report.of(pid, target.comm, policy, log.warning):
            result = run(lambda: _precopy(audience, pid, images_dir, policy, options, with_criu))
            parts = [] if result.final is None else freeze_parts(result.final)
            if report is not None and result.final is not None:
                report.last_dump(result.final, result.frozen_at, parts)
        for warning in result.warnings:
            log.warning(warning)
    if invocation.json:
        print_json({"event": "end", "images_dir": result.images_dir, **end_fields(result, parts, report)})
    else:
        _show(policy, result, parts, report)


async def _precopy(
    audience: Audience,
    pid: int,
    images_dir: str,
    policy: PrecopyPolicy,
    options: DumpOptions,
    with_criu: dict[str, Any],
) -> PrecopyResult:
    """Call the engine."""
    from incdump.engine.precopy import precopy

    with audience.rounds.shown():
        return await precopy(pid, images_dir, policy=policy, options=options, **audience.callbacks(), **with_criu)


def _show(policy: PrecopyPolicy, result: PrecopyResult, parts: list[FreezePart], report: Report | None) -> None:
    """What came of it, for people."""
    from incdump.cli.text import Fact

    own = []
    if result.final is not None:
        stats = result.final.stats
        own = [
            Fact("last dump", policy.final, result.final.images_dir),
            Fact("pages written", f"{stats.pages_written + stats.shpages_written:,}"),
        ]
    show_end(f"pre-copy into {result.images_dir}", policy, result, parts, report, own)
