"""The wheel: it has the library for CRIU where it was built with a compiler, and is for all machines where not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def build(place: Path, compiler: str) -> Path:
    pytest.importorskip("hatchling", reason="needs hatchling: pip install '.[check]'")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", place]
    environment = {**os.environ, "CC": compiler}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    (wheel,) = place.glob("*.whl")
    return wheel


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_with_a_compiler_it_has_the_library_and_is_for_such_machines(tmp_path: Path) -> None:
    wheel = build(tmp_path, "cc")
    assert "-py3-none-linux_" in wheel.name
    assert zipfile.ZipFile(wheel).read("incdump/criu/preload.so").startswith(b"\x7fELF")


@pytest.mark.parametrize("compiler", ["false", "/no/compiler"])
def test_without_one_it_is_for_all_and_has_the_source(tmp_path: Path, compiler: str) -> None:
    wheel = build(tmp_path, compiler)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "incdump/criu/preload.c" in names
    assert "incdump/criu/preload.so" not in names
