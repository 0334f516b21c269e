"""Programs unpacked into the tests' cache and made callable through the loader and libraries that they came with.

CRIU itself: distributions' own is often missing, or too old for the running kernel. ``INCDUMP_TEST_CRIU`` names another
one. And programs to checkpoint: installed in the usual way, they would start services on the machine.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path

from tests.guest.debian import RELEASE, CannotFetchError, architecture, cached, unpack

_LOADERS = {
    "amd64": ("usr/lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu"),
    "arm64": ("usr/lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu"),
}


def fetch_criu() -> Path:
    """The program, which is fetched if it is not in the cache.

    :raises CannotFetchError: it is not there, and cannot be had.
    """
    return _given() or fetch_program("criu", "usr/sbin/criu")


def fetch_criu_for_sockets() -> Path:
    """One that can dump TCP sockets on this kernel: CRIU 4.1 asks them for SO_PASSCRED, which 6.18 refuses.

    :raises CannotFetchError: it is not there, and cannot be had.
    """
    with socket.socket() as sock:
        try:
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError:
            return _given() or fetch_program("criu", "usr/sbin/criu", "forky")
    return fetch_criu()


def _given() -> Path | None:
    path = os.environ.get("INCDUMP_TEST_CRIU")
    return Path(path) if path else None


def fetch_program(package: str, path: str, release: str = RELEASE) -> Path:
    """A program of a Debian package, which is fetched with all that it depends on if it is not in the cache.

    :param path: where it is in the package.
    :raises CannotFetchError: it is not there, and cannot be had.
    """
    arch = architecture()
    if arch not in _LOADERS:
        raise CannotFetchError(f"{package}: no packages are known for {arch}")
    name = "-".join([package, *([] if release == RELEASE else [release]), arch])
    return cached(name, partial(_unpack, package, path, release)) / Path(path).name


def _unpack(package: str, path: str, release: str, folder: Path, place: Path) -> None:
    loader, libraries = (f"{place}/root/{part}" for part in _LOADERS[architecture()])
    unpack(folder / "root", [package], release=release)
    wrapper = folder / Path(path).name
    wrapper.write_text(f'#!/bin/sh\nexec "{loader}" --library-path "{libraries}" "{place}/root/{path}" "$@"\n')
    wrapper.chmod(0o755)
