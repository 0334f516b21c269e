"""``incdump precopy``: pre-dumps until the rest is small enough, and the last dump."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from incdump.cli.dumping import target_options
from incdump.cli.invocation import (
    Command,
    Invocation,
    criu_arguments,
    criu_option,
    json_option,
    one_line,
    output,
    print_json,
    verbose_option,
)
from incdump.cli.policy import freeze_timeout_option, policy_options, take_policy
from incdump.cli.signals import run
from incdump.model.options import DumpOptions
from incdump.model.precopy import FINALS
from incdump.proc.tree import check_target

if TYPE_CHECKING:
    from incdump.engine.precopy import PrecopyResult
    from incdump.model.options import Afterwards
    from incdump.model.precopy import Decision, PrecopyPolicy, PrecopyRound

_EXAMPLE = """\b
Examples:
  incdump precopy -t 1234 -D images
  incdump precopy -t 1234 -D images --downtime 50ms --timeout 10m --on-timeout throttle --final checkpoint
"""


@click.command("precopy", cls=Command, epilog=_EXAMPLE)
@target_options
@policy_options
@click.option("--final", type=click.Choice(FINALS), default="dump", show_default=True, help="What comes last.")
@criu_option
@click.option("-R", "--leave-running", is_flag=True, help="Let the tree go on afterwards: the default.")
@click.option("-s", "--leave-stopped", is_flag=True, help="Leave it stopped, as by SIGSTOP.")
@click.option("--kill", is_flag=True, help="Kill it once the last images are complete.")
@freeze_timeout_option
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
    criu_options: tuple[str, ...],
    leave_running: bool,
    leave_stopped: bool,
    kill: bool,
    freeze_timeout: float,
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
    check_target(pid)  # before the engine is loaded: who named a wrong process hears of it at once
    from incdump.engine.precopy import precopy

    report = Rounds(invocation, policy)
    result = run(
        lambda: precopy(
            pid,
            images_dir,
            policy=policy,
            options=options,
            on_round=report.round,
            criu=criu,
            criu_options=criu_options,
        )
    )
    report.end(result)


class Rounds:
    """What is told as the rounds run."""

    _HEADINGS = ("round", "pages", "bytes", "time", "written/s", "copied/s", "downtime", "")
    _WIDTHS = (5, 10, 10, 9, 11, 11, 9, 0)

    def __init__(self, invocation: Invocation, policy: PrecopyPolicy) -> None:
        self._json = invocation.json
        self._policy = policy

    def round(self, done: PrecopyRound, decision: Decision) -> None:
        """A round is complete."""
        if self._json:
            print_json({"event": "round", **asdict(done), **decision.as_dict()})
            return
        from incdump.cli.text import bytes_text, time_text

        now = decision.estimate

        def rate(value: float | None) -> str:
            return "" if value is None else f"{bytes_text(int(value))}"

        cells = (
            str(done.number),
            f"{done.bytes_written >> 12:,}",
            bytes_text(done.bytes_written),
            time_text(int(done.seconds * 1e6)),
            rate(now.dirty_rate),
            rate(now.bandwidth),
            "" if now.downtime is None else time_text(int(now.downtime * 1e6)),
            decision.why + (f", slowed down by {done.throttled:.0%}" if done.throttled else ""),
        )
        if done.number == 1:
            self._line(self._HEADINGS)
        self._line(cells)

    @output()
    def _line(self, cells: tuple[str, ...]) -> None:
        text = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, self._WIDTHS, strict=True))
        print(one_line(text).rstrip(), flush=True)

    def end(self, result: PrecopyResult) -> None:
        """The loop is over."""
        final = result.final
        if self._json:
            print_json(
                {
                    "event": "end",
                    "images_dir": result.images_dir,
                    "rounds": len(result.rounds),
                    "why": "" if result.decision is None else result.decision.why,
                    "downtime": result.downtime,
                    "seconds": result.seconds,
                    "hottest": result.hottest,
                    "warnings": result.warnings,
                    "final": None if final is None else final.as_dict(),
                }
            )
            return
        from incdump.cli.text import Fact, show_facts, time_text

        facts = [Fact("rounds", str(len(result.rounds)), result.decision.why if result.decision else "")]
        if final is not None and result.downtime is not None:
            stats = final.stats
            facts += [
                Fact("last dump", self._policy.final, final.images_dir),
                Fact("pages written", f"{stats.pages_written + stats.shpages_written:,}"),
                Fact(
                    "downtime", time_text(int(result.downtime * 1e6)), f"of {self._policy.downtime * 1e3:g} ms allowed"
                ),
            ]
        facts.append(Fact("time in all", time_text(int(result.seconds * 1e6))))
        facts += [Fact("written most", "", text) for text in result.hottest]
        show_facts(f"pre-copy into {result.images_dir}", facts)
