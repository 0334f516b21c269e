"""``incdump migrate``: moves a running process tree to another host."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from incdump.cli.address import PEER
from incdump.cli.dumping import tree_options
from incdump.cli.invocation import (
    Command,
    Invocation,
    criu_arguments,
    criu_option,
    json_option,
    print_json,
    verbose_option,
)
from incdump.cli.log import Log
from incdump.cli.policy import DURATION, freeze_timeout_option, policy_options, take_policy
from incdump.cli.receive import take_hook
from incdump.cli.report import Report, report_option
from incdump.cli.rounds import Rounds, allowed_text, show_freeze
from incdump.cli.signals import Stopped, run
from incdump.cli.tls import take_tls, tls_options
from incdump.model.options import COMPRESSIONS, DumpOptions
from incdump.model.precopy import IF_UNKNOWN
from incdump.proc.tree import check_target

if TYPE_CHECKING:
    from incdump.engine.migrate import MigrateResult
    from incdump.model.precopy import Decision, PrecopyPolicy, PrecopyRound
    from incdump.model.stats import DumpStats

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
@click.option(
    "--if-unknown",
    type=click.Choice(IF_UNKNOWN),
    default="stop",
    show_default=True,
    help="If the connection dies in the moment of the switch, and it cannot be found out whether the tree runs there: "
    "what becomes of it here.",
)
@click.option("--asking", type=DURATION, default="1m", show_default=True, help="How long to try to find that out.")
@click.option(
    "--compression",
    type=click.Choice(COMPRESSIONS),
    default="auto",
    show_default=True,
    help="Of pages on their way. auto: where it turns out to be quicker.",
)
@criu_option
@tls_options
@freeze_timeout_option
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
    if_unknown: Any,
    asking: float,
    criu: str | None,
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
        rounds = Rounds(invocation, policy, f"migration of process {pid} ({target.comm}) to {receiver}")
        more: dict[str, Any] = {"criu": criu, "criu_options": criu_options, "hook": take_hook(hook)}
        more |= {"if_unknown": if_unknown, "asking": asking}
        steps: list[str] = []
        with nullcontext() if report is None else report.of(pid, target.comm, policy, log.warning):
            try:
                result = run(
                    lambda: _migrate(invocation, rounds, report, log, pid, where, policy, options, more, steps)
                )
            except Stopped as stopped:
                if "runs" in steps:
                    raise Stopped(stopped.number, f"the process runs at {receiver} already") from None
                raise
            if report is not None and result.final is not None:
                report.last_dump(result.final, result.frozen_at, result.parts)
        for warning in result.warnings:
            log.warning(warning)
    if invocation.json:
        print_json(_fields(result, report))
    else:
        _show(policy, result, report)


async def _migrate(
    invocation: Invocation,
    rounds: Rounds,
    report: Report | None,
    log: Log,
    pid: int,
    where: tuple[str, int],
    policy: PrecopyPolicy,
    options: DumpOptions,
    more: dict[str, Any],
    steps: list[str],
) -> MigrateResult:
    """Call the engine, with those who tell of it."""
    from incdump.engine.migrate import migrate

    def on_round(done: PrecopyRound, decision: Decision) -> None:
        if report is not None:
            report.round(done, decision)
        rounds.round(done, decision)

    def on_step(step: str) -> None:
        steps.append(step)
        log.line(_STEPS[step])
        if invocation.json:
            print_json({"event": "step", "step": step})
        else:
            rounds.step(_STEPS[step])

    def progress(step: str, stats: DumpStats) -> None:
        log.progress(step, stats)
        rounds.progress(step, stats)

    with rounds.shown():
        return await migrate(
            pid,
            *where,
            policy=policy,
            options=options,
            on_round=on_round,
            on_written=None if report is None else report.written,
            on_step=on_step,
            progress=progress,
            **more,
        )


def _fields(result: MigrateResult, report: Report | None) -> dict[str, Any]:
    """The last JSON object."""
    return {
        "event": "end",
        "pid": result.pid,
        "receiver": result.receiver,
        "outcome": result.outcome,
        "rounds": len(result.rounds),
        "why": "" if result.decision is None else result.decision.why,
        "downtime": result.downtime,
        "frozen_at": result.frozen_at,
        "freeze": [{"part": part.name, "seconds": part.microseconds / 1e6} for part in result.parts],
        "seconds": result.seconds,
        "hottest": result.hottest,
        "warnings": result.warnings,
        "report": None if report is None else report.path,
        "final": None if result.final is None else result.final.as_dict(),
    }


def _show(policy: PrecopyPolicy, result: MigrateResult, report: Report | None) -> None:
    """What came of it, for people."""
    from incdump.cli.text import Fact, bytes_text, show_facts, time_text

    sent = sum(done.bytes_written for done in result.rounds)
    sent += 0 if result.final is None else result.final.stats.bytes_written
    facts = [
        Fact("rounds", str(len(result.rounds)), result.decision.why if result.decision else ""),
        Fact("pages sent", f"{sent >> 12:,}", bytes_text(sent)),
    ]
    if result.downtime is not None:
        facts.append(Fact("downtime", time_text(int(result.downtime * 1e6)), f"of {allowed_text(policy)} allowed"))
    facts.append(Fact("time in all", time_text(int(result.seconds * 1e6))))
    facts += [Fact("written most", "", text) for text in result.hottest]
    if report is not None and report.path is not None:
        facts.append(Fact("report", "", report.path))
    what = "runs" if result.outcome == "runs" else "goes on here, and is stored"
    show_facts(f"process {result.pid} {what} at {result.receiver}", facts)
    if result.parts:
        show_freeze("how the downtime divides", result.parts)
