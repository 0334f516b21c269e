"""A number means a process only in one pid namespace: with another's /proc, or another's holder, nothing is touched."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump.errors import HolderError, TargetExited
from incdump.holder import wire
from incdump.holder.client import HolderKeeper, ask, connect, end_holder_within, forget
from incdump.proc.identity import Identity, check_own_proc, identify, open_identified, pid_of, signal_same
from tests.kernel.support import (
    Odd,
    assert_untouched,
    holder_pid,
    kill_holder,
    require_root,
    require_tracker,
    tracked_pids,
    until,
    wait_readable,
    watched_vmas,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kernel]

FOREIGN_PROC = ("unshare", "--fork", "--pid")
OWN_PROC = ("unshare", "--fork", "--pid", "--mount-proc")


def within(how: tuple[str, ...], program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a pid namespace of its own, after some processes that use up small numbers."""
    require_root()
    return subprocess.run(
        [*how, sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )


COMMANDS = {
    "predump": ("predump", "-t", "PID", "-D", "DIR"),
    "dump": ("dump", "-t", "PID", "-D", "DIR", "--kill"),
    "checkpoint": ("checkpoint", "-t", "PID", "-D", "DIR"),
    "precopy": ("precopy", "-t", "PID", "-D", "DIR"),
    "restore": ("restore", "-D", "DIR"),
    "receive": ("receive", "-D", "DIR", "--listen", "127.0.0.1:0", "--restore"),
    "untrack": ("untrack", "PID"),
    "untrack all": ("untrack", "--all"),
}
RUN = "import sys; from incdump.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_another_namespaces_proc(odd: Odd, images_root: Path, command: str) -> None:
    given = {"PID": odd.pid, "DIR": images_root / "1"}
    done = within(FOREIGN_PROC, RUN, *[given.get(word, word) for word in COMMANDS[command]])
    assert done.returncode == 3, done
    assert "/proc does not show this pid namespace" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (images_root / "1").exists()
    assert_untouched(odd)


LIBRARY = """
import anyio, os, sys
import incdump
from incdump.freeze.seize import Freezer
from incdump.holder.client import OwnKeeper, held_targets
pid, refused = int(sys.argv[1]), 0

async def each():
    async with Freezer() as freezer:
        await freezer.freeze(pid)

async def session():
    async with incdump.Session(pid) as session:
        await session.predump("/nowhere/1")

for job in (each, session, lambda: incdump.untrack(pid), lambda: incdump.check_against(sys.argv[2], pid)):
    try:
        anyio.run(job)
    except incdump.ProcMismatch:
        refused += 1
for call in (held_targets, lambda: OwnKeeper().acquire(pid, 1)):
    try:
        call()
    except incdump.ProcMismatch:
        refused += 1
print(refused)
"""


@pytest.mark.asyncio
async def test_the_library_refuses_it_too(odd: Odd, images_root: Path) -> None:
    await incdump.dump(odd.pid, images_root / "1")
    await incdump.untrack(odd.pid)
    done = within(FOREIGN_PROC, LIBRARY, odd.pid, images_root / "1")
    assert done.stdout == "6\n", done
    assert_untouched(odd)


def test_doctor_names_it() -> None:
    done = within(FOREIGN_PROC, RUN, "doctor")
    assert done.returncode != 0
    assert "/proc does not show this pid namespace" in done.stdout + done.stderr


def test_the_own_proc_is_taken_for_what_it_is() -> None:
    check_own_proc()
    done = within(OWN_PROC, "from incdump.proc.identity import check_own_proc; check_own_proc(); print('own')")
    assert done.stdout == "own\n", done


CONTAINED = """
import os, subprocess, sys
import anyio, incdump
from incdump.holder.client import held_targets

async def both():
    target = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(100)"], stdout=-1)
    target.stdout.readline()
    try:
        await incdump.predump(target.pid, sys.argv[1])
        assert [held["pid"] for held in held_targets()] == [target.pid]
        assert await incdump.untrack(int(sys.argv[2])) == []
        assert await incdump.untrack(None) == [target.pid]
    finally:
        target.kill()
        target.wait()

anyio.run(both)
print("done")
"""


@pytest.mark.asyncio
async def test_each_namespace_has_a_holder_of_its_own_in_one_directory(odd: Odd, images_root: Path) -> None:
    require_tracker("uffd-wp")
    first = await incdump.predump(odd.pid, images_root / "1")
    holder = holder_pid()
    done = within(OWN_PROC, CONTAINED, images_root / "inner", odd.pid)
    assert done.stdout == "done\n", done
    assert holder_pid() == holder
    assert tracked_pids() == [odd.pid]
    second = await incdump.predump(odd.pid, images_root / "2", parent="../1")
    assert second.incremental
    assert first.generation != second.generation


INTRUDER = """
import socket, sys
from incdump.holder import wire
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(10)
sock.connect(sys.argv[1])
print(wire.receive(sock)[0]["error"])
"""


@pytest.mark.asyncio
async def test_the_holder_answers_nobody_of_another_namespace(odd: Odd, images_root: Path) -> None:
    require_tracker("uffd-wp")
    await incdump.predump(odd.pid, images_root / "1")
    done = within(OWN_PROC, INTRUDER, wire.socket_path())
    assert "serves another pid namespace" in done.stdout, done
    assert tracked_pids() == [odd.pid]
    assert watched_vmas(odd.pid)


@pytest.mark.asyncio
async def test_a_request_that_is_mistaken_costs_nobody_the_tracking(odd: Odd, images_root: Path) -> None:
    """Another start time, no pidfd, another process's pidfd."""
    require_tracker("uffd-wp")
    await incdump.predump(odd.pid, images_root / "1")
    start = identify(odd.pid).start_time
    sock = connect()
    assert sock is not None
    own, right = os.pidfd_open(os.getpid()), os.pidfd_open(odd.pid)
    try:
        with sock:
            for wrong, fds in ((start + 1, (right,)), (start, ()), (start, (own,)), (start, (sock.fileno(),))):
                question = {"do": "acquire", "pid": odd.pid, "start_time": wrong}
                with pytest.raises(incdump.IncdumpError):
                    ask(sock, question, odd.pid, fds)
    finally:
        os.close(own)
        os.close(right)
    assert tracked_pids() == [odd.pid]
    assert (await incdump.predump(odd.pid, images_root / "2", parent="../1")).incremental


def test_a_process_is_bound_to_its_number_by_a_pidfd(odd: Odd) -> None:
    start = identify(odd.pid).start_time
    pidfd = open_identified(odd.pid, start)
    assert pid_of(pidfd) == odd.pid
    os.close(pidfd)
    with pytest.raises(TargetExited):
        open_identified(odd.pid, start + 1)
    other = Identity(odd.pid, start + 1, "")
    assert not signal_same(other, signal.SIGKILL)
    assert_untouched(odd)


@pytest.mark.asyncio
async def test_a_holder_that_does_not_answer_is_not_waited_for_for_ever(
    odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tracker("uffd-wp")
    await incdump.predump(odd.pid, images_root / "1")
    holder = holder_pid()
    assert holder is not None
    monkeypatch.setattr("incdump.holder.client.ANSWER_TIMEOUT", 0.2)
    os.kill(holder, signal.SIGSTOP)
    try:
        with pytest.raises(HolderError, match=f"process {holder}, does not answer; is it stopped"):
            await incdump.predump(odd.pid, images_root / "2", parent="../1")
    finally:
        os.kill(holder, signal.SIGCONT)
    monkeypatch.undo()
    assert not (images_root / "2").exists()
    assert (await incdump.predump(odd.pid, images_root / "2", parent="../1")).incremental


def test_a_holder_of_another_version_is_named(odd: Odd, images_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_tracker("uffd-wp")
    keeper = HolderKeeper()
    keeper.acquire(odd.pid, identify(odd.pid).start_time).close()
    monkeypatch.setattr(wire, "VERSION", wire.VERSION + 1)
    with pytest.raises(HolderError, match="is of another version of incdump: end it"):
        connect()
    keeper.close()


def test_a_starter_that_gives_up_leaves_no_holder_that_nobody_can_reach(
    images_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder gets to run only after that: it listens under a name of its own, and ends."""
    place = images_root / "run"
    place.mkdir(0o700)
    monkeypatch.setenv("INCDUMP_RUNTIME_DIR", str(place))
    path = wire.socket_path()
    ours, theirs = socket.socketpair()
    code = "from incdump.holder.server import main; main()"
    with theirs:
        holder = subprocess.Popen(
            [sys.executable, "-c", code, path, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True
        )
    assert holder.wait(20) == 0  # its first process: the holder is under way
    mine = Path(os.fsdecode(ours.recv(4096)))
    assert mine.name != Path(path).name
    assert mine.exists()
    pid = int(mine.name.rpartition(".")[2])
    pidfd = os.pidfd_open(pid)
    ours.close()
    assert pid_of(pidfd) in (pid, -1)
    wait_readable(pidfd)
    os.close(pidfd)
    assert not mine.exists()
    assert not Path(path).exists()


@pytest.mark.asyncio
async def test_untrack_gives_up_the_descendants_too(images_root: Path) -> None:
    require_tracker("uffd-wp")
    with Odd() as odd, Odd() as other:
        (child,) = odd.do("fork")
        await incdump.predump(odd.pid, images_root / "1")
        await incdump.predump(other.pid, images_root / "2")
        assert sorted(await incdump.untrack(odd.pid)) == sorted((odd.pid, child))
        assert tracked_pids() == [other.pid]
        assert watched_vmas(child) == []


@pytest.mark.asyncio
async def test_untrack_finds_the_descendants_of_a_root_that_is_gone(odd: Odd, images_root: Path) -> None:
    require_tracker("uffd-wp")
    command = ["sh", "-c", "sleep 1000 & echo $!; read line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as root:
        assert root.stdout is not None
        child = int(root.stdout.readline())
        await incdump.predump(root.pid, images_root / "1")
        await incdump.predump(odd.pid, images_root / "2")
        root.kill()
    until(lambda: root.pid not in tracked_pids())
    try:
        assert sorted(tracked_pids()) == sorted((child, odd.pid))
        assert await incdump.untrack(root.pid) == [child]
        assert tracked_pids() == [odd.pid]
        assert watched_vmas(child) == []
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.asyncio
async def test_untrack_finds_descendants_that_have_left_the_tree(odd: Odd, images_root: Path) -> None:
    """Their parent has exited, and they are init's, or a subreaper's."""
    require_tracker("uffd-wp")
    script = "import subprocess, sys; p = subprocess.Popen(['sh', '-c', sys.argv[1]]); p.wait(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, "sleep 1000 & echo $!; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as root:
        assert root.stdin is not None
        assert root.stdout is not None
        child = int(root.stdout.readline())
        await incdump.predump(root.pid, images_root / "1")
        await incdump.predump(odd.pid, images_root / "2")
        root.stdin.write(b"\n")
        root.stdin.flush()
        until(lambda: len(tracked_pids()) == 3)  # the shell between them is gone
        assert sorted(await incdump.untrack(root.pid)) == sorted((root.pid, child))
        assert tracked_pids() == [odd.pid]
        os.kill(child, signal.SIGKILL)
        root.kill()


@pytest.mark.asyncio
async def test_untrack_of_a_number_that_is_anothers_by_now_spares_the_former_tree(odd: Odd, images_root: Path) -> None:
    require_tracker("uffd-wp")
    (child,) = odd.do("fork")
    await incdump.predump(odd.pid, images_root / "1")
    assert forget([], (odd.pid, identify(odd.pid).start_time + 1)) == []
    assert sorted(tracked_pids()) == sorted((odd.pid, child))
    assert sorted(forget([], (odd.pid, identify(odd.pid).start_time))) == sorted((odd.pid, child))


ADOPTER = """
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
memory = bytearray(b"x") * (1 << 20)
print("ready", flush=True)
for line in sys.stdin:
    done = subprocess.run(line.split(), capture_output=True, text=True)
    print(done.returncode, done.stderr.strip().replace("\\n", " "), flush=True)
"""


@pytest.fixture
def adopter() -> Iterator[subprocess.Popen[str]]:
    """A subreaper that runs commands: what they leave behind becomes its child, as an init's of a container."""
    with_pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", ADOPTER], **with_pipes)  # type: ignore[call-overload]
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def run_in(adopter: subprocess.Popen[str], *words: object) -> str:
    assert adopter.stdin is not None
    assert adopter.stdout is not None
    print(*words, file=adopter.stdin, flush=True)
    return adopter.stdout.readline()


@pytest.mark.asyncio
async def test_a_holder_that_criu_would_stop_ends_before_and_the_leases_stay(
    adopter: subprocess.Popen[str], odd: Odd, images_root: Path
) -> None:
    require_tracker("uffd-wp")
    if holder_pid() is not None:
        kill_holder()
    command = (sys.executable, "-m", "incdump", "predump", "-t", odd.pid, "-D", images_root / "1")
    assert run_in(adopter, *command).startswith("0"), "the holder starts there"
    keeper = HolderKeeper()
    lease = keeper.acquire(odd.pid, identify(odd.pid).start_time)
    try:
        assert not end_holder_within(odd.pid)
        assert end_holder_within(adopter.pid)
        assert connect() is None
        assert watched_vmas(odd.pid)
    finally:
        lease.close()
        keeper.close()
    assert watched_vmas(odd.pid) == []


@pytest.mark.asyncio
async def test_a_holder_that_the_target_has_adopted_is_no_part_of_its_tree(
    adopter: subprocess.Popen[str], images_root: Path
) -> None:
    require_tracker("uffd-wp")
    with Odd() as other:
        if holder_pid() is not None:
            kill_holder()
        command = (sys.executable, "-m", "incdump", "predump", "-t", other.pid, "-D", images_root / "other")
        assert run_in(adopter, *command).startswith("0"), "the holder starts there"
        holder = holder_pid()
        assert holder is not None
        assert f"PPid:\t{adopter.pid}\n" in Path(f"/proc/{holder}/status").read_text()
        first = await incdump.predump(adopter.pid, images_root / "1")
        stopped = incdump.DumpOptions(afterwards="stopped", track_for=60)
        last = await incdump.dump(adopter.pid, images_root / "2", parent="../1", options=stopped)
        os.kill(adopter.pid, signal.SIGCONT)
        assert last.incremental
        assert first.pids == last.pids == [adopter.pid]
        assert sorted(tracked_pids()) == sorted((other.pid, adopter.pid))
        await incdump.untrack(None)


@pytest.mark.asyncio
async def test_an_adopted_holder_of_another_runtime_directory_is_no_part_of_a_tree(
    adopter: subprocess.Popen[str], images_root: Path
) -> None:
    require_tracker("uffd-wp")
    other_dir = images_root / "other-runtime"
    with Odd() as other:
        elsewhere = ("env", f"INCDUMP_RUNTIME_DIR={other_dir}", sys.executable, "-m", "incdump")
        done = run_in(adopter, *elsewhere, "predump", "-t", other.pid, "-D", images_root / "other")
        assert done.startswith("0"), done
        (socket_path,) = other_dir.glob("*.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(socket_path))
            holder, _ = wire.peer(sock)
        assert f"PPid:\t{adopter.pid}\n" in Path(f"/proc/{holder}/status").read_text()
        first = await incdump.predump(adopter.pid, images_root / "1")
        stopped = incdump.DumpOptions(afterwards="stopped")
        last = await incdump.dump(adopter.pid, images_root / "2", parent="../1", options=stopped)
        os.kill(adopter.pid, signal.SIGCONT)
        assert first.pids == last.pids == [adopter.pid]
        with pytest.raises(HolderError, match=f"process {holder} is the holder of another incdump.*kill {holder}"):
            end_holder_within(adopter.pid)
        assert not end_holder_within(other.pid)
        assert run_in(adopter, *elsewhere, "untrack", "--all").startswith("0")
        await incdump.untrack(None)


@pytest.mark.asyncio
async def test_a_process_that_merely_has_the_holders_name_is_dumped(images_root: Path) -> None:
    name = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'incdump-holder', 0, 0, 0); print(flush=True); input()"
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {name!r}]).wait()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as root:
        assert root.stdout is not None
        assert root.stdout.readline() == b"\n"
        result = await incdump.predump(root.pid, images_root / "1")
        assert len(result.pids) == 2
        await incdump.untrack(root.pid)
        root.communicate(b"\n")


@pytest.mark.asyncio
async def test_whoever_has_not_used_the_holder_yet_recognizes_one_that_the_target_has_adopted(
    adopter: subprocess.Popen[str], images_root: Path
) -> None:
    """Each is a process of its own, which has never talked to that holder before it lists the tree."""
    require_tracker("uffd-wp")
    session = "import asyncio, incdump, sys\nasync def main():\n async with incdump.Session(int(sys.argv[1])) as s:\n"
    session += "  print(incdump.__name__, list((await s.predump(sys.argv[2])).pids))\nasyncio.run(main())"
    with Odd() as other:
        if holder_pid() is not None:
            kill_holder()
        command = (sys.executable, "-m", "incdump", "predump", "-t", other.pid, "-D", images_root / "other")
        assert run_in(adopter, *command).startswith("0"), "the holder starts there"
        for number, words in enumerate((
            ("-m", "incdump", "predump", "-t", str(adopter.pid), "-D"),
            ("-m", "incdump", "predump", "--tracker", "content", "-t", str(adopter.pid), "-D"),
            ("-m", "incdump", "dump", "--leave-stopped", "-t", str(adopter.pid), "-D"),
            ("-c", session, str(adopter.pid)),
        )):  # fmt: skip
            images = images_root / str(number)
            subprocess.run([sys.executable, *words, images], check=True, timeout=60)
            os.kill(adopter.pid, signal.SIGCONT)
            assert [path.name for path in images.glob("pagemap-[0-9]*.img")] == [f"pagemap-{adopter.pid}.img"]
        await incdump.untrack(None)


def test_a_lock_that_somebody_keeps_is_named(images_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = images_root / "run"
    place.mkdir(0o700)
    monkeypatch.setenv("INCDUMP_RUNTIME_DIR", str(place))
    monkeypatch.setattr(wire, "LOCK_TIMEOUT", 0.1)
    Path(wire.socket_path()).touch()
    lock = wire.lock_socket(str(place))
    try:
        with pytest.raises(HolderError, match=r"holder-\d+\.lock is kept locked by another incdump"):
            connect()
    finally:
        os.close(lock)


@pytest.mark.asyncio
async def test_the_end_of_the_holder_is_waited_for_by_who_has_a_thousand_descriptors(
    odd: Odd, images_root: Path
) -> None:
    require_tracker("uffd-wp")
    await incdump.predump(odd.pid, images_root / "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(1024)]
    try:
        assert await incdump.untrack(None) == [odd.pid]
    finally:
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
