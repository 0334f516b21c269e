"""The user's options for CRIU: what incdump looks for is found as CRIU finds it, shortened, in a configuration file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from incdump.criu.options import (
    ACTION_SCRIPT,
    FREEZE_CGROUP,
    is_given,
    is_option,
    refuse_scripts_in_files,
    take_scripts,
)
from incdump.errors import CriuError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and a place for the whole machine's configuration file, with nothing in them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CRIU_CONFIG_FILE", raising=False)
    monkeypatch.setattr("incdump.criu.options._GLOBAL", tmp_path / "etc" / "default.conf")
    (tmp_path / "home" / ".criu").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize("name", [ACTION_SCRIPT, FREEZE_CGROUP])
def test_every_abbreviation_that_criu_takes_is_recognised(name: str) -> None:
    shortest = len("--ac")
    for end in range(len(name) + 1):
        assert is_option(name[:end], name) == (end >= shortest)
        assert is_option(f"{name[:end]}=value", name) == (end >= shortest)
    for other in ("--action-scripts", "--freezer", "--address", "--force-irmap", "action-script", "-a", "--", ""):
        assert not is_option(other, name)


def test_scripts_are_taken_however_they_are_spelt() -> None:
    options = ["-j", "--act", "one", "--ac=two x", "--address", "a", "--action-scr", "three"]
    assert take_scripts(options) == (["-j", "--address", "a"], ["three", "two x", "one"])


def test_what_is_no_option_is_no_script() -> None:
    options = ["--exec-cmd", "--", "program", "--action-script", "its own"]
    assert take_scripts(options) == (options, [])
    assert not is_given(["--", "--freeze-cgroup"], FREEZE_CGROUP)
    assert take_scripts(["-j", "--action-script"]) == (["-j", "--action-script"], [])


@pytest.mark.parametrize(
    "text",
    [
        "action-script /x",
        "# comment\n\n  act   /x",
        'log-file "a # b"\ntcp-established # yes\naction-script=/x',
        "tcp-established --action-script /x",
        "action-script",
    ],
)
def test_a_script_in_a_configuration_file_is_refused(home: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.conf"
    file.write_text(text)
    for options in (["--config", str(file)], ["-j", f"--config={file}"]):
        with pytest.raises(CriuError, match=f"{file} has an action script, .*: take it out") as raised:
            refuse_scripts_in_files(options)
        assert raised.value.path == str(file)
    refuse_scripts_in_files([])


@pytest.mark.parametrize(
    "text", ["", "# action-script /x", 'log-file "action-script"', "tcp-established # --action-script", "a /x"]
)
def test_any_other_configuration_file_is_criu_s(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.conf"
    file.write_text(text)
    refuse_scripts_in_files(["--config", str(file)])
    refuse_scripts_in_files(["--config", str(tmp_path / "none")])
    refuse_scripts_in_files(["--config"])


def test_only_files_that_criu_reads_are_looked_at(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "etc" / "default.conf", home / ".criu" / "default.conf", tmp_path / "environment"]
    for file in files[:2]:
        file.write_text("action-script /x\n")
        with pytest.raises(CriuError, match=str(file)):
            refuse_scripts_in_files(["-j"])
        refuse_scripts_in_files(["--no-default-config"])
        refuse_scripts_in_files(["--config", str(tmp_path / "none")])
        file.unlink()
    files[2].write_text("freeze-cg /x\naction-script /x\n")
    monkeypatch.setenv("CRIU_CONFIG_FILE", str(files[2]))
    with pytest.raises(CriuError, match=str(files[2])):
        refuse_scripts_in_files(["--no-default-config"])
    assert is_given([], FREEZE_CGROUP)
    monkeypatch.delenv("CRIU_CONFIG_FILE")
    assert not is_given([], FREEZE_CGROUP)
    assert is_given(["--fr", "/x"], FREEZE_CGROUP)
