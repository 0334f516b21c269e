"""``incdump migrate``: moves a running process tree to another host."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from incdump.cli.address import PEER
from incdump.cli.dumping import stall_timeout_option, thp_option, tree_options, wait_for_lazy_option
from incdump.cli.durations import time_option
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
from incdump.cli.policy import freeze_timeout_option, hook_timeout_option, policy_options, take_policy
from incdump.cli.receive import take_hook
from incdump.cli.report import Report, report_option
from incdump.cli.signals import Stopped, run
from incdump.cli.tls import take_tls, tls_options
from incdump.model.options import COMPRESSIONS, DumpOptions
from incdump.model.precopy import IF_UNKNOWN
from incdump.proc.tree import check_target

if TYPE_CHECKING:
    from incdump.engine.migrate import MigrateResult
    from incdump.model.options import WayName
    from incdump.model.precopy import PrecopyPolicy

_STEPS = {
    "stopped": "it stands still, and everything is there",
    "restore": "restoring there",
    "go": "it may run there",
    "runs": "it runs there",
    "asking": "asking what has become of it",
}

_EXAMPLE = """\b
Examples:
  incdump receive -D arriving --listen 192.0.2.7:7777 --restore        (on the other host)
  incdump migrate -t 1234 192.0.2.7:7777
  incdump migrate -t 1234 192.0.2.7:7777 --downtime 100ms --on-timeout throttle -- --tcp-established
"""


@click.command("migrate", cls=Command, epilog=_EXAMPLE)
@tree_options
@click.argument("where", type=PEER, metavar="HOST:PORT")
@policy_options
@click.option(
    "--hook",
    metavar="COMMAND",
    help="Called at each step, with INCDUMP_STEP: stopped, moved or failed. To move an address along.",
)
@hook_timeout_option
@click.option(
    "--if-unknown",
    type=click.Choice(IF_UNKNOWN),
    default="stop",
    show_default=True,
    help="If the connection dies in the moment of the switch, and it cannot be found out whether the tree runs there: "
    "what becomes of it here.",
)
@time_option("--asking", "1m", "How long to try to find that out.")
@click.option(
    "--compression",
    type=click.Choice(COMPRESSIONS),
    default="auto",
    show_default=True,
    help="Of pages on their way. auto: where it turns out to be quicker.",
)
@criu_option
@way_option
@tls_options
@freeze_timeout_option
@stall_timeout_option
@wait_for_lazy_option
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
    where: tuple[str, int],
    hook: str | None,
    hook_timeout: float,
    if_unknown: Any,
    asking: float,
    criu: str | None,
    way: WayName,
    criu_options: tuple[str, ...],
    report: Report | None,
    **given: Any,
) -> None:
    """Move a process tree to another host, where `incdump receive --restore` listens.

    Its memory goes over while it runs, again and again what it has written since, until the rest is small; then it is
    stopped, the rest goes over, it is restored there, and is killed here when it runs there. Whatever goes wrong before
    that, it goes on here.

    With --json: an object a line, for each round and each step, and one at the end.
    """
    tls = take_tls(given)
    policy = take_policy(given, "checkpoint")
    options = DumpOptions(**given, tls=tls)
    with Log(invocation.verbosity, None, "") as log:
        target = check_target(pid)  # before the engine is loaded: who named a wrong process hears of it at once
        receiver = f"{where[0]} port {where[1]}"
        log.line(f"migration of process {pid} to {receiver}")
        title = f"migration of process {pid} ({target.comm}) to {receiver}"
        audience = Audience(invocation, log, policy, report, title)
        more: dict[str, Any] = {"criu": criu, "criu_options": criu_options, "hook": take_hook(hook)}
        more["hook_timeout"] = hook_timeout
        more |= {"if_unknown": if_unknown, "asking": asking, "way": way}
        steps: list[str] = []
        with nullcontext() if report is None else report.of(pid, target.comm, policy, log.warning):
            try:
                result = run(lambda: _migrate(invocation, audience, log, pid, where, policy, options, more, steps))
            except Stopped as stopped:
                if "runs" in steps:
                    raise Stopped(stopped.number, f"the process runs at {receiver} already") from None
                raise
            if report is not None and result.final is not None:
                report.last_dump(result.final, result.frozen_at, result.parts)
        for warning in result.warnings:
            log.warning(warning)
    if invocation.json:
        about = {"pid": result.pid, "receiver": result.receiver, "outcome": result.outcome}
        print_json({"event": "end", **about, **end_fields(result, result.parts, report)})
    else:
        _show(policy, result, report)


async def _migrate(
    invocation: Invocation,
    audience: Audience,
    log: Log,
    pid: int,
    where: tuple[str, int],
    policy: PrecopyPolicy,
    options: DumpOptions,
    more: dict[str, Any],
    steps: list[str],
) -> MigrateResult:
    """Call the engine.

    :param steps: takes the steps that were told.
    """
    from incdump.engine.migrate import migrate

    def on_step(step: str) -> None:
        steps.append(step)
        log.line(_STEPS[step])
        if invocation.json:
            print_json({"event": "step", "step": step})
        else:
            audience.rounds.step(_STEPS[step])

    address, port = where
    told = {**audience.callbacks(), "on_step": on_step}
    with audience.rounds.shown():
        return await migrate(pid, address, port, policy=policy, options=options, **told, **more)


def _show(policy: PrecopyPolicy, result: MigrateResult, report: Report | None) -> None:
    """What came of it, for people."""
    from incdump.cli.text import Fact, bytes_text

    sent = sum(done.bytes_written for done in result.rounds)
    sent += 0 if result.final is None else result.final.stats.bytes_written
    what = "runs" if result.outcome == "runs" else "goes on here, and is stored"
    title = f"process {result.pid} {what} at {result.receiver}"
    show_end(title, policy, result, result.parts, report, [Fact("pages sent", f"{sent >> 12:,}", bytes_text(sent))])
