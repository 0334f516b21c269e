"""A user's own program, called at the steps of a migration: to move an address along, to tell a load balancer."""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

from incdump.errors import MigrationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

_SAID = 200
"""Letters of what it said on stderr that are quoted."""


async def call_hook(command: Sequence[str], step: str, pid: int, images_dir: str | None = None) -> None:
    """Call the program and wait for it; nothing to do for an empty command.

    It finds in its environment ``INCDUMP_STEP``, ``INCDUMP_PID``, and ``INCDUMP_IMAGES_DIR`` where there is one.

    :param command: the program and its arguments.
    :param step: which step this is.
    :raises incdump.errors.MigrationError: it cannot be run, or has failed.
    """
    if not command:
        return
    env = {**os.environ, "INCDUMP_STEP": step, "INCDUMP_PID": str(pid)}
    if images_dir is not None:
        env["INCDUMP_IMAGES_DIR"] = images_dir
    try:
        # A file, no pipe: what the hook leaves running would keep that open.
        with tempfile.TemporaryFile() as stderr:
            status = await _run(command, env, stderr)
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _SAID))
            said = stderr.read().decode(errors="replace").strip()
    except (OSError, ValueError) as error:
        raise MigrationError(f"the hook {command[0]} cannot be run: {error}", pid=pid) from error
    if status:
        reason = f": {said}" if said else ""
        raise MigrationError(f"the hook {command[0]} failed at {step!r} (exit status {status}){reason}", pid=pid)


async def _run(command: Sequence[str], env: dict[str, str], stderr: IO[bytes]) -> int:
    """Returns its exit status. It is killed when this is cancelled."""
    async with await anyio.open_process(
        list(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=env
    ) as process:
        try:
            return await process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            raise
