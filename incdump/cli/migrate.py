"""``incdump migrate``: moves a running process tree to another host."""

from __future__ import annotations

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
from incdump.cli.policy import DURATION, freeze_timeout_option, policy_options, take_policy
from incdump.cli.precopy import Rounds
from incdump.cli.receive import take_hook
from incdump.cli.signals import run
from incdump.cli.tls import take_tls, tls_options
from incdump.model.options import COMPRESSIONS, DumpOptions
from incdump.model.precopy import IF_UNKNOWN
from incdump.proc.tree import check_target

if TYPE_CHECKING:
    from incdump.engine.migrate import MigrateResult
    from incdump.model.precopy import PrecopyPolicy

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
    words = take_hook(hook)
    check_target(pid)  # before the engine is loaded: who named a wrong process hears of it at once
    from incdump.engine.migrate import migrate

    rounds = Rounds(invocation, policy)

    def tell_step(step: str) -> None:
        if invocation.json:
            print_json({"event": "step", "step": step})

    result = run(
        lambda: migrate(
            pid,
            *where,
            policy=policy,
            options=options,
            on_round=rounds.round,
            on_step=tell_step,
            criu=criu,
            criu_options=criu_options,
            hook=words,
            if_unknown=if_unknown,
            asking=asking,
        )
    )
    _tell(invocation, policy, result)


def _tell(invocation: Invocation, policy: PrecopyPolicy, result: MigrateResult) -> None:
    if invocation.json:
        print_json(
            {
                "event": "end",
                "pid": result.pid,
                "receiver": result.receiver,
                "outcome": result.outcome,
                "rounds": len(result.rounds),
                "why": "" if result.decision is None else result.decision.why,
                "downtime": result.downtime,
                "parts": result.parts,
                "seconds": result.seconds,
                "hottest": result.hottest,
                "warnings": result.warnings,
                "final": None if result.final is None else result.final.as_dict(),
            }
        )
        return
    from incdump.cli.text import Fact, bytes_text, show_facts, time_text

    sent = sum(done.bytes_written for done in result.rounds)
    sent += 0 if result.final is None else result.final.stats.bytes_written
    facts = [
        Fact("rounds", str(len(result.rounds)), result.decision.why if result.decision else ""),
        Fact("sent", bytes_text(sent), "pages"),
    ]
    if result.downtime is not None:
        allowed = f"of {policy.downtime * 1e3:g} ms allowed"
        facts.append(Fact("downtime", time_text(int(result.downtime * 1e6)), allowed))
    names = {"copy": "of it, stop and copy", "restore": "restore there", "switch": "until it ran there"}
    facts += [Fact(names.get(name, name), time_text(int(part * 1e6))) for name, part in result.parts.items()]
    facts.append(Fact("time in all", time_text(int(result.seconds * 1e6))))
    facts += [Fact("written most", "", text) for text in result.hottest]
    what = (
        f"runs at {result.receiver}"
        if result.outcome == "runs"
        else f"is stored at {result.receiver}, and goes on here"
    )
    show_facts(f"process {result.pid} {what}", facts)
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
