"""PostgreSQL under load, in the guest: every row that it has committed is there after its restore."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.criu.namespaces import in_own_namespaces, own_network
from tests.criu.services import HOST, Load, Service

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(1200), pytest.mark.usefixtures("real_criu_for_sockets")]

PORT = 5432
USER = "postgres"
AS_USER = ("unshare", "--ipc", "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
"""As in a container: CRIU dumps System V's shared memory only where it is that of a namespace."""
PROGRAMS = Path("/usr/lib/postgresql")
WRITERS = 3
CONFIG = f"""
listen_addresses = '{HOST}'
port = {PORT}
unix_socket_directories = ''
shared_buffers = 64MB
max_connections = 20
jit = off
"""
TABLES = """
CREATE TABLE row (writer int, number int, filler text, PRIMARY KEY (writer, number));
CREATE UNLOGGED TABLE account (id int PRIMARY KEY, money int);
INSERT INTO account SELECT id, 1000 FROM generate_series(0, 999) AS id;
"""
"""Accounts are unlogged: had PostgreSQL to recover, by its log, from a crash, they would be empty."""
CRIU_OPTIONS = ("--tcp-close", "--skip-in-flight", "--network-lock", "skip")
"""Connections do not come back; who was connected finds that out, and connects again."""


@pytest.fixture
def postgresql() -> Path:
    """Where PostgreSQL's programs are.

    It refuses to run as root, and CRIU can dump another user's process only with all capabilities: the guest
    (tests/guest/kernel_tests) has both, and there the test must run.
    """
    found = sorted(PROGRAMS.glob("*/bin"))
    if "INCDUMP_TEST_SLOWER" not in os.environ and not (found and has_all_capabilities()):
        pytest.skip("PostgreSQL is tested in the guest")
    return found[-1]


def has_all_capabilities() -> bool:
    """Whether CRIU is root with no capability missing, CAP_SYS_RESOURCE above all."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return status["CapEff"] == f"{(1 << int(Path('/proc/sys/kernel/cap_last_cap').read_text()) + 1) - 1:016x}"


class Client:
    """A session of psql, statement by statement."""

    def __init__(self, programs: Path) -> None:
        options = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", HOST, "-p", str(PORT), "-U", USER, "postgres"]
        self._process = subprocess.Popen(
            [programs / "psql", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )

    def ask(self, statements: str) -> list[str]:
        """Run statements; returns the lines of their results.

        :raises ConnectionError: something went wrong; with psql's words.
        """
        assert self._process.stdin
        assert self._process.stdout
        lines: list[str] = []
        try:
            self._process.stdin.write(f"{statements}\n\\echo done\n")
            self._process.stdin.flush()
            while (line := self._process.stdout.readline()) != "done\n":
                if not line:
                    raise ConnectionError("\n".join(lines))
                lines.append(line.removesuffix("\n"))
        except BrokenPipeError:
            raise ConnectionError("psql has ended") from None
        return lines

    def close(self) -> None:
        """End it."""
        assert self._process.stdout
        self._process.kill()
        self._process.communicate()


class Writer(Load):
    """Inserts numbered rows and moves money in transactions, and notes what was committed.

    :ivar committed: the numbers of those of which it knows that they are there.
    :ivar lost: how many connections broke.
    """

    def __init__(self, programs: Path, number: int) -> None:
        super().__init__()
        self.number = number
        self.committed: list[int] = []
        self.lost = 0
        self._programs = programs
        self._numbers = itertools.count()
        self._client = Client(programs)
        self.begin()

    def work(self) -> None:
        """A transaction; where the connection breaks, whether it was committed is not known."""
        row = next(self._numbers)
        giver, taker = row * 7 % 1000, row * 13 % 1000
        statements = (
            "BEGIN",
            f"INSERT INTO row VALUES ({self.number}, {row}, '{filler(self.number, row)}')",
            *(
                f"UPDATE account SET money = money {sign} 1 WHERE id = {who}"
                for who, sign in sorted_transfer(giver, taker)
            ),
            "COMMIT",
        )
        try:
            self._client.ask("; ".join(statements) + ";")
        except ConnectionError:
            self.lost += 1
            self._client.close()
            self.rest()
        else:
            self.committed.append(row)

    def reconnect(self) -> None:
        """Go on where the connection broke."""
        self._client = Client(self._programs)
        self.begin()

    def close(self) -> None:
        """End the connection."""
        self.rest()
        self.until_rest()
        self._client.close()


def sorted_transfer(giver: int, taker: int) -> list[tuple[int, str]]:
    """The two halves of a transfer, in the order in which everybody locks the accounts."""
    return sorted([(giver, "-"), (taker, "+")])


def filler(writer: int, row: int) -> str:
    """What a row says."""
    return f"{writer} {row} " * 20


def assert_everything_is_there(programs: Path, writers: list[Writer]) -> None:
    """What was committed is there, whole and once; what was not begun is not."""
    client = Client(programs)
    for writer in writers:
        rows = client.ask(f"SELECT number, filler FROM row WHERE writer = {writer.number} ORDER BY number;")
        held = dict(row.split("|", 1) for row in rows)
        assert len(held) == len(rows)
        missing = set(map(str, writer.committed)) - set(held)
        assert not missing, f"{len(missing)} rows of {len(writer.committed)}"
        assert len(held) <= len(writer.committed) + writer.lost
        assert all(held[number] == filler(writer.number, int(number)) for number in held)
    assert client.ask("SELECT sum(money), count(*) FROM account;") == ["1000000|1000"]
    client.close()


def written_meanwhile(service: Service, writers: list[Writer], rows: int = 20) -> None:
    """Wait until every writer has committed some more."""
    before = [len(writer.committed) for writer in writers]
    service.until(lambda: all(w.error or len(w.committed) >= n + rows for w, n in zip(writers, before, strict=True)))


@in_own_namespaces
def test_what_postgresql_has_committed_is_there_after_its_restore(images_root: Path, postgresql: Path) -> None:
    own_network()
    images_root.chmod(0o711)
    directory = images_root / "postgresql"
    directory.mkdir(mode=0o700)
    shutil.chown(directory, USER, USER)
    data = directory / "data"
    initdb = (postgresql / "initdb", "-D", data, "-A", "trust", "--no-sync", "--locale=C", "--encoding=UTF8")
    subprocess.run([*AS_USER, *initdb], cwd=directory, check=True, capture_output=True)
    with (data / "postgresql.conf").open("a") as file:
        file.write(CONFIG)
    with Service([*AS_USER, postgresql / "postgres", "-D", data], directory, criu_options=CRIU_OPTIONS) as service:
        service.until_listening(PORT)
        service.until(lambda: "ready to accept connections" in service.log.read_text())
        administrator = Client(postgresql)
        administrator.ask(TABLES)
        administrator.close()
        writers = [Writer(postgresql, number) for number in range(WRITERS)]
        for restores, way in enumerate(("leash", "lazy-pages"), 1):
            for _ in range(2):
                written_meanwhile(service, writers)
                service.predump()
            written_meanwhile(service, writers)
            assert len(service.tree()) > WRITERS + 5
            result = service.checkpoint(way)
            assert result["incremental"]
            assert result["pages_skipped_parent"]
            for writer in writers:
                writer.until_rest()  # their connections are gone
            assert [writer.lost for writer in writers] == [restores] * WRITERS
            service.restore()
            assert_everything_is_there(postgresql, writers)
            for writer in writers:
                writer.reconnect()
            written_meanwhile(service, writers)
            assert not re.search("PANIC|terminated by signal|reinitializing", service.log.read_text())
        for writer in writers:
            writer.close()
