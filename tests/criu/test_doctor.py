"""`incdump doctor` on CRIU: what it says was tried, on a child of its own, and nothing is left of that."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from incdump.criu.program import Criu, find
from incdump.criu.trial import TCP_SINCE, tells_of_tcp_sockets, try_out
from tests.command import environment, is_untouched
from tests.command import incdump as command
from tests.criu.criu import criu_path, restorable_churn, until

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("real_criu")]


def children() -> list[str]:
    """Those of this process, by their command lines."""
    pids = " ".join((thread / "children").read_text() for thread in Path("/proc/self/task").iterdir())
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids.split()]


def program(path: Path, restores: str) -> Path:
    """A CRIU that does something else than to restore; ``$3`` is the images dir, ``$5`` the log."""
    path.write_text(f'#!/bin/sh\n[ "$1" = restore ] || exec {criu_path()} "$@"\n{restores}\n')
    path.chmod(0o700)
    return path


def test_it_says_which_one_is_used_and_that_it_works_here() -> None:
    report = command("doctor", "--json", "--criu", criu_path()).json["criu"]
    version = ".".join(map(str, find(str(criu_path())).version))
    assert report["works"], report
    assert (report["path"], report["version"], report["named_by"]) == (str(criu_path()), version, "--criu")
    assert report["why"] == "a child process was dumped and restored"
    assert report["tcp"] in (True, False)
    text = command("doctor", "--criu", criu_path()).out
    assert f"  CRIU {version}  works  {criu_path()}, named by --criu\n" in text
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_it_says_who_names_it(tmp_path: Path) -> None:
    named = command("doctor", "--json", env={"INCDUMP_CRIU": str(criu_path())}).json["criu"]
    assert (named["path"], named["named_by"], named["works"]) == (str(criu_path()), "INCDUMP_CRIU", True)
    (tmp_path / "criu").symlink_to(criu_path())
    path = f"{tmp_path}:{os.environ['PATH']}"
    found = command("doctor", "--json", env={"PATH": path, "INCDUMP_CRIU": ""}).json["criu"]
    assert (found["path"], found["named_by"], found["works"]) == (str(tmp_path / "criu"), "PATH", True)


@pytest.mark.parametrize("says", [None, "Version: 3.17.1"])
def test_without_one_it_says_what_to_install(tmp_path: Path, says: str | None) -> None:
    criu = tmp_path / "criu"
    if says:
        criu.write_text(f"#!/bin/sh\necho '{says}'\n")
        criu.chmod(0o700)
    done = command("doctor", "--json", "--criu", criu)
    report = done.json["criu"]
    assert done.code == 0  # dumps work all the same
    assert (report["works"], report["version"], report["tcp"]) == (False, None, None)
    assert ("4.1 or later is needed" if says else "there is no program") in report["why"]
    assert "Debian 13 (trixie), 4.2.1 that of Debian forky" in report["advice"][0]


def test_nobodys_action_script_runs(tmp_path: Path) -> None:
    (tmp_path / ".criu").mkdir()
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o700)
    (tmp_path / ".criu" / "default.conf").write_text(f"action-script {script}\n")
    env = {"HOME": str(tmp_path), "CRIU_CONFIG_FILE": str(tmp_path / ".criu" / "default.conf")}
    assert command("doctor", "--json", "--criu", criu_path(), env=env).json["criu"]["works"]
    assert not (tmp_path / "ran").exists()


def test_what_fails_is_said_in_crius_words(tmp_path: Path) -> None:
    before = children()
    fails = """echo "  7: Error (criu/x.c:1): Can't fork for 7: File exists" > "$3/$5"; exit 1"""
    failing = program(tmp_path / "criu", fails)
    why = try_out(find(str(failing)))
    assert why is not None
    assert "failed (exit status 1) on a child process (restore): Can't fork for 7: File exists; hint: the " in why
    assert children() == before
    assert not list(Path(tempfile.gettempdir()).iterdir())


@pytest.mark.parametrize("restores", ["sleep 600", "(setsid sleep 600 &) ; setsid sleep 600"])
def test_one_that_hangs_is_given_up_with_all_that_it_has_started(tmp_path: Path, restores: str) -> None:
    before, began = children(), time.monotonic()
    why = try_out(find(str(program(tmp_path / "criu", restores))), seconds=1.0)
    assert why is not None
    assert "had not dumped and restored a child process after 1 s" in why
    assert time.monotonic() - began < 10
    assert children() == before
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_a_signal_ends_it_at_once(tmp_path: Path) -> None:
    hanging = program(tmp_path / "criu", f"touch {tmp_path}/begun; sleep 600")
    doctor = subprocess.Popen(
        [sys.executable, "-m", "incdump", "doctor", "--criu", str(hanging)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    until((tmp_path / "begun").exists, 60)
    doctor.send_signal(signal.SIGTERM)
    said = doctor.communicate(timeout=20)[1]
    assert doctor.returncode == 128 + signal.SIGTERM, said
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_what_criu_says_on_stdout_is_told_too(tmp_path: Path) -> None:
    """What it lacks as another user, for example, before it has a log."""
    lacking = tmp_path / "criu"
    says = "CRIU needs to have the CAP_SYS_ADMIN capability:"
    lacking.write_text(f'#!/bin/sh\n[ "$1" != --version ] || exec {criu_path()} "$@"\necho "{says}"; exit 1\n')
    lacking.chmod(0o700)
    why = try_out(find(str(lacking)))
    assert why is not None
    assert f"on a child process (dump): {says}; hint: CRIU cannot do this as this user" in why
    with restorable_churn(tmp_path, mib=1) as target:
        for way in ("leash", "preload", "lazy-pages"):
            options = ("-t", target.pid, "-D", tmp_path / "1", "--criu", lacking, "--way", way)
            done = command("checkpoint", *options)
            assert done.code == 7, done
            assert f"{says}; hint: CRIU cannot" in done.error
        assert is_untouched(target.pid)
        target.quit()


def test_where_there_is_no_flock_it_does_not_do(tmp_path: Path) -> None:
    for name in ("sh", "sleep"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    report = command("doctor", "--json", "--criu", criu_path(), env={"PATH": str(tmp_path)}).json["criu"]
    assert not report["works"]
    assert "the program flock (util-linux)" in report["why"]


def test_one_that_restores_nothing_is_found_out(tmp_path: Path) -> None:
    idle = program(tmp_path / "criu", "shift 4; while [ $# -gt 1 ]; do shift; done; sleep 0 & echo $! > $1; wait")
    why = try_out(find(str(idle)))
    assert why is not None
    assert "did not live" in why


def test_sockets_that_an_old_criu_cannot_dump_are_told_by_asking_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tells_of_tcp_sockets(Criu("criu", TCP_SINCE))
    assert tells_of_tcp_sockets(Criu("criu", (5, 0)))
    monkeypatch.setattr(socket, "SO_PASSCRED", socket.SO_REUSEADDR)
    assert tells_of_tcp_sockets(Criu("criu", (4, 1, 1)))
    monkeypatch.setattr(socket, "SO_PASSCRED", 9999)
    assert not tells_of_tcp_sockets(Criu("criu", (4, 1, 1)))
