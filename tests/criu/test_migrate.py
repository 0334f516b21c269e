"""Process trees that move to another host; and that do not, whoever is killed, whatever breaks, at whichever step."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import incdump
from incdump import CannotMigrate, DumpOptions, ImagesDir, MigrationError, OutcomeUnknown, PrecopyPolicy
from incdump.images import proved
from tests import command
from tests.certificates import Authority
from tests.command import is_untouched, refused
from tests.criu.arrivals import receiving
from tests.criu.criu import criu_path, exists, restorable_churn, until
from tests.criu.namespaces import in_own_namespaces
from tests.kernel.support import of_forced_tracker
from tests.proxy import Proxy

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

    from incdump import MigrateResult
    from incdump.model.precopy import Decision, PrecopyRound
    from tests.criu.arrivals import There
    from tests.criu.criu import RestorableTarget

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]

EASY = PrecopyPolicy(downtime=5.0, timeout=60)
TWO_ROUNDS = PrecopyPolicy(downtime=1e-6, timeout=600, max_rounds=2)
SILENCE = 60 if "INCDUMP_TEST_SLOWER" in os.environ else 5
"""Seconds after which the other end is given up."""


def migrate(target: RestorableTarget, port: int, **options: Any) -> MigrateResult:
    options.setdefault("policy", EASY)
    options["options"] = of_forced_tracker(options.get("options", DumpOptions(page_server_timeout=SILENCE)))
    call = partial(incdump.migrate, target.pid, "127.0.0.1", port, criu=str(criu_path()), **options)
    return anyio.run(call, backend_options={"use_uvloop": True})


def start_migrating(target: RestorableTarget, there: There) -> subprocess.Popen[bytes]:
    """By the command, which tells of its steps."""
    options = ("--downtime", "5s", "--json", "--criu", criu_path())
    return command.start("migrate", "-t", target.pid, f"127.0.0.1:{there.port}", *options)


def runs_here(target: RestorableTarget, there: There) -> None:
    """It does, as if nothing had been, and not over there."""
    until(lambda: is_untouched(target.pid), 10)
    until(lambda: there.here(target.pid) is None, 10)
    target.step(20)
    target.check()


def runs_there(target: RestorableTarget, there: There) -> None:
    """It does, with all its memory as it was, and not here."""
    assert not exists(target.pid)
    there.take_over(target)
    target.check()
    target.step(20)


@in_own_namespaces
def test_a_tree_runs_on_over_there(images_root: Path) -> None:
    """Several processes, threads, shared memory; rounds while it works."""
    steps: list[str] = []
    with (
        restorable_churn(images_root, seed=61, threads=2, processes=2, mib=8) as target,
        receiving(images_root / "arriving") as there,
    ):
        target.step(50)
        result = migrate(
            target, there.port, policy=TWO_ROUNDS, on_step=steps.append, on_round=lambda *_: target.step(20)
        )
        runs_there(target, there)
        report = there.migration()
        target.quit()
    assert steps == ["stopped", "restore", "go", "runs"]
    assert result.outcome == report["outcome"] == "runs"
    assert result.downtime is not None
    assert result.downtime == pytest.approx(sum(part.microseconds for part in result.parts) / 1e6, abs=1e-3)
    assert result.final is not None
    assert result.final.incremental
    assert report["rounds"] == len(result.rounds) + 1
    assert len(incdump.check(report["images_dir"]).levels) == report["rounds"]


@in_own_namespaces
def test_many_rounds_read_each_pagemap_once_here(images_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the tree runs over there with all its memory, though its chain was proved there round by round."""
    reads: Counter[str] = Counter()
    summary = ImagesDir.summary

    def count(self: ImagesDir, kind: Any, number: int) -> object:
        reads[self.path.name] += 1
        return summary(self, kind, number)

    def rule(rounds: Sequence[PrecopyRound], policy: PrecopyPolicy, *rest: Any) -> Decision:
        return replace(incdump.should_stop(rounds, policy, *rest), verdict="stop" if len(rounds) == 15 else "go on")

    monkeypatch.setattr(ImagesDir, "summary", count)
    monkeypatch.setattr(proved, "_TICK", -3600 * 10**9)  # every level counts as old enough to be remembered
    with restorable_churn(images_root, seed=60, mib=8) as target, receiving(images_root / "arriving") as there:
        target.step(50)
        result = migrate(target, there.port, rule=rule, on_round=lambda *_: target.step(5))
        runs_there(target, there)
        report = there.migration()
        target.quit()
    assert result.final is not None
    assert result.final.incremental
    there_are = {
        path.name: len(list(path.glob("pagemap-*.img"))) for path in Path(report["images_dir"]).parent.iterdir()
    }
    assert reads == {str(number): there_are[str(number)] for number in range(1, 16)}
    assert len(incdump.check(report["images_dir"]).levels) == report["rounds"] == 16


@in_own_namespaces
def test_a_receiver_that_only_stores_has_a_checkpoint_and_the_tree_runs_on(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=62, mib=4) as target,
        receiving(images_root / "arriving", "--no-restore", "--once") as there,
    ):
        target.step(20)
        result = migrate(target, there.port)
        assert result.outcome == there.migration()["outcome"] == "stored"
        runs_here(target, there)
        target.quit()
    incdump.check(images_root / "arriving" / str(len(result.rounds) + 1))
    assert list((images_root / "arriving").glob("*/core-*.img"))


@in_own_namespaces
def test_the_commands(images_root: Path) -> None:
    hooked = images_root / "hooked"
    hook = images_root / "hook"
    hook.write_text(f'#!/bin/sh\necho "$1 $INCDUMP_STEP $INCDUMP_PID" >> {hooked}\n')
    hook.chmod(0o755)
    with (
        restorable_churn(images_root, seed=63, mib=4) as target,
        receiving(images_root / "arriving", "--once", "--hook", f"{hook} there") as there,
    ):
        target.step(20)
        done = command.incdump(
            *("migrate", "-t", target.pid, f"127.0.0.1:{there.port}", "--downtime", "5s", "--hook", f"{hook} here"),
            *("--criu", criu_path(), "--json"),
        )
        assert done.code == 0, done
        told = [json.loads(line) for line in done.out.splitlines()]
        runs_there(target, there)
        there.migration()
        target.quit()
    assert {line["event"] for line in told} == {"round", "step", "end"}
    assert told[-1]["outcome"] == "runs"
    assert {"copy", "restore", "switch"} < {part["part"] for part in told[-1]["freeze"]}
    lines = [line.rsplit(" ", 1)[0] for line in hooked.read_text().splitlines()]
    assert lines[:3] == ["here stopped", "there restore", "there ready"]
    assert sorted(lines[3:]) == ["here moved", "there runs"]


@in_own_namespaces
def test_it_moves_over_tls_and_nobody_else_is_let_in(images_root: Path) -> None:
    authority, stranger = (Authority(images_root / name) for name in ("authority", "stranger"))
    files = authority.signs("127.0.0.1")
    tls = ("--tls", "--tls-cacert", files.cacert, "--tls-cert", files.cert, "--tls-key", files.key)
    with (
        restorable_churn(images_root, seed=83, mib=4) as target,
        receiving(images_root / "arriving", *tls) as there,
    ):
        target.step(20)
        for other in (None, replace(stranger.signs("client"), cacert=files.cacert)):
            with pytest.raises(incdump.XferError):
                migrate(target, there.port, options=DumpOptions(page_server_timeout=3, tls=other))
            runs_here(target, there)
        migrate(target, there.port, options=DumpOptions(tls=authority.signs("client")))
        runs_there(target, there)
        target.quit()


@in_own_namespaces
def test_it_moves_over_a_slow_link_that_loses_packets(images_root: Path) -> None:
    """20 ms each way; what is lost comes 200 ms late."""
    with (
        restorable_churn(images_root, seed=84, processes=2, mib=4) as target,
        receiving(images_root / "arriving") as there,
        Proxy(there.port, delay=0.02, loss=0.01) as link,
    ):
        target.step(20)
        result = migrate(target, link.port, on_round=lambda *_: target.step(10))
        assert result.outcome == "runs"
        runs_there(target, there)
        target.quit()


@in_own_namespaces
def test_the_example_moves_all_that_it_can(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=85, mib=1) as target,
        restorable_churn(images_root, seed=86, mib=1) as other,
        receiving(images_root / "arriving") as there,
    ):
        pids = (target.pid, command.NO_PID, other.pid)
        place = str(criu_path().parent)
        path = {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}
        done = command.run_python(
            command.ROOT / "examples" / "evacuate.py", f"127.0.0.1:{there.port}", *pids, "--downtime", 5, env=path
        )
        assert done.code == 1, done
        lines = done.out.splitlines()
        assert [": runs at" in line for line in lines] == [True, False, True], done
        assert "stays here" in lines[1]
        for moved in (target, other):
            runs_there(moved, there)
            moved.quit()


# --- what is looked at before anything is begun -----------------------------------------------------------------------


@in_own_namespaces
def test_what_the_other_host_lacks_is_said_before_anything_is_begun(images_root: Path) -> None:
    with restorable_churn(images_root, seed=65, mib=4) as target:
        server = command.start("receive", "--json", "-D", images_root / "a", "--restore", "--criu", criu_path())
        try:
            port = json.loads(command.read_until(server.stdout, b"\n"))["port"]
            with pytest.raises(CannotMigrate, match="numbers that the tree has are in use there") as caught:
                migrate(target, port)
        finally:
            server.kill()
            server.communicate()
        assert any(str(target.pid) in problem for problem in caught.value.problems)
        assert is_untouched(target.pid)
        target.quit()


@in_own_namespaces
def test_two_migrations_at_once_are_refused(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=66, mib=4) as target,
        restorable_churn(images_root, seed=67, mib=4) as other,
        receiving(images_root / "arriving") as there,
    ):

        def meanwhile(*_: object) -> None:
            done = command.incdump("migrate", "-t", other.pid, f"127.0.0.1:{there.port}", "--criu", criu_path())
            refused(done, 10, "busy with another migration")

        migrate(target, there.port, on_round=meanwhile)
        runs_there(target, there)
        target.quit()
        migrate(other, there.port)
        runs_there(other, there)
        other.quit()
    assert sorted(os.listdir(images_root / "arriving")) == ["1", "2"]


def test_a_page_server_is_no_receiver(images_root: Path, rewriter: Callable[..., Any], real_criu: None) -> None:
    target = rewriter(mib=1)
    server = command.start("page-server", "--json", "-D", images_root / "served")
    try:
        port = json.loads(command.read_until(server.stdout, b"\n"))["port"]
        done = command.incdump("migrate", "-t", target.pid, f"127.0.0.1:{port}", "--criu", criu_path())
        refused(done, 8, "is it incdump receive that listens")
        server.kill()
        server.communicate()
        done = command.incdump("migrate", "-t", target.pid, f"127.0.0.1:{port}", "--criu", criu_path())
        refused(done, 8, "no receiver", "incdump receive")
    finally:
        server.kill()
        server.communicate()
    assert is_untouched(target.pid)


# --- the connection breaks --------------------------------------------------------------------------------------------


@in_own_namespaces
def test_a_connection_that_breaks_before_the_switch_keeps_the_tree_here(images_root: Path) -> None:
    """In the first round, after it, when the tree stands, while it is restored: it goes on, and moves at last."""
    with (
        restorable_churn(images_root, seed=68, threads=2, processes=2, mib=8) as target,
        receiving(images_root / "arriving") as there,
    ):
        for where in ("round", "stopped", "restore"):
            target.step(20)
            with Proxy(there.port) as proxy:

                def at(step: str, *_: object, where: str = where, proxy: Proxy = proxy) -> None:
                    if step == where:
                        proxy.cut()

                with pytest.raises(incdump.IncdumpError):
                    migrate(target, proxy.port, on_step=at, on_round=partial(at, "round"), policy=TWO_ROUNDS)
            runs_here(target, there)
            assert there.migration()["outcome"] == "void"
            assert list((images_root / "arriving").iterdir()) == []
        migrate(target, there.port)
        runs_there(target, there)
        target.quit()


@in_own_namespaces
def test_the_word_go_that_is_lost_keeps_the_tree_here(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=69, mib=4) as target,
        receiving(images_root / "arriving") as there,
        Proxy(there.port) as proxy,
    ):
        target.step(20)
        told: list[str] = []

        def at(step: str) -> None:
            told.append(step)
            if step == "go":
                proxy.cut(for_good=False)

        with pytest.raises(MigrationError, match="goes on here"):
            migrate(target, proxy.port, on_step=at)
        assert "asking" in told
        runs_here(target, there)
        target.quit()


@in_own_namespaces
def test_an_answer_that_is_lost_is_asked_for(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=70, mib=4) as target,
        receiving(images_root / "arriving", "--once") as there,
        Proxy(there.port) as proxy,
    ):
        target.step(20)
        told: list[str] = []

        def at(step: str) -> None:
            told.append(step)
            if step == "go":
                proxy.mute()
            if step == "asking":
                proxy.cut(for_good=False)

        result = migrate(target, proxy.port, on_step=at)
        assert result.outcome == "runs"
        assert told[-3:] == ["go", "asking", "runs"]
        runs_there(target, there)
        target.quit()


@pytest.mark.parametrize("if_unknown", ["stop", "run"])
@in_own_namespaces
def test_what_cannot_be_found_out_is_said_and_the_tree_is_left_stopped_or_goes_on(
    images_root: Path, if_unknown: str
) -> None:
    with (
        restorable_churn(images_root, seed=71, processes=2, mib=4) as target,
        receiving(images_root / "arriving") as there,
        Proxy(there.port) as proxy,
    ):
        target.step(20)

        def at(step: str) -> None:
            if step == "go":
                proxy.mute()
            if step == "asking":
                proxy.cut()

        with pytest.raises(OutcomeUnknown, match="it is not known whether") as caught:
            migrate(target, proxy.port, on_step=at, if_unknown=if_unknown, asking=1.0)
        assert caught.value.exit_code == 11
        copy = there.here(target.pid)
        assert copy is not None
        os.kill(copy, signal.SIGKILL)  # this is the one that is to end
        if if_unknown == "stop":
            assert all(command.states(pid) == {"T"} for pid in target.tree())
            for pid in reversed(target.tree()):
                os.kill(pid, signal.SIGCONT)
        runs_here(target, there)
        target.quit()


# --- somebody is killed -----------------------------------------------------------------------------------------------


@in_own_namespaces
def test_a_receiver_that_is_killed_leaves_the_tree_here(images_root: Path) -> None:
    """In a round, when the tree stands here, while it is restored there, when it stands there and is to go."""
    for n, where in enumerate(("round", "stopped", "restore", "ready")):
        with (
            restorable_churn(images_root, seed=72 + n, threads=2, processes=2, mib=8) as target,
            receiving(images_root / f"arriving-{where}", "--hook", f"touch {images_root}/$INCDUMP_STEP") as there,
        ):
            target.step(20)

            def at(step: str, *_: object, where: str = where, there: There = there) -> None:
                if step == where or (step == "go" and where == "ready"):
                    there.kill_receiver()
                    until(lambda: not exists(there.pid), 10)

            expected = OutcomeUnknown if where == "ready" else incdump.IncdumpError
            with pytest.raises(expected):
                migrate(
                    target,
                    there.port,
                    on_step=at,
                    on_round=partial(at, "round"),
                    policy=TWO_ROUNDS,
                    asking=1.0,
                    if_unknown="run",  # it was killed before it could hear of it
                )
            runs_here(target, there)
            target.quit()


@in_own_namespaces
def test_a_source_that_is_killed_leaves_the_tree_here(images_root: Path) -> None:
    """incdump, at the same steps; its CRIU finds that nobody holds the gate."""
    for n, where in enumerate(("round", "stopped", "restore")):
        with (
            restorable_churn(images_root, seed=76 + n, threads=2, processes=2, mib=8) as target,
            receiving(images_root / f"arriving-{where}", "--hook", "sleep 0.3") as there,
        ):
            target.step(20)
            source = start_migrating(target, there)
            command.read_until(
                source.stdout, b'"event": "round"' if where == "round" else b'"step": "%s"' % where.encode()
            )
            source.kill()
            source.communicate()
            assert there.migration()["outcome"] == "void"
            runs_here(target, there)
            target.quit()


@in_own_namespaces
def test_a_source_that_is_interrupted_leaves_the_tree_here(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=80, processes=2, mib=4) as target,
        receiving(images_root / "arriving", "--hook", "sleep 0.2") as there,
    ):
        for step in (b'"event": "round"', b'"step": "restore"'):
            source = start_migrating(target, there)
            command.read_until(source.stdout, step)
            source.send_signal(signal.SIGINT)
            assert command.wait(source).code == 130
            assert there.migration()["outcome"] == "void"
            runs_here(target, there)
        target.quit()


# --- the target -------------------------------------------------------------------------------------------------------


@in_own_namespaces
def test_a_target_that_exits_in_the_middle_is_gone(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=81, mib=4) as target,
        receiving(images_root / "arriving") as there,
    ):

        def at(*_: object) -> None:
            if exists(target.pid):
                os.kill(target.pid, signal.SIGKILL)
                target.process.wait()

        with pytest.raises(incdump.TargetError):
            migrate(target, there.port, on_round=at, policy=TWO_ROUNDS)
        assert there.migration()["outcome"] == "void"
        assert list((images_root / "arriving").iterdir()) == []


@in_own_namespaces
def test_a_target_that_writes_faster_than_the_link_stays_or_is_forced(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=82, threads=2, mib=16) as target,
        receiving(images_root / "arriving") as there,
        Proxy(there.port, delay=0.01) as link,  # 6 MB/s
    ):

        def at(*_: object) -> None:
            target.step(100)

        policy = PrecopyPolicy(downtime=1e-3, timeout=3, on_timeout="cancel")
        with pytest.raises(incdump.DidNotConverge):
            migrate(target, link.port, policy=policy, on_round=at)
        runs_here(target, there)
        there.migration()
        policy = PrecopyPolicy(downtime=1e-3, timeout=3, on_timeout="force")
        result = migrate(target, link.port, policy=policy, on_round=at)
        assert result.decision is not None
        assert result.decision.why == "3 s are over" or result.decision.allow is not None
        runs_there(target, there)
        target.quit()
