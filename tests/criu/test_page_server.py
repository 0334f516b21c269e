"""CRIU dumps to incdump's page server, incdump to CRIU's; CRIU restores from what came of it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from tests import oracle
from tests.certificates import Authority
from tests.command import read_until, start, wait
from tests.criu.criu import CHAINABLE_OPS, criu, dump, restorable_churn, revive
from tests.criu.criu import page_server as crius_page_server
from tests.criu.namespaces import in_own_namespaces
from tests.kernel.support import carry_on, of_forced_tracker, require_tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]


@contextmanager
def page_server(*options: object) -> Iterator[tuple[str, ...]]:
    """incdump's page server for as many sessions as it is told; yields what CRIU is to be told."""
    server = start("page-server", "--json", *options)
    try:
        port = json.loads(read_until(server.stdout, b"\n"))["port"]
        yield "--page-server", "--address", "127.0.0.1", "--port", str(port)
        done = wait(server)
        assert done.code == 0, done
        told = [json.loads(line) for line in done.out.splitlines()]
        assert [session["error"] for session in told] == [None] * len(told)
    finally:
        server.kill()
        server.wait()


def put_together(rest: Path, served: Path) -> None:
    """Move what CRIU kept for itself to the pages that it sent."""
    for image in rest.glob("*.img"):
        image.rename(served / image.name)


@in_own_namespaces
def test_criu_restores_what_it_dumped_to_incdumps_page_server(images_root: Path) -> None:
    served, rest = images_root / "served", images_root / "rest"
    with restorable_churn(images_root, seed=41, threads=2, processes=3) as target:
        target.step(100)
        with page_server("-D", served, "--once") as to_server:
            dump(target.pid, rest, *to_server)
        assert list(rest.glob("pages-*")) == []
        put_together(rest, served)
        assert len(incdump.check(served).levels) == 1
        revive(target, served)
        target.quit()


def tls_options(files: incdump.TlsFiles) -> tuple[str, ...]:
    """The options that both programs have."""
    return ("--tls", "--tls-cacert", files.cacert, "--tls-cert", files.cert, "--tls-key", files.key)


@in_own_namespaces
def test_criu_restores_what_it_dumped_to_incdumps_page_server_over_tls(images_root: Path) -> None:
    authority = Authority(images_root / "authority")
    served, rest = images_root / "served", images_root / "rest"
    with restorable_churn(images_root, seed=45, threads=2, processes=2) as target:
        target.step(100)
        with page_server("-D", served, "--once", *tls_options(authority.signs("127.0.0.1"))) as to_server:
            dump(target.pid, rest, *to_server, *tls_options(authority.signs("client")), "--tls-no-cn-verify")
        assert list(rest.glob("pages-*")) == []
        put_together(rest, served)
        revive(target, served)
        target.quit()


@pytest.mark.parametrize("options", [(), ("--auto-dedup",)])
@in_own_namespaces
def test_criu_pre_dumps_and_dumps_to_incdumps_page_server(images_root: Path, options: tuple[str, ...]) -> None:
    require_tracker("soft-dirty")
    served = images_root / "served"
    with restorable_churn(images_root, seed=42, threads=2, ops=CHAINABLE_OPS) as target:
        with page_server("-D", served, "--rounds", 3, *options) as to_server:
            criu("pre-dump", images_root / "1", "--tree", str(target.pid), *to_server)
            target.step(50)
            parent = ("--prev-images-dir", "../1")
            criu("pre-dump", images_root / "2", "--tree", str(target.pid), *parent, *to_server)
            target.step(50)
            dump(target.pid, images_root / "3", "--track-mem", "--prev-images-dir", "../2", *to_server)
        report = incdump.check(served / "3")
        assert len(report.levels) == 3
        assert report.levels[0].pages_in_parent > 0
        put_together(images_root / "3", served / "3")
        revive(target, served / "3")
        target.quit()


async def to_crius_server(images_root: Path, number: int, pid: int, kind: str) -> incdump.DumpResult:
    """A round whose pages go to CRIU's page server, which serves one session."""
    parent = f"../{number - 1}" if number > 1 else None
    options = ("--prev-images-dir", f"../{number - 1}") if parent else ()
    with crius_page_server(images_root / "served" / str(number), *options) as port:
        call = incdump.predump if kind == "predump" else incdump.dump
        where = ("127.0.0.1", port)
        dump_options = of_forced_tracker(incdump.DumpOptions(page_server=where, afterwards="stopped"))
        if kind == "predump":
            dump_options = replace(dump_options, afterwards="running")
        return await call(pid, images_root / "rest" / str(number), parent=parent, options=dump_options)


@pytest.mark.asyncio
async def test_incdump_dumps_to_crius_page_server(churn: Callable[..., Target], images_root: Path) -> None:
    (images_root / "served").mkdir()
    target = churn(seed=43, threads=2, processes=2, mib=8)
    for number in (1, 2, 3):
        target.step(50)
        result = await to_crius_server(images_root, number, target.pid, "predump")
        assert result.incremental == (number > 1)
        assert not [line for line in result.warnings if "page server" in line]
    target.step(50)
    result = await to_crius_server(images_root, 4, target.pid, "dump")
    assert result.incremental
    assert result.stats.pages_skipped_parent > 0
    pids = oracle.tree(target.pid)
    try:
        report = oracle.compare(images_root / "served" / "4", pids, finished=False)
    finally:
        carry_on(pids.values())
    assert report.ok, report
    assert report.from_parents
    target.check()


@pytest.mark.asyncio
async def test_incdump_dumps_to_crius_page_server_over_tls(churn: Callable[..., Target], images_root: Path) -> None:
    authority = Authority(images_root / "authority")
    target = churn(seed=46, threads=2, processes=2, mib=4)
    target.step(50)
    client = replace(authority.signs("client"), verify_name=False)
    tls = (*tls_options(authority.signs("127.0.0.1")), "--tls-no-cn-verify")
    with crius_page_server(images_root / "served", *tls) as port:
        options = incdump.DumpOptions(page_server=("127.0.0.1", port), afterwards="stopped", tls=client)
        await incdump.dump(target.pid, images_root / "rest", options=options)
    pids = oracle.tree(target.pid)
    try:
        report = oracle.compare(images_root / "served", pids, finished=False)
    finally:
        carry_on(pids.values())
    assert report.ok, report
    target.check()


@in_own_namespaces
def test_criu_ends_a_chain_that_incdump_began_at_crius_page_server(images_root: Path) -> None:
    require_tracker("soft-dirty")
    served, rest = images_root / "served", images_root / "rest"
    served.mkdir()
    with restorable_churn(images_root, seed=44, threads=2, ops=CHAINABLE_OPS) as target:
        for number in (1, 2):
            anyio.run(to_crius_server, images_root, number, target.pid, "predump")
            target.step(50)
        with crius_page_server(served / "3", "--prev-images-dir", "../2") as port:
            to_server = ("--page-server", "--address", "127.0.0.1", "--port", str(port))
            dump(target.pid, rest / "3", "--track-mem", "--prev-images-dir", "../2", *to_server)
        put_together(rest / "3", served / "3")
        revive(target, served / "3")
        target.quit()
