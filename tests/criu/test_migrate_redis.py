"""A Redis server under load moves to another host, its address with it, and its clients keep their connections."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from tests import command
from tests.criu.arrivals import receiving
from tests.criu.criu import exists
from tests.criu.namespaces import in_own_namespaces
from tests.criu.services import TCP_LIVES_ON, Service, criu_for_sockets, program
from tests.criu.test_redis import PORT, Writer, assert_everything_is_there, configuration, preload, written_meanwhile

if TYPE_CHECKING:
    from pathlib import Path

    from tests.hosts import Host

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu_for_sockets")]

ADDRESS = "192.0.2.10"
KEYS = 66_000
"""Of 4 KiB: 256 MiB and more."""
WRITERS = 2

# The address leaves one host when the tree has been stopped, is there on the other before the sockets are, and is
# announced when these are complete. What is sent to it meanwhile is lost, and sent again by who has sent it.
HOOK = """
import os, socket, subprocess, sys
device, address = sys.argv[1:]

def ip(what):
    subprocess.run(["ip", "address", what, f"{address}/32", "dev", device], check=True)

def announce():
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        own, everybody = raw.getsockname()[4], b"\\xff" * 6
        arp = bytes.fromhex("0001080006040002") + own + socket.inet_aton(address)
        raw.send(everybody + own + b"\\x08\\x06" + arp + everybody + socket.inet_aton(address))

step = os.environ["INCDUMP_STEP"]
if step == "stopped":
    ip("del")
elif step == "restore":
    ip("add")
elif step == "ready":
    announce()
"""


@in_own_namespaces
def test_redis_moves_with_its_clients_connected(switched_hosts: tuple[Host, Host, Host], images_root: Path) -> None:
    redis = program("redis-server", "usr/bin/redis-server")
    client, near, far = switched_hosts
    near.add_address(ADDRESS)
    hook = images_root / "hook.py"
    hook.write_text(HOOK)
    directory = images_root / "redis"
    directory.mkdir()
    with near.inside():
        service = Service([redis, configuration(directory, ADDRESS)], directory, criu_options=TCP_LIVES_ON)
    with service:
        with client.inside():
            service.until_listening(PORT, ADDRESS)
            preload(KEYS, ADDRESS)
            writers = [Writer(f"writer-{n}", ADDRESS) for n in range(WRITERS)]
            written_meanwhile(service, writers)
        options = ("--hook", f"{sys.executable} {hook} {far.name} {ADDRESS}", "--", *TCP_LIVES_ON)
        with receiving(images_root / "arriving", *options, host=far, criu=criu_for_sockets()) as there:
            with near.inside():
                done = command.incdump(
                    *("migrate", "-t", service.pid, f"{far.address}:{there.port}", "--downtime", "5s", "--json"),
                    *("--hook", f"{sys.executable} {hook} {near.name} {ADDRESS}"),
                    *("--criu", criu_for_sockets(), "--", *TCP_LIVES_ON),
                )
            assert done.code == 0, done
            end = json.loads(done.out.splitlines()[-1])
            assert there.migration()["outcome"] == "runs"
            assert not exists(service.pid)
            moved = there.here(service.pid)
            assert moved is not None
            before = [writer.count for writer in writers]
            while any(writer.count < n + 1000 for writer, n in zip(writers, before, strict=True)):
                assert all(writer.error is None for writer in writers), [writer.error for writer in writers]
            for writer in writers:
                writer.rest()
                writer.until_rest()
            with client.inside():
                assert_everything_is_there(writers, KEYS, ADDRESS)
    assert end["final"]["incremental"]
    longest = max(writer.longest for writer in writers)
    assert longest < end["downtime"] + 2  # a packet that was lost is sent again after twice as long each time
    parts = ", ".join(f"{part['part']} {part['seconds']:.3f}" for part in end["freeze"])
    print(f"downtime {end['downtime']:.3f} s, by the clients' clock {longest:.3f} s: {parts}", flush=True)
