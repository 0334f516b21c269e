"""What cannot be dumped, or not there: one line that says what to do, an unharmed target, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import (
    KINDS,
    NO_PID,
    ROOT,
    Done,
    incdump,
    is_untouched,
    predump,
    read_until,
    refused,
    start,
    wait,
)
from tests.targets.build import NoCompilerError, Target
from tests.targets.build import rewriter as rewriter_target

pytestmark = pytest.mark.kernel

MakeTarget = Callable[..., Target]


@pytest.fixture
def target(rewriter: MakeTarget) -> Target:
    """A quiet process of a few MiB."""
    return rewriter(mib=4)


@pytest.fixture
def big(rewriter: MakeTarget) -> Target:
    """A process that takes a while to dump."""
    return rewriter(mib=384, rate=1000)


# -- targets that cannot be dumped -----------------------------------------------------------------------------------


def kernel_thread() -> int:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if int(fields[6]) & 0x00200000:
                    return int(name)
    pytest.skip("needs a kernel thread that is visible in /proc")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pid_that_does_not_exist_is_refused(images_root: Path, kind: str) -> None:
    refused(incdump(kind, "-t", NO_PID, "-D", images_root / "1"), 3, str(NO_PID))
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_thread_is_refused(images_root: Path, kind: str) -> None:
    refused(incdump(kind, "-t", kernel_thread(), "-D", images_root / "1"), 3, "kernel thread")
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_zombie_is_refused(images_root: Path, kind: str) -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        refused(incdump(kind, "-t", process.pid, "-D", images_root / "1"), 3, "zombie")
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_incdump_itself_is_refused(images_root: Path, kind: str) -> None:
    script = f'exec {sys.executable} -m incdump {kind} -t $$ -D "$0"'
    done = subprocess.run(["sh", "-c", script, str(images_root / "1")], cwd=ROOT, capture_output=True, text=True)
    refused(Done(done.returncode, done.stdout, done.stderr), 3, "incdump itself")
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_that_incdump_runs_in_is_refused(images_root: Path, kind: str) -> None:
    refused(incdump(kind, "-t", os.getpid(), "-D", images_root / "1"), 3, "incdump")
    assert not (images_root / "1").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_is_traced_already_is_refused(target: Target, images_root: Path, kind: str) -> None:
    code = f"import sys; from incdump._uapi import ptrace; ptrace.seize({target.pid}); print('ok'); sys.stdin.read()"
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as tracer:
        read_until(tracer.stdout, b"ok")
        refused(incdump(kind, "-t", target.pid, "-D", images_root / "1"), 3, str(tracer.pid), "traced")
        tracer.communicate(b"")
    assert not (images_root / "1").exists()
    assert is_untouched(target.pid)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_that_exits_in_mid_dump_is_an_error_and_leaves_nothing(
    big: Target, images_root: Path, kind: str
) -> None:
    command = start(kind, "-t", big.pid, "-D", images_root / "1", "-v")
    read_until(command.stderr, b" dumping\n")
    command.send_signal(signal.SIGSTOP)
    big.process.kill()
    command.send_signal(signal.SIGCONT)
    done = wait(command)
    assert done.code == 3, done
    assert "exited" in done.err.splitlines()[-1]
    assert not (images_root / "1").exists()


# -- another user ----------------------------------------------------------------------------------------------------


def test_another_users_process_is_refused(target: Target, as_nobody: dict[str, Any]) -> None:
    for kind in KINDS:
        refused(incdump(kind, "-t", target.pid, "-D", "images", **as_nobody), 3, "permission")
        assert not Path(str(as_nobody["cwd"]), "images").exists()
    assert is_untouched(target.pid)


def test_a_directory_that_may_not_be_written_is_refused(as_nobody: dict[str, Any]) -> None:
    with _sleeper(as_nobody) as pid:
        done = incdump("predump", "-t", pid, "-D", "/var/images", **as_nobody)
        refused(done, 4, "/var/images")
        assert is_untouched(pid)


def test_an_ordinary_user_can_dump_processes_of_its_own(as_nobody: dict[str, Any]) -> None:
    with _sleeper(as_nobody) as pid:
        doctor = incdump("doctor", "--json", **as_nobody).json
        if not doctor["works"]:
            pytest.skip(f"needs a kernel that lets ordinary users trace: {doctor['limits']}")
        for kind in KINDS:
            done = incdump(kind, "-t", pid, "-D", kind, **as_nobody)
            assert done.code == 0, done
        assert is_untouched(pid)
        assert incdump("check", "dump", **as_nobody).code == 0
        assert incdump("untrack", "--all", **as_nobody).code == 0


@contextlib.contextmanager
def _sleeper(options: dict[str, Any]) -> Iterator[int]:
    """A process of that user that waits, and may be traced as far as Yama is concerned."""
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1)); print(1); sys.stdin.read()"
    command = [options["python"], "-u", "-c", code]
    plain = {key: value for key, value in options.items() if key not in ("env", "python")}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **plain) as process:
        read_until(process.stdout, b"1")
        yield process.pid
        process.communicate(b"")


# -- directories that cannot be used ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_cannot_be_made_is_refused(target: Target, images_root: Path, kind: str) -> None:
    (images_root / "file").write_text("")
    refused(incdump(kind, "-t", target.pid, "-D", images_root / "file" / "1"), 4, "file/1")
    assert is_untouched(target.pid)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_an_error_that_leaves_nothing(target: Target, tiny_tmpfs: Path, kind: str) -> None:
    done = incdump(kind, "-t", target.pid, "-D", tiny_tmpfs / "1", "--json")
    assert done.code == 4, done
    assert done.json["errno"] == "ENOSPC"
    assert done.json["error"] == done.error
    assert list(tiny_tmpfs.iterdir()) == []
    assert is_untouched(target.pid)


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_holds_a_dump_is_refused_and_stays_as_it_is(
    target: Target, images_root: Path, kind: str
) -> None:
    assert predump(target, images_root / "1").code == 0
    before = {path: path.read_bytes() for path in (images_root / "1").iterdir()}
    refused(incdump(kind, "-t", target.pid, "-D", images_root / "1"), 4, "already holds a dump")
    assert before == {path: path.read_bytes() for path in (images_root / "1").iterdir()}
    assert is_untouched(target.pid)


# -- parents that cannot be used -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain_made_once() -> Iterator[tuple[Target, Path]]:
    """A target, and three pre-dumps of it, by content: 1, 2 and 3."""
    with contextlib.ExitStack() as stack:
        try:
            target = stack.enter_context(rewriter_target(mib=4))
        except NoCompilerError as error:
            pytest.skip(str(error))
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        for number in (1, 2, 3):
            parent = ("--prev-images-dir", f"../{number - 1}") if number > 1 else ()
            done = predump(target, root / str(number), "--tracker", "content", *parent)
            assert done.code == 0, done
        yield target, root


@pytest.fixture
def chain(chain_made_once: tuple[Target, Path], images_root: Path) -> tuple[Target, Path]:
    """The same, to be damaged at will: a copy of it."""
    target, root = chain_made_once
    return target, shutil.copytree(root, images_root / "chain", symlinks=True)


def on_top_of(target: Target, root: Path, parent: str, kind: str) -> Done:
    return incdump(kind, "-t", target.pid, "-D", root / "new", "--prev-images-dir", parent)


def clean(target: Target, root: Path) -> bool:
    return is_untouched(target.pid) and not (root / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_that_does_not_exist_is_refused_with_what_may_be_meant(chain: tuple[Target, Path], kind: str) -> None:
    target, root = chain
    refused(on_top_of(target, root, "../9", kind), 4, "../9", str(root / "9"))
    mistaken = incdump(kind, "-t", target.pid, "-D", "new", "--prev-images-dir", "3", cwd=root)
    refused(mistaken, 4, "../3")
    assert clean(target, root)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_parent_is_refused(chain: tuple[Target, Path], kind: str) -> None:
    target, root = chain
    (root / "3" / "inventory.img").unlink()
    refused(on_top_of(target, root, "../3", kind), 4, str(root / "3"), "no finished dump")
    assert clean(target, root)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_of_another_process_is_refused(rewriter: MakeTarget, chain: tuple[Target, Path], kind: str) -> None:
    target, root = chain
    other = rewriter(mib=1)
    refused(on_top_of(other, root, "../3", kind), 4, str(other.pid), str(target.pid))
    assert clean(other, root)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_of_a_reused_pid_is_refused(chain: tuple[Target, Path], kind: str) -> None:
    target, root = chain
    path = root / "3" / "incdump.json"
    meta = json.loads(path.read_text())
    meta["processes"][str(target.pid)]["start_time"] -= 1
    path.write_text(json.dumps(meta))
    refused(on_top_of(target, root, "../3", kind), 4, str(target.pid), "earlier process")
    assert clean(target, root)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parent_deleted_in_the_middle_of_the_chain_is_refused(chain: tuple[Target, Path], kind: str) -> None:
    target, root = chain
    shutil.rmtree(root / "2")
    refused(on_top_of(target, root, "../3", kind), 4, str(root / "3" / "parent"), "../2")
    assert clean(target, root)


def test_check_tells_each_damage_with_the_code_for_it(chain: tuple[Target, Path]) -> None:
    _target, root = chain
    assert incdump("check", root / "3").code == 0
    refused(incdump("check", root / "9"), 4, str(root / "9"))
    pages = max((root / "1").glob("pages-*.img"), key=lambda path: path.stat().st_size)
    os.truncate(pages, pages.stat().st_size - 4096)
    refused(incdump("check", root / "3"), 6, str(pages))
    assert incdump("check", root / "3", "--json").json["kind"] == "BadImage"
    shutil.rmtree(root / "1")
    refused(incdump("check", root / "3"), 6, str(root / "2" / "parent"), "../1")
    (root / "3" / "inventory.img").unlink()
    refused(incdump("check", root / "3"), 6, "no finished dump")
