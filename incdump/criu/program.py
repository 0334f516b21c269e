"""CRIU's program: where it is, which version, and what it said when it failed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from incdump.errors import CriuError

if TYPE_CHECKING:
    from pathlib import Path

OLDEST = (4, 1)
"""What the leash was tried with: CRIU 4.1 scans by PAGEMAP_SCAN where the kernel has it."""
_PLACES = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not on every user's PATH
_QUOTED = 3
_SPARED = "-1000"
# What CRIU cannot do without a capability, and does without; and what follows from any other error.
_SAY_NOTHING = ("rlimit: Can't setup", "Unable to detach", "Dumping FAILED", "Restoring FAILED", "Killing processes")


@dataclass(frozen=True, slots=True)
class Criu:
    """An installed CRIU.

    :ivar path: of the program.
    :ivar version: its numbers, for example ``(4, 1, 1)``.
    """

    path: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"CRIU {'.'.join(map(str, self.version))}"


def find(path: str | None = None) -> Criu:
    """Find CRIU, and make sure that it is new enough. Blocks.

    :param path: the program; None: ``criu``, on the PATH or where distributions put it.
    :raises incdump.errors.CriuError: there is none, it does not run, or it is too old.
    """
    name = path or "criu"
    where = shutil.which(name) or (None if path else shutil.which(name, path=os.pathsep.join(_PLACES)))
    if where is None:
        hint = "give another --criu" if path else "install it (4.1 or later), or give its place with --criu"
        raise CriuError(f"there is no program {name}: {hint}", path=path)
    where = os.path.abspath(where)
    try:
        said = subprocess.run([where, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise CriuError(f"{where} cannot be run: {error}", path=where) from error
    match = re.search(r"^Version: *(\d+(?:\.\d+)*)", said.stdout, re.MULTILINE)
    if match is None:
        first = (said.stderr or said.stdout).strip().splitlines()[:1]
        raise CriuError(f"{where} is no CRIU: --version says {first[0] if first else 'nothing'!r}", path=where)
    version = tuple(map(int, match[1].split(".")))
    if version < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise CriuError(f"{where} is CRIU {match[1]}: {wanted} or later is needed; give another --criu", path=where)
    return Criu(where, version)


def spare(pid: int) -> None:
    """Have the kernel end other processes first when memory runs out, where that is allowed (CAP_SYS_RESOURCE).

    A CRIU that is killed while it works on a process is the one way to lose that process. For a dump only: what is
    restored would inherit it.
    """
    with suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
        file.write(_SPARED)


def failure(criu: Criu, status: int, doing: str, log: Path, **data: Any) -> CriuError:
    """The error for a CRIU that has failed, with its own reason.

    :param status: its exit status; negative for a signal.
    :param doing: what it was doing, after "failed".
    :param data: the error's ``pid`` or ``path``.
    """
    how = f"was killed by signal {-status}" if status < 0 else f"failed (exit status {status})"
    return CriuError(f"{criu} {how} {doing}{_why(log)}", **data)


def _why(log: Path) -> str:
    if said := last_errors(log):
        return f": {said}"
    with suppress(OSError):
        disk = os.statvfs(log.parent)
        if disk.f_blocks and not disk.f_bfree:  # not even for root; a file system without a size has 0 of 0
            return f", and logged no reason; no space is left in {log.parent}"
    return ", and logged no reason"


def last_errors(log: Path) -> str:
    """The last lines that CRIU logged as errors, as one line for a person; empty if there are none.

    The first ones say most: those after them only that something failed further down.
    """
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [
        re.sub(r"^(\([^)]*\)\s*)?(\d+:\s*)?Error \([^)]*\): *", "", line).strip() for line in lines if "Error (" in line
    ]
    telling = [error for error in errors if not error.startswith(_SAY_NOTHING)]
    return "; ".join(list(dict.fromkeys(telling or errors))[:_QUOTED])
