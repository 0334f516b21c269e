"""Pages that are written in every round of the pre-copy loop.

What a pre-dump copies of such a page is out of date at once, and it has to be copied again while the target stands
still. So it is deferred: a page that was written in each of the last `ROUNDS` rounds, the one that is being made
included, gets no entry in that round's images, neither as present nor as a hole. Nothing is lost by that, whatever
pages are deferred: the next dump has parent images that lack the page, so it takes it whether or not it was written
since; and the tracker goes on watching it. In the first round in which it was not written it is copied like any other.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, TypeAlias

from incdump.model.runs import empty_runs, intersect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from incdump.model.runs import Runs

ROUNDS = 3
"""The first of them counts for little: it follows the copying of all memory, and in such a time much is written that is
not hot. Where nothing is hot, and a share of all pages is written in each round at random, three rounds defer few pages
by mistake: of 30% they make the freeze longer by 6%, two rounds by 21%."""

Process: TypeAlias = "tuple[int, int]"
"""Pid and start time."""


class HotPages:
    """What was written in the last rounds of a loop, process by process."""

    def __init__(self) -> None:
        self._rounds: dict[Process, tuple[Runs, ...]] = {}
        self._left: dict[Process, Runs] = {}

    def before(self, process: Process) -> Runs:
        """The pages that were written in each of the rounds that count, but for the one that is being made.

        None of them if there were not yet so many rounds of this process one after the other.
        """
        rounds = self._rounds.get(process, ())
        return reduce(intersect, rounds) if len(rounds) == ROUNDS - 1 else empty_runs()

    def note(self, written: Mapping[Process, Runs]) -> None:
        """A round is complete.

        :param written: what was written of each process, canonical. A process that is missing, because no tracker could
            tell, begins anew.
        """
        self._left = {process: intersect(self.before(process), runs) for process, runs in written.items()}
        self._rounds = {
            process: (*self._rounds.get(process, ()), runs)[-(ROUNDS - 1) :] for process, runs in written.items()
        }

    def left(self, process: Process) -> Runs:
        """The pages that the last round has left out: the next dump has to copy them, written once more or not."""
        return self._left.get(process, empty_runs())

    def written(self, pid: int) -> Runs:
        """What was written of a process in the last round."""
        found = [rounds[-1] for (of, _), rounds in self._rounds.items() if of == pid]
        return found[0] if found else empty_runs()
