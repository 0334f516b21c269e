"""Ctrl-C at a terminal goes to a whole process group: to incdump, and to nobody whom it has started."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import incdump
from tests import command
from tests.criu.arrivals import receiving
from tests.criu.criu import criu_path, exists, restorable_churn, revive, until
from tests.criu.namespaces import in_own_namespaces
from tests.criu.test_migrate import migrate, runs_here, runs_there
from tests.criu.test_migrate_switch import criu_that

if TYPE_CHECKING:
    import subprocess

    from tests.criu.arrivals import There
    from tests.criu.criu import RestorableTarget

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]


def press_ctrl_c(leader: subprocess.Popen[bytes] | There) -> None:
    """At the terminal of what has a process group of its own."""
    os.killpg(leader.pid, signal.SIGINT)


def is_running(action: str) -> bool:
    """Whether a CRIU does that."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
            if action.encode() in words and b"--action-script" in words:
                return True
    return False


def has_ended(pid: int) -> bool:
    """Whether a process has."""
    return not exists(pid)


def has_been_said(hooked: Path, step: str) -> bool:
    """Whether a hook has been called at a step."""
    return step in hooked.read_text()


def migrating(target: RestorableTarget, port: int, *options: object) -> subprocess.Popen[bytes]:
    where = ("-t", target.pid, f"127.0.0.1:{port}", "--criu", criu_path())
    return command.start("migrate", *where, "--downtime", "5s", "--json", *options, process_group=0)


@in_own_namespaces
def test_at_a_receiver_before_the_tree_may_run_it_is_not_there(images_root: Path) -> None:
    """CRIU restores, and stands at its gate."""
    hooked = images_root / "hooked"
    with restorable_churn(images_root, seed=121, processes=3, mib=16) as target:
        for step in ("restoring", "ready"):
            hook = f"sh -c 'echo $INCDUMP_STEP >> {hooked}; if [ $INCDUMP_STEP = ready ]; then sleep 2; fi'"
            hooked.write_text("")
            with receiving(images_root / f"arriving-{step}", "--hook", hook) as there:
                target.step(20)
                source = migrating(target, there.port)
                begun = {"restoring": partial(is_running, "restore"), "ready": partial(has_been_said, hooked, step)}
                until(begun[step], 60)
                press_ctrl_c(there)
                done = command.wait(source)
                assert done.code in (8, 10), done
                runs_here(target, there)
                until(partial(has_ended, there.pid), 20)
                assert not is_running("restore")
            assert list((images_root / f"arriving-{step}").iterdir()) == []
        target.quit()


@in_own_namespaces
def test_at_a_receiver_when_the_tree_may_run_it_runs_there(images_root: Path) -> None:
    """CRIU is through with it, and has not ended yet."""
    with (
        restorable_churn(images_root, seed=122, processes=2, mib=4) as target,
        receiving(images_root / "arriving", criu=criu_that(images_root, "sleep 0.5")) as there,
    ):

        def at(step: str) -> None:
            if step == "go":
                threading.Timer(0.2, press_ctrl_c, (there,)).start()

        target.step(10)
        assert migrate(target, there.port, on_step=at).outcome == "runs"
        runs_there(target, there)
        target.quit()


@in_own_namespaces
def test_at_a_receiver_that_is_just_being_told_to_go_the_tree_is_in_one_place(images_root: Path) -> None:
    """And the source knows in which, at once: it is said to it."""
    for number in range(4):
        with (
            restorable_churn(images_root, seed=126 + number, mib=4) as target,
            receiving(images_root / f"arriving-{number}") as there,
        ):

            def at(step: str, number: int = number, there: There = there) -> None:
                if step == "go":
                    press_ctrl_c(there)
                    time.sleep(0.002 * number * number)

            target.step(10)
            problem: incdump.MigrationError | None = None
            try:
                migrate(target, there.port, on_step=at)
            except incdump.MigrationError as error:
                problem = error
            assert not isinstance(problem, incdump.OutcomeUnknown), problem
            if problem is None:
                runs_there(target, there)
            else:
                assert "goes on here" in str(problem)
                runs_here(target, there)
            target.quit()


@in_own_namespaces
def test_at_the_source_the_tree_goes_on(images_root: Path) -> None:
    """In a round, while CRIU dumps, while it stands at its gate."""
    with (
        restorable_churn(images_root, seed=123, processes=2, mib=8) as target,
        receiving(images_root / "arriving", "--hook", "sleep 0.3") as there,
    ):
        for step in ("round", "dump", "restore"):
            target.step(20)
            source = migrating(target, there.port)
            if step == "dump":
                until(lambda: is_running("dump"), 60)
            else:
                command.read_until(source.stdout, b'"%s"' % step.encode())
            press_ctrl_c(source)
            done = command.wait(source)
            assert done.code == 130, done
            assert "stopped by SIGINT" in done.err + done.out
            assert there.migration()["outcome"] == "void"
            runs_here(target, there)
            assert not is_running("dump")
        migrate(target, there.port)
        runs_there(target, there)
        target.quit()


@in_own_namespaces
def test_at_the_source_when_the_tree_may_run_there_it_is_gone_here(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=124, mib=4) as target,
        receiving(images_root / "arriving", criu=criu_that(images_root, "sleep 0.5")) as there,
    ):
        source = migrating(target, there.port)
        command.read_until(source.stdout, b'"step": "go"')
        press_ctrl_c(source)
        done = command.wait(source)
        assert done.code == 130, done
        assert "runs at 127.0.0.1" in done.err + done.out
        runs_there(target, there)
        target.quit()


@in_own_namespaces
def test_at_a_checkpoint_the_tree_goes_on_and_the_next_one_is_right(images_root: Path) -> None:
    with restorable_churn(images_root, seed=125, processes=2, mib=16) as target:
        target.step(20)
        assert command.predump(target, images_root / "1").code == 0
        for number, way in enumerate(("leash", "preload", "lazy-pages")):
            target.step(20)
            images = images_root / f"broken-{number}"
            options = ("--prev-images-dir", "../1", "--way", way, "--criu", criu_path())
            running = command.start("checkpoint", "-t", target.pid, "-D", images, *options, process_group=0)
            until(lambda: is_running("dump"), 60)
            press_ctrl_c(running)
            done = command.wait(running)
            assert done.code == 130, done
            assert not is_running("dump")
            assert not (images / "inventory.img").exists()
            until(lambda: command.is_untouched(target.pid), 10)
            target.step(20)
        images = images_root / "2"
        options = ("--prev-images-dir", "../1", "--criu", criu_path(), "--json")
        done = command.incdump("checkpoint", "-t", target.pid, "-D", images, *options)
        assert done.code == 0, done
        assert done.json["incremental"]
        incdump.check(images)
        revive(target, images)
        target.quit()
