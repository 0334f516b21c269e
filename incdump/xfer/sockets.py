"""What both ends of a page-server session do with their blocking sockets."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from incdump.errors import ConnectionLost, XferError
from incdump.images.page_reads import rest_of

if TYPE_CHECKING:
    from incdump.model.options import TlsFiles

Wrap: TypeAlias = Callable[[socket.socket], socket.socket]
"""Makes a connection an encrypted one."""
SILENT = (BlockingIOError, TimeoutError)
"""What a call on a connection fails with when its time is over."""
_Result = TypeVar("_Result")
_BYTES_ACKED = struct.Struct("=120xQ")
"""tcpi_bytes_acked in struct tcp_info (include/uapi/linux/tcp.h, Linux 4.1)."""
_CONNECT_TIMEOUT = 10.0
_FAREWELL_SECONDS = 2.0
_PROGRAMS = {"page server": "incdump page-server, criu page-server", "receiver": "incdump receive"}
_LONGEST = 1e8
"""Three years: what the kernel takes for a timeout."""


def connect(
    address: str, port: int, timeout: float, tls: TlsFiles | None = None, *, server: str = "page server"
) -> socket.socket:
    """Connect to a page server, or to a receiver. Blocks.

    :param timeout: seconds for which it may take nothing, or not answer; see `limit_calls`.
    :param tls: for an encrypted connection.
    :param server: what it is, for people.
    :raises XferError: there is no server, or it is not the one that it should be.
    """
    wrap = None
    if tls is not None:
        from incdump.xfer.tls import client_side, shake_hands  # not for everybody: it takes its time to load

        wrap = client_side(tls, address)
    try:
        connection = socket.create_connection((address, port), min(timeout, _CONNECT_TIMEOUT))
    except (OSError, UnicodeError) as error:
        reason, number = why(error)
        raise XferError(
            f"no {server} at {address} port {port}: {reason}; start one there ({_PROGRAMS[server]})",
            errno=number,
        ) from error
    if wrap is not None:
        connection.settimeout(timeout)
        connection = wrap(connection)
        try:
            shake_hands(connection)
        except BaseException:
            connection.close()
            raise
    with suppress(OSError):  # it has broken already: the first call says so
        limit_calls(connection, timeout)
    return connection


def limit_calls(connection: socket.socket, seconds: float | None) -> None:
    """Have each system call on a blocking socket fail with EAGAIN after some time; and small messages leave at once.

    The kernel does it: Python's own timeouts have it poll before each call. Only with TLS they are needed.

    :param seconds: None for ever.
    :raises OSError: the connection has broken.
    """
    connection.settimeout(None if is_plain(connection) else seconds)
    limit = 0.0 if seconds is None else min(max(seconds, 1e-3), _LONGEST)
    value = struct.pack("@ll", int(limit), int(limit % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def patiently(connection: socket.socket, call: Callable[..., _Result], *arguments: object) -> _Result:
    """Make a system call on a connection, again and again while its time runs out but the other end takes what was
    sent before: over a slow link that can take long, and is no silence.

    :param call: waits for no longer than `limit_calls` lets it; one that sends says how much it took.
    :raises BlockingIOError: in all of its time the other end has taken nothing (or TimeoutError; see `SILENT`).
    """
    taken = _taken(connection)
    while True:
        try:
            return call(*arguments)
        except SILENT:
            before, taken = taken, _taken(connection)
            if taken <= before:
                raise


def send_all(connection: socket.socket, parts: list[memoryview], server: str, timeout: float) -> None:
    """Send a page server the bytes of all parts, waiting `patiently`.

    :param parts: at most 1,024 (IOV_MAX).
    :param server: where it is, and the timeout of `limit_calls`, for messages.
    :raises ConnectionLost: the server has gone, or takes nothing.
    """
    try:
        while parts:
            if is_plain(connection):
                sent = patiently(connection, connection.sendmsg, parts)
            else:
                sent = patiently(connection, connection.send, parts[0])
            parts = rest_of(parts, sent)
    except SILENT:
        raise ConnectionLost(f"the page server at {server} took nothing for {timeout:g} s") from None
    except OSError as error:
        raise broken_server(server, error) from None


def _taken(connection: socket.socket) -> int:
    """How many bytes the other end has acknowledged; 0 if that cannot be told."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        (taken,) = _BYTES_ACKED.unpack(info)
    except (OSError, struct.error):
        return 0
    return int(taken)


def is_plain(connection: socket.socket) -> bool:
    """Whether what goes through a connection is what goes over the network: not with TLS."""
    return type(connection) is socket.socket


def shut_down(connection: socket.socket, how: int) -> None:
    """shutdown(2), below TLS: of another thread's call nothing is disturbed but that it ends.

    :raises OSError: the connection has broken.
    """
    socket.socket.shutdown(connection, how)


def why(error: OSError | UnicodeError) -> tuple[str, int | None]:
    """Why an address could not be used: for people, and the error's number. (A name may be none by its letters.)"""
    if isinstance(error, OSError):
        return error.strerror or str(error), error.errno
    return str(error), None


def hang_up(connection: socket.socket) -> None:
    """End a connection at once, and with it the calls that wait for it, at both ends. Never blocks, never fails.

    It is reset: after a mere shutdown a peer whose data nobody takes any more waits for minutes.
    """
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    with suppress(OSError):
        shut_down(connection, socket.SHUT_RDWR)


def farewell(connection: socket.socket, last: bytes) -> None:
    """Say something last to a peer that may be in the middle of saying something itself. Never fails.

    :param last: what.
    """
    with suppress(OSError, XferError):
        connection.settimeout(_FAREWELL_SECONDS)
        connection.sendall(last)
        shut_down(connection, socket.SHUT_WR)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline and connection.recv(1 << 16):
            pass  # closed with something unread, the connection would be reset, and the text lost


def broken(error: OSError) -> ConnectionLost:
    """The error for a system call that failed on the connection to a client."""
    return ConnectionLost(f"the connection broke: {error.strerror}", errno=error.errno)


def broken_server(server: str, error: OSError) -> ConnectionLost:
    """The error for a system call that failed on the connection to a page server."""
    text = f"the connection to the page server at {server} broke ({error.strerror}): see its log"
    return ConnectionLost(text, errno=error.errno)


def silence(timeout: float | None) -> ConnectionLost:
    """The error for a client that is silent."""
    return ConnectionLost(f"the client was silent for {timeout:g} s")
