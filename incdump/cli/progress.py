"""Progress of a dump or a check, on a terminal, if it takes more than half a second.

rich is loaded when the half second is over, and not at all otherwise: loading it takes as long as many a dump.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from incdump.cli.text import bytes_text
from incdump.model.stats import DumpStats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.live import Live
    from rich.spinner import Spinner

PATIENCE = 0.5
"""Seconds before anything is shown."""
_PAGE = 4096
STEPS = {
    "checking": "looking at the target",
    "freezing": "freezing",
    "dumping": "dumping",
    "finishing": "writing the last images",
}
"""The engine's words for its steps, for people."""


class Waiting:
    """What is shown while something takes long: what it is, and for how long by now.

    :param what: the step, in words.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._began = time.monotonic()
        self._live: Live | None = None
        self._spinner: Spinner | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show it for the rest of this block, once it has taken long enough. For use within an event loop."""
        import asyncio

        timer = asyncio.get_running_loop().call_later(PATIENCE, self._show)
        try:
            yield
        finally:
            timer.cancel()
            if self._live is not None:
                self._live.stop()

    def _show(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._spinner = Spinner("dots")
        self._live = Live(
            console=Console(stderr=True), refresh_per_second=8, transient=True, get_renderable=self._renderable
        )
        self._live.start()

    def _renderable(self) -> Spinner:
        assert self._spinner is not None
        self._spinner.update(text=self._text())
        return self._spinner

    def _text(self) -> str:
        return f"{self.what}: {self._details()}{time.monotonic() - self._began:.1f} s"

    def _details(self) -> str:
        return ""


class Progress(Waiting):
    """What the engine reports to, and what shows it."""

    def __init__(self) -> None:
        super().__init__(STEPS["checking"])
        self._stats = DumpStats()

    def update(self, step: str, stats: DumpStats) -> None:
        """Take note of a step and the counters so far."""
        self.what, self._stats = STEPS.get(step, step), stats

    def _details(self) -> str:
        return f"{counters_text(self._stats)}, "


def counters_text(stats: DumpStats) -> str:
    """How far a dump is, for people."""
    written = stats.pages_written + stats.shpages_written
    return (
        f"{stats.pages_scanned + stats.shpages_scanned:,} pages scanned, "
        f"{written:,} written ({bytes_text(written * _PAGE)}), "
        f"{stats.pages_skipped_parent + stats.shpages_skipped_parent:,} left to the parent"
    )
