"""CRIU as a program: found or refused with a reason, and its log quoted; the gate that it waits at."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from incdump.criu.gate import Gate
from incdump.criu.program import find, last_errors
from incdump.errors import CriuError

if TYPE_CHECKING:
    from pathlib import Path


def program(path: Path, says: str) -> str:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("says", "version"), [("Version: 4.1", (4, 1)), ("Version: 4.1.1", (4, 1, 1)), ("Version: 5.0", (5, 0))]
)
def test_a_program_that_is_new_enough_is_found(tmp_path: Path, says: str, version: tuple[int, ...]) -> None:
    criu = find(program(tmp_path / "criu", says))
    assert criu.version == version
    assert str(criu) == f"CRIU {'.'.join(map(str, version))}"


@pytest.mark.parametrize(("says", "reason"), [("Version: 4.0", "4.1 or later"), ("hello", "no CRIU"), ("", "nothing")])
def test_any_other_program_is_refused(tmp_path: Path, says: str, reason: str) -> None:
    with pytest.raises(CriuError, match=reason):
        find(program(tmp_path / "criu", says))


def test_no_program_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CriuError, match="another --criu"):
        find(str(tmp_path / "none"))
    monkeypatch.setattr("incdump.criu.program._PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CriuError, match="install it"):
        find()


def test_the_errors_that_say_most_are_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "(00.02) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
        "(00.03) Warn  (criu/x.c:1): something\n"
        "(00.04)     12: Error (criu/sk-inet.c:1): Connected TCP socket, consider using --tcp-established option.\n"
        "(00.05) Error (criu/cr-dump.c:2111): Dumping FAILED.\n"
    )
    assert last_errors(log) == "Connected TCP socket, consider using --tcp-established option."
    log.write_text("Error (criu/cr-dump.c:2111): Dumping FAILED.\n")
    assert last_errors(log) == "Dumping FAILED."
    assert last_errors(tmp_path / "none") == ""


def run(gate: Gate, action: str) -> int:
    return subprocess.run([gate.script], env={**os.environ, "CRTOOLS_SCRIPT_ACTION": action}, check=False).returncode


@pytest.mark.parametrize("may_pass", [True, False])
def test_the_gate_holds_until_it_is_opened(tmp_path: Path, may_pass: bool) -> None:
    gate = Gate(tmp_path)
    assert run(gate, "pre-dump") == 0
    assert run(gate, "network-lock") == 0
    assert not gate.is_reached
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(run(gate, "post-dump")))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert gate.is_reached
    gate.open(may_pass=may_pass)
    waiting.join(10)
    assert (codes == [0]) == may_pass
    gate.close()


def test_a_gate_whose_keeper_is_gone_lets_nobody_through(tmp_path: Path) -> None:
    Gate(tmp_path).close()
    gate = Gate.__new__(Gate)
    gate.script = tmp_path / "script"
    assert run(gate, "pre-dump") != 0
    assert run(gate, "post-dump") != 0
