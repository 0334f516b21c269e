"""Options stand in groups; and what the shell offers: commands, options, directories, running processes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import click
import pytest

from incdump.cli.groups import GROUPS, grouped
from incdump.cli.main import COMMANDS, main
from tests.command import ROOT, environment, run_python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Capture = pytest.CaptureFixture[str]


def options_of(name: str) -> list[click.Parameter]:
    command: click.Command = import_module(f"incdump.cli.{name.replace('-', '_')}").command
    return [
        option
        for option in command.get_params(click.Context(command))
        if isinstance(option, click.Option) and not option.hidden
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_every_command_is_in_a_group_with_a_title(name: str, capsys: Capture) -> None:
    options = options_of(name)
    groups = dict(grouped(options))
    assert "Other options" not in groups
    assert sum(map(len, groups.values())) == len(options)
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Options:" not in lines
    assert [line[:-1] for line in lines if line.endswith(":") and line[:-1] in groups] == list(groups)


def test_the_table_of_groups_names_no_option_that_is_gone() -> None:
    known = {name for command in COMMANDS for option in options_of(command) for name in option.opts}
    assert {name for _, names in GROUPS for name in names} <= known


def test_whatever_names_a_process_or_a_file_can_be_completed() -> None:
    for name in COMMANDS:
        command: click.Command = import_module(f"incdump.cli.{name.replace('-', '_')}").command
        for parameter in command.params:
            if parameter.metavar in ("PID", "DIR", "FILE", "PATH"):
                assert parameter._custom_shell_complete is not None, (name, parameter.opts)


# -- completion ------------------------------------------------------------------------------------------------------


def offered(shell: str, *words: str, cwd: Path = ROOT) -> str:
    """What the command answers a shell that asks how the last of some words could go on."""
    ask = {"_INCDUMP_COMPLETE": f"{shell}_complete", "COMP_CWORD": str(len(words))}
    ask["COMP_WORDS"] = " ".join(["incdump", *words]) if shell != "fish" else " ".join(["incdump", *words[:-1]])
    if shell == "fish":
        ask["COMP_CWORD"] = words[-1]
    done = run_python("-m", "incdump", env=ask, cwd=cwd)
    assert done.err == ""
    return done.out


NAME = f"inc{os.getpid()}"
"""Nobody else's, also if these tests run twice at the same time."""


@pytest.fixture
def named() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a name of its own."""
    code = f"open('/proc/self/comm', 'w').write('{NAME}-shown'); print('ready', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.communicate(b"\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_running_processes_are_offered_with_their_names(shell: str, named: subprocess.Popen[bytes]) -> None:
    for typed in (f"{NAME}-sh", str(named.pid)):
        answer = offered(shell, "dump", "-t", typed)
        assert str(named.pid) in answer
        assert (f"{NAME}-shown: " in answer) == (shell != "bash")  # which shows values alone
    assert str(named.pid) in offered(shell, "untrack", f"{NAME}-sh")
    assert str(named.pid) in offered(shell, "check", "x", "--against", f"{NAME}-sh")
    assert str(named.pid) not in offered(shell, "dump", "-t", f"{NAME}-other")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_directories_and_files_are_left_to_the_shell(shell: str) -> None:
    for words in (("dump", "-D", "im"), ("restore", "--images-dir", ""), ("receive", "-D", "x"), ("check", "ima")):
        assert "dir" in offered(shell, *words).replace("\n", ",").split(",")[:2]
    for words in (("precopy", "--report", "a"), ("restore", "--pidfile", ""), ("checkpoint", "--criu", "/")):
        assert "file" in offered(shell, *words).replace("\n", ",").split(",")[:2]


def test_parent_images_are_offered_as_seen_from_the_images_dir(tmp_path: Path) -> None:
    for name in ("images/1", "images/12", "images/2", "other"):
        (tmp_path / name).mkdir(parents=True)
    words = ("dump", "-D", "images/3", "--prev-images-dir")
    assert offered("bash", *words, "../1", cwd=tmp_path).split() == ["plain,../1", "plain,../12"]
    assert offered("bash", *words, "../", cwd=tmp_path).split() == ["plain,../1", "plain,../12", "plain,../2"]


def test_commands_are_offered_with_their_summaries() -> None:
    answer = offered("zsh", "pre").splitlines()
    assert answer[1::3] == ["predump", "precopy"]
    assert answer[5].startswith("Pre-dump a process tree again and again, until it need be stopped for a moment only;")
    assert "--leave-stopped" in offered("bash", "dump", "--leave-s")


def test_bash_completes_a_name_to_the_number_of_its_process(tmp_path: Path, named: subprocess.Popen[bytes]) -> None:
    """As the README has it: the script from the command, then Tab."""
    program = tmp_path / "incdump"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m incdump "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(_INCDUMP_COMPLETE=bash_source incdump)"; '
        f"COMP_WORDS=(incdump dump -t {NAME}-sh); COMP_CWORD=3; "
        '_incdump_completion incdump; echo "${COMPREPLY[@]}"; complete -p incdump'
    )
    env = environment({"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == str(named.pid)
    assert "_incdump_completion" in done.stdout.splitlines()[1]
