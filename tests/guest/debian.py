"""Debian packages unpacked into folders of the tests' cache; nothing of them is installed or configured on the machine.

mmdebstrap fetches them from the mirror that the machine's own apt uses; where apt is missing, or knows of no Debian,
from the one that mmdebstrap has built in. It is installed by apt if it is not there and we are root.

The cache is ``$INCDUMP_TEST_CACHE``, or ``incdump-tests`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. An entry appears
whole or not at all, also when two test runs want it at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RELEASE = "trixie"
"""The first with a criu that works on current kernels, and with a kernel that has soft-dirty and PAGEMAP_SCAN both."""

_SECONDS = 1200


class CannotFetchError(Exception):
    """Something can be neither found nor fetched; the text says what is missing."""


def cache_dir() -> Path:
    """The folder that all entries are in."""
    given = os.environ.get("INCDUMP_TEST_CACHE")
    path = Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "incdump-tests").absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def cached(name: str, make: Callable[[Path, Path], None]) -> Path:
    """A folder in the cache.

    :param make: fills it if it is not there yet; called with a temporary folder, and the one that it is going to be.
    """
    entry = cache_dir() / name
    if entry.is_dir():
        return entry
    with _locked(entry.with_name(f".{name}.lock")):
        if entry.is_dir():  # made by somebody else, meanwhile
            return entry
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=entry.parent))
        try:
            unfinished.chmod(0o755)
            make(unfinished, entry)
            unfinished.rename(entry)
        finally:
            if unfinished.exists():
                shutil.rmtree(unfinished)
    return entry


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def architecture() -> str:
    """Debian's name of this machine's architecture."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def unpack(folder: Path, packages: Sequence[str], arch: str | None = None, release: str = RELEASE) -> None:
    """Unpack packages, and all that they depend on, into a folder.

    :param arch: Debian's name of an architecture; None: this machine's.
    :raises CannotFetchError: with the reason.
    """
    require_tool("mmdebstrap", "mmdebstrap")
    command = ["mmdebstrap", "--variant=extract", f"--include={','.join(packages)}"]
    command += ['--aptopt=Acquire::Check-Valid-Until "false"']  # a mirror may lag; what it has is signed all the same
    command += [f"--architectures={arch or architecture()}", release, str(folder)]
    call(*command, *filter(None, [_mirror()]))


def require_tool(name: str, package: str) -> str:
    """The path of a program, which is installed if it is missing.

    :raises CannotFetchError: it is not there and cannot be installed.
    """
    search = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    if not shutil.which(name, path=search):
        if os.geteuid() or not shutil.which("apt-get"):
            raise CannotFetchError(f"needs {name} (Debian package {package}), or root and apt-get to install it")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        call("apt-get", "update", "-qq")
        call("apt-get", "install", "-y", "-qq", "--no-install-recommends", package, environment=environment)
    found = shutil.which(name, path=search)
    if found is None:
        raise CannotFetchError(f"there is no {name} in package {package}")
    return found


def _mirror() -> str | None:
    """Where this machine's apt gets Debian from; None: it does not say."""
    if not shutil.which("apt-get"):
        return None
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    for update in (False, True):
        if update and os.geteuid() == 0:
            call("apt-get", "update", "-qq")
        found = subprocess.run([*command, "Label: Debian"], capture_output=True, text=True, check=False).stdout.split()
        if found:
            return found[0]
    return None


def call(*command: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a program that fetches or makes something; returns what it printed.

    :raises CannotFetchError: it failed; with the end of its words.
    """
    try:
        return subprocess.run(
            command, env=environment, cwd=cwd, check=True, capture_output=True, text=True, timeout=_SECONDS
        ).stdout
    except subprocess.CalledProcessError as error:
        words = " | ".join((error.stderr.strip() or error.stdout.strip() or "no output").splitlines()[-3:])
        raise CannotFetchError(f"{' '.join(command[:3])} failed: {words}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotFetchError(f"{' '.join(command[:3])} failed: {error}") from None
