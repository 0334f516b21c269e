"""What a tree needs of a host that is to restore it: told by the one it is on, looked for by the other.

Files that the tree has open are not incdump's to move, and CRIU finds out about many things only when it restores, when
the tree stands still. What can be known before the first round is looked at then, and said in one message: processor,
page size, CRIU's version and what ``criu check`` says, the process numbers, the files that are mapped.
"""

from __future__ import annotations

import base64
import mmap
import os
import platform
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from incdump.criu.program import last_errors
from incdump.errors import ProtocolError, TargetError
from incdump.images.build_id import read_build_id
from incdump.model.runs import PAGE_SIZE
from incdump.model.vmas import VmaKind
from incdump.proc.maps import read_vmas
from incdump.proc.tree import process_tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from incdump.criu.program import Criu
    from incdump.proc.tree import Task
    from incdump.xfer.control import Json

_SECONDS = 60
_NAMED = 5
"""Things of a kind that are named in the message; the rest are counted."""
_DELETED = " (deleted)"
_TRIED = 32 << 20
"""Bytes."""
_MOST_COMM = 64
"""Letters: the kernel has 15."""


def describe(pid: int, criu: Criu) -> dict[str, Any]:
    """What the tree of a process needs, as JSON has it. Blocks.

    :param criu: that will dump it.
    :raises incdump.errors.TargetError: there is no such process.
    """
    tasks = [task for task in process_tree(pid) if task.state != "Z"]
    root = tasks[0]
    return {
        "pid": root.vpid,
        "comm": root.comm,
        "machine": platform.machine(),
        "page_size": PAGE_SIZE,
        "criu": list(criu.version),
        "processor": _processor(criu),
        "pids": sorted({tid for task in tasks for tid in task.vtids}) if _in_our_namespace(pid, "pid") else [],
        "files": _files(tasks),
    }


def _processor(criu: Criu) -> str | None:
    """The processor's features as ``criu cpuinfo dump`` has them, in base64; None where CRIU does not tell."""
    with tempfile.TemporaryDirectory(prefix="incdump-cpuinfo-") as place:
        if _run(criu, "cpuinfo", "dump", place):
            return None
        with suppress(FileNotFoundError):
            return base64.b64encode((Path(place) / "cpuinfo.img").read_bytes()).decode()
    return None


def _run(criu: Criu, *command: str) -> str | None:
    """Run one of CRIU's small commands; returns its reason if it fails.

    :param command: the last word is a directory for it to work in.
    """
    *words, place = command
    log = Path(place) / "log"
    try:
        done = subprocess.run(
            [criu.path, *words, "--images-dir", place, "--work-dir", place, "--log-file", log.name, "-v1"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if done.returncode == 0 else last_errors(log) or f"exit status {done.returncode}"


def _files(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """Size and build id of the files that a tree has mapped, by path; those of other mount namespaces CRIU looks at."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        with suppress(TargetError, OSError):
            if not _in_our_namespace(task.pid, "mnt") or os.readlink(f"/proc/{task.pid}/root") != "/":
                continue
            vmas = read_vmas(task.pid, flags=False)
            files = vmas.select(vmas.of_kind(VmaKind.FILE_PRIVATE, VmaKind.FILE_SHARED))
            for path in set(files.names) - found.keys():
                if path.startswith("/") and not path.endswith(_DELETED) and (facts := _facts(path)) is not None:
                    found[path] = facts
    return found


def _in_our_namespace(pid: int, kind: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return False


def _facts(path: str) -> dict[str, Any] | None:
    """Size and build id of a regular file; None if there is none."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a device may do something
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return None
    try:
        build_id = "".join(f"{word:08x}" for word in read_build_id(fd))
        return {"size": os.fstat(fd).st_size, "build_id": build_id}
    except OSError:
        return None
    finally:
        os.close(fd)


def who(tree: Json) -> tuple[int, str]:
    """The root's process number, and command name, of what `describe` said.

    :raises incdump.errors.ProtocolError: that makes no sense.
    """
    if isinstance(tree, dict):
        pid, comm = tree.get("pid"), tree.get("comm")
        if isinstance(pid, int) and isinstance(comm, str) and len(comm) <= _MOST_COMM:
            return pid, comm
    raise ProtocolError("the tree that is to come is not described")


def problems(tree: Json, criu: Criu | None) -> list[str]:
    """What this host lacks for a tree to be restored here, a line each, for people at the other end. Blocks.

    :param tree: what `describe` said there.
    :param criu: that will restore it; None: it will not be restored here.
    :raises incdump.errors.ProtocolError: that makes no sense.
    """
    who(tree)
    assert isinstance(tree, dict)
    try:
        return [] if criu is None else list(_problems(tree, criu))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ProtocolError("the tree that is to come is described in a way that makes no sense") from error


def _problems(tree: dict[str, Any], criu: Criu) -> Iterator[str]:
    if tree["machine"] != platform.machine():
        yield f"it is {platform.machine()}, the tree's programs are for {tree['machine']}"
        return
    if tree["page_size"] != PAGE_SIZE:
        yield f"its pages have {PAGE_SIZE} bytes, the tree's {tree['page_size']}"
    version = tuple(map(int, tree["criu"]))
    if criu.version < version:
        yield f"it has {criu}, which is older than the one that will dump the tree, {'.'.join(map(str, version))}"
    with tempfile.TemporaryDirectory(prefix="incdump-check-") as place:
        if why := _run(criu, "check", place):
            yield f"{criu} cannot work there: {why}"
        if tree["processor"] is not None:
            (Path(place) / "cpuinfo.img").write_bytes(base64.b64decode(tree["processor"]))
            if why := _run(criu, "cpuinfo", "check", place):
                yield f"its processor lacks what the tree's programs may use: {why}"
    yield from _several("process numbers that the tree has are in use there", _in_use(tree["pids"]))
    yield from _several("files that the tree has mapped are missing or other ones there", _other_files(tree["files"]))


def restore_rate() -> float:
    """How many bytes a second this host fills fresh memory with, from files in its page cache. Measured; blocks.

    That is what a restore does most of the time, and what the tree has to wait for.
    """
    with tempfile.TemporaryFile() as file:
        file.truncate(_TRIED)
        with mmap.mmap(file.fileno(), _TRIED, mmap.MAP_SHARED | mmap.MAP_POPULATE):
            began = time.perf_counter()
            with mmap.mmap(-1, _TRIED, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
                os.preadv(file.fileno(), [memory], 0)
                return _TRIED / (time.perf_counter() - began)


def _in_use(pids: Sequence[int]) -> Iterator[str]:
    for pid in pids:
        with suppress(OSError):
            comm = Path(f"/proc/{int(pid)}/comm").read_text(errors="replace").strip()
            yield f"{int(pid)} ({comm})"


def _other_files(files: dict[str, dict[str, Any]]) -> Iterator[str]:
    for path, wanted in files.items():
        facts = _facts(str(path))
        if facts is None:
            yield f"{path} (missing)"
        elif wanted["build_id"] != facts["build_id"]:
            yield f"{path} (another build)"
        elif wanted["size"] != facts["size"]:
            yield f"{path} (another size)"


def _several(what: str, found: Iterator[str]) -> Iterator[str]:
    names = list(found)
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"{what}: {', '.join(names[:_NAMED])}{more}"
