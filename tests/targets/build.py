"""Real target processes for tests and benchmarks: compiling them, starting them, talking to them, ending them.

The programs are C files beside this one (churn: see churn_main.c for its commands; rewriter: see rewriter.c)::

    with churn(seed=7, threads=4, processes=3, free_run=True) as target:
        ...                       # target.pid is the root of the tree
        target.check()            # raises BadTargetError when a page is not what it should be

Compiled programs are kept in a cache directory outside of the checkout, under a hash of the sources and the compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

HERE = Path(__file__).resolve().parent
SOURCES: dict[str, tuple[str, ...]] = {
    "churn": ("churn_main.c", "areas.c", "ops.c", "procs.c", "pattern.c"),
    "rewriter": ("rewriter.c",),
}
HEADERS: dict[str, tuple[str, ...]] = {"churn": ("churn.h",), "rewriter": ()}
FLAGS = ("-O2", "-g", "-Wall", "-Wextra", "-pthread")
ALL_OPS = (
    "write", "kwrite", "zero", "map", "split", "remap", "protect", "dontneed", "free", "guard", "replace", "brk", "thp",
    "file", "shared", "memfd", "sysv", "sparse", "droppable", "hugetlb", "stack", "fork", "zombie", "exec", "threads",
    "signal", "regs", "sleep",
)  # fmt: skip


class NoCompilerError(RuntimeError):
    """There is no C compiler on this machine."""


class BadTargetError(AssertionError):
    """A target found its own memory, or something else of its own, changed."""


_BASE = os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()
"""Asked for once: a test may have a place of its own for temporary files."""


def _cache_dir() -> Path:
    path = Path(_BASE) / f"incdump-test-targets-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to somebody else")
    return path


def compiler() -> str:
    """The C compiler's path: ``$CC``, else gcc, else cc.

    :raises NoCompilerError: there is none; tests skip with its text as the reason.
    """
    for name in (os.environ.get("CC"), "gcc", "cc"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NoCompilerError("needs a C compiler (gcc or cc) to build the target processes")


def build(name: str) -> Path:
    """Compile a target, unless the very same one was compiled before.

    :param name: a key of `SOURCES`.
    :returns: the path of the program.
    :raises NoCompilerError: there is no compiler.
    :raises RuntimeError: it does not compile; the compiler's output is the text.
    """
    cc = compiler()
    digest = hashlib.sha256(repr((cc, FLAGS)).encode())
    for source in (*SOURCES[name], *HEADERS[name]):
        digest.update((HERE / source).read_bytes())
    program = _cache_dir() / f"{name}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    unfinished = program.with_name(f"{program.name}.{os.getpid()}")
    command = [cc, *FLAGS, "-o", str(unfinished), *(str(HERE / source) for source in SOURCES[name])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} does not compile:\n{done.stderr}")
    unfinished.rename(program)
    return program


def descendants(pid: int) -> list[int]:
    """The pids of all living descendants of a process (zombies included), parents before children."""
    found: list[int] = []
    todo = [pid]
    while todo:
        parent = todo.pop(0)
        with contextlib.suppress(OSError):
            for tid in os.listdir(f"/proc/{parent}/task"):
                with contextlib.suppress(OSError):
                    children = Path(f"/proc/{parent}/task/{tid}/children").read_text().split()
                    found.extend(map(int, children))
                    todo.extend(map(int, children))
    return found


class Target:
    """A target process (the root of a tree), in a session of its own, told what to do through pipes.

    :ivar pid: the root's pid.
    :ivar directory: a directory of its own, its working directory; gone after `close`.
    """

    def __init__(self, command: Sequence[str | os.PathLike[str]], *, ready_timeout: float = 60.0) -> None:
        """Start a program and wait for its line ``ready PID``."""
        self._directory = tempfile.TemporaryDirectory(prefix="incdump-target-", ignore_cleanup_errors=True)
        self.directory = Path(self._directory.name)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._buffer = b""
        self.process = subprocess.Popen(
            [os.fspath(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=self.directory,
            start_new_session=True,
        )
        self.pid = self.process.pid
        try:
            ready = self._line(ready_timeout)
            if ready != f"ready {self.pid}":
                raise BadTargetError(f"target said {ready!r} instead of ready")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Target {self.process.args!r} pid={self.pid} {'alive' if self.alive() else 'ended'}>"

    def errors(self) -> str:
        """What the target wrote to its standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def _line(self, timeout: float) -> str:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BadTargetError(f"target {self.pid} did not answer within {timeout} s; {self.errors()}")
            got = os.read(self.process.stdout.fileno(), 65536)
            if not got:
                raise BadTargetError(f"target {self.pid} ended with {self.process.wait()}: {self.errors()}")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def send(self, text: str) -> None:
        """Send a command without waiting for the answer (see `receive`)."""
        assert self.process.stdin is not None
        try:
            os.write(self.process.stdin.fileno(), text.encode() + b"\n")
        except BrokenPipeError:
            raise BadTargetError(f"target {self.pid} ended with {self.process.wait()}: {self.errors()}") from None

    def receive(self, timeout: float = 120.0) -> str:
        """The next line of the target's output.

        :raises BadTargetError: it is ``bad ...``, or the target has ended, or said nothing for `timeout` seconds.
        """
        line = self._line(timeout)
        if line.startswith("bad"):
            raise BadTargetError(line)
        return line

    def command(self, text: str, timeout: float = 120.0) -> str:
        """Send a command; returns the answer, one line.

        :raises BadTargetError: as `receive`.
        """
        self.send(text)
        return self.receive(timeout)

    def step(self, count: int) -> int:
        """Let every worker do `count` operations; returns the operations of each so far."""
        return int(self.command(f"step {count}").removeprefix("ok "))

    def check(self) -> None:
        """Let the target verify everything.

        :raises BadTargetError: with its words, if anything is wrong.
        """
        answer = self.command("check")
        if answer != "good":
            raise BadTargetError(answer)

    def run(self) -> None:
        """Let the target work without end."""
        self.command("run")

    def stop(self) -> None:
        """End `run`: nobody works until the next command."""
        self.command("stop")

    def dirty(self, percent: float, seed: int) -> int:
        """(rewriter) Rewrite a share of all pages; returns how many pages."""
        return int(self.command(f"dirty {percent} {seed}").removeprefix("ok "))

    def stripe(self, step: int, seed: int) -> int:
        """(rewriter) Rewrite every `step`-th page; returns how many pages."""
        return int(self.command(f"stripe {step} {seed}").removeprefix("ok "))

    def where(self) -> int:
        """(churn) The address of a page that the target checks; only between steps."""
        return int(self.command("where").removeprefix("where "), 16)

    def stats(self) -> dict[str, int]:
        """(churn) How often each operation was done."""
        pairs = (part.split("=") for part in self.command("stats").split()[1:])
        return {name: int(count) for name, count in pairs}

    def alive(self) -> bool:
        """Whether the root process runs."""
        return self.process.poll() is None

    def tree(self) -> list[int]:
        """The pids of the whole tree, root first."""
        return [self.pid, *descendants(self.pid)]

    def quit(self) -> None:
        """(churn) Let it check everything, end its children and exit.

        :raises BadTargetError: it did not exit with 0.
        """
        self.send("quit")
        while self._line(120.0) not in {"ok quit"}:
            pass
        if self.process.wait(60):
            raise BadTargetError(f"target ended with {self.process.returncode}: {self.errors()}")

    def close(self) -> None:
        """Kill the whole tree (exactly these processes) and reap the root."""
        pids = self.tree() if self.alive() else []
        for _ in range(10):  # whatever was forked meanwhile
            for pid in pids:
                if pid == self.pid or _session(pid) == self.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            pids = _session_members(self.pid)
            if not pids:
                break
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()
        while _session_members(self.pid):  # killed, on their way out
            time.sleep(0.001)
        self._errors.close()
        self._directory.cleanup()


def _session(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    return None


def _session_members(sid: int) -> list[int]:
    """The processes of a session that have not exited."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == sid and fields[0] not in "ZX":
                    found.append(int(name))
    return found


def churn(
    *,
    seed: int = 1,
    threads: int = 2,
    processes: int = 1,
    mib: int = 16,
    ops: str | Iterable[str] = "all",
    free_run: bool = False,
    dirty_rate: float = 0,
    seconds: float = 0,
) -> Target:
    """Start a churn target.

    :param mib: the working set of the whole tree, about.
    :param ops: names of operations (`ALL_OPS`), or a list as text: ``"all,-fork,-exec"``, ``"write,remap"``.
    :param free_run: work at once and without end; else only when told to `Target.step` or `Target.run`.
    :param dirty_rate: pages a second that the whole tree writes when running free, about; 0: as many as it can.
        What it could not write in time is not made up for.
    :param seconds: then check, say ``good`` and exit; 0: live until told to quit.
    """
    names = ops if isinstance(ops, str) else ",".join(ops)
    slower = float(os.environ.get("INCDUMP_TEST_SLOWER", "1"))
    if slower != 1:
        dirty_rate = (dirty_rate or 100_000) / slower
        names += ",-sparse"
    command = [str(build("churn")), f"--seed={seed}", f"--threads={threads}", f"--processes={processes}"]
    command += [f"--mib={mib}", f"--ops={names}", f"--dirty-rate={dirty_rate}", f"--seconds={seconds}", "--dir=."]
    return Target([*command, "--free-run"] if free_run else command)


def rewriter(*, mib: int = 0, vmas: int = 0, vma_kib: int = 40, rate: float = 0) -> Target:
    """Start a rewriter target.

    :param mib: size of one big mapping, MiB.
    :param vmas: number of small mappings, with gaps between them, of `vma_kib` KiB each.
    :param rate: pages a second to rewrite from the start.
    """
    program = build("rewriter")
    return Target([program, f"--mib={mib}", f"--vmas={vmas}", f"--vma-kib={vma_kib}", f"--rate={rate}"])


@contextlib.contextmanager
def cat(pass_fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """cat(1), which has answered once: its program has taken over from what forked it."""
    with subprocess.Popen(
        ["cat"], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=pass_fds
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"?")
        assert child.stdout.read(1) == b"?"
        yield child
        child.kill()
