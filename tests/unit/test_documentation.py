"""The library's reference and the man page: built without a warning, with everything in it that there is."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import import_module
from typing import TYPE_CHECKING

import click
import pytest

import incdump
from incdump.cli.main import COMMANDS
from tests.command import ROOT, environment

if TYPE_CHECKING:
    from pathlib import Path

API = ROOT / "docs" / "api"
MAN = ROOT / "docs" / "incdump.1"
AGAIN = "make the man page anew: python -m sphinx -W -b man -d build/man docs/api docs"


def sphinx(builder: str, where: Path) -> None:
    """Build as the README says."""
    pytest.importorskip("sphinx", reason="needs Sphinx: pip install '.[docs]'")
    pytest.importorskip("sphinx_click", reason="needs sphinx-click: pip install '.[docs]'")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        builder,
        "-d",
        where / "trees",
        API,
        where,
    ]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


def words(roff: str) -> list[str]:
    """The words of a man page, without what says how they look, and without the line that has the version."""
    lines = [line for line in roff.splitlines() if not line.startswith((".TH", '.\\"', "'\\\""))]
    text = re.sub(r"\\f.|\\&|\\%", "", " ".join(re.sub(r"^\.\w+", "", line) for line in lines))
    return re.findall(r"[\w-]+", text.replace("\\-", "-"))


def test_every_public_name_stands_in_the_reference_once() -> None:
    text = "\n".join(path.read_text() for path in API.glob("*.rst"))
    named = re.findall(r"^\.\. auto(?:function|class|exception|data):: incdump\.(\w+)(?:\(\))?$", text, re.MULTILINE)
    assert sorted(named) == sorted(incdump.__all__)


@pytest.mark.slow
def test_the_reference_is_built_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    sphinx("html", tmp_path)
    from sphinx.util.inventory import InventoryFile

    with (tmp_path / "objects.inv").open("rb") as file:
        known = InventoryFile.load(file, "", "/".join)
    have = {name for kind, names in known.items() if kind.startswith("py:") for name in names}
    assert {f"incdump.{name}" for name in incdump.__all__} <= have
    assert {"incdump.Session.precopy", "incdump.PageServer.serve", "incdump.ImagesDir.read"} <= have


@pytest.mark.slow
def test_the_man_page_is_what_the_parser_says(tmp_path: Path) -> None:
    sphinx("man", tmp_path)
    assert words(MAN.read_text()) == words((tmp_path / "incdump.1").read_text()), AGAIN


@pytest.mark.parametrize("name", COMMANDS)
def test_the_man_page_has_every_option_of_every_command(name: str) -> None:
    page = MAN.read_text().replace("\\-", "-")
    section = page[page.index(f".SS {name}\n") :]
    section = section[: section.find("\n.SS ", 1)] if "\n.SS " in section[1:] else section
    command: click.Command = import_module(f"incdump.cli.{name.replace('-', '_')}").command
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert all(spelling in section for spelling in option.opts), f"{option.opts}: {AGAIN}"


@pytest.mark.slow
def test_the_wheel_installs_the_man_page(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling: pip install '.[check]'")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    (path,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".1"))
    assert path.endswith(".data/data/share/man/man1/incdump.1")
    assert zipfile.ZipFile(wheel).read(path) == MAN.read_bytes()
