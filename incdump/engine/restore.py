"""Bringing a checkpoint back to life: the chain is proved first, then ``criu restore`` does it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import aiofiles
import anyio

from incdump.criu.program import failure, find
from incdump.engine.check import check
from incdump.engine.threads import in_thread
from incdump.errors import ImagesError, IncdumpError
from incdump.images.core import has_registers
from incdump.images.images_dir import ImagesDir
from incdump.images.stats import decode_restore_stats
from incdump.model.stats import RestoreResult

if TYPE_CHECKING:
    from collections.abc import Sequence

LOG = "criu-restore.log"
STATS = "stats-restore"


async def restore(
    images_dir: str | os.PathLike[str],
    *,
    detached: bool = True,
    pidfile: str | os.PathLike[str] | None = None,
    criu: str | None = None,
    criu_options: Sequence[str] = (),
) -> RestoreResult:
    """Restore a process tree from a complete checkpoint, incdump's or CRIU's.

    :param images_dir: the newest directory of the chain.
    :param detached: return when the tree runs; else when it has ended. A cancelled restore that is not detached ends
        CRIU, which then ends what it has restored so far, or lets go of a tree that runs already.
    :param pidfile: where to write the root's pid.
    :param criu: CRIU's program; None: where it is installed.
    :param criu_options: further options for ``criu restore``.
    :raises incdump.errors.ImagesError: the chain is damaged, or holds memory only: nothing was started.
    :raises incdump.errors.CriuError: CRIU is missing or failed; its reason is in the message.
    """
    program = await in_thread(find, criu)
    images = await in_thread(_prove, images_dir)
    with tempfile.TemporaryDirectory(prefix="incdump-restore-") as place:
        pid_path = Path(place) / "pid"
        with suppress(FileNotFoundError):
            (images / STATS).unlink()
        command = [program.path, "restore", "--images-dir", str(images), "--log-file", LOG, "--pidfile", str(pid_path)]
        command += ["--restore-detached"] if detached else []
        status = await _run([*command, *criu_options])
        if status:
            raise failure(program, status, f"restoring {images}", images / LOG, path=images)
        pid = int(await _read(pid_path))
    if pidfile is not None:
        await _write(pidfile, b"%d\n" % pid)
    stats = images / STATS
    times = decode_restore_stats(await _read(stats), stats) if stats.exists() else {}
    return RestoreResult(images_dir=str(images), pid=pid, criu=str(program), **times)


def _prove(images_dir: str | os.PathLike[str]) -> Path:
    """
    :returns: the directory, absolute.
    :raises incdump.errors.ImagesError: this is nothing to restore from.
    """
    path = Path(os.path.abspath(images_dir))
    check(path)
    images = ImagesDir(path)
    for pid in images.pids():
        core = path / f"core-{pid}.img"
        if not core.exists() or not has_registers(core.read_bytes(), core):
            raise ImagesError(
                f"{path} holds the memory of process {pid} only (no registers): restore one that "
                "`incdump checkpoint` or `criu dump` made",
                path=path,
            )
    return path


async def _read(path: Path) -> bytes:
    async with aiofiles.open(path, "rb") as file:
        return await file.read()


async def _write(path: str | os.PathLike[str], data: bytes) -> None:
    try:
        async with aiofiles.open(path, "wb") as file:
            await file.write(data)
    except OSError as error:
        raise IncdumpError(f"cannot write {path}: {error.strerror}", path=path, errno=error.errno) from error


async def _run(command: Sequence[str]) -> int:
    """Run CRIU with this process's own streams, which the restored tree gets where it had a terminal."""
    async with await anyio.open_process(
        command, stdin=None, stdout=None, stderr=subprocess.DEVNULL, start_new_session=False
    ) as process:
        try:
            return await process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            raise
