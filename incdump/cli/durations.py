"""Times on the command line: one parser for all commands.

A time has a unit: ``50ms``, ``1.5s``, ``2m``, ``1h``. A bare number is a number of seconds where CRIU has the option
and means that; where people have taken it for milliseconds (``--downtime``) it is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

_UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST = 1e8
_HINT = "give a number and its unit, as in 50ms, 1.5s, 2m or 1h"


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A time that is more than nothing, and not for ever; the value is in seconds.

    :param bare: whether a number without a unit is a number of seconds.
    :param zero: whether ``0s`` will do.
    """

    name = "time"

    def __init__(self, *, bare: bool = True, zero: bool = False) -> None:
        self.bare = bare
        self.zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert the text of an argument, or a default in seconds.

        :raises click.BadParameter: it is no such time.
        """
        if isinstance(value, float):
            return value
        text = str(value).strip()
        match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?|\.\d{1,9})(ms|s|m|h|)", text)
        if match is None:
            self.fail(f"{value!r} is no time: {_HINT}", param, ctx)
        if not match[2] and not self.bare:
            self.fail(f"{text} has no unit: write {text}ms or {text}s", param, ctx)
        seconds = float(match[1]) * _UNITS[match[2]]
        if not 0 < seconds <= _LONGEST and not (self.zero and seconds == 0):
            self.fail(f"{value!r} is no time that can be waited for: {_HINT}", param, ctx)
        return seconds


DURATION = Duration()
DURATION_OR_NONE = Duration(bare=False, zero=True)
DOWNTIME = Duration(bare=False)


def time_option(
    name: str, default: str, text: str, kind: Duration = DURATION
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option for a time, for a click command.

    :param default: as it would be typed.
    :param text: its help.
    """
    return click.option(name, type=kind, default=default, metavar="TIME", show_default=True, help=text)
