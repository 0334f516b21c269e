"""What the pagemap readers have in common: their interface, spans of address space, a second thread."""

from __future__ import annotations

import errno
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from incdump.errors import TargetExited
from incdump.model.vmas import VmaKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump.model.regions import Window
    from incdump.model.runs import Runs
    from incdump.model.vmas import VmaTable

GAP = 1 << 20
"""The most address space between two VMAs that the cache reads rather than skips, bytes."""


class PagemapReader(Protocol):
    """A way to find out which pages are populated."""

    name: str
    """``"plain"``, ``"cache"`` or ``"scan"``."""

    def windows(self, pagemap_fd: int, vmas: VmaTable) -> Iterator[Window]:
        """Read the pagemap of these VMAs.

        :param pagemap_fd: /proc/PID/pagemap, open; only pread and ioctl are used.
        :param vmas: the VMAs that are wanted; what lies between them is not reported.
        :returns: windows, ascending, that together cover every VMA.
        :raises TargetExited: the address space is gone (exit or exec).
        """
        ...


def wanted_spans(vmas: VmaTable) -> Runs:
    """Start and end of the VMAs that pagemap knows of; [vsyscall] can only be the last."""
    spans = vmas.spans()
    return spans[:-1] if len(spans) and int(vmas.kind[-1]) == VmaKind.VSYSCALL else spans


def join_near(spans: Runs, gap: int = GAP) -> Runs:
    """Join spans (ascending, disjoint) that are at most `gap` bytes apart."""
    if len(spans) < 2:
        return spans
    apart = (spans[1:, 0] - spans[:-1, 1] > gap).nonzero()[0]
    if len(apart) == len(spans) - 1:
        return spans
    joined = np.empty((len(apart) + 1, 2), np.uint64)
    joined[0, 0], joined[-1, 1] = spans[0, 0], spans[-1, 1]
    joined[1:, 0] = spans[apart + 1, 0]
    joined[:-1, 1] = spans[apart, 1]
    return joined


@cache
def helper() -> ThreadPoolExecutor:
    """A second thread, for what the kernel does as well in two halves side by side.

    Who hands it work waits for that, whatever happens meanwhile: the work fills the caller's buffers.
    """
    return ThreadPoolExecutor(1, "pagemap")


os.register_at_fork(after_in_child=helper.cache_clear)  # threads do not survive a fork


def address_space_gone() -> TargetExited:
    return TargetExited("the target's address space is gone: it exited, or replaced itself by exec", errno=errno.ESRCH)


class Spare:
    """One buffer that is used again by the next caller, or made anew while another caller has it.

    Fresh memory costs more than what is read into it.
    """

    def __init__(self) -> None:
        self._buffers: list[NDArray[np.uint64]] = []

    @contextmanager
    def borrow(self, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint64]]:
        """An array of this shape, contents undefined. (list.pop and append are atomic: threads may share this.)"""
        size = math.prod(shape)
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = np.empty(size, np.uint64)
        if len(buffer) < size:
            buffer = np.empty(size, np.uint64)
        try:
            yield buffer[:size].reshape(shape)
        finally:
            self._buffers = [buffer]
