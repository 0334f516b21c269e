"""Checkpoints by a library in CRIU: of processes that have a seccomp filter, for which there is no leash."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump._uapi.arch import ARCH
from incdump.criu import preload_library, preloaded
from incdump.criu.preloaded import PreloadedCriu
from incdump.errors import LeashUnusable
from incdump.proc import confinement
from incdump.proc.tree import process_tree
from incdump.tracking.uffd_wp import UffdWpRound
from tests import oracle
from tests.command import environment, is_untouched
from tests.command import incdump as command
from tests.criu.arrivals import receiving
from tests.criu.criu import criu_path, restorable_churn, revive
from tests.criu.namespaces import in_own_namespaces
from tests.criu.test_checkpoint import (
    FILTERED,
    PRIVATE_OPS,
    checkpoint,
    is_crius,
    predump,
    prove_next,
    until_criu_has_ended,
)
from tests.criu.test_migrate import TWO_ROUNDS, migrate, runs_there

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from incdump.model.vmas import VmaTable
    from tests.criu.criu import RestorableTarget

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu", "library")]


@pytest.fixture
def library() -> None:
    """Skips the test, by name, where there is no library and no compiler."""
    try:
        preload_library.preload_library()
    except LeashUnusable as error:
        pytest.skip(str(error))


def under_a_filter(root: Path, seed: int, processes: int = 1, threads: int = 2) -> RestorableTarget:
    """A tree with a seccomp filter, as containers have."""
    filtered = (sys.executable, FILTERED, "no-scan")
    return restorable_churn(root, seed=seed, processes=processes, threads=threads, ops=PRIVATE_OPS, under=filtered)


def way(result: incdump.DumpResult) -> str:
    assert result.checkpoint is not None
    return result.checkpoint.way


# --- what it holds ----------------------------------------------------------------------------------------------------


@in_own_namespaces
def test_every_page_of_filtered_processes_is_the_stopped_targets(images_root: Path) -> None:
    with under_a_filter(images_root, 71, processes=3) as target:
        predump(target, images_root / "1")
        for n in range(2, 5):
            target.step(60)
            result = checkpoint(target, images_root / str(n), f"../{n - 1}", afterwards="stopped")
            assert way(result) == "preload"
            assert result.incremental
            assert not result.warnings
            pids = oracle.tree(target.pid)
            shown, oracle.SHOWN = oracle.SHOWN, 10_000
            report = oracle.compare(images_root / str(n), pids)
            oracle.SHOWN = shown
            wrong = [finding for finding in report.findings if not is_crius(images_root / str(n), finding, pids)]
            for pid in pids.values():
                os.kill(pid, signal.SIGCONT)
            assert not wrong, [str(finding) for finding in wrong]
            assert report.from_parents
        target.step(50)
        assert way(checkpoint(target, images_root / "5", "../4")) == "preload"
        incdump.check(images_root / "5")
        revive(target, images_root / "5")
        assert confinement.filtered(process_tree(target.pid)) == target.pid
        target.step(50)
        target.quit()


@in_own_namespaces
def test_a_filter_that_comes_between_look_and_freeze_is_as_good(images_root: Path) -> None:
    """By the leash it fails then, and the library is next; asked for the library, there was nothing to look at."""
    with under_a_filter(images_root, 72) as target, pytest.MonkeyPatch.context() as patch:
        patch.setattr("incdump.engine.checkpoint.filtered", lambda _: None)
        predump(target, images_root / "1")
        target.step(30)
        result = checkpoint(target, images_root / "2", "../1", afterwards="running")
        assert way(result) == "preload"
        assert result.checkpoint is not None
        assert "has got a seccomp filter" in result.checkpoint.why
        target.step(30)
        assert way(checkpoint(target, images_root / "3", "../2", way="preload")) == "preload"
        revive(target, images_root / "3")
        target.quit()


@in_own_namespaces
def test_a_tree_with_a_filter_is_precopied_to_a_checkpoint(images_root: Path) -> None:
    with under_a_filter(images_root, 73, processes=2) as target:
        options = ("--downtime", "10s", "--final", "checkpoint", "--kill", "--json", "--criu", criu_path())
        done = command("precopy", "-t", target.pid, "-D", images_root / "rounds", *options)
        assert done.code == 0, done
        assert '"way": "preload"' in done.out
        revive(target, (images_root / "rounds" / "latest").resolve())
        target.step(20)
        target.quit()


@in_own_namespaces
def test_a_tree_with_a_filter_moves_to_another_host(images_root: Path) -> None:
    with (
        under_a_filter(images_root, 74, processes=2) as target,
        receiving(images_root / "arriving") as there,
    ):
        target.step(50)
        result = migrate(target, there.port, policy=TWO_ROUNDS, on_round=lambda *_: target.step(20))
        runs_there(target, there)
        assert result.final is not None
        assert way(result.final) == "preload"
        assert result.final.incremental
        assert there.migration()["outcome"] == "runs"
        assert confinement.filtered(process_tree(target.pid)) == target.pid
        target.quit()


# --- what it leaves alone ---------------------------------------------------------------------------------------------


@in_own_namespaces
def test_what_criu_starts_has_nothing_of_it(images_root: Path) -> None:
    """Neither the library, nor its socket; but what somebody else has preloaded."""
    script, seen = images_root / "script", images_root / "seen"
    script.write_text(
        f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\nexec >> {seen}\n'
        'echo "preload=$LD_PRELOAD socket=$INCDUMP_PRELOAD_SOCKET"\nls -l /proc/self/fd\n'
        "grep -c incdump-preload /proc/self/maps\nexit 0\n"
    )
    script.chmod(0o700)
    options = ("--action-script", str(script))
    with restorable_churn(images_root, seed=75, ops=PRIVATE_OPS) as target, pytest.MonkeyPatch.context() as patch:
        checkpoint(target, images_root / "1", afterwards="running", way="preload", criu_options=options)
        assert seen.read_text().startswith("preload= socket=\n")
        assert "socket:" not in seen.read_text()
        assert "memfd:incdump" not in seen.read_text()
        assert seen.read_text().endswith("\n0\n")
        seen.unlink()
        patch.setenv("LD_PRELOAD", "libc.so.6:libc.so.6")
        checkpoint(target, images_root / "2", afterwards="running", way="preload", criu_options=options)
        assert seen.read_text().startswith("preload=libc.so.6:libc.so.6 socket=\n")
        assert not [path for path in Path(f"/proc/{target.pid}/maps").read_text().splitlines() if "preload" in path]
        target.check()
        target.quit()


@pytest.mark.parametrize("kind", ["compiled", "shell"])
@in_own_namespaces
def test_it_passes_through_what_criu_is_wrapped_in(images_root: Path, kind: str) -> None:
    criu = images_root / "criu"
    if kind == "compiled":
        compile_wrapper(criu, "")
    else:  # which starts it, and does not become it
        criu.write_text(f'#!/bin/sh\n{criu_path()} "$@"\nexit $?\n')
        criu.chmod(0o700)
    with under_a_filter(images_root, 80) as target:
        assert way(checkpoint(target, images_root / "1", criu=criu)) == "preload"
        revive(target, images_root / "1")
        target.quit()


# --- where it does not work -------------------------------------------------------------------------------------------

_WRAPPER = """
#include <stdlib.h>
#include <unistd.h>
int main(int n, char **arguments) { (void)n; unsetenv("NONE"); return execv(%s, arguments); }
"""


def compile_wrapper(place: Path, without: str, *options: str) -> None:
    """A program that becomes CRIU.

    :param without: a variable that it takes out of the environment.
    """
    source = place.with_suffix(".c")
    source.write_text(_WRAPPER.replace("NONE", without or "NONE") % f'"{criu_path()}"')
    subprocess.run(["cc", *options, "-o", place, source], check=True)


def shell(place: Path, *before: str) -> None:
    place.write_text(f'#!/bin/sh\n{" ".join(before)} {criu_path()} "$@"\n')
    place.chmod(0o700)


@pytest.mark.parametrize("kind", ["static", "without environment", "without descriptors", "broken"])
@in_own_namespaces
def test_a_criu_that_does_not_load_it_is_found_out_before_the_tree_is_touched(images_root: Path, kind: str) -> None:
    criu = images_root / "criu"
    with under_a_filter(images_root, 76) as target, pytest.MonkeyPatch.context() as patch:
        if kind == "static":
            compile_wrapper(criu, "LD_PRELOAD", "-static")  # nothing can be loaded into it, nor is into what it starts
        elif kind == "without environment":
            shell(criu, "exec", "env", "-u", "LD_PRELOAD")
        elif kind == "without descriptors":
            closing = "import os, sys; os.closerange(3, 1024); os.execv(sys.argv[1], sys.argv[1:])"
            shell(criu, f"exec {sys.executable} -c '{closing}'")
        else:
            shell(criu, "exec")
            patch.setattr(preloaded, "preload_library", lambda: b"no library")
        predump(target, images_root / "1")
        target.step(30)
        with pytest.raises(incdump.CriuError, match="does not load the library"):
            checkpoint(target, images_root / "2", "../1", criu=criu, way="preload")
        assert is_untouched(target.pid)
        assert not (images_root / "2").exists()
        if kind == "without descriptors":  # a lazy dump needs one as well
            target.check()
            target.quit()
            return
        result = checkpoint(target, images_root / "2", "../1", criu=criu)
        assert way(result) == "lazy-pages"
        assert any("does not load the library" in warning for warning in result.warnings)
        assert result.incremental
        revive(target, images_root / "2")
        target.quit()


@in_own_namespaces
def test_without_a_library_and_a_compiler_the_next_way_is_taken(images_root: Path) -> None:
    with under_a_filter(images_root, 77) as target, pytest.MonkeyPatch.context() as patch:
        patch.setattr(preload_library, "BUILT", images_root / "none")
        patch.setattr(preload_library, "COMPILERS", ("no-compiler",))
        patch.setenv("XDG_CACHE_HOME", str(images_root / "cache"))
        result = checkpoint(target, images_root / "1", afterwards="running")
        assert way(result) == "lazy-pages"
        (warning,) = (text for text in result.warnings if "lazy dump" in text)
        assert "has a seccomp filter" in warning
        assert "there is no C compiler: none of no-compiler" in warning
        with pytest.raises(incdump.CriuError, match="no C compiler"):
            checkpoint(target, images_root / "2", way="preload")
        assert is_untouched(target.pid)
        target.check()
        target.quit()


# --- whoever is killed ------------------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys
from incdump.cli.main import main
from incdump.criu.preloaded import PreloadedCriu
from incdump.engine import checkpoint
checkpoint._BIG = 0
left = int(sys.argv.pop(1))
answer = PreloadedCriu._answer
def die_at(self, question):
    global left
    left -= bool(question)  # there is none in the end
    if question and left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    answer(self, question)
PreloadedCriu._answer = die_at
sys.exit(main())
"""


@in_own_namespaces
def test_incdump_is_killed_at_each_question_and_the_tree_runs_on(images_root: Path) -> None:
    """When CRIU says that it is there, for the mappings of each process, at the scan of each."""
    with under_a_filter(images_root, 78, processes=3) as target:
        predump(target, images_root / "0")
        number = 0
        lasting = ("-R", "--track-for", "1h", "--criu", criu_path())
        while True:
            number += 1
            assert number < 40
            target.step(20)
            images = images_root / f"{number}-killed"
            arguments: Sequence[object] = ("-t", target.pid, "-D", images, "--prev-images-dir", "../0", *lasting)
            words = [sys.executable, "-c", KILLED_AT, number, "checkpoint", *arguments]
            done = subprocess.run(
                [str(word) for word in words],
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=120,
                check=False,
            )
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL
            until_criu_has_ended(images)
            assert not any(oracle.states(pid) & set("tT") for pid in oracle.tree(target.pid).values())
            assert not (images / "inventory.img").exists()
            target.check()
        assert number > 2 * len(oracle.tree(target.pid))
        prove_next(target, images_root / "next", f"../{number}-killed")
        target.quit()


@in_own_namespaces
def test_a_criu_that_is_killed_while_it_waits_is_noticed(images_root: Path) -> None:
    register, hold = UffdWpRound.register, PreloadedCriu._hold
    held: list[PreloadedCriu] = []

    def kill_criu(self: UffdWpRound, vmas: VmaTable) -> NDArray[np.bool_]:
        while held:
            criu = held.pop()
            assert not criu._may_go_on.is_set()
            os.kill(criu.pid, signal.SIGKILL)
        return register(self, vmas)

    def note_criu(self: PreloadedCriu, pid: int) -> None:
        held.append(self)
        hold(self, pid)

    with restorable_churn(images_root, seed=79, processes=2, ops=PRIVATE_OPS) as target:
        predump(target, images_root / "1")
        target.step(50)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UffdWpRound, "register", kill_criu)
            patch.setattr(PreloadedCriu, "_hold", note_criu)
            with pytest.raises(incdump.CriuError, match="killed by signal 9"):
                checkpoint(target, images_root / "2", "../1", way="preload")
        assert not (images_root / "2").exists()
        prove_next(target, images_root / "2", "../1")
        target.quit()


# --- the library ------------------------------------------------------------------------------------------------------


def test_it_is_compiled_once_and_only_ones_own_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory and a file that others cannot write to, or else it is made again and again."""
    compiled: list[Path] = []

    def count(made: Path, compiler: str | None = None) -> None:
        compiled.append(made)
        compile_library(made, compiler)

    compile_library = preload_library.compile_library
    monkeypatch.setattr(preload_library, "BUILT", tmp_path / "none")
    monkeypatch.setattr(preload_library, "compile_library", count)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = preload_library.preload_library()
    assert first.startswith(b"\x7fELF")
    assert preload_library.preload_library() == first
    assert len(compiled) == 1
    cache = tmp_path / "incdump"
    (kept,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    assert kept.stat().st_mode & 0o777 == 0o600
    for path, mode in ((kept, 0o620), (cache, 0o770)):
        before = path.stat().st_mode & 0o777
        path.chmod(mode)
        kept.write_bytes(b"another's")
        assert preload_library.preload_library() == first
        path.chmod(before)
        kept.write_bytes(first)
    for path in (kept, cache):
        os.chown(path, 65534, 65534)
        assert preload_library.preload_library() == first
        os.chown(path, os.geteuid(), os.getegid())
    assert len(compiled) == 5
    assert preload_library.preload_library() == first
    assert len(compiled) == 5


ASKER = Path(__file__).with_name("asker.c")


def ask(place: Path, mappings: Callable[[int], bytes] | None, other: int) -> dict[str, str]:
    """What comes of a program's calls that has the library in it. It may go on at once."""
    program, said = place / "asker", place / "said"
    subprocess.run(["cc", "-rdynamic", "-Wall", "-Werror", "-o", program, ASKER], check=True)
    command = ["sh", "-c", 'cd "$2" && "$0" "$1"', str(program), str(other), str(place)]
    asking = PreloadedCriu(command, mappings, lambda: None, lambda: None, lambda: None, said)
    asking.go_on()
    assert asking.wait() == 0
    assert asking.scanned == {other}
    return dict(line.split("=", 1) for line in said.read_text().splitlines())


def test_it_answers_what_it_should_and_leaves_the_rest_to_the_kernel(tmp_path: Path) -> None:
    told = ask(tmp_path, lambda pid: b"%08d text" % pid, os.getpid())
    everything, kernels = f"0,0,{ARCH.task_size}", "0,0,4096"
    assert told == {
        "preload": "",
        "smaps of another": f"{os.getpid():08}",
        "smaps of its own": told["smaps of its own"],
        "status": "Name:\t" + Path("/proc/self/comm").read_text()[:2],
        "own": kernels,
        "no pages": kernels,
        "any of": everything,
        "mask": everything,
        "thread": everything,
        "no pagemap": "-1",
        "pipe": "3",
        "mode": "640",
        "none": "2",
        "child": kernels,
    }
    assert told["smaps of its own"] != told["smaps of another"]


def test_smaps_are_the_kernels_where_nothing_is_told(tmp_path: Path) -> None:
    def doubt(_: int) -> bytes:
        raise BlockingIOError

    smaps = Path("/proc/self/smaps").read_text()[:8]
    for mappings in (None, doubt):
        assert ask(tmp_path, mappings, os.getpid())["smaps of another"] == smaps


@pytest.mark.parametrize("compiler", ["cc", "aarch64-linux-gnu-gcc"])
def test_it_compiles_without_a_warning(tmp_path: Path, compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    command = [compiler, *preload_library.OPTIONS, "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "made"]
    subprocess.run([*command, preload_library.SOURCE], check=True)
