"""The option that names the target, and what is said to whoever names it otherwise.

A process is named by its number alone: a name may belong to several, and the wrong process must not be dumped. So a
name, or a number without ``-t``, is an error that says what to write.
"""

from __future__ import annotations

import os
from typing import Any

import click

_SHOWN = 5


class TargetPid(click.IntRange):
    """A process number. Given a program's name, the error lists the processes that bear it."""

    name = "pid"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert the text of an argument.

        :raises click.BadParameter: it is no number, or none that a process can have.
        """
        if isinstance(value, str) and not value.strip().lstrip("+-").isdigit():
            self.fail(f"{value!r} is not a process number{_processes_named(value)}", param, ctx)
        return int(super().convert(value, param, ctx))


def _processes_named(name: str) -> str:
    """What can be said about a name: which processes bear it."""
    found = sorted(int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _bears(int(pid), name))
    others = [str(pid) for pid in found if pid != os.getpid()]
    if not others:
        return "; ps -e lists processes with their numbers"
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return f"; the processes of that name are {', '.join(others[:_SHOWN])}{more}"


def _bears(pid: int, name: str) -> bool:
    """Whether a process has a command name; the kernel keeps 15 bytes of it."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().rstrip(b"\n") == os.fsencode(name)[:15]
    except OSError:
        return False


def hint_at_target(args: list[str]) -> str | None:
    """What to write instead of a lone number, which was meant as the target.

    :param args: the arguments of a command that takes its target by ``-t``, as given.
    :returns: None if there is nothing to say.
    """
    if args and args[0].isdigit() and not any(arg.startswith(("-t", "--tree")) for arg in args):
        return f"name the target by -t: -t {args[0]}"
    return None
