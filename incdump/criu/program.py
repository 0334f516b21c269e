"""CRIU's program: where it is, which version, and what it said when it failed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from incdump.criu.hints import hint
from incdump.errors import CriuError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OLDEST = (4, 1)
"""What the leash was tried with: CRIU 4.1 scans by PAGEMAP_SCAN where the kernel has it."""
WHERE_FROM = (
    "CRIU 4.1.1 is the package criu of Debian 13 (trixie), 4.2.1 that of Debian forky and sid (3.17.1, Debian 12's, is "
    "too old); elsewhere build a release of https://github.com/checkpoint-restore/criu; --criu or INCDUMP_CRIU names a "
    "program that is not on the PATH"
)
_PLACES = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not on every user's PATH
_QUOTED = 3
_MOST_QUOTED = 4096
_MOST_KEPT = 4 << 20
"""Bytes of a log, the last ones, that are kept of a CRIU that failed."""
_SPARED = "-1000"
SECCOMP_REFUSED = "suspending seccomp failed"
"""What CRIU says where it is itself under a filter (compel's infect.c)."""
UMASK = 0o077
"""Of CRIU: its images hold registers and memory."""
# What CRIU cannot do, and does without: no reason for anything. And what follows from any other error.
_HARMLESS = ("rlimit: Can't setup", "cgroupns not supported")
_FOLLOWS = ("Unable to detach", "Dumping FAILED", "Restoring FAILED", "Killing processes")


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

    :param path: the program; None: ``$INCDUMP_CRIU``, or else ``criu``, on the PATH or where distributions put it.
    :raises incdump.errors.CriuError: there is none, it does not run, or it is too old.
    """
    path = path or os.environ.get("INCDUMP_CRIU") or None
    name = path or "criu"
    where = shutil.which(name) or (None if path else shutil.which(name, path=os.pathsep.join(_PLACES)))
    if where is None:
        advice = (
            "give another --criu"
            if path
            else "install it (4.1 or later: Debian trixie's package criu, or a release of upstream's), or name it by "
            "--criu or INCDUMP_CRIU"
        )
        raise CriuError(f"there is no program {name}: {advice}", path=path)
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
        raise CriuError(
            f"{where} is CRIU {match[1]}: {wanted} or later is needed (Debian trixie's package criu, or a release of "
            "upstream's); give another --criu",
            path=where,
        )
    return Criu(where, version)


def private(command: Sequence[str]) -> list[str]:
    """A command whose files are its owner's alone, for where a process is started by uvloop, which sets no umask."""
    return ["/bin/sh", "-c", f'umask {UMASK:03o} && exec "$0" "$@"', *command]


def own_file(path: Path) -> BinaryIO:
    """A new file to write, its owner's alone."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb")


def spare(pid: int) -> None:
    """Have the kernel end other processes first when memory runs out, where that is allowed (CAP_SYS_RESOURCE).

    A CRIU that is killed while it works on a process is the one way to lose that process. For a dump only: what is
    restored would inherit it.
    """
    with suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
        file.write(_SPARED)


def failure(criu: Criu, status: int, doing: str, log: Path, stderr: Path, **data: Any) -> CriuError:
    """The error for a CRIU that has failed: its own reason, a hint where that is known (`incdump.criu.hints`).

    A copy of its log is kept, and named.

    :param status: its exit status; negative for a signal.
    :param doing: what it was doing, after "failed".
    :param stderr: a file that took what it said there.
    :param data: the error's ``pid`` or ``path``.
    """
    return CriuError(f"{criu} {_how(status)} {doing}{_why(log, stderr)}{_kept(log)}", **data)


def brief_failure(criu: Criu, status: int, doing: str, log: Path, stderr: Path) -> str:
    """What `failure` says, for a log that is not to be kept."""
    return f"{criu} {_how(status)} {doing}{_why(log, stderr)}"


def _how(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"failed (exit status {status})"


def _kept(log: Path) -> str:
    """Put a log where it stays when the images dir is removed; where it is, after a semicolon."""
    try:
        with open(log, "rb") as source:
            fd, name = tempfile.mkstemp(prefix="incdump-criu-", suffix=".log")
            with open(fd, "wb") as kept:
                source.seek(max(0, os.fstat(source.fileno()).st_size - _MOST_KEPT))
                shutil.copyfileobj(source, kept)
    except OSError:
        return ""
    return f"; its log is kept in {name}"


def _why(log: Path, stderr: Path) -> str:
    errors, said = _errors(log), last_errors(log)
    if not said:
        with suppress(OSError), open(stderr, "rb") as file:
            lines = file.read(_MOST_QUOTED).decode(errors="replace").split("\n")
            errors = [line.strip() for line in lines if line.strip()]
            said = "; ".join(errors[:_QUOTED])
    if said:
        known = hint(errors)
        return f": {said}; hint: {known}" if known else f": {said}"
    with suppress(OSError):
        disk = os.statvfs(log.parent)
        if disk.f_blocks and not disk.f_bfree:  # not even for root; a file system without a size has 0 of 0
            return f", and logged no reason; no space is left in {log.parent}"
    return ", and logged no reason"


def last_errors(log: Path) -> str:
    """The lines that CRIU logged as errors and that tell, as one line for a person; empty if there are none.

    The first ones say most: those after them only that something failed further down.
    """
    errors = _errors(log)
    telling = [error for error in errors if not error.startswith(_FOLLOWS)]
    return "; ".join((telling or errors)[:_QUOTED])


def _errors(log: Path) -> list[str]:
    """What CRIU logged as errors, each once, but for what is none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    errors = [
        " ".join(re.sub(r"^(pie: )?.*?Error \([^)]*\):", lambda found: found[1] or "", line.strip()).split())
        for line in lines
        if "Error (" in line
    ]
    return [error for error in dict.fromkeys(errors) if error and not error.startswith(_HARMLESS)]
