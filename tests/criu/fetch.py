"""CRIU itself, unpacked into the tests' cache and made callable through the loader and libraries that it came with.

Distributions' own criu is often missing, or too old for the running kernel. ``INCDUMP_TEST_CRIU`` names another one.
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.guest.debian import CannotFetchError, architecture, cached, unpack

_LOADERS = {
    "amd64": ("usr/lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu"),
    "arm64": ("usr/lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu"),
}


def fetch_criu() -> Path:
    """The program, which is fetched if it is not in the cache.

    :raises CannotFetchError: it is not there, and cannot be had.
    """
    if given := os.environ.get("INCDUMP_TEST_CRIU"):
        return Path(given)
    arch = architecture()
    if arch not in _LOADERS:
        raise CannotFetchError(f"criu: no packages are known for {arch}")
    return cached(f"criu-{arch}", _unpack_criu) / "criu"


def _unpack_criu(folder: Path, place: Path) -> None:
    loader, libraries = (f"{place}/root/{path}" for path in _LOADERS[architecture()])
    unpack(folder / "root", ["criu"])
    wrapper = folder / "criu"
    wrapper.write_text(f'#!/bin/sh\nexec "{loader}" --library-path "{libraries}" "{place}/root/usr/sbin/criu" "$@"\n')
    wrapper.chmod(0o755)
