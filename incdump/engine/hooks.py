"""A user's own program, called at the steps of a migration: to move an address along, to tell a load balancer."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from incdump.errors import HookTimeout, MigrationError, ResourceLimit
from incdump.proc.limits import as_before, starting

if TYPE_CHECKING:
    from typing import IO

_SAID = 200
"""Letters of what it said on stderr that are quoted."""
_DYING = 1.0
"""Seconds for which a hook that was killed is waited for: one that hangs in the kernel does not die."""


@dataclass(frozen=True, slots=True)
class Hook:
    """The program.

    :ivar command: it and its arguments; empty: there is none, and nothing is done.
    :ivar timeout: seconds that it may take at each step. The tree may stand still meanwhile.
    """

    command: tuple[str, ...]
    timeout: float

    async def call(self, step: str, pid: int, images_dir: str | None = None) -> None:
        """Call it and wait for it.

        It finds in its environment ``INCDUMP_STEP``, ``INCDUMP_PID``, and ``INCDUMP_IMAGES_DIR`` where there is one.
        It has a process group of its own, which is killed when it takes too long, or this is cancelled. What it leaves
        running when it ends is not waited for.

        :param step: which step this is.
        :param pid: the root of the tree, at the source.
        :raises incdump.errors.HookTimeout: it took too long.
        :raises incdump.errors.MigrationError: it cannot be run, or has failed.
        """
        if not self.command:
            return
        env = {**os.environ, "INCDUMP_STEP": step, "INCDUMP_PID": str(pid)}
        if images_dir is not None:
            env["INCDUMP_IMAGES_DIR"] = images_dir
        name = self.command[0]
        try:
            # A file, no pipe: what the hook leaves running would keep that open.
            with tempfile.TemporaryFile() as stderr:
                status = await self._run(env, stderr)
                stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _SAID))
                said = stderr.read().decode(errors="replace").strip()
        except (OSError, ValueError, ResourceLimit) as error:
            raise MigrationError(f"the hook {name} cannot be run: {error}", pid=pid) from error
        reason = f": {said}" if said else ""
        if status is None:
            raise HookTimeout(f"the hook {name} was killed at {step!r}, after {self.timeout:g} s{reason}", pid=pid)
        if status:
            raise MigrationError(f"the hook {name} failed at {step!r} (exit status {status}){reason}", pid=pid)

    async def tell(self, step: str, pid: int, images_dir: str | None = None) -> str | None:
        """The same, when it is too late to fail.

        :returns: what went wrong, one line; None if nothing did.
        """
        try:
            await self.call(step, pid, images_dir)
        except MigrationError as error:
            return str(error)
        return None

    async def _run(self, env: dict[str, str], stderr: IO[bytes]) -> int | None:
        """Returns its exit status; None if it took too long."""
        with starting():
            process = await anyio.open_process(
                as_before(self.command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=env,
                start_new_session=True,  # so that all of it can be ended, and a Ctrl-C is incdump's to handle
            )
        try:
            with anyio.move_on_after(self.timeout):
                return await process.wait()
            return None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with anyio.move_on_after(_DYING, shield=True):
                    await process.wait()
