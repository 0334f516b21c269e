"""Dumps to a page server on another host, over a link that is slower than the dump."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump import ConnectionLost, DumpOptions
from tests import oracle
from tests.command import run_python
from tests.hosts import page_server
from tests.kernel.support import Chain, assert_untouched, carry_on, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from incdump import DumpStats
    from incdump.model.options import ProtocolName
    from tests.hosts import Host
    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.alone]  # links with limits of time

PROTOCOLS: tuple[ProtocolName, ...] = ("auto", "criu")
MORE = 8 << 20
"""What a dump of 128 MiB may need more than one of 16 MiB; it is 1 MiB."""


def to(host: Host, port: int, protocol: ProtocolName = "auto", timeout: float = 30) -> DumpOptions:
    where = (host.address, port)
    return DumpOptions(page_server=where, page_server_protocol=protocol, page_server_timeout=timeout)


def prove(chain: Chain, served: Path, *, finished: bool) -> None:
    """A last dump, compared at the server with the tree as it stands; then the tree goes on.

    :param served: the server's directory, with one of each session in it.
    """
    pids = anyio.run(chain.dump_stopped)
    newest = max(served.iterdir(), key=lambda path: int(path.name))
    try:
        report = oracle.compare(newest, pids, finished=finished)
        incdump.check(newest)
    finally:
        carry_on(pids.values())
    assert report.ok, report
    assert report.from_parents
    assert set(pids.values()) == set(chain.last.pids)
    assert_untouched(chain.target)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_chain_at_another_host_is_exact(
    churn: Callable[..., Target], two_hosts: tuple[Host, Host], images_root: Path, protocol: ProtocolName
) -> None:
    near, far = two_hosts
    with page_server(far, "-D", images_root / "served") as port, near.inside():
        target = churn(seed=81, threads=2, processes=2, mib=4, free_run=True, dirty_rate=2000)
        chain = Chain(target, images_root, to(far, port, protocol))
        for _ in range(3):
            anyio.run(chain.predump)
        prove(chain, images_root / "served", finished=protocol == "auto")
        target.check()
        assert all(done.incremental for done in chain.rounds[1:])


DUMP_AND_TELL_PEAK = """
import sys, anyio, incdump
from functools import partial

pid, images, address, port, protocol = sys.argv[1:]
options = incdump.DumpOptions(page_server=(address, int(port)), page_server_protocol=protocol)
anyio.run(partial(incdump.predump, int(pid), images, options=options))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_slow_link_holds_the_reading_back(
    rewriter: Callable[..., Target], two_hosts: tuple[Host, Host], images_root: Path, protocol: ProtocolName
) -> None:
    near, far = two_hosts

    def peak(mib: int) -> int:
        target = rewriter(mib=mib)
        to_server = (far.address, port, protocol)
        done = run_python("-c", DUMP_AND_TELL_PEAK, target.pid, images_root / f"{mib}", *to_server)
        assert done.code == 0, done
        return int(done.out) << 10

    with page_server(far, "-D", images_root / "served") as port, near.inside():
        assert peak(128) < peak(16) + MORE


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_link_that_needs_longer_than_the_timeout_for_what_is_on_its_way_is_no_silent_server(
    rewriter: Callable[..., Target], two_hosts: tuple[Host, Host], images_root: Path, protocol: ProtocolName
) -> None:
    near, far = two_hosts
    near.limit("12mbit")  # 4 MiB in 3 s
    with page_server(far, "-D", images_root / "served") as port, near.inside():
        chain = Chain(rewriter(mib=4), images_root, to(far, port, protocol, timeout=0.5))
        anyio.run(chain.predump)
        prove(chain, images_root / "served", finished=protocol == "auto")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_link_that_goes_down_costs_one_round(
    rewriter: Callable[..., Target], two_hosts: tuple[Host, Host], images_root: Path, protocol: ProtocolName
) -> None:
    near, far = two_hosts

    def cut(step: str, stats: DumpStats) -> None:
        if step == "dumping" and stats.pages_written:
            far.link("down")

    with page_server(far, "-D", images_root / "served", "--timeout", 2) as port, near.inside():
        target = rewriter(mib=16)
        chain = Chain(target, images_root, to(far, port, protocol))
        anyio.run(chain.predump)
        target.dirty(80, seed=1)
        options = replace(chain.options, page_server_timeout=1)
        lost = partial(incdump.predump, target.pid, chain.next_dir(), parent="../001", options=options, progress=cut)
        with pytest.raises(ConnectionLost, match="for 1 s"):
            anyio.run(lost)
        assert not (images_root / "002").exists()
        assert_untouched(target)
        far.link("up")
        until(partial(far.takes_connections, port))
        target.dirty(10, seed=2)
        anyio.run(chain.predump)
        assert chain.last.incremental
        prove(chain, images_root / "served", finished=protocol == "auto")
        assert chain.last.incremental
