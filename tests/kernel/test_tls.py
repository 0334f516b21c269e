"""TLS between page server and client, with certificates that openssl(1) makes."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

import incdump
from incdump import TlsFiles, XferError
from incdump.model.options import DumpOptions
from tests import command
from tests.certificates import Authority
from tests.command import read_until, start, wait
from tests.kernel.support import Chain, assert_untouched, carry_on, same_when_stopped
from tests.kernel.test_page_client import PROTOCOLS, page_server, prove

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from incdump.model.options import ProtocolName
    from tests.targets.build import Target

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.asyncio
async def test_a_chain_over_tls_is_exact(
    churn: Callable[..., Target], images_root: Path, authority: Authority, protocol: ProtocolName
) -> None:
    target = churn(seed=81, threads=2, processes=2, mib=4, free_run=True, dirty_rate=5000)
    tls = authority.signs("127.0.0.1")
    async with page_server(images_root / "served", tls=tls) as served:
        options = DumpOptions(
            page_server=("127.0.0.1", served.port), page_server_protocol=protocol, tls=authority.signs("client")
        )
        chain = Chain(target, images_root, options)
        for _ in range(2):
            await chain.predump()
        report = await prove(chain, served, options)
        assert report.from_parents
        assert all(r.incremental for r in chain.rounds[1:])


async def refusal(images_root: Path, target: Target, server: TlsFiles | None, client: TlsFiles | None) -> str:
    """What a client is told, whose server takes nothing from it."""
    async with page_server(images_root / "served", timeout=2, tls=server) as served:
        options = DumpOptions(page_server=("127.0.0.1", served.port), tls=client, page_server_timeout=3)
        with pytest.raises(XferError) as caught:
            await incdump.predump(target.pid, images_root / "1", options=options)
        await served.told(1)
        assert served.reports[0].error is not None
    assert not (images_root / "1").exists()
    assert not (images_root / "served" / "1").exists()
    assert_untouched(target)
    return str(caught.value)


@pytest.mark.asyncio
async def test_a_server_of_another_name_is_refused(
    rewriter: Callable[..., Target], images_root: Path, authority: Authority
) -> None:
    text = await refusal(images_root, rewriter(mib=1), authority.signs("elsewhere"), authority.signs("client"))
    assert "mismatch" in text


@pytest.mark.asyncio
async def test_a_server_of_another_name_is_taken_where_that_was_asked_for(
    rewriter: Callable[..., Target], images_root: Path, authority: Authority
) -> None:
    target = rewriter(mib=1)
    files = authority.signs("client")
    client = TlsFiles(cacert=files.cacert, cert=files.cert, key=files.key, verify_name=False)
    async with page_server(images_root / "served", tls=authority.signs("elsewhere")) as served:
        options = DumpOptions(page_server=("127.0.0.1", served.port), tls=client)
        await incdump.predump(target.pid, images_root / "1", options=options)


@pytest.mark.asyncio
async def test_whoever_another_authority_has_signed_is_refused(
    rewriter: Callable[..., Target], images_root: Path, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    await refusal(images_root, rewriter(mib=1), authority.signs("127.0.0.1"), other.signs("client"))


@pytest.mark.asyncio
async def test_a_client_without_tls_gets_nothing_from_a_server_with_it(
    rewriter: Callable[..., Target], images_root: Path, authority: Authority
) -> None:
    await refusal(images_root, rewriter(mib=1), authority.signs("127.0.0.1"), None)


@pytest.mark.asyncio
async def test_a_client_with_tls_gives_nothing_to_a_server_without_it(
    rewriter: Callable[..., Target], images_root: Path, authority: Authority
) -> None:
    await refusal(images_root, rewriter(mib=1), None, authority.signs("client"))


@pytest.mark.asyncio
async def test_what_goes_over_the_network_is_encrypted(
    rewriter: Callable[..., Target], images_root: Path, authority: Authority
) -> None:
    """A page that is known is looked for in all that passes."""
    target = rewriter(mib=1)
    heard = bytearray()

    def listen(listener: socket.socket, port: int) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=pass_on, args=(client, socket.create_connection(("127.0.0.1", port)))).start()

    def pass_on(client: socket.socket, server: socket.socket) -> None:
        with client, server:
            back = threading.Thread(target=forward, args=(server, client))
            back.start()
            forward(client, server)
            back.join()

    def forward(source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                heard.extend(data)
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)

    for tls in (None, authority.signs("127.0.0.1")):
        name = "plain" if tls is None else "tls"
        async with page_server(images_root / name, tls=tls) as served:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                threading.Thread(target=listen, args=(listener, served.port), daemon=True).start()
                options = DumpOptions(page_server=listener.getsockname()[:2], tls=tls, compression="off")
                await incdump.predump(target.pid, images_root / f"{name}-here", options=options)
                listener.shutdown(socket.SHUT_RDWR)
            pages = (served.newest / "pages-1.img").read_bytes()
        page = next(p for p in (pages[at : at + 4096] for at in range(0, len(pages), 4096)) if any(p))
        assert (page in heard) == (tls is None)
        heard.clear()


def test_the_commands(rewriter: Callable[..., Target], images_root: Path, authority: Authority) -> None:
    target = rewriter(mib=1)
    server_files, client_files = authority.signs("127.0.0.1"), authority.signs("client")

    def options(files: TlsFiles) -> tuple[str, ...]:
        return ("--tls", "--tls-cacert", files.cacert, "--tls-cert", files.cert, "--tls-key", files.key)

    server = start("page-server", "--json", "-D", images_root / "served", "--once", *options(server_files))
    try:
        port = json.loads(read_until(server.stdout, b"\n"))["port"]
        where = ("--page-server", "--port", port, *options(client_files))
        done = command.incdump("dump", "-t", target.pid, "-D", images_root / "1", *where, "--leave-stopped")
        assert done.code == 0, done
        assert wait(server).code == 0
        assert same_when_stopped(target, images_root / "served").ok
    finally:
        server.kill()
        server.communicate()
        carry_on([target.pid])


def test_files_without_tls_are_a_mistake(images_root: Path) -> None:
    done = command.incdump("page-server", "-D", images_root / "1", "--tls-cert", "x.pem")
    assert done.code == 2
    assert "--tls" in done.err
    done = command.incdump("page-server", "-D", images_root / "1", "--tls", "--tls-cacert", images_root / "none.pem")
    assert done.code == 8
    assert "none.pem" in done.err
