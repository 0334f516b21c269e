"""How many mappings a tracked process has, lest tracking takes away its room for more.

A mapping that is registered with a userfaultfd does not merge with a new neighbour. A program that exchanges blocks of
memory all the time (an allocator) so goes from 24 to 65,530 mappings (vm.max_map_count) within two seconds, and then
its mmap(2) and munmap(2) fail. Registering the neighbours too does not help. So the number is looked at all the time,
more often while it grows. Tracking begins only where it is less than a quarter of the limit, and ends when it has grown
by another quarter: that leaves room for what is added between two looks. Once a program is not tracked any more its
number falls again as it goes on exchanging (by half in five seconds, measured).

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import contextlib
import time

_USUAL_LIMIT = 65530
_CHUNK = 1 << 16
_PART = 4
_FEW = 256
_LEAST_INTERVAL = 0.25
"""Seconds. The quickest program seen came to have 45,000 more in a second."""
_QUICK_INTERVAL = 0.02
_LARGEST_PART = 20
"""A look at all processes takes no more than this part (a twentieth) of the time."""


def count_mappings(pid: int) -> int:
    """How many mappings a process has; 0 if it is gone, or does not let itself be looked at."""
    count = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            count += chunk.count(b"\n")
    return count


def most_mappings() -> int:
    """How many the kernel lets a process have: vm.max_map_count."""
    with contextlib.suppress(OSError, ValueError), open("/proc/sys/vm/max_map_count", "rb") as file:
        return int(file.read())
    return _USUAL_LIMIT


class Growth:
    """The number of one process's mappings, since it is tracked.

    :ivar most: where tracking has to end.
    :ivar count: when it was last looked at.
    :ivar is_growing: whether it was much larger then than the time before.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.count = count_mappings(pid)
        self._limit = most_mappings()
        self.most = self.count + self._limit // _PART
        self.is_growing = False

    def is_too_large(self) -> bool:
        """Look. Takes microseconds, or a millisecond for each 2,000 mappings."""
        before, self.count = self.count, count_mappings(self._pid)
        self.is_growing = self.count > before + max(_FEW, before // 10)
        return self.count > self.most

    @property
    def is_too_large_to_begin(self) -> bool:
        """Whether there were too many when it was last looked at for tracking to begin."""
        return self.count >= self._limit // _PART

    @property
    def why_not(self) -> str:
        """Why tracking does not begin, for people."""
        return (
            f"it has {self.count:,} mappings, and would come to have more if it were tracked; the kernel allows "
            f"{self._limit:,} (vm.max_map_count)"
        )

    @property
    def why(self) -> str:
        """Why tracking ended, for people."""
        return (
            f"tracking ended when it had {self.count:,} mappings, as tracked ones do not merge and the kernel allows "
            f"{self._limit:,} (vm.max_map_count)"
        )


class Pace:
    """When to look again, such that looking takes no more than a twentieth of the time."""

    def __init__(self) -> None:
        self._next = 0.0

    @property
    def left(self) -> float:
        """Seconds until the next look."""
        return max(0.0, self._next - time.monotonic())

    def took(self, seconds: float, *, hurry: bool = False) -> None:
        """A look ended now, that took so long.

        :param hurry: the number of something grows: half of the time is spent on looking.
        """
        pause = max(_QUICK_INTERVAL, seconds) if hurry else max(_LEAST_INTERVAL, seconds * _LARGEST_PART)
        self._next = time.monotonic() + pause
