"""What the library's functions are called with, checked on entry by the arguments' names: `incdump.model.fields` for
options that stand alone.

Each name means the same wherever it occurs, so there is one table. Nothing is opened, asked or begun before.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from incdump.model.fields import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_path,
    check_seconds,
    check_sequence,
    check_text,
    check_type,
)
from incdump.model.options import WAYS, DumpOptions
from incdump.model.precopy import IF_UNKNOWN, Freeze, PrecopyPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_perhaps_called = partial(check_callable, may_be_none=True)

_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "pid": partial(check_count, low=1),
    "images_dir": check_path,
    "parent": partial(check_path, may_be_none=True),
    "pidfile": partial(check_path, may_be_none=True),
    "options": partial(check_type, kind=DumpOptions, may_be_none=True),
    "policy": partial(check_type, kind=PrecopyPolicy, may_be_none=True),
    "rule": check_callable,
    "freezes": partial(check_sequence, kind=Freeze),
    "on_round": _perhaps_called,
    "on_written": _perhaps_called,
    "on_step": _perhaps_called,
    "progress": _perhaps_called,
    "criu": partial(check_type, kind=str, may_be_none=True),
    "criu_options": partial(check_sequence, kind=str),
    "way": partial(check_choice, choices=WAYS),
    "address": check_text,
    "port": partial(check_count, low=1, high=65535),
    "hook": partial(check_sequence, kind=str),
    "hook_timeout": check_seconds,
    "if_unknown": partial(check_choice, choices=IF_UNKNOWN),
    "asking": partial(check_seconds, may_be_zero=True),
    "freeze_timeout": check_seconds,
    "stall_timeout": check_seconds,
    "detached": check_flag,
}


def check_arguments(**given: Any) -> None:
    """Refuse what a function cannot be called with.

    :param given: its arguments, by their names.
    :raises incdump.errors.InvalidOption: the first of them that cannot be; it names the argument, and what it may be.
    """
    for name, value in given.items():
        _CHECKS[name](name, value)
