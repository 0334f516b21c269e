"""On a kernel whose pages are not of 4 KiB nothing is begun: pagemap would be read in the wrong places."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump.cli.main import COMMANDS, main
from incdump.freeze.seize import Freezer
from incdump.model.runs import PAGE_SIZE
from incdump.proc import identity
from incdump.proc.tree import check_target

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def pages_of_64_kib(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the C library says on such a kernel."""
    usual = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 65536 if name == "SC_PAGE_SIZE" else usual(name))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_so_by_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 1
    assert "this kernel has pages of 64 KiB, and incdump knows 4 KiB alone" in capsys.readouterr().err


async def freeze(_: Path) -> None:
    async with Freezer() as freezer:
        await freezer.freeze(os.getppid())


async def serve(place: Path) -> None:
    async with incdump.PageServer(place):
        pass


async def receive(place: Path) -> None:
    async with incdump.Receiver(place):
        pass


ENTRIES: dict[str, Callable[[Path], Awaitable[object]]] = {
    "predump": lambda place: incdump.predump(os.getppid(), place / "1"),
    "dump": lambda place: incdump.dump(os.getppid(), place / "1"),
    "restore": lambda place: incdump.restore(place),
    "precopy": lambda place: incdump.precopy(os.getppid(), place),
    "migrate": lambda _: incdump.migrate(os.getppid(), "localhost", 1),
    "freeze": freeze,
    "page server": serve,
    "receiver": receive,
}


@pytest.mark.parametrize("entry", list(ENTRIES))
def test_the_library_does_not_begin(entry: str, tmp_path: Path) -> None:
    with pytest.raises(incdump.UnsupportedPageSize):
        anyio.run(ENTRIES[entry], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_target_is_not_looked_at() -> None:
    with pytest.raises(incdump.UnsupportedPageSize):
        check_target(os.getppid())


def test_the_size_is_the_one_that_images_are_made_of() -> None:
    assert identity._PAGE_SIZE == PAGE_SIZE
