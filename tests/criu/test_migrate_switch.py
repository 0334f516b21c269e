"""The moment of a migration's switch: whatever ends in it, the tree is in one place, and what is said is so."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump import CriuError, DumpOptions, MigrationError, Receiver, ReceiverOptions
from incdump.engine import page_server
from tests.criu.arrivals import receiving
from tests.criu.criu import criu_path, restorable_churn, until
from tests.criu.namespaces import in_own_namespaces
from tests.criu.test_migrate import EASY, migrate, runs_here, runs_there
from tests.kernel.support import of_forced_tracker

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]


def kill_criu(action: str) -> None:
    """The CRIU that dumps, or restores, and waits at its gate."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            words = (entry / "cmdline").read_text(errors="replace").split("\0")
            if action in words and "--action-script" in words:
                found.append(int(entry.name))
    os.kill(min(found), signal.SIGKILL)


def criu_that(images_root: Path, then: str) -> Path:
    """A CRIU that does something more when it has restored; $images is where from."""
    path = images_root / "criu"
    path.write_text(
        f'#!/bin/sh\n{criu_path()} "$@"\nstatus=$?\nif [ "$1" = restore ]; then\nimages=$3\n{then}\nfi\nexit $status\n'
    )
    path.chmod(0o755)
    return path


@in_own_namespaces
def test_a_tree_that_stands_no_more_does_not_go(images_root: Path) -> None:
    """CRIU is killed at its gate here, so the tree runs on here: early, and right before "go"."""
    with (
        restorable_churn(images_root, seed=91, processes=2, mib=4) as target,
        receiving(images_root / "arriving", "--hook", "sleep 0.3") as there,
    ):
        for step in ("restore", "go"):

            def at(now: str, step: str = step) -> None:
                if now == step:
                    kill_criu("dump")
                    until(lambda: "TracerPid:\t0" in Path(f"/proc/{target.pid}/status").read_text(), 5)

            target.step(10)
            with pytest.raises((CriuError, MigrationError)):
                migrate(target, there.port, on_step=at)
            assert there.migration()["outcome"] == "void"
            runs_here(target, there)
        target.quit()


@in_own_namespaces
def test_a_criu_that_is_killed_there_leaves_nothing_there(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=92, processes=2, mib=4) as target,
        receiving(images_root / "arriving") as there,
    ):

        def at(step: str) -> None:
            if step == "go":
                kill_criu("restore")

        target.step(10)
        with pytest.raises(MigrationError, match="killed by signal 9"):
            migrate(target, there.port, on_step=at)
        assert there.migration()["outcome"] == "void"
        runs_here(target, there)
        assert list((images_root / "arriving").iterdir()) == []
        migrate(target, there.port)
        runs_there(target, there)
        target.quit()


@in_own_namespaces
def test_a_tree_of_which_criu_cannot_write_how_long_it_took_runs_there_only(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=93, mib=4) as target,
        receiving(images_root / "arriving", criu=criu_that(images_root, ': > "$images/stats-restore"')) as there,
    ):
        target.step(10)
        assert migrate(target, there.port).outcome == there.migration()["outcome"] == "runs"
        runs_there(target, there)
        target.quit()


@in_own_namespaces
def test_a_task_that_is_cancelled_after_go_has_the_tree_there_only(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=94, mib=4) as target,
        receiving(images_root / "arriving", criu=criu_that(images_root, "sleep 0.5")) as there,
    ):

        async def cancelled() -> None:
            def at(step: str) -> None:
                if step == "go":
                    for delay in (0.1, 0.2):
                        asyncio.get_running_loop().call_later(delay, task.cancel)

            options = of_forced_tracker(DumpOptions(page_server_timeout=5))
            call = partial(incdump.migrate, target.pid, "127.0.0.1", there.port, criu=str(criu_path()), policy=EASY)
            task = asyncio.ensure_future(call(options=options, on_step=at))
            with pytest.raises(asyncio.CancelledError):
                await task

        target.step(10)
        anyio.run(cancelled, backend_options={"use_uvloop": True})
        runs_there(target, there)
        assert there.migration()["outcome"] == "runs"
        target.quit()


@in_own_namespaces
def test_who_cannot_be_told_that_it_runs_there_does_not_have_it_run_here(images_root: Path) -> None:
    hooked = images_root / "hooked"
    with restorable_churn(images_root, seed=95, mib=4) as target, receiving(images_root / "arriving") as there:

        def at(step: str) -> None:
            if step == "runs":
                raise LookupError("nobody listens")

        target.step(10)
        with pytest.raises(LookupError):
            migrate(target, there.port, on_step=at, hook=("sh", "-c", f"echo $INCDUMP_STEP >> {hooked}"))
        runs_there(target, there)
        assert hooked.read_text().split() == ["stopped", "moved"]
        target.quit()


@in_own_namespaces
def test_a_receiver_that_is_told_to_end_after_go_says_that_it_runs(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=96, mib=4) as target,
        receiving(images_root / "arriving", criu=criu_that(images_root, "sleep 0.5")) as there,
    ):
        told = []

        def at(step: str) -> None:
            told.append(step)
            if step == "go":
                threading.Timer(0.2, os.kill, (there.pid, signal.SIGTERM)).start()

        target.step(10)
        assert migrate(target, there.port, on_step=at).outcome == "runs"
        assert told == ["stopped", "restore", "go", "runs"]
        runs_there(target, there)
        target.quit()


@in_own_namespaces
def test_a_round_that_the_source_knows_of_first_is_waited_for(images_root: Path) -> None:
    """The session has said that it is through, and the receiver's own task has not seen it yet."""
    real: Callable[..., Any] = page_server._report

    def late(*args: Any) -> Any:
        time.sleep(0.5)
        return real(*args)

    page_server._report = late
    with restorable_churn(images_root, seed=97, mib=1) as target:

        async def both() -> None:
            options = ReceiverOptions(restore=False, once=True)
            async with Receiver(images_root / "arriving", options) as receiver, anyio.create_task_group() as tasks:
                tasks.start_soon(receiver.serve)
                result = await incdump.migrate(
                    target.pid, "127.0.0.1", receiver.port, criu=str(criu_path()), policy=EASY
                )
                assert result.outcome == "stored"

        anyio.run(both)
        target.quit()
    shutil.rmtree(images_root / "arriving")
