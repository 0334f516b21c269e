"""Fixtures for tests with real target processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from incdump.images import images_dir, proved
from incdump.images.framing import read_file
from tests.command import ROOT
from tests.kernel.support import Odd

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534
CAN_DUMP = "import anyio, click, google.protobuf, numpy, rich, uvloop, xxhash"


@pytest.fixture
def odd() -> Iterator[Odd]:
    """A victim that makes unusual memory."""
    with Odd() as target:
        yield target


@pytest.fixture(scope="session")
def nobodys_place() -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """A directory with a copy of the project that everybody can read, a Python, and how to become user nobody."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    place = Path(f"/var/tmp/incdump-nobody-{os.getpid()}")
    place.mkdir(mode=0o755)
    try:
        shutil.copytree(ROOT / "incdump", place / "incdump", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "examples", place / "examples")
        for path in place.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        for name in ("run", "home"):
            (place / name).mkdir(mode=0o700)
            os.chown(place / name, NOBODY, NOBODY)
        env = {"INCDUMP_RUNTIME_DIR": str(place / "run"), "HOME": str(place / "home")}
        env["PYTHONPATH"] = f"{place}:{sysconfig.get_path('platlib')}"
        options: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": place / "home"}
        yield place, find_python({**options, "env": {**os.environ, **env}}), {**options, "env": env}
    finally:
        shutil.rmtree(place)


def find_python(options: dict[str, Any]) -> str:
    """A Python that this user can run, with what incdump needs: this one, or the system's where this one is root's."""
    for candidate in (
        sys.executable,
        shutil.which(f"python3.{sys.version_info.minor}", path="/usr/bin:/usr/local/bin"),
    ):
        if candidate is not None:
            try:
                if subprocess.run([candidate, "-c", CAN_DUMP], **options, capture_output=True).returncode == 0:
                    return candidate
            except PermissionError:
                continue
    pytest.skip("needs a Python, and packages, that other users can read")


@pytest.fixture
def as_nobody(nobodys_place: tuple[Path, str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Options for `tests.command.incdump` and `run_python`: user nobody, in an empty directory of its own."""
    place, python, options = nobodys_place
    yield {**options, "python": python}
    for path in (place / "home").iterdir():
        shutil.rmtree(path)


@pytest.fixture
def tiny_tmpfs(images_root: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = images_root / "tiny"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "incdump-test", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def pagemap_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many pagemaps of each images dir were read. Every level counts as old enough to be remembered."""
    counted: Counter[str] = Counter()

    def count(path: str | os.PathLike[str]) -> bytes | None:
        directory, name = os.path.split(path)
        counted[directory] += name.startswith("pagemap-")
        return read_file(path)

    monkeypatch.setattr(images_dir, "read_file", count)
    monkeypatch.setattr(proved, "_TICK", -3600 * 10**9)
    return counted
