"""The library that is loaded into CRIU (preload.c): where it comes from.

A package that was built where there is a compiler has it, beside this module. Else it is compiled when it is first
wanted, if there is a compiler then, and kept in a directory of this user alone: ``$XDG_CACHE_HOME/incdump``, or else
``.cache/incdump`` in the user's home. What another user could have written is not taken from there.

The package's build (hatch_build.py) loads this module without incdump: it is stdlib only, but for its error.
"""

from __future__ import annotations

import hashlib
import os
import platform
import pwd
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

SOURCE = Path(__file__).with_name("preload.c")
BUILT = Path(__file__).with_name("preload.so")
"""Made when the package was."""
COMPILERS = ("cc", "gcc", "clang")
OPTIONS = ("-shared", "-fPIC", "-O2")
_SECONDS = 60


def preload_library() -> bytes:
    """The library, compiled if need be. Blocks.

    :raises incdump.errors.LeashUnusable: there is none, and none can be made.
    """
    with suppress(OSError):
        return BUILT.read_bytes()
    kept = _cache() / f"preload-{_key()}.so"
    try:
        return _read_own(kept)
    except OSError:
        pass
    with tempfile.TemporaryDirectory(prefix="incdump-preload-") as name:
        made = Path(name) / "preload.so"
        try:
            compile_library(made)
        except OSError as error:
            from incdump.errors import LeashUnusable

            raise LeashUnusable(
                "CRIU cannot be given a library that answers its scans (the package was built without one, and "
                f"{error})"
            ) from error
        library = made.read_bytes()
    with suppress(OSError):  # it is made again the next time
        _keep(kept, library)
    return library


def compile_library(made: Path, compiler: str | None = None) -> None:
    """Compile it. Blocks.

    :param made: the file.
    :param compiler: the program; None: the first of `COMPILERS` that there is.
    :raises OSError: there is no compiler, or it fails; the text says why.
    """
    found = compiler or next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise FileNotFoundError(f"there is no C compiler: none of {', '.join(COMPILERS)}")
    command = [found, *OPTIONS, "-o", str(made), str(SOURCE)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.SubprocessError as error:
        raise OSError(f"{found} does not end") from error
    except OSError as error:
        raise OSError(f"{found} cannot be run: {error.strerror}") from error
    if done.returncode or not made.exists():
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"{found} failed: {said[0] if said else f'exit status {done.returncode}'}")


def _key() -> str:
    """What it is made from, and for."""
    text = b"\0".join([SOURCE.read_bytes(), " ".join(OPTIONS).encode(), platform.machine().encode()])
    return hashlib.sha256(text).hexdigest()[:32]


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given, "incdump")
    try:
        home = pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        home = "/nonexistent"
    return Path(home, ".cache", "incdump")


def _refuse_others(found: os.stat_result, path: Path) -> None:
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"another user may have written {path}")


def _read_own(path: Path) -> bytes:
    """:raises OSError: there is no such file, or others may write to it, or to its directory."""
    parent = os.lstat(path.parent)
    if not stat.S_ISDIR(parent.st_mode):
        raise NotADirectoryError(str(path.parent))
    _refuse_others(parent, path.parent)
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
        _refuse_others(os.fstat(file.fileno()), path)
        return file.read()


def _keep(path: Path, library: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_others(os.lstat(path.parent), path.parent)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".preload-")
    try:
        with open(fd, "wb") as file:
            file.write(library)
        os.rename(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
