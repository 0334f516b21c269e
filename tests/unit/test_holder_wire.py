"""Messages of the holder arrive whole with their descriptors, or not at all, and no descriptor is ever left behind."""

from __future__ import annotations

import array
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.holder import server, wire
from tests.unit.pagesets import moderately, thoroughly

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[socket.socket, socket.socket]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(), x, max_size=4))
messages = st.dictionaries(st.text(), values.filter(lambda v: v == v), max_size=5)
NESTED = b"[" * 60_000


def socket_pair() -> Pair:
    """Two ends of a connection; nothing on it ever blocks for long."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(10)
    theirs.settimeout(10)
    return ours, theirs


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a connection."""
    ours, theirs = socket_pair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def no_descriptor_is_left() -> Iterator[None]:
    """As many descriptors are open after the test as before."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


def send_raw(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
    """A datagram with descriptors, whatever is in it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)


def identity(fd: int) -> tuple[int, int]:
    """What a descriptor refers to."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


@moderately
@given(st.lists(messages, min_size=1, max_size=4))
def test_messages_arrive_as_they_were_sent_one_by_one(sent: list[dict[str, Any]]) -> None:
    ours, theirs = socket_pair()
    with ours, theirs:
        for message in sent:
            wire.send(ours, message)
        for message in sent:
            assert json.dumps(wire.receive(theirs)) == json.dumps((message, []))


@pytest.mark.usefixtures("no_descriptor_is_left")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_descriptors_arrive_beside_their_message(pair: Pair, count: int) -> None:
    files = [os.memfd_create(f"file-{n}") for n in range(count)]
    wire.send(pair[0], {"n": count}, tuple(files))
    message, fds = wire.receive(pair[1])
    assert message == {"n": count}
    assert [identity(fd) for fd in fds] == [identity(fd) for fd in files]
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in (*files, *fds):
        os.close(fd)


def test_the_end_of_the_connection_is_no_message(pair: Pair) -> None:
    pair[0].close()
    assert wire.receive(pair[1]) == (None, [])


@pytest.mark.usefixtures("no_descriptor_is_left")
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"{", id="cut short"),
        pytest.param(b"[1]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"a": 1} x', id="more behind it"),
        pytest.param(b"\xff\xfe\xfa", id="no text"),
        pytest.param(b"\x00", id="a zero byte"),
        pytest.param(b"9" * 5000, id="a number of 5000 digits"),
        pytest.param(NESTED, id="60,000 lists in one another"),
        pytest.param(b'{"a":' * 9000, id="9,000 objects in one another"),
        pytest.param(b'{"a": 1}' + b" " * wire.MAX_MESSAGE + b"x", id="longer than a message may be"),
    ],
)
@pytest.mark.parametrize("count", [0, 1, 4])
def test_what_is_no_message_is_refused_and_its_descriptors_closed(pair: Pair, data: bytes, count: int) -> None:
    with open("/dev/null", "rb") as file:
        send_raw(pair[0], data, (file.fileno(),) * count)
    with pytest.raises(ValueError, match=r"."):
        wire.receive(pair[1])


@pytest.mark.usefixtures("no_descriptor_is_left")
def test_an_empty_message_with_descriptors_leaves_none_of_them_open(pair: Pair) -> None:
    with open("/dev/null", "rb") as file:
        send_raw(pair[0], b"", (file.fileno(),) * 2)
    assert wire.receive(pair[1]) == (None, [])


@pytest.mark.usefixtures("no_descriptor_is_left")
@pytest.mark.parametrize("count", [5, 250])
def test_more_descriptors_than_a_message_may_have_are_closed_and_refused(pair: Pair, count: int) -> None:
    with open("/dev/null", "rb") as file:
        send_raw(pair[0], b"{}", (file.fileno(),) * count)
    with pytest.raises(ValueError, match="cut short"):
        wire.receive(pair[1])


@thoroughly
@given(st.binary(max_size=300) | values.map(lambda v: json.dumps(v).encode()), st.integers(0, 4))
def test_any_datagram_is_a_message_or_refused_and_no_descriptor_is_left(data: bytes, count: int) -> None:
    ours, theirs = socket_pair()
    with ours, theirs, open("/dev/null", "rb") as file:
        send_raw(ours, data, (file.fileno(),) * count)
        before = len(os.listdir("/proc/self/fd"))
        try:
            message, fds = wire.receive(theirs)
        except ValueError:
            fds = []
        else:
            assert message is None or isinstance(message, dict)
            assert len(fds) == (0 if message is None else count)
        for fd in fds:
            os.close(fd)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_message_that_is_too_long_is_not_sent(pair: Pair) -> None:
    with pytest.raises(OSError, match="too long"):
        wire.send(pair[0], {"a": "x" * wire.MAX_MESSAGE})
    wire.send(pair[0], {"a": "x" * (wire.MAX_MESSAGE - 9)})
    message, _ = wire.receive(pair[1])
    assert message is not None
    assert len(message["a"]) == wire.MAX_MESSAGE - 9


class OneClient:
    """A holder with one connection, driven by hand."""

    def __init__(self) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.holder = server.Holder(self.listener)
        self.ours, self.client = socket_pair()
        self.holder.clients.add(self.client)
        self.holder.selector.register(self.client, 1, self.holder._serve)

    def close(self) -> None:
        """End it."""
        self.holder.selector.close()
        for sock in (self.ours, self.client, self.listener):
            sock.close()

    def ask(self, data: bytes) -> dict[str, Any] | None:
        """Its answer to a datagram; None when it ends the connection."""
        self.ours.send(data)
        self.holder._serve(self.client)
        answer, fds = wire.receive(self.ours)
        assert fds == []
        return answer


@pytest.fixture
def one_client() -> Iterator[OneClient]:
    """A holder with one connection."""
    holder = OneClient()
    yield holder
    holder.close()


# Pids that no process can have (PID_MAX_LIMIT is 2^22), and what is none.
no_pids = st.one_of(st.integers(max_value=0), st.integers(min_value=1 << 22), st.floats(), st.text(), st.none(), values)
verbs = st.sampled_from(("hello", "acquire", "renew", "commit", "forget", "list", "", None))


@moderately
@given(st.fixed_dictionaries({}, optional={"do": verbs, "pid": no_pids, "start_time": values, "generation": values}))
def test_the_holder_answers_any_request_and_lives_on(request: dict[str, Any]) -> None:
    if isinstance(request.get("pid"), (int, float, str)):
        try:
            if 0 < int(request["pid"]) < 1 << 22:
                return
        except (ValueError, OverflowError):
            pass
    one = OneClient()
    try:
        answer = one.ask(json.dumps(request).encode())
        assert answer is not None
        assert one.holder.targets == {}
        hello = one.ask(b'{"do": "hello"}')
        assert hello == {"pid": os.getpid(), "version": wire.VERSION}
    finally:
        one.close()


@pytest.mark.parametrize(
    "request_text",
    [
        '{"do": "acquire", "pid": Infinity, "start_time": 1}',
        '{"do": "acquire", "pid": NaN, "start_time": 1}',
        '{"do": "acquire", "pid": 99999999999999999999, "start_time": 1}',
        '{"do": "acquire", "pid": -1, "start_time": 1}',
        '{"do": "acquire", "pid": 4194999}',
        '{"do": "commit", "pid": 4194999, "generation": "g"}',
        '{"do": []}',
        "{}",
    ],
)
def test_a_request_that_makes_no_sense_is_refused(one_client: OneClient, request_text: str) -> None:
    answer = one_client.ask(request_text.encode())
    assert answer is not None
    assert "error" in answer


@pytest.mark.parametrize("data", [b"{", NESTED, b"[]", b"\xff"])
def test_a_client_that_sends_no_messages_is_dropped(one_client: OneClient, data: bytes) -> None:
    assert one_client.ask(data) is None
    assert one_client.holder.clients == set()


def test_the_runtime_directory_is_made_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INCDUMP_RUNTIME_DIR", str(tmp_path / "a" / "b"))
    assert wire.runtime_dir() == str(tmp_path / "a" / "b")
    assert os.stat(tmp_path / "a" / "b").st_mode & 0o7777 == 0o700
    namespace = os.stat("/proc/self/ns/pid").st_ino
    assert wire.socket_path() == str(tmp_path / "a" / "b" / f"holder-{namespace}.sock")


def test_a_runtime_directory_that_others_may_write_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INCDUMP_RUNTIME_DIR", str(tmp_path / "open"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError):
        wire.runtime_dir()


def test_a_runtime_directory_behind_a_symbolic_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("INCDUMP_RUNTIME_DIR", str(tmp_path / "link"))
    with pytest.raises(PermissionError):
        wire.runtime_dir()


def test_a_runtime_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INCDUMP_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError):
        wire.runtime_dir()


def test_who_waits_for_the_lock_while_a_holder_ends_gets_the_next_one(tmp_path: Path) -> None:
    """The file that was waited for is gone by then: a lock on it would keep nobody out."""
    ending = wire.lock_socket(str(tmp_path))
    with pytest.raises(BlockingIOError):
        wire.lock_socket(str(tmp_path), wait=False)
    got: list[int] = []
    waiting = threading.Thread(target=lambda: got.append(wire.lock_socket(str(tmp_path))))
    waiting.start()
    until_opened_twice(next(tmp_path.iterdir()))
    wire.remove_traces(str(tmp_path))
    assert os.listdir(tmp_path) == []
    os.close(ending)
    waiting.join(10)
    with pytest.raises(BlockingIOError):
        wire.lock_socket(str(tmp_path), wait=False)
    os.close(got[0])
    os.close(wire.lock_socket(str(tmp_path), wait=False))


def until_opened_twice(lock: Path) -> None:
    """Wait until somebody else in this process has the lock's file open."""
    for _ in range(1000):
        names = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        if names.count(str(lock)) >= 2:
            return
        time.sleep(0.01)
    raise AssertionError("nobody waits for the lock")


def test_a_lock_that_is_never_let_go_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "LOCK_TIMEOUT", 0.05)
    kept = wire.lock_socket(str(tmp_path))
    with pytest.raises(TimeoutError, match="another incdump keeps it locked"):
        wire.lock_socket(str(tmp_path))
    os.close(kept)


def test_a_holder_that_ends_leaves_its_successors_socket_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INCDUMP_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    path = Path(wire.socket_path())
    (tmp_path / "mine").touch()
    mine = os.lstat(tmp_path / "mine")
    path.touch()
    lock = wire.lock_socket(str(tmp_path))
    wire.remove_traces(str(tmp_path), mine)
    assert path.exists()
    wire.remove_traces(str(tmp_path), os.lstat(path))
    os.close(lock)
    assert os.listdir(tmp_path) == ["mine"]


def test_a_log_with_something_in_it_is_left(tmp_path: Path) -> None:
    log = Path(wire.log_path(str(tmp_path)))
    log.write_text("Traceback")
    lock = wire.lock_socket(str(tmp_path))
    wire.remove_traces(str(tmp_path))
    os.close(lock)
    assert os.listdir(tmp_path) == [log.name]
