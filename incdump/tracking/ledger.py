"""What a dump has taken from a tracker and not yet put into a finished images dir.

Reading a tracker clears it. Until the images of the round are complete, this process alone knows what was cleared, so
it is written down here before anything else can happen, and given back if the round fails (invariant 3). A scan that is
still running in its thread when the round is given up is waited for: the lock is held over each system call together
with the record of its answer.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from incdump.model.runs import PAGE_SHIFT, canonical, empty_runs, page_count, run

if TYPE_CHECKING:
    from incdump.model.runs import Runs

MOST_RUNS = 1 << 16
"""Above so many pieces the ledger is put in order, which merges those that touch; where that does not leave half as
many, those that are near each other become one: a page that is given back in excess is only written once more."""


class Ledger:
    """The pages taken from one process's tracker in one round."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._pieces: list[Runs] = []
        self._count = 0
        self._closed = False
        self._recording = threading.Lock()

    def __repr__(self) -> str:
        return f"<Ledger {page_count(self.taken())} pages{', closed' if self._closed else ''}>"

    @property
    def closed(self) -> bool:
        """Whether nothing may be taken any more."""
        return self._closed

    def record(self, runs: Runs) -> None:
        """Note pages as taken; `lock` is held since before they were, by the caller or by who waits for it.

        :param runs: shape (n, 2), need not be canonical.
        """
        if not len(runs):
            return
        with self._recording:
            self._pieces.append(np.array(runs[:, :2], np.uint64))
            self._count += len(runs)
            if self._count > MOST_RUNS:
                self._pieces = [coarser(canonical(np.concatenate(self._pieces)), MOST_RUNS // 2)]
                self._count = len(self._pieces[0])

    def record_span(self, lo: int, hi: int) -> None:
        """Note a whole span as taken: what was in it is not known."""
        self.record(run(lo, hi))

    def taken(self) -> Runs:
        """All pages taken so far and, if they came in very many pieces, some around them."""
        return canonical(np.concatenate(self._pieces)) if self._pieces else empty_runs()

    def close(self) -> Runs:
        """Let nothing more be taken, wait for a scan that is under way, and return all that was."""
        with self.lock:
            self._closed = True
            return self.taken()


def coarser(runs: Runs, most: int) -> Runs:
    """The same pages and, if they come in more than `most` runs, some between them: of the same aligned block."""
    grain = PAGE_SHIFT + 1
    while len(runs) > most:
        mask = np.uint64((1 << grain) - 1)
        starts = np.maximum(runs[:, 0] & ~mask, runs[0, 0])
        ends = np.minimum((runs[:, 1] + mask) & ~mask, runs[-1, 1])  # never beyond the address space
        runs = canonical(np.stack((starts, ends), axis=1))
        grain += 1
    return runs
