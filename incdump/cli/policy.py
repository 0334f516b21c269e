"""The options of the pre-copy loop: when to stop the target, and what to do when that moment does not come."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from incdump.cli.dumping import all_of
from incdump.cli.invocation import SECONDS
from incdump.model.precopy import ON_TIMEOUT, PrecopyPolicy

if TYPE_CHECKING:
    from incdump.model.precopy import Final


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A time: a number of seconds, or with a unit, as in ``300ms``, ``5s``, ``10m``, ``1h``."""

    name = "duration"
    _UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}  # noqa: RUF012

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|)", str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no time: give 300ms, 5s, 10m or 1h", param, ctx)
        return float(match[1]) * self._UNITS[match[2]]


DURATION = Duration()


policy_options = all_of(
    (
        click.option(
            "--downtime", type=DURATION, default="300ms", show_default=True, help="How long it may stand still."
        ),
        click.option("--timeout", type=DURATION, default="10m", show_default=True, help="The loop has to end by then."),
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

freeze_timeout_option = click.option(
    "--freeze-timeout",
    type=SECONDS,
    default=10.0,
    metavar="SECONDS",
    show_default=True,
    help="How long to wait for every thread to stop.",
)


hook_timeout_option = click.option(
    "--hook-timeout",
    type=DURATION,
    default="30s",
    show_default=True,
    help="How long the hook may take at each step; then it is killed, and counts as failed.",
)


def take_policy(given: dict[str, Any], final: Final) -> PrecopyPolicy:
    """Take the values of `policy_options` out of a command's."""
    return PrecopyPolicy(
        **{name: given.pop(name) for name in ("downtime", "timeout", "on_timeout", "max_rounds")}, final=final
    )
