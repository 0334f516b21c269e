"""Checkpoints to a page server on another host, which are restored there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump import DumpOptions
from tests.criu.criu import criu_path, restorable_churn, revive, until
from tests.criu.namespaces import in_own_namespaces
from tests.hosts import page_server
from tests.kernel.support import of_forced_tracker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from incdump import DumpResult, DumpStats
    from incdump.model.options import Afterwards, WayName
    from tests.criu.criu import RestorableTarget
    from tests.hosts import Host

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]


def to(host: Host, port: int, timeout: float = 30) -> DumpOptions:
    where = (host.address, port)
    return of_forced_tracker(DumpOptions(page_server=where, page_server_timeout=timeout))


def predump(target: RestorableTarget, images: Path, options: DumpOptions, parent: str | None = None) -> DumpResult:
    return anyio.run(partial(incdump.predump, target.pid, images, parent=parent, options=options))


def checkpoint(
    target: RestorableTarget,
    images: Path,
    options: DumpOptions,
    parent: str,
    *,
    afterwards: Afterwards = "killed",
    way: WayName = "auto",
    progress: Callable[[str, DumpStats], None] | None = None,
) -> DumpResult:
    options = replace(options, afterwards=afterwards, track_for=None if afterwards == "killed" else 3600)
    call = partial(incdump.checkpoint, target.pid, images, parent=parent, options=options, way=way, progress=progress)
    return anyio.run(partial(call, criu=str(criu_path())))


@in_own_namespaces
def test_a_tree_moves_to_another_host(two_hosts: tuple[Host, Host], images_root: Path) -> None:
    near, far = two_hosts
    served = images_root / "served"
    with near.inside(), restorable_churn(images_root, seed=51, threads=2, processes=2, mib=8) as target:
        with page_server(far, "-D", served) as port:
            predump(target, images_root / "1", to(far, port))
            for number in (2, 3):
                target.step(50)
                assert predump(target, images_root / f"{number}", to(far, port), f"../{number - 1}").incremental
            target.step(50)
            result = checkpoint(target, images_root / "4", to(far, port), "../3", way="leash")
        assert result.incremental
        assert result.stats.pages_skipped_parent > 0
        assert list(served.glob("4/pagemap-shmem-*.img"))
        assert len(incdump.check(served / "4").levels) == 4
        with far.inside():
            revive(target, served / "4")
        target.step(50)
        target.quit()


@in_own_namespaces
def test_the_tree_runs_on_when_the_link_goes_down(two_hosts: tuple[Host, Host], images_root: Path) -> None:
    near, far = two_hosts
    served = images_root / "served"

    def cut(step: str, stats: DumpStats) -> None:
        if step == "finishing":
            far.link("down")

    with near.inside(), restorable_churn(images_root, seed=52, threads=2, processes=2, mib=8) as target:
        with page_server(far, "-D", served, "--timeout", 2) as port:
            predump(target, images_root / "1", to(far, port))
            target.step(50)
            with pytest.raises(incdump.ConnectionLost, match="for 1 s"):
                checkpoint(target, images_root / "2", to(far, port, timeout=1), "../1", progress=cut)
            assert not (images_root / "2").exists()
            target.step(50)
            far.link("up")
            until(partial(far.takes_connections, port), 30)
            result = checkpoint(target, images_root / "2", to(far, port), "../1", afterwards="running")
            assert result.incremental
            target.step(50)
            assert checkpoint(target, images_root / "3", to(far, port), "../2", way="lazy-pages").incremental
        with far.inside():
            revive(target, served / "3")
        target.quit()
