"""Limits of descriptors, threads and processes: raised where incdump may, called by name where they are the end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump.criu.lazy import LazyCriu
from incdump.criu.leash import LeashedCriu
from incdump.criu.preloaded import PreloadedCriu
from incdump.errors import HolderError, ResourceLimit
from incdump.freeze.tracer import TracerThread
from incdump.holder import wire
from incdump.holder.client import connect, connect_or_start
from incdump.proc.limits import limit_of, naming_limits, starting
from tests.kernel.support import holder_pid, kill_holder, require_root, require_tracker, tracked_pids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from incdump.criu.held import HeldCriu

pytestmark = [pytest.mark.kernel]

RUN = "import sys; from incdump.cli.main import main; sys.exit(main(sys.argv[1:]))"
USUAL = 1024


@contextmanager
def family(children: int) -> Iterator[int]:
    """A process with so many children, all of them small."""
    script = f"n=0; while [ $n -lt {children} ]; do sleep 1000 & n=$((n+1)); done; echo ready; exec sleep 1000"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True) as shell:
        try:
            assert shell.stdout is not None
            assert shell.stdout.readline() == b"ready\n"
            yield shell.pid
        finally:
            os.killpg(shell.pid, 9)


def run(program: str, *arguments: object, soft: int, hard: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Python program with an RLIMIT_NOFILE of its own."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if hard is None else hard
    command = ["prlimit", f"--nofile={soft}:{hard}", sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["predump", "dump"])
def test_a_command_dumps_more_processes_than_the_usual_limit_has_room_for(images_root: Path, kind: str) -> None:
    with family(300) as pid:
        done = run(RUN, kind, "-t", pid, "-D", images_root / "1", "--json", soft=USUAL)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["pids"]) == 301
        incdump.check(images_root / "1")
        run(RUN, "untrack", pid, soft=USUAL)


def test_a_hard_limit_that_is_too_small_is_told_by_name(images_root: Path) -> None:
    with family(60) as pid:
        done = run(RUN, "predump", "-t", pid, "-D", images_root / "1", soft=64, hard=64)
        assert done.returncode == 1
        assert "RLIMIT_NOFILE is 64" in done.stderr
        assert "ulimit -n" in done.stderr
        assert "report" not in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (images_root / "1").exists()
        done = run(RUN, "predump", "-t", pid, "-D", images_root / "1", soft=64)
        assert done.returncode == 1
        assert f"process {holder_pid()} (the holder)" in done.stderr  # which was started with that limit
        assert "RLIMIT_NOFILE is 64" in done.stderr
        run(RUN, "untrack", "--all", soft=USUAL)
        done = run(RUN, "predump", "-t", pid, "-D", images_root / "1", soft=64)
        assert done.returncode == 0, done.stderr
        run(RUN, "untrack", pid, soft=USUAL)


LIBRARY = """
import anyio, json, resource, sys
import incdump
pid, where, call = int(sys.argv[1]), sys.argv[2], sys.argv[3]

async def work():
    if call == "session":
        async with incdump.Session(pid) as session:
            await session.predump(where)
    else:
        await getattr(incdump, call)(pid, where)

try:
    anyio.run(work)
except incdump.IncdumpError as error:
    print(json.dumps([type(error).__name__, error.limit, error.errno_name, str(error)]))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize("call", ["predump", "dump", "session"])
def test_the_library_leaves_the_limit_alone_and_names_it(images_root: Path, call: str) -> None:
    with family(60) as pid:
        done = run(LIBRARY, pid, images_root / "1", call, soft=64)
        lines = done.stdout.splitlines()
        assert lines, done.stderr
        name, limit, number, text = json.loads(lines[0])
        assert (name, limit, number) == ("ResourceLimit", "RLIMIT_NOFILE", "EMFILE")
        assert "RLIMIT_NOFILE is 64" in text
        assert "resource.setrlimit" in text
        assert lines[1] == "64"
        assert not (images_root / "1").exists()
        run(RUN, "untrack", pid, soft=USUAL)


HOOK = """
import anyio, sys
from incdump.cli.main import _prepare_process
from incdump.engine.hooks import Hook
from incdump.engine.restore import _run
from incdump.errors import MigrationError
from pathlib import Path
import resource
_prepare_process()
said = Path(sys.argv[1])

async def work():
    await Hook(("sh", "-c", f"ulimit -Sn > {said}/hook"), 10).call("step", 1)
    await _run(["sh", "-c", f"ulimit -Sn > {said}/criu"], said / "stderr")
    for missing in ("/nowhere/hook", "/etc/passwd"):
        try:
            await Hook((missing,), 10).call("step", 1)
        except MigrationError as error:
            print(error)

anyio.run(work)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
print(soft == hard)
"""


def test_what_a_command_starts_has_the_limit_of_before(tmp_path: Path) -> None:
    done = run(HOOK, tmp_path, soft=321)
    lines = done.stdout.splitlines()
    assert (tmp_path / "hook").read_text() == "321\n"
    assert (tmp_path / "criu").read_text() == "321\n"
    assert "No such file" in lines[0]
    assert "Permission denied" in lines[1]
    assert lines[2] == "True"


HELD = """
import anyio, sys
import incdump
anyio.run(incdump.predump, int(sys.argv[1]), sys.argv[2])
"""


def test_the_holder_raises_its_own_limit(images_root: Path) -> None:
    require_tracker("uffd-wp")
    with family(0) as pid:
        done = run(HELD, pid, images_root / "1", soft=USUAL)
        assert done.returncode == 0, done.stderr
        holder = holder_pid()
        assert holder is not None
        soft, hard = resource.prlimit(holder, resource.RLIMIT_NOFILE)
        assert soft == hard
        kill_holder()


def _free(pid: int) -> int:
    """The least descriptor that a process has not in use."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    return next(number for number in range(100) if number not in taken)


def test_a_holder_without_descriptors_says_so_and_keeps_what_it_has(images_root: Path) -> None:
    require_tracker("uffd-wp")
    require_root()
    with family(3) as pid:
        done = run(RUN, "predump", "-t", pid, "-D", images_root / "1", soft=USUAL)
        assert done.returncode == 0, done.stderr
        holder = holder_pid()
        assert holder is not None
        before = resource.prlimit(holder, resource.RLIMIT_NOFILE)
        with connect_or_start() as sock:
            try:
                resource.prlimit(holder, resource.RLIMIT_NOFILE, (_free(holder), before[1]))
                wire.send(sock, {"do": "list"}, (0,))
                answer, _ = wire.receive(sock)
                with pytest.raises(ResourceLimit, match="RLIMIT_NOFILE is"):
                    connect()
            finally:
                resource.prlimit(holder, resource.RLIMIT_NOFILE, before)
        assert answer is not None
        assert answer["kind"] == "ResourceLimit"
        assert len(tracked_pids()) == 4
        kill_holder()


def test_a_holder_takes_no_more_targets_than_leave_room_to_talk(images_root: Path) -> None:
    require_tracker("uffd-wp")
    with family(0) as small, family(60) as pid:
        run(RUN, "predump", "-t", small, "-D", images_root / "1", soft=USUAL)
        holder = holder_pid()
        assert holder is not None
        resource.prlimit(holder, resource.RLIMIT_NOFILE, (100, 100))
        done = run(RUN, "predump", "-t", pid, "-D", images_root / "2", soft=USUAL)
        assert "(the holder) has too many files open: RLIMIT_NOFILE is 100" in done.stderr
        assert len(tracked_pids()) == 1, "what the failed dump had begun to track it does not leave tracked"
        done = run(RUN, "untrack", "--all", soft=USUAL)
        assert done.returncode == 0, done.stderr


@pytest.mark.asyncio
async def test_a_tracing_thread_goes_on_where_it_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = TracerThread()
    tracer.start()
    first = await tracer.run(threading.get_native_id)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _no_thread)
        await asyncio.wait_for(tracer.run(tracer.retire), 10)
    assert await asyncio.wait_for(tracer.run(threading.get_native_id), 10) == first
    await tracer.run(tracer.retire)
    assert await tracer.run(threading.get_native_id) != first
    await asyncio.wait_for(tracer.finish(lambda: None), 10)
    assert not os.path.exists(f"/proc/self/task/{first}")


def _no_thread(_self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("way", ["leash", "preload", "lazy"])
def test_a_criu_that_nobody_could_watch_is_not_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def start(command: list[str]) -> HeldCriu | LazyCriu:
        if way == "leash":
            return LeashedCriu(command, None, lambda: None, lambda: None, tmp_path / "stderr")
        if way == "preload":
            return PreloadedCriu(command, None, lambda: None, lambda: None, lambda: None, tmp_path / "stderr")
        return LazyCriu(command, (4, 1, 1), lambda: None, tmp_path / "stderr")

    command = ["sh", "-c", "exec sleep 1000", "sh"]
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _no_thread)
        with pytest.raises(ResourceLimit, match="RLIMIT_NPROC"), naming_limits():
            start(command)
    assert len(os.listdir("/proc/self/fd")) == before
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if b"1000" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_each_limit_has_its_name() -> None:
    of_files = limit_of(OSError(errno.ENFILE, "full"))
    assert of_files is not None
    assert of_files.limit == "fs.file-max"
    assert Path("/proc/sys/fs/file-max").read_text().strip() in str(of_files)
    inner = HolderError("cannot be started", errno=errno.EMFILE)
    with pytest.raises(ResourceLimit, match="RLIMIT_NOFILE"), naming_limits():
        raise inner
    with pytest.raises(ResourceLimit, match=r"RLIMIT_NPROC is .*threads-max is"), naming_limits():
        raise RuntimeError("can't start new thread")
    with pytest.raises(ResourceLimit, match="RLIMIT_NPROC"), starting():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    with pytest.raises(RuntimeError, match="another"), naming_limits():
        raise RuntimeError("another fault")
    assert limit_of(OSError(errno.EAGAIN, "a socket that does not block")) is None


NOBODY = """
import codecs, difflib, os, resource, sys
import anyio._backends._asyncio, numpy, uvloop
import incdump.cli.predump, incdump.cli.progress, incdump.cli.signals, incdump.engine.dump
from incdump.cli.main import main
list(map(codecs.lookup, ("ascii", "latin-1", "idna")))  # what is loaded now need not be readable later
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
sys.exit(main(sys.argv[1:]))
"""


def test_a_user_who_may_start_no_thread_is_told_which_limit(images_root: Path) -> None:
    require_root()
    images_root.chmod(0o755)
    theirs = images_root / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    environment = {**os.environ, "INCDUMP_RUNTIME_DIR": str(theirs / "run")}
    with subprocess.Popen(["sleep", "1000"], user=65534, group=65534, extra_groups=[]) as target:
        try:
            done = subprocess.run(
                [sys.executable, "-c", NOBODY, "predump", "-D", theirs / "1", "-t", str(target.pid)],
                env=environment, capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
        finally:
            target.kill()
    assert done.returncode == 1, done
    assert "RLIMIT_NPROC is 1 for user 65534" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(theirs) in ([], ["run"])
