"""A user's own program, called at the steps of a migration: to move an address along, to tell a load balancer."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio

from incdump.errors import MigrationError

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        process = await anyio.open_process(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
        )
    except (OSError, ValueError) as error:
        raise MigrationError(f"the hook {command[0]} cannot be run: {error}", pid=pid) from error
    said = b""
    async with process:
        assert process.stderr is not None
        try:
            async for piece in process.stderr:
                said = (said + piece)[-_SAID:]
            status = await process.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            raise
    if status:
        reason = f": {said.decode(errors='replace').strip()}" if said.strip() else ""
        raise MigrationError(f"the hook {command[0]} failed at {step!r} (exit status {status}){reason}", pid=pid)
