"""What a task is, besides its memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCore:
    """The fields of /proc that tell what a task is.

    :ivar comm: command name.
    :ivar flags: PF_* bits of the kernel.
    :ivar personality: as personality(2) has it.
    :ivar blocked_signals: signal N is bit N - 1.
    """

    comm: str
    flags: int
    personality: int
    blocked_signals: int
