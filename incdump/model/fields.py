"""Checks of what a caller hands over as options: values are refused when an options object is made.

A misspelt choice must not be found out where the choice is acted upon, with a process tree frozen, and must never be
taken for the last of the choices.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from incdump.errors import InvalidOption


def check_choice(field: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is none of some texts.

    :raises InvalidOption: it is not.
    """
    if not (isinstance(value, str) and value in choices):
        raise InvalidOption(field, value, f"choose one of {', '.join(map(repr, choices))}")


def check_seconds(field: str, value: Any, *, may_be_none: bool = False, may_be_zero: bool = False) -> None:
    """Refuse what is no time that can be waited for.

    :raises InvalidOption: it is no number, infinite, or not more than nothing.
    """
    if value is None and may_be_none:
        return
    wanted = "give seconds, as a number that is 0 or more" if may_be_zero else "give seconds, as a number above 0"
    if not _is_number(value) or not math.isfinite(value) or value < 0 or (not value and not may_be_zero):
        raise InvalidOption(field, value, wanted)


def check_count(field: str, value: object, low: int, high: int | None = None, *, may_be_none: bool = False) -> None:
    """Refuse what is no whole number of a range.

    :param high: the largest that is allowed; None: any.
    :raises InvalidOption: it is not.
    """
    if value is None and may_be_none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        wanted = f"from {low} to {high}" if high is not None else f"that is {low} or more"
        raise InvalidOption(field, value, f"give a whole number {wanted}")


def check_flag(field: str, value: object) -> None:
    """Refuse what is neither True nor False.

    :raises InvalidOption: it is not.
    """
    if not isinstance(value, bool):
        raise InvalidOption(field, value, "give True or False")


def check_address(field: str, value: object) -> None:
    """Refuse what is no pair of host and port; None is none.

    :raises InvalidOption: it is not.
    """
    if value is None:
        return
    if not (isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and value[0]):
        raise InvalidOption(field, value, "give a host and a port, as in ('127.0.0.1', 9999)")
    check_count(f"{field}[1]", value[1], 1, 65535)


def check_type(field: str, value: object, kind: type | tuple[type, ...], *, may_be_none: bool = False) -> None:
    """Refuse what is of another type.

    :raises InvalidOption: it is.
    """
    if value is None and may_be_none:
        return
    if not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InvalidOption(field, value, f"give a value of type {names}")


def check_text(field: str, value: Any) -> None:
    """Refuse what is no text with something in it: an empty address, for one, would be any.

    :raises InvalidOption: it is not.
    """
    if not isinstance(value, str) or not value or "\0" in value:
        raise InvalidOption(field, value, "give a text that is not empty")


def check_path(field: str, value: Any, *, may_be_none: bool = False) -> None:
    """Refuse what is no path.

    :raises InvalidOption: it is neither a text nor an `os.PathLike` of one, it is empty, or no path can have such
        characters in it.
    """
    if value is None and may_be_none:
        return
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidOption(field, value, "give a path, as a text or a pathlib.Path")


def check_callable(field: str, value: Any, *, may_be_none: bool = False) -> None:
    """Refuse what cannot be called.

    :raises InvalidOption: it cannot.
    """
    if not (callable(value) or (value is None and may_be_none)):
        raise InvalidOption(field, value, "give a function")


def check_sequence(field: str, value: Any, kind: type) -> None:
    """Refuse what is no sequence of values of one type: one text alone would pass for one of letters.

    :raises InvalidOption: it is not.
    """
    is_sequence = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not is_sequence or not all(isinstance(part, kind) for part in value):
        raise InvalidOption(field, value, f"give a list or tuple of values of type {kind.__name__}")


def check_words(field: str, value: object) -> None:
    """Refuse what is no tuple of texts: one text alone would pass for a tuple of letters.

    :raises InvalidOption: it is not.
    """
    if not isinstance(value, tuple) or not all(isinstance(word, str) for word in value):
        raise InvalidOption(field, value, "give a tuple of texts, as in ('program', 'argument')")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
