"""CRIU as a program: found or refused with a reason, and its log quoted; the gate that it waits at."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from incdump.criu.gate import Gate
from incdump.criu.options import take_scripts
from incdump.criu.program import Criu, failure, find, last_errors
from incdump.errors import CriuError


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where logs are kept, of the test's own."""
    place = tmp_path_factory.mktemp("kept")
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


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


def test_what_criu_does_without_is_no_reason(tmp_path: Path) -> None:
    log, said = tmp_path / "log", tmp_path / "stderr"
    log.write_text("(00.02) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Not permitted\n")
    assert last_errors(log) == ""
    said.write_text("Out of memory\n")
    assert ": Out of memory;" in str(failure(Criu("criu", (4, 1)), -11, "on process 7", log, said))
    said.write_text("")
    assert ", and logged no reason;" in str(failure(Criu("criu", (4, 1)), -11, "on process 7", log, said))


def run(gate: Gate, action: str) -> int:
    return subprocess.run([gate.script], env={**os.environ, "CRTOOLS_SCRIPT_ACTION": action}, check=False).returncode


@pytest.mark.parametrize("may_pass", [True, False])
def test_the_gate_holds_until_it_is_opened(tmp_path: Path, may_pass: bool) -> None:
    gate = Gate(tmp_path, tmp_path)
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
    Gate(tmp_path, tmp_path).close()
    gate = Gate.__new__(Gate)
    gate.script = tmp_path / "script"
    assert run(gate, "pre-dump") != 0
    assert run(gate, "post-dump") != 0


def test_the_users_scripts_run_last_and_find_the_images(tmp_path: Path) -> None:
    images, place = tmp_path / "images", tmp_path / "gate"
    images.mkdir()
    place.mkdir()
    options, scripts = take_scripts(["--tcp-established", "--action-script", "one", "--action-script=two; three"])
    assert (options, scripts) == (["--tcp-established"], ["two; three", "one"])
    seen = images / "seen"
    note = f'echo "$CRTOOLS_SCRIPT_ACTION $CRTOOLS_IMAGE_DIR $PWD" >> {seen}'
    gate = Gate(place, images, [note, "test $CRTOOLS_SCRIPT_ACTION != post-dump"])
    assert run(gate, "pre-dump") == 0
    gate.open(may_pass=True)
    assert run(gate, "post-dump") == 1
    assert seen.read_text() == f"pre-dump {images} {images}\npost-dump {images} {images}\n"


def test_what_criu_said_on_stderr_is_quoted_where_it_logged_nothing(tmp_path: Path) -> None:
    said, log = tmp_path / "stderr", tmp_path / "log"
    said.write_text("criu: unrecognized option '--magic'\n\nTry again\n")
    error = failure(Criu("criu", (4, 1)), 1, "on process 7", log, said, pid=7)
    assert str(error) == "CRIU 4.1 failed (exit status 1) on process 7: criu: unrecognized option '--magic'; Try again"
    said.write_text("CRIU needs to have the CAP_SYS_ADMIN or the CAP_CHECKPOINT_RESTORE capability: \n")
    assert "hint: CRIU cannot do this as this user" in str(failure(Criu("criu", (4, 1)), 1, "", log, said))


def test_the_log_of_a_criu_that_failed_is_kept(tmp_path: Path, temporary: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Error (criu/x.c:1): no\n")
    text = str(failure(Criu("criu", (4, 1)), -9, "on process 7", log, tmp_path / "none"))
    kept = Path(text.rpartition("its log is kept in ")[2])
    assert text.startswith("CRIU 4.1 was killed by signal 9 on process 7: no; its log is kept in ")
    assert kept.read_text() == log.read_text()
    assert kept.parent == temporary
    assert kept.stat().st_mode & 0o777 == 0o600


def test_the_environment_names_a_criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INCDUMP_CRIU", program(tmp_path / "another", "Version: 4.9"))
    assert find().version == (4, 9)
    assert find(program(tmp_path / "criu", "Version: 4.2")).version == (4, 2)
