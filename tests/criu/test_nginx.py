"""nginx and its workers under load: no request goes unanswered, and their shared memory is as it was."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import re
from typing import TYPE_CHECKING

import pytest

from tests.criu.namespaces import in_own_namespaces, own_network
from tests.criu.services import HOST, TCP_LIVES_ON, Load, Service, program

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu_for_sockets")]

PORT = 8080
WORKERS = 3
CLIENTS = 4
FILES = 4
ALLOWED = 20
"""Requests that a key has at once. One more comes back with every minute: not half of them while a test runs."""

CONFIG = f"""
daemon off;
user root;
worker_processes {WORKERS};
pid nginx.pid;
error_log stderr;
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    gzip on;
    gzip_types *;
    gzip_proxied any;
    keepalive_requests 100000000;
    keepalive_timeout 1d;
    client_body_temp_path tmp;
    proxy_temp_path tmp;
    fastcgi_temp_path tmp;
    uwsgi_temp_path tmp;
    scgi_temp_path tmp;
    open_file_cache max=100;
    limit_req_zone $arg_key zone=keys:32m rate=1r/m;
    server {{
        listen {HOST}:{PORT} reuseport;
        root files;
        add_header X-Worker $pid always;
        location /limited/ {{ alias files/; limit_req zone=keys burst={ALLOWED - 1} nodelay; limit_req_status 429; }}
        location /status {{ stub_status; }}
    }}
}}
"""


def content(number: int) -> bytes:
    """Of a file: half of it can be compressed."""
    return b"".join(hashlib.blake2b(b"%d %d" % (number, n)).hexdigest().encode() for n in range(512 << number))


CONTENTS = {f"/{number}.txt": content(number) for number in range(FILES)}


class Client(Load):
    """Asks for every file in turn, as it is and compressed, over one connection that it keeps.

    :ivar requests: how many were answered.
    :ivar worker: the process that has answered the last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0
        self.worker = 0
        self._connection = http.client.HTTPConnection(HOST, PORT)
        self._connection.connect()

    def ask(self, path: str, encoding: str = "identity") -> tuple[int, bytes]:
        """The status and the content of a page."""
        self._connection.request("GET", path, headers={"Accept-Encoding": encoding})
        answer = self._connection.getresponse()
        body = answer.read()
        self.requests += 1
        self.worker = int(answer.headers["X-Worker"])
        return answer.status, gzip.decompress(body) if answer.headers["Content-Encoding"] == "gzip" else body

    def work(self) -> None:
        """Every file, twice."""
        for path in CONTENTS:
            for encoding in ("identity", "gzip"):
                self.check(path, encoding)

    def check(self, path: str, encoding: str) -> None:
        """Ask for a file, which has to be right."""
        assert self.ask(path, encoding) == (200, CONTENTS[path]), path

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def may(self, key: str, times: int) -> bool:
        """Whether a key may be used so many times more."""
        return all(self.ask(f"/limited/0.txt?key={key}")[0] == 200 for _ in range(times))


def requests_counted(client: Client) -> int:
    """What nginx counts in its workers' shared memory, this request included."""
    status, text = client.ask("/status")
    assert status == 200
    found = re.search(r"requests\s+\d+ \d+ (\d+)", text.decode())
    assert found
    return int(found[1])


def ask_every_worker(workers: set[int]) -> int:
    """Connect again and again, until every worker has answered rightly; returns how many requests that took."""
    answered: set[int] = set()
    for count in range(1, 1000):
        client = Client()
        client.check("/0.txt", "gzip")
        client.close()
        answered.add(client.worker)
        if answered == workers:
            return count
    raise AssertionError(f"of {workers} only {answered} answered")


def worked_meanwhile(service: Service, clients: list[Client]) -> None:
    """Wait until every client has asked for some more."""
    before = [client.requests for client in clients]
    service.until(lambda: all(c.error or c.requests > n + 50 for c, n in zip(clients, before, strict=True)))


@in_own_namespaces
def test_nginx_answers_from_every_worker_and_has_lost_nothing(images_root: Path) -> None:
    nginx = program("nginx-light", "usr/sbin/nginx")
    own_network()
    directory = images_root / "nginx"
    (directory / "files").mkdir(parents=True)
    for path, data in CONTENTS.items():
        (directory / "files" / path[1:]).write_bytes(data)
    config = directory / "nginx.conf"
    config.write_text(CONFIG)
    with Service(
        [nginx, "-p", directory, "-c", config, "-e", "stderr"], directory, criu_options=TCP_LIVES_ON
    ) as service:
        service.until((directory / "nginx.pid").exists)
        service.until_listening(PORT)
        clients = [Client() for _ in range(CLIENTS)]
        guest = Client()
        for way in ("leash", "lazy-pages"):
            for client in clients:
                client.begin()
            for _ in range(2):
                worked_meanwhile(service, clients)
                service.predump()
            used_up = [f"{way}-{n}" for n in range(3)]
            for key in used_up:
                assert guest.may(key, ALLOWED)
            worked_meanwhile(service, clients)
            workers = set(service.tree()[1:])
            assert len(workers) == WORKERS
            assert service.checkpoint(way)["incremental"]
            for client in clients:
                client.rest()  # with requests on the way
            service.restore()
            for client in clients:
                client.until_rest()
            counted = requests_counted(guest)
            assert counted == sum(client.requests for client in (*clients, guest))
            assert not any(guest.may(key, ALLOWED // 2) for key in used_up)
            assert guest.may(f"{way}-unused", ALLOWED // 2)
            guest.requests += ask_every_worker(workers)
