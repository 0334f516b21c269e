"""Starting the small processes of this package: the holder, and those that make a userfaultfd or huge pages.

Nothing but the standard library is loaded there, as fast as Python can start.
"""

from __future__ import annotations

import os
import subprocess
import sys

from incdump.proc.limits import starting

_PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def spawn(
    module: str, arguments: list[str], pass_fds: tuple[int, ...], log: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a module of this package with nothing but the standard library, as fast as Python can start.

    :param log: descriptor for what it may have to say before it dies.
    """
    code = f"import sys; sys.path.insert(0, {_PACKAGE_ROOT!r}); from {module} import main; main()"
    with starting():
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=pass_fds,
            start_new_session=True,
            cwd="/",
        )


def await_first_process(child: subprocess.Popen[bytes]) -> None:
    """A process's first one ends once it has forked; one that has not got so far is ended."""
    try:
        child.wait(1.0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
