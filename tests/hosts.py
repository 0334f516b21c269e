"""Hosts on this machine: two network namespaces that a link of limited bandwidth joins, or three and a switch.

They share everything but the network: files, users, and process numbers::

    with joined_hosts() as (near, far):
        with far.inside():
            ...             # sockets that are made here, and processes that are started, are the far host's
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.command import read_until, start
from tests.guest.debian import CannotFetchError, require_tool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RATE = "200mbit"
BURST, LATENCY = "256kb", "50ms"
LOSSY = ("netem", "delay", "20ms", "loss", "1%", "limit", "5000")
"""What a link does to the packets of either direction, as tc(8) has it. netem needs a kernel that has it."""
CLONE_NEWNET = 0x40000000


def _bandwidth(rate: str) -> tuple[str, ...]:
    return ("tbf", "rate", rate, "burst", BURST, "latency", LATENCY)


SLOW = _bandwidth(RATE)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Host:
    """One of the two.

    :ivar name: of its network namespace, and of its only network device besides loopback.
    """

    name: str
    address: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and the threads and processes that it starts, are on this host as long as the context lasts."""
        with open("/proc/thread-self/ns/net", "rb") as before, open(f"/run/netns/{self.name}", "rb") as network:
            _setns(network.fileno())
            try:
                yield
            finally:
                _setns(before.fileno())

    def link(self, state: str) -> None:
        """Have its end of the link ``"up"`` or ``"down"``."""
        _call("ip", "-n", self.name, "link", "set", self.name, state)

    def limit(self, rate: str) -> None:
        """Let no more leave it, as tc(8) has it: ``"8mbit"``."""
        _call("tc", "-n", self.name, "qdisc", "change", "dev", self.name, "root", *_bandwidth(rate))

    def takes_connections(self, port: int) -> bool:
        """Whether it can be reached from where this thread is."""
        with suppress(OSError), socket.create_connection((self.address, port), 1):
            return True
        return False

    def add_address(self, address: str) -> None:
        """Another address, as those of services are that move from host to host."""
        _call("ip", "-n", self.name, "address", "add", f"{address}/32", "dev", self.name)


def _require_hosts() -> None:
    if os.geteuid():
        pytest.skip("needs root, for network namespaces")
    try:
        for tool in ("ip", "tc"):
            require_tool(tool, "iproute2")
    except CannotFetchError as error:
        pytest.skip(str(error))


@contextmanager
def switched_hosts() -> Iterator[tuple[Host, Host, Host]]:
    """A client's host and two others, all in one network; skips the test, by name, where there can be none."""
    _require_hosts()
    client, near, far = (
        Host(f"inc{end}{os.getpid()}", f"192.0.2.{number}") for number, end in ((100, "c"), (1, "a"), (2, "b"))
    )
    with ExitStack() as stack:
        try:
            for host in (client, near, far):
                _call("ip", "netns", "add", host.name)
                stack.callback(_call, "ip", "netns", "del", host.name)
                _call("ip", "-n", host.name, "link", "set", "lo", "up")
            _call("ip", "-n", client.name, "link", "add", client.name, "type", "bridge")
            for host in (near, far):
                port = ("name", f"{host.name}p", "netns", client.name)
                _call("ip", "link", "add", "name", host.name, "netns", host.name, "type", "veth", "peer", *port)
                _call("ip", "-n", client.name, "link", "set", f"{host.name}p", "master", client.name, "up")
            for host in (client, near, far):
                _call("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", host.name)
                host.link("up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs networks and a switch: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield client, near, far


@contextmanager
def joined_hosts(limit: Sequence[str] = SLOW) -> Iterator[tuple[Host, Host]]:
    """Two hosts; skips the test, by name, where there can be none.

    :param limit: of the link between them.
    """
    _require_hosts()
    near, far = (Host(f"inc{end}{os.getpid()}", f"192.0.2.{number}") for number, end in ((1, "a"), (2, "b")))
    with ExitStack() as stack:
        try:
            for host in (near, far):
                _call("ip", "netns", "add", host.name)
                stack.callback(_call, "ip", "netns", "del", host.name)
            ends = [("name", host.name, "netns", host.name) for host in (near, far)]
            _call("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for host in (near, far):
                _call("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", host.name)
                _call("ip", "-n", host.name, "link", "set", "lo", "up")
                host.link("up")
                _call("tc", "-n", host.name, "qdisc", "add", "dev", host.name, "root", *limit)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs two networks and a link ({limit[0]}): {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield near, far


@contextmanager
def page_server(host: Host, *options: object) -> Iterator[int]:
    """incdump's page server on a host; yields its port."""
    with host.inside():
        server = start("page-server", "--json", "--address", host.address, *options)
    try:
        yield json.loads(read_until(server.stdout, b"\n"))["port"]
    finally:
        server.kill()
        server.communicate()


def _call(*command: str) -> None:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    subprocess.run(command, env=os.environ | {"PATH": path}, check=True, capture_output=True, text=True)


def _setns(fd: int) -> None:
    if _libc.setns(ctypes.c_int(fd), ctypes.c_int(CLONE_NEWNET)):
        raise OSError(ctypes.get_errno(), "setns")
