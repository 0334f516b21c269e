"""A Redis server under load: every write that it has acknowledged is there after its restore."""

from __future__ import annotations

import hashlib
import itertools
import socket
import time
from typing import TYPE_CHECKING

import pytest

from tests.criu.namespaces import in_own_namespaces, own_network
from tests.criu.services import HOST, TCP_LIVES_ON, Load, Service, program

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu_for_sockets")]

PORT = 6379
VALUE = 4096
PRELOADED = 30_000
KEYS = 2000
"""That a writer goes round and round, each time with another value."""
WRITERS = 2
BATCH = 20


def value(key: str, number: int) -> bytes:
    """What a key holds after the write of this number."""
    return hashlib.blake2b(f"{key} {number}".encode()).digest() * (VALUE // 64)


class Client:
    """A connection to Redis, in its own protocol, with many commands on the way at once."""

    def __init__(self, host: str = HOST) -> None:
        self._socket = socket.create_connection((host, PORT))
        self._answers = self._socket.makefile("rb")

    def close(self) -> None:
        """End the connection."""
        self._answers.close()
        self._socket.close()

    def ask(self, commands: Sequence[Sequence[str | bytes]]) -> list[bytes | None]:
        """Send commands; returns their answers."""
        self._socket.sendall(b"".join(map(_encode, commands)))
        return [self._answer() for _ in commands]

    def _answer(self) -> bytes | None:
        line = self._answers.readline()
        assert line.endswith(b"\r\n"), "the connection has ended"
        kind, rest = line[:1], line[1:-2]
        assert kind in b"+:$", line
        if kind != b"$":
            return rest
        if int(rest) < 0:
            return None
        return self._answers.read(int(rest) + 2)[:-2]


def _encode(command: Sequence[str | bytes]) -> bytes:
    words = [word.encode() if isinstance(word, str) else word for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class Writer(Load):
    """Writes numbered values over one connection, and notes what was acknowledged.

    :ivar acknowledged: the number of the last acknowledged write of each key.
    :ivar longest: that it has waited for an answer, seconds.
    """

    def __init__(self, name: str, host: str = HOST) -> None:
        super().__init__()
        self.longest = 0.0
        self.name = name
        self.acknowledged: dict[str, int] = {}
        self._client = Client(host)
        self._numbers = itertools.count()
        self.begin()

    def work(self) -> None:
        """Some writes."""
        batch = [(f"{self.name}:{number % KEYS}", number) for number in itertools.islice(self._numbers, BATCH)]
        began = time.monotonic()
        answers = self._client.ask([("SET", key, value(key, number)) for key, number in batch])
        self.longest = max(self.longest, time.monotonic() - began)
        assert answers == [b"OK"] * BATCH
        self.acknowledged.update(batch)

    @property
    def count(self) -> int:
        """Of acknowledged writes, about."""
        return next(reversed(self.acknowledged.values()), 0)


def chunks(keys: Iterable[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], ...]]:
    iterator = iter(keys)
    while chunk := tuple(itertools.islice(iterator, 1000)):
        yield chunk


def preloaded(count: int = PRELOADED) -> Iterator[tuple[str, int]]:
    return ((f"preloaded:{number}", number) for number in range(count))


def preload(count: int = PRELOADED, host: str = HOST) -> None:
    """Have Redis hold something to begin with."""
    loader = Client(host)
    for chunk in chunks(preloaded(count)):
        loader.ask([("SET", key, value(key, number)) for key, number in chunk])
    loader.close()


def configuration(directory: Path, host: str = HOST) -> Path:
    """A configuration file for a server that keeps everything in its memory only."""
    config = directory / "redis.conf"
    lines = [f"bind {host}", f"port {PORT}", "protected-mode no", "daemonize no", 'save ""', "appendonly no"]
    config.write_text("\n".join([*lines, f"dir {directory}", ""]))
    return config


def assert_everything_is_there(writers: list[Writer], count: int = PRELOADED, host: str = HOST) -> None:
    """Redis holds exactly what it has acknowledged."""
    client = Client(host)
    wanted = itertools.chain(preloaded(count), *(writer.acknowledged.items() for writer in writers))
    for chunk in chunks(wanted):
        held = client.ask([("GET", key) for key, _ in chunk])
        wrong = [key for (key, number), got in zip(chunk, held, strict=True) if got != value(key, number)]
        assert not wrong, f"{len(wrong)} of {len(chunk)} keys: {wrong[:5]}"
    held_keys = count + sum(len(writer.acknowledged) for writer in writers)
    assert client.ask([("DBSIZE",)]) == [str(held_keys).encode()]
    client.close()


def written_meanwhile(service: Service, writers: list[Writer]) -> None:
    """Wait until every writer has gone round a part of its keys."""
    before = [writer.count for writer in writers]
    service.until(lambda: all(w.error or w.count > n + KEYS // 2 for w, n in zip(writers, before, strict=True)))


@in_own_namespaces
def test_what_redis_has_acknowledged_is_there_after_its_restore(images_root: Path) -> None:
    redis = program("redis-server", "usr/bin/redis-server")
    own_network()
    directory = images_root / "redis"
    directory.mkdir()
    with Service([redis, configuration(directory)], directory, criu_options=TCP_LIVES_ON) as service:
        service.until_listening(PORT)
        preload()
        writers = [Writer(f"writer-{n}") for n in range(WRITERS)]
        for way in ("leash", "lazy-pages"):
            for _ in range(3):
                service.predump()
                written_meanwhile(service, writers)
            result = service.checkpoint(way)
            for writer in writers:
                writer.rest()  # with writes on the way, whose answers come after the restore
            assert result["incremental"]
            assert result["pages_skipped_parent"] > 100 << 8
            service.restore()
            for writer in writers:
                writer.until_rest()
            assert_everything_is_there(writers)
            for writer in writers:
                writer.begin()
            written_meanwhile(service, writers)
