"""What the commands that run the pre-copy loop have in common: who is told of it as it runs, and what is said of it in
the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from incdump.cli.rounds import Rounds, allowed_text, show_freeze

if TYPE_CHECKING:
    from collections.abc import Sequence

    from incdump.cli.invocation import Invocation
    from incdump.cli.log import Log
    from incdump.cli.report import Report
    from incdump.cli.text import Fact
    from incdump.engine.migrate import MigrateResult
    from incdump.engine.precopy import PrecopyResult
    from incdump.model.precopy import Decision, PrecopyPolicy, PrecopyRound
    from incdump.model.stats import DumpStats, FreezePart


class Audience:
    """Those who are told: the terminal or the JSON lines, the log, the report.

    :ivar rounds: the first of them.
    """

    def __init__(
        self, invocation: Invocation, log: Log, policy: PrecopyPolicy, report: Report | None, title: str
    ) -> None:
        """
        :param title: what is being done, one line.
        """
        self.rounds = Rounds(invocation, policy, title)
        self._log = log
        self._report = report

    def callbacks(self) -> dict[str, Any]:
        """For the engine to call, as arguments by name."""
        on_written = None if self._report is None else self._report.written
        return {"on_round": self._round, "on_written": on_written, "progress": self._progress}

    def _round(self, done: PrecopyRound, decision: Decision) -> None:
        if self._report is not None:
            self._report.round(done, decision)
        self.rounds.round(done, decision)

    def _progress(self, step: str, stats: DumpStats) -> None:
        self._log.progress(step, stats)
        self.rounds.progress(step, stats)


def end_fields(
    result: PrecopyResult | MigrateResult, parts: Sequence[FreezePart], report: Report | None
) -> dict[str, Any]:
    """The fields of the last JSON object that tell of the loop."""
    return {
        "rounds": len(result.rounds),
        "why": result.why,
        "downtime": result.downtime,
        "frozen_at": result.frozen_at,
        "freeze": [{"part": part.name, "seconds": part.microseconds / 1e6} for part in parts],
        "seconds": result.seconds,
        "hottest": result.hottest,
        "warnings": result.warnings,
        "report": None if report is None else report.path,
        "final": None if result.final is None else result.final.as_dict(),
    }


def show_end(
    title: str,
    policy: PrecopyPolicy,
    result: PrecopyResult | MigrateResult,
    parts: Sequence[FreezePart],
    report: Report | None,
    own: Sequence[Fact],
) -> None:
    """Print what came of it, for people.

    :param own: facts of the command's own, shown after the number of rounds.
    """
    from incdump.cli.text import Fact, bytes_text, show_facts, time_text

    facts = [Fact("rounds", str(len(result.rounds)), result.why), *own]
    deferred = result.rounds[-1].bytes_deferred if result.rounds else 0
    if deferred:
        facts.append(Fact("left for last", bytes_text(deferred), "written in every round"))
    if result.downtime is not None:
        facts.append(Fact("downtime", time_text(int(result.downtime * 1e6)), f"of {allowed_text(policy)} allowed"))
    facts.append(Fact("time in all", time_text(int(result.seconds * 1e6))))
    facts += [Fact("written most", "", text) for text in result.hottest]
    if report is not None and report.path is not None:
        facts.append(Fact("report", "", report.path))
    show_facts(title, facts)
    if parts:
        show_freeze("how the downtime divides", parts)
