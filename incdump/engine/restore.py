"""Bringing a checkpoint back to life: the chain is proved first, then ``criu restore`` does it.

`restore` does it at once. `HeldRestore` has the tree stand, complete, until it is told that it may run, or is not to
be: the end of a migration.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import aiofiles
import anyio

from incdump.criu.gate import Gate
from incdump.criu.options import take_scripts
from incdump.criu.program import failure, find, own_file, private
from incdump.engine.reach import check_readable
from incdump.engine.threads import in_thread
from incdump.errors import ImagesError, IncdumpError, TargetError
from incdump.images.core import has_registers
from incdump.images.images_dir import ImagesDir
from incdump.images.proved import ProvedChain
from incdump.images.stats import decode_restore_stats
from incdump.model.arguments import check_arguments
from incdump.model.stats import RestoreResult
from incdump.proc.identity import Identity, boot_id, check_own_proc, check_page_size, is_same, read_stat, signal_same
from incdump.proc.limits import as_before, names_limits, starting
from incdump.proc.tree import process_tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from incdump.criu.program import Criu

LOG = "criu-restore.log"
STDERR = "criu-restore.stderr"
STATS = "stats-restore"
_LOOK_SECONDS = 0.02


@names_limits
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
    :raises incdump.InvalidOption: an argument cannot be; nothing was begun.
    :raises incdump.errors.ImagesError: the chain is damaged, or holds memory only: nothing was started.
    :raises incdump.errors.CriuError: CRIU is missing or failed; its reason is in the message.
    :raises incdump.errors.ProcMismatch: /proc is another pid namespace's: nothing was started.
    """
    check_arguments(images_dir=images_dir, detached=detached, pidfile=pidfile, criu=criu, criu_options=criu_options)
    check_own_proc()  # CRIU goes by its numbers, too
    check_page_size()
    program = await in_thread(find, criu)
    images = await in_thread(prove, images_dir)
    await in_thread(check_readable, images)
    with tempfile.TemporaryDirectory(prefix="incdump-restore-") as place:
        pid_path = Path(place) / "pid"
        command = _command(program, images, pid_path)
        command += ["--restore-detached"] if detached else []
        status = await _run([*command, *criu_options], pid_path.with_name(STDERR))
        result = await _result(program, images, pid_path, status)
    if pidfile is not None:
        await _write(pidfile, b"%d\n" % result.pid)
    return result


def _command(program: Criu, images: Path, pid_path: Path) -> list[str]:
    with suppress(FileNotFoundError):
        (images / STATS).unlink()
    return [program.path, "restore", "--images-dir", str(images), "--log-file", LOG, "--pidfile", str(pid_path)]


async def _result(program: Criu, images: Path, pid_path: Path, status: int) -> RestoreResult:
    """What CRIU has done, by its exit status.

    :raises incdump.errors.CriuError: it has failed.
    """
    if status:
        raise failure(program, status, f"restoring {images}", images / LOG, pid_path.with_name(STDERR), path=images)
    pid = int(await _read(pid_path))
    stats = images / STATS
    times = decode_restore_stats(await _read(stats), stats) if stats.exists() else {}
    return RestoreResult(images_dir=str(images), pid=pid, criu=str(program), **times)


class HeldRestore:
    """A restore in two steps. Whoever is killed between them, or ends without the second, the tree is not there.

    :ivar runs: whether the tree runs.
    """

    def __init__(self, images: Path, program: Criu, criu_options: Sequence[str], pid: int) -> None:
        """
        :param images: a checkpoint, proved (`prove`).
        :param pid: the root's number, as it was dumped.
        """
        self._pid = pid
        self._images = images
        self._program = program
        self._options = criu_options
        self._place: tempfile.TemporaryDirectory[str] | None = None
        self._gate: Gate | None = None
        self._process: anyio.abc.Process | None = None
        self._children: set[Identity] = set()
        self.runs = False

    async def until_ready(self) -> None:
        """Restore all but the running.

        :raises incdump.errors.CriuError: CRIU failed. Nothing is left of the tree.
        :raises incdump.errors.ImagesOutOfReach: it could not open the images: nothing was started.
        :raises incdump.errors.ProcMismatch: /proc is another pid namespace's: nothing was started.
        """
        check_own_proc()  # `_end_remains` sends signals by numbers that were read there
        await in_thread(check_readable, self._images)
        # Among the images, from where programs can be executed if they can be at all.
        self._place = tempfile.TemporaryDirectory(prefix="criu-restore-", dir=self._images)
        options, scripts = take_scripts(self._options)
        self._gate = Gate(Path(self._place.name), self._images, scripts)
        command = _command(self._program, self._images, self._pid_path)
        command += ["--restore-detached", "--action-script", str(self._gate.script)]
        with (
            anyio.CancelScope(shield=True),  # who is cancelled here would never know of it
            own_file(self._pid_path.with_name(STDERR)) as said,
            starting(),
        ):
            self._process = process = await anyio.open_process(
                private(as_before([*command, *options])),
                stdin=None,
                stdout=None,
                stderr=said,
                start_new_session=True,  # a Ctrl-C is incdump's to handle: the tree may just be about to run
            )
        looked = 0.0
        while not self._gate.is_reached:
            if process.returncode is not None:
                await _result(self._program, self._images, self._pid_path, process.returncode or 1)
            if time.monotonic() - looked > _LOOK_SECONDS:
                self._note_children()
                looked = time.monotonic()
            await anyio.sleep(0.0005)  # a file appears, made by a shell
        self._note_children()

    def _note_children(self) -> None:
        """The tree's root is one of CRIU's children."""
        assert self._process is not None
        pid = self._process.pid
        with suppress(OSError, TargetError):
            for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
                self._children.add(Identity(child, read_stat(child).start_time, boot_id()))

    def _end_remains(self) -> None:
        """A CRIU that is killed cannot end what it has restored so far. Blocks."""
        for child in filter(is_same, self._children):
            with suppress(TargetError, ProcessLookupError):
                for task in reversed(process_tree(child.pid)):
                    signal_same(task.identity, signal.SIGKILL)

    @property
    def _pid_path(self) -> Path:
        assert self._place is not None
        return Path(self._place.name) / "pid"

    async def go(self) -> RestoreResult:
        """Let the tree run. Waits until it does, whoever is cancelled meanwhile.

        :raises incdump.errors.CriuError: CRIU failed. Nothing is left of the tree.
        """
        assert self._gate is not None
        assert self._process is not None
        with suppress(OSError):  # CRIU fails then, and says so
            self._gate.open(may_pass=True)
        with anyio.CancelScope(shield=True):
            status = await self._process.wait()
            self.runs = status == 0
            try:
                return await _result(self._program, self._images, self._pid_path, status)
            except (IncdumpError, OSError, ValueError):
                if not self.runs:
                    raise
                # It runs: what CRIU has written about it may be missing, on a disk that is full.
                return RestoreResult(images_dir=str(self._images), pid=self._pid, criu=str(self._program))
        raise AssertionError  # a shielded scope swallows nothing

    async def close(self) -> None:
        """Undo it, if the tree does not run yet. Waits, whoever is cancelled meanwhile."""
        with anyio.CancelScope(shield=True):
            if self._gate is not None:
                self._gate.close()
            if self._process is not None:
                if self._process.returncode is None and not (self._gate and self._gate.is_reached):
                    with suppress(ProcessLookupError):
                        self._process.send_signal(signal.SIGTERM)
                if await self._process.wait() < 0:
                    await in_thread(self._end_remains)
                await self._process.aclose()
            if self._place is not None:
                self._place.cleanup()


def prove(images_dir: str | os.PathLike[str], proved: ProvedChain | None = None) -> Path:
    """Make sure that there is a checkpoint. Blocks.

    :param proved: what was proved of its chain before; None: all is read.
    :returns: the directory, absolute.
    :raises incdump.errors.ImagesError: this is nothing to restore from.
    """
    path = Path(os.path.abspath(images_dir))
    images = ImagesDir(path)
    (proved or ProvedChain(elsewhere=False)).prove(images)
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


async def _run(command: Sequence[str], stderr: Path) -> int:
    """Run CRIU with this process's own streams, which the restored tree gets where it had a terminal.

    :param stderr: a file that takes what it says there.
    """
    with own_file(stderr) as said, starting():
        opened = await anyio.open_process(
            private(as_before(command)), stdin=None, stdout=None, stderr=said, start_new_session=False
        )
    async with opened as process:
        try:
            return await process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            raise
