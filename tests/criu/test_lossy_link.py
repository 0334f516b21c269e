"""Over a link that takes 20 ms each way and loses every hundredth packet (netem): slow, and exact all the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump import DumpOptions
from tests.criu.arrivals import receiving
from tests.criu.criu import CHAINABLE_OPS, criu_path, restorable_churn
from tests.criu.namespaces import in_own_namespaces
from tests.criu.test_migrate import TWO_ROUNDS, runs_there
from tests.hosts import page_server
from tests.kernel.support import Chain, of_forced_tracker
from tests.kernel.test_two_hosts import prove

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.criu.arrivals import There
    from tests.criu.criu import RestorableTarget
    from tests.hosts import Host
    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]

SILENCE = 60.0
"""Seconds after which the other end is given up."""


@in_own_namespaces
def test_a_tree_moves_over_a_lossy_link(lossy_hosts: tuple[Host, Host], images_root: Path, real_criu: None) -> None:
    """It verifies every page of its own over there, and what came is a whole chain."""
    near, far = lossy_hosts
    with (
        receiving(images_root / "arriving", "--timeout", SILENCE, host=far) as there,
        near.inside(),
        restorable_churn(images_root, seed=141, processes=2, mib=2, ops=CHAINABLE_OPS) as target,
    ):
        target.step(50)
        assert move(target, far, there).outcome == "runs"
        images = Path(there.migration()["images_dir"])
        assert len(incdump.check(images).levels) == int(images.name) == 3
        runs_there(target, there)
        target.quit()


def move(target: RestorableTarget, host: Host, there: There) -> incdump.MigrateResult:
    """To another host, the target at work between the rounds."""

    async def moved() -> incdump.MigrateResult:
        return await incdump.migrate(
            *(target.pid, host.address, there.port),
            policy=TWO_ROUNDS,
            options=of_forced_tracker(DumpOptions(page_server_timeout=SILENCE)),
            criu=str(criu_path()),
            on_round=lambda *_: target.step(50),
        )

    result = anyio.run(moved, backend_options={"use_uvloop": True})
    sent = sum(done.bytes_written for done in result.rounds)
    print(f"{len(result.rounds)} rounds of {sent >> 20} MiB, {result.seconds:.1f} s, downtime {result.downtime:.2f} s")
    return result


def test_a_chain_of_a_page_server_over_a_lossy_link_is_exact(
    churn: Callable[..., Target], lossy_hosts: tuple[Host, Host], images_root: Path
) -> None:
    near, far = lossy_hosts
    with page_server(far, "-D", images_root / "served") as port, near.inside():
        target = churn(seed=142, threads=2, processes=2, mib=1, free_run=True, dirty_rate=500)
        options = DumpOptions(page_server=(far.address, port), page_server_timeout=SILENCE)
        chain = Chain(target, images_root, of_forced_tracker(options))
        for _ in range(2):
            anyio.run(chain.predump)
        prove(chain, images_root / "served", finished=True)
        target.check()
        assert all(done.incremental for done in chain.rounds[1:])
