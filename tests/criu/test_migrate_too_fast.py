"""A target that writes faster than the link to the other host carries: it stays, is forced, or is slowed down."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump import DumpOptions, PrecopyPolicy
from tests.command import is_untouched
from tests.criu.arrivals import receiving
from tests.criu.criu import criu_path, exists, restorable_churn
from tests.criu.namespaces import in_own_namespaces
from tests.kernel.support import of_forced_tracker
from tests.kernel.test_precopy import done_by

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    from incdump import MigrateResult
    from incdump.model.precopy import Decision, PrecopyRound
    from tests.criu.arrivals import There
    from tests.criu.criu import RestorableTarget
    from tests.hosts import Host

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.alone,  # links with limits of time
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("real_criu"),
]

SLOW = PrecopyPolicy(downtime=0.5, timeout=60, on_timeout="throttle")
RATE = 100_000
"""Pages a second: 400 MB, of which the link carries 25."""
FULL_SPEED = 1 / 3
"""Of what it did before: more than a target does that is stopped for most of the time, however busy the machine."""


class Fast:
    """A target that writes without rest, more than the link carries, and what it did in a second before.

    :ivar target: it.
    :ivar there: the receiver on the other host.
    :ivar told: the rounds of the last migration.
    """

    def __init__(self, target: RestorableTarget, there: There, host: Host) -> None:
        self.target = target
        self.there = there
        self.told: list[PrecopyRound] = []
        self._host = host
        self._before = speed(target)

    def is_fast(self) -> bool:
        """Whether it still does as much."""
        return speed(self.target) > FULL_SPEED * self._before

    async def migrate(self, policy: PrecopyPolicy, **options: Any) -> MigrateResult:
        """To the other host."""
        on_round = options.pop("on_round", None)
        self.told.clear()

        def tell(done: PrecopyRound, _: Decision) -> None:
            self.told.append(done)
            if on_round is not None:
                on_round(done)

        return await incdump.migrate(
            *(self.target.pid, self._host.address, self.there.port),
            policy=policy,
            options=of_forced_tracker(DumpOptions(page_server_timeout=5)),
            criu=str(criu_path()),
            on_round=tell,
            **options,
        )

    def stays_fast(self) -> None:
        """It runs here, and nobody slows it down."""
        assert is_untouched(self.target.pid)
        assert self.is_fast()
        assert self.there.here(self.target.pid) is None
        self.target.stop()
        self.target.check()
        self.target.run()


@contextmanager
def fast(hosts: tuple[Host, Host], images_root: Path, *options: object) -> Iterator[Fast]:
    """On the first of two hosts, the receiver being on the other."""
    near, far = hosts
    with (
        receiving(images_root / "arriving", "--timeout", 5, *options, host=far) as there,
        near.inside(),
        restorable_churn(images_root, seed=101, threads=2, mib=64, ops="write", dirty_rate=RATE) as target,
    ):
        target.run()
        yield Fast(target, there, far)
        target.stop()
        target.quit()


def speed(target: RestorableTarget) -> float:
    """What it does in a second."""
    began, first = time.monotonic(), done_by(target)
    time.sleep(0.5)
    return (done_by(target) - first) / (time.monotonic() - began)


@in_own_namespaces
def test_it_is_left_as_it_is(two_hosts: tuple[Host, Host], images_root: Path) -> None:
    with fast(two_hosts, images_root) as source:
        with pytest.raises(incdump.DidNotConverge, match="writes too fast"):
            anyio.run(partial(source.migrate, PrecopyPolicy(downtime=0.5, timeout=8, on_timeout="cancel")))
        assert not any(done.throttled for done in source.told)
        source.stays_fast()
        assert source.there.migration()["outcome"] == "void"


@in_own_namespaces
def test_it_is_moved_all_the_same_when_the_time_is_over(two_hosts: tuple[Host, Host], images_root: Path) -> None:
    with fast(two_hosts, images_root) as source:
        began, steps = time.monotonic(), {}
        policy = PrecopyPolicy(downtime=0.5, timeout=8, on_timeout="force")
        call = partial(source.migrate, policy, on_step=lambda step: steps.setdefault(step, time.monotonic() - began))
        result = anyio.run(call)
        assert result.decision is not None
        assert result.decision.why == "8 s are over"
        assert not any(done.throttled for done in source.told)
        assert result.frozen_at is not None
        assert 7 < result.frozen_at < 9.5
        # All of it goes once more, then it stands there.
        assert steps["runs"] < 8 + 64 * 8 / 200 * 2 + 5
        runs_there_fast(source)


@in_own_namespaces
def test_it_is_slowed_down_until_the_link_keeps_up_and_runs_as_before_over_there(
    two_hosts: tuple[Host, Host], images_root: Path
) -> None:
    with fast(two_hosts, images_root) as source:
        result = anyio.run(partial(source.migrate, SLOW))
        assert result.decision is not None
        assert result.decision.why.startswith("the rest takes about")
        assert result.rounds[-1].throttled > 0.5
        assert sorted(done.throttled for done in source.told) == [done.throttled for done in source.told]
        print(f"{len(source.told)} rounds, downtime {result.downtime:.3f} s, in all {result.seconds:.1f} s", flush=True)
        runs_there_fast(source)


def runs_there_fast(source: Fast) -> None:
    """It does, with all its memory as it was, and nobody slows it down."""
    target = source.target
    assert not exists(target.pid)
    source.there.take_over(target)
    assert source.is_fast()
    target.stop()
    target.check()
    target.run()


@in_own_namespaces
def test_nobody_slows_it_down_after_a_migration_that_failed(two_hosts: tuple[Host, Host], images_root: Path) -> None:
    """The link goes down, it is cancelled, the last hook over there says no: each time while it is slowed down."""
    far = two_hosts[1]
    with fast(two_hosts, images_root, "--hook", "sh -c 'test $INCDUMP_STEP != ready'") as source:

        def cut(done: PrecopyRound) -> None:
            if done.throttled > 0.5:
                far.link("down")

        with pytest.raises(incdump.XferError):
            anyio.run(partial(source.migrate, SLOW, on_round=cut))
        assert source.told[-1].throttled > 0.5
        source.stays_fast()
        far.link("up")
        assert source.there.migration()["outcome"] == "void"

        async def cancelled() -> None:
            async with anyio.create_task_group() as tasks:

                def cancel(done: PrecopyRound) -> None:
                    if done.throttled > 0.5:
                        asyncio.get_running_loop().call_later(0.2, tasks.cancel_scope.cancel)

                tasks.start_soon(partial(source.migrate, SLOW, on_round=cancel))

        anyio.run(cancelled)
        assert source.told[-1].throttled > 0.5
        source.stays_fast()
        assert source.there.migration()["outcome"] == "void"

        with pytest.raises(incdump.MigrationError, match="failed at 'ready'"):
            anyio.run(partial(source.migrate, SLOW))
        assert source.told[-1].throttled > 0.5
        source.stays_fast()
        assert source.there.migration()["outcome"] == "void"
