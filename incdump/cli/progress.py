"""Progress of a dump or a check, on a terminal, if it takes more than half a second.

rich is loaded when the half second is over, and not at all otherwise: loading it takes as long as many a dump.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from incdump.cli.invocation import one_line
from incdump.cli.text import bytes_text
from incdump.model.stats import DumpStats

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from rich.live import Live
    from rich.spinner import Spinner

    from incdump.engine.page_server import Arriving

PATIENCE = 0.5
"""Seconds before anything is shown."""
_EVERY = 0.2
"""Seconds between two looks at what has come."""
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
        from rich.text import Text

        # One line: what is cut on a narrow terminal is the counters' end.
        self._spinner.update(text=Text(one_line(self._text()), no_wrap=True, overflow="ellipsis"))
        return self._spinner

    def _text(self) -> str:
        details = self._details()
        return f"{self.what}, {time.monotonic() - self._began:.1f} s{': ' if details else ''}{details}"

    def _details(self) -> str:
        return ""


class Arrivals:
    """What is coming in over the network, on one line of stderr: how much, from whom, how fast, for how long, where to.

    :param ask: what is coming in now.
    :param show: whether that may be shown, if stderr is a terminal.
    """

    def __init__(self, ask: Callable[[], Arriving | None], *, show: bool) -> None:
        self._ask = ask
        self._is_shown = show and sys.stderr is not None and sys.stderr.isatty()
        self._session: tuple[str, str] | None = None
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_drawn = False

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show it for the rest of this block. For use within an event loop, which draws."""
        if not self._is_shown:
            yield
            return
        self._draw_again()
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self.clear()

    def _draw_again(self) -> None:
        import asyncio

        self.draw()
        self._timer = asyncio.get_running_loop().call_later(_EVERY, self._draw_again)

    def draw(self) -> None:
        """Draw the line as it is now."""
        now = self._ask()
        session = None if now is None else (now.client, now.images_dir)
        if session != self._session:
            self._session, self._began = session, time.monotonic()
        seconds = time.monotonic() - self._began
        if now is None or seconds < PATIENCE:
            self.clear()
            return
        rate = bytes_text(int(now.bytes / seconds))
        text = f"{bytes_text(now.bytes)} of {now.client}, {rate}/s, {seconds:.1f} s, into {now.images_dir}"
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        self._print(f"\r\x1b[2K{one_line(text)[: width - 1]}")
        self._is_drawn = True

    def clear(self) -> None:
        """Take the line away, before another is printed."""
        if self._is_drawn:
            self._print("\r\x1b[2K")
            self._is_drawn = False

    def _print(self, text: str) -> None:
        with suppress(OSError):  # a terminal that is gone
            print(text, end="", file=sys.stderr, flush=True)


class Progress(Waiting):
    """What the engine reports to, and what shows it."""

    def __init__(self) -> None:
        super().__init__(STEPS["checking"])
        self._stats = DumpStats()

    def update(self, step: str, stats: DumpStats) -> None:
        """Take note of a step and the counters so far."""
        self.what, self._stats = STEPS.get(step, step), stats

    def _details(self) -> str:
        return counters_text(self._stats)


def counters_text(stats: DumpStats) -> str:
    """How far a dump is, for people."""
    written = stats.pages_written + stats.shpages_written
    return (
        f"{stats.pages_scanned + stats.shpages_scanned:,} pages scanned, "
        f"{written:,} written ({bytes_text(written * _PAGE)}), "
        f"{stats.pages_skipped_parent + stats.shpages_skipped_parent:,} left to the parent"
    )
