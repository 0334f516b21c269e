"""The log of a dump: lines with a time, to a file (``-o``) and, with ``-v``, to stderr.

The file is only ever added to. A relative name is taken from the images dir, as CRIU takes it from its work dir, which
is the images dir unless it is told otherwise. As it is the dump that makes the images dir, lines are held back until it
is there.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from incdump.cli.invocation import one_line
from incdump.errors import ImagesIOError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from incdump.model.stats import DumpStats

_COUNTERS_EVERY = 0.1


class Log:
    """A context manager; an exception that ends it is the last line.

    :param verbosity: 0: the file alone; 1: stderr as well; 2: with counters.
    :param file: the file, or None.
    :param images_dir: where a relative name is taken from.
    """

    def __init__(self, verbosity: int, file: str | None, images_dir: str) -> None:
        self._verbosity = verbosity
        self._path = None if file is None else os.path.join(os.path.abspath(images_dir), file)
        self._images_dir = images_dir
        self._fd = -1
        self._held_back: list[str] = []
        self._began = time.monotonic()
        self._step = ""
        self._counted = 0.0

    def __enter__(self) -> Self:
        if self._path is not None and (os.path.isdir(os.path.dirname(self._path)) or not self._is_in_images_dir()):
            try:
                self._open()
            except OSError as error:
                raise ImagesIOError(
                    f"cannot write the log file {self._path}: {error.strerror}", path=self._path, errno=error.errno
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._to_file(f"error: {one_line(str(error))}")
        if self._path is not None and self._fd < 0 and not self._try_open(make=True):
            print(f"warning: cannot write the log file {one_line(self._path)}", file=sys.stderr)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def line(self, text: str) -> None:
        """Log a line."""
        if self._verbosity:
            print(self._stamped(text), file=sys.stderr)
        self._to_file(text)

    def warning(self, text: str) -> None:
        """A warning, which is for stderr whatever the verbosity."""
        print(f"warning: {one_line(text)}", file=sys.stderr)
        self._to_file(f"warning: {one_line(text)}")

    def progress(self, step: str, stats: DumpStats) -> None:
        """Log a new step; between steps the counters now and then, when they are wanted."""
        now = time.monotonic()
        if step != self._step:
            self._step = step
            self.line(step)
        elif self._verbosity > 1 and now - self._counted > _COUNTERS_EVERY:
            self._counted = now
            self.line(
                f"pages_scanned {stats.pages_scanned} pages_skipped_parent {stats.pages_skipped_parent} "
                f"pages_written {stats.pages_written} shpages_written {stats.shpages_written}"
            )
        if self._path is not None and self._fd < 0 and step != "checking":
            self._try_open(make=False)

    def _stamped(self, text: str) -> str:
        return f"({time.monotonic() - self._began:09.6f}) {one_line(text)}"

    def _to_file(self, text: str) -> None:
        if self._path is None:
            return
        self._held_back.append(self._stamped(text) + "\n")
        if self._fd >= 0:
            self._write()

    def _is_in_images_dir(self) -> bool:
        assert self._path is not None
        return os.path.dirname(self._path) == os.path.abspath(self._images_dir)

    def _try_open(self, *, make: bool) -> bool:
        try:
            if make:
                os.makedirs(self._images_dir, 0o700, exist_ok=True)
            self._open()
        except OSError:
            return False
        return True

    def _open(self) -> None:
        assert self._path is not None
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._write()

    def _write(self) -> None:
        text, self._held_back = "".join(self._held_back), []
        try:
            os.write(self._fd, text.encode(errors="backslashreplace"))
        except OSError as error:
            path, self._path = self._path, None
            print(f"warning: cannot write the log file {path}: {error.strerror}", file=sys.stderr)
