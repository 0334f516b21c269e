"""The options of the pre-copy loop: when to stop the target, and what to do when that moment does not come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from incdump.cli.dumping import all_of
from incdump.cli.durations import DOWNTIME, time_option
from incdump.model.precopy import ON_TIMEOUT, PrecopyPolicy

if TYPE_CHECKING:
    from incdump.model.precopy import Final


policy_options = all_of(
    (
        click.option(
            "--downtime",
            type=DOWNTIME,
            default="300ms",
            metavar="TIME",
            show_default=True,
            help="How long it may stand still: a number with its unit, 50ms or 1.5s.",
        ),
        time_option("--timeout", "10m", "The loop has to end by then."),
        click.option(
            "--on-timeout",
            type=click.Choice(ON_TIMEOUT),
            default="cancel",
            show_default=True,
            help="What then: leave the target as it is; stop it all the same; or slow it down until the rest is small.",
        ),
        click.option(
            "--max-rounds", type=click.IntRange(min=1), metavar="N", help="Stop it after N pre-dumps in any case."
        ),
    )
)
"""What makes a `PrecopyPolicy`, for a click command."""

freeze_timeout_option = time_option("--freeze-timeout", "10s", "How long to wait for every thread to stop.")


hook_timeout_option = time_option(
    "--hook-timeout", "30s", "How long the hook may take at each step; then it is killed, and counts as failed."
)


def take_policy(given: dict[str, Any], final: Final) -> PrecopyPolicy:
    """Take the values of `policy_options` out of a command's."""
    return PrecopyPolicy(
        **{name: given.pop(name) for name in ("downtime", "timeout", "on_timeout", "max_rounds")}, final=final
    )
