"""``incdump doctor``: what works here, what does not, and what follows.

Features are tried on this very process (`incdump.kerndat`). Trackers are tried on a child that does nothing else: it is
stopped, read and tracked as any target would be, so that a seccomp filter or Yama in the way is found as well. CRIU is
tried on another one (`incdump.cli.doctor_criu`).
"""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from incdump.cli.invocation import Command, Invocation, criu_option, json_option, output, print_json, verbose_option
from incdump.errors import IncdumpError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from incdump.kerndat import Feature

_EXAMPLE = """\b
Example:
  incdump doctor
"""
_HOLDER_PATIENCE = 2.0
"""Seconds for which the holder is waited for."""
_MANY_FILES = 4096
_FILES_OF_A_PROCESS = 6
"""As many descriptors as a dump has open for a process, at most."""
_YAMA = {
    "1": "only descendants of the dumper can be traced (kernel.yama.ptrace_scope=1): run as root, or let the target "
    "call prctl(PR_SET_PTRACER)",
    "2": "only root can trace (kernel.yama.ptrace_scope=2)",
    "3": "nobody can trace (kernel.yama.ptrace_scope=3)",
}


class Verdict(NamedTuple):
    """Whether a tracker works, and why or why not."""

    name: str
    works: bool
    why: str


@click.command("doctor", cls=Command, epilog=_EXAMPLE)
@criu_option
@json_option
@verbose_option
@click.pass_obj
def command(invocation: Invocation, criu: str | None) -> int:
    """Try each kernel feature, each tracker, and CRIU: works or not, why, what follows.

    Needs no privilege, but answers for the user who runs it. The exit code is 1 if no tracker works; CRIU, which only
    checkpoints and migrations need, does not count.
    """
    from incdump import kerndat
    from incdump.cli.doctor_criu import examine

    features = kerndat.probe().features()
    trackers = _try_trackers()
    works = any(tracker.works for tracker in trackers)
    tracked, problem = _tracked()
    report: dict[str, Any] = {
        "works": works,
        "auto": next((tracker.name for tracker in trackers if tracker.works), None),
        "trackers": [tracker._asdict() for tracker in trackers],
        "criu": examine(criu),
        "features": [asdict(feature) for feature in features],
        "limits": _limits(),
        "tracked": tracked,
        "holder": problem,
    }
    if invocation.json:
        print_json(report)
    else:
        _show(report, features, trackers)
    return 0 if works else 1


def _try_trackers() -> list[Verdict]:
    """Each tracker, best first."""
    from incdump.engine.trackers import needs
    from incdump.proc.identity import check_own_proc

    unfit = None
    try:
        check_own_proc()
    except IncdumpError as error:
        unfit = str(error)
    with _child() as pid:
        attempts: tuple[tuple[Any, Callable[[int], None], str], ...] = (
            ("uffd-wp", _start_tracking, "a child process was tracked and read; pre-dumps do not stop the target"),
            ("soft-dirty", _freeze, "a child process was stopped and read; shared with CRIU"),
            ("content", _freeze, "a child process was stopped and read; pages are compared by hash"),
        )
        verdicts = []
        for name, attempt, passed in attempts:
            missing = [f"{feature.what}: {feature.why}" for feature in needs(name) if not feature.works]
            why = unfit or (missing[0] if missing else _failure(attempt, pid))
            verdicts.append(Verdict(name, why is None, why or passed))
    return verdicts


def _failure(attempt: Callable[[int], None], pid: int) -> str | None:
    try:
        attempt(pid)
        _read(pid)
    except IncdumpError as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return None


@contextmanager
def _child() -> Iterator[int]:
    """A process that waits for its standard input, so to speak, to end."""
    from incdump.proc.limits import starting

    reader, writer = os.pipe()
    with starting():
        pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        yield pid
    finally:
        os.close(writer)
        os.waitpid(pid, 0)


def _start_tracking(pid: int) -> None:
    from incdump.holder.client import OwnKeeper
    from incdump.proc.identity import identify

    keeper = OwnKeeper()
    try:
        keeper.acquire(pid, identify(pid).start_time).close()
    finally:
        keeper.close()


def _freeze(pid: int) -> None:
    from incdump.cli.signals import run
    from incdump.freeze.seize import Freezer

    async def freeze() -> None:
        async with Freezer() as freezer:
            await freezer.freeze(pid)

    attempt: Callable[[], Awaitable[None]] = freeze
    run(attempt)


def _read(pid: int) -> None:
    """Read one page of a child: the page of an object that it has at the same address."""
    import numpy as np

    from incdump.model.runs import PAGE_SIZE
    from incdump.proc.memory import ProcessMemory
    from incdump.proc.tree import check_target

    check_target(pid)
    start = id(_YAMA) & -PAGE_SIZE
    with ProcessMemory(pid) as memory:
        missing = memory.read_into(np.empty(PAGE_SIZE, np.uint8), np.array([[start, start + PAGE_SIZE]], np.uint64))
    if len(missing):
        raise OSError(0, "a page of a child process could not be read")


def _limits() -> list[str]:
    """What stands between this user and other processes."""
    from incdump.holder.client import runtime_dir, unusable
    from incdump.proc.confinement import hidepid

    found = []
    if os.geteuid() != 0:
        found.append("not root: only processes of this user can be dumped")
        try:
            with open("/proc/sys/kernel/yama/ptrace_scope", encoding="ascii") as file:
                scope = file.read().strip()
        except OSError:
            scope = "0"
        if scope in _YAMA:
            found.append(_YAMA[scope])
        if (hidden := hidepid()) is not None:
            found.append(f"/proc hides the processes of other users (hidepid={hidden}): run as root for those")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= most < _MANY_FILES:
        room = most // _FILES_OF_A_PROCESS
        found.append(f"RLIMIT_NOFILE is {most} at most: enough for a tree of about {room} processes (ulimit -Hn)")
    try:
        directory = runtime_dir()
        if not os.access(directory, os.W_OK | os.X_OK):
            raise unusable(PermissionError(errno.EROFS, "it cannot be written to", directory))
    except IncdumpError as error:
        found.append(f"pre-dumps cannot keep their tracking: {error}")
    return found


def _tracked() -> tuple[list[int] | None, str | None]:
    """The processes that this user's holder keeps track of; or None, and why that is not known."""
    from incdump.holder.client import held_targets, unusable

    try:
        return sorted(target["pid"] for target in held_targets(_HOLDER_PATIENCE)), None
    except IncdumpError as error:
        return None, str(error)
    except OSError as error:
        return None, str(unusable(error))


def _show(report: dict[str, Any], features: tuple[Feature, ...], trackers: list[Verdict]) -> None:
    from incdump.cli.doctor_criu import row
    from incdump.cli.text import show_verdicts

    show_verdicts("trackers", [(t.name, t.works, (t.why,)) for t in trackers])
    auto = report["auto"]
    lines = [f"--tracker auto takes {auto}" if auto else "nothing works: no process can be dumped by this user here"]
    lines += report["limits"]
    if report["tracked"]:
        lines.append(f"tracked now (see `incdump untrack`): {', '.join(map(str, report['tracked']))}")
    if report["holder"] is not None and report["holder"] not in "\n".join(lines):
        lines.append(f"what is tracked now is not known: {report['holder']}")
    with output():
        print("\n".join(lines), end="\n\n")
    show_verdicts("checkpoints", [row(report["criu"])])
    with output():
        print()
    show_verdicts("kernel features", [(f.name, f.works, (f.what, f"seen: {f.why}", f.follows)) for f in features])
