"""Checkpoints by a session, alone and at the end of a pre-copy loop: restored, the tree finds all of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump import CriuError, DumpOptions, PrecopyPolicy
from tests import oracle
from tests.command import is_untouched
from tests.criu.criu import criu_path, exists, restorable_churn, revive
from tests.criu.namespaces import in_own_namespaces
from tests.criu.test_checkpoint import PRIVATE_OPS, is_crius
from tests.kernel.support import carry_on, of_forced_tracker
from tests.kernel.test_precopy import rounds_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from incdump.model.options import Afterwards
    from tests.criu.criu import RestorableTarget

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]

POLICY = PrecopyPolicy(final="checkpoint")


def run(target: RestorableTarget, job: Callable[[incdump.Session], Any], afterwards: Afterwards = "killed") -> None:
    """Do something with a session."""

    async def within() -> None:
        async with incdump.Session(target.pid, of_forced_tracker(DumpOptions(afterwards=afterwards))) as session:
            await job(session)

    anyio.run(within, backend_options={"use_uvloop": True})


async def follow(rounds: incdump.PrecopyRounds, target: RestorableTarget) -> None:
    """To the end, the target working in between."""
    async for _ in rounds:
        target.step(50)


@in_own_namespaces
def test_it_is_restored(images_root: Path) -> None:
    with restorable_churn(images_root, seed=131, threads=2, processes=2, mib=16) as target:

        async def job(session: incdump.Session) -> None:
            before = await session.predump(images_root / "before")
            rounds = session.precopy(images_root / "chain", policy=POLICY, rule=rounds_of(5), criu=str(criu_path()))
            await follow(rounds, target)
            result = rounds.result
            assert result.final is not None
            assert result.final is session.rounds[-1]
            assert result.final.criu is not None
            assert result.final.checkpoint is not None
            assert result.final.incremental
            assert result.downtime == pytest.approx(
                (result.final.stats.freezing_time + result.final.stats.frozen_time) / 1e6
            )
            assert session.rounds[1].parent == before.images_dir
            assert len(incdump.check(result.final.images_dir).levels) == 7
            assert not exists(target.pid)

        target.step(50)
        run(target, job)
        revive(target, images_root / "chain" / "6")
        target.step(20)
        target.quit()


@in_own_namespaces
def test_a_session_makes_checkpoints_on_top_of_its_dumps(images_root: Path) -> None:
    with restorable_churn(images_root, seed=134, threads=2, processes=2, mib=16) as target:

        async def job(session: incdump.Session) -> None:
            await session.predump(images_root / "1")
            target.step(50)
            running = await session.checkpoint(images_root / "2", criu=str(criu_path()))
            assert running.incremental
            assert is_untouched(target.pid)
            target.step(50)
            killing = of_forced_tracker(DumpOptions(afterwards="killed"))
            last = await session.checkpoint(images_root / "3", options=killing, criu=str(criu_path()))
            assert last.incremental
            assert last.parent == running.images_dir
            assert not exists(target.pid)

        target.step(50)
        run(target, job, "running")
        revive(target, images_root / "3")
        target.step(20)
        target.quit()


@in_own_namespaces
def test_every_page_is_there_and_the_session_goes_on(images_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages too that were deferred, in a tree that is left stopped."""
    with restorable_churn(images_root, seed=132, threads=2, processes=2, mib=16, ops=PRIVATE_OPS) as target:

        async def job(session: incdump.Session) -> None:
            options = of_forced_tracker(DumpOptions(afterwards="stopped"))
            rounds = session.precopy(
                images_root / "chain", policy=POLICY, options=options, rule=rounds_of(5), criu=str(criu_path())
            )
            async for _ in rounds:
                target.step(300)
            pids = oracle.tree(target.pid)
            final = rounds.result.final
            assert final is not None
            images = Path(final.images_dir)
            monkeypatch.setattr(oracle, "SHOWN", 10_000)
            try:
                report = oracle.compare(images, pids)
                wrong = [finding for finding in report.findings if not is_crius(images, finding, pids)]
            finally:
                carry_on(pids.values())
            assert not wrong, [str(finding) for finding in wrong]
            assert any(done.bytes_deferred for done in rounds.result.rounds)
            target.step(50)
            after = await session.dump(images_root / "after")
            assert after.incremental
            assert after.parent == final.images_dir
            incdump.check(after.images_dir)

        target.step(50)
        run(target, job, "running")
        target.check()
        target.quit()


@in_own_namespaces
def test_a_criu_that_fails_ends_the_loop_and_loses_nothing(images_root: Path) -> None:
    with restorable_churn(images_root, seed=133, threads=2, processes=2, mib=16) as target:

        async def job(session: incdump.Session) -> None:
            rounds = session.precopy(
                images_root / "chain",
                policy=POLICY,
                rule=rounds_of(4),
                criu=str(criu_path()),
                criu_options=("--no-such-option",),
            )
            with pytest.raises(CriuError):
                await follow(rounds, target)
            assert is_untouched(target.pid)
            assert rounds.result.final is None
            target.step(50)
            again = session.precopy(images_root / "again", policy=POLICY, rule=rounds_of(2), criu=str(criu_path()))
            await follow(again, target)
            assert all(done.incremental for done in session.rounds[1:])

        target.step(50)
        run(target, job)
        revive(target, images_root / "again" / "3")
        target.step(20)
        target.quit()
