"""What both ends of a page-server session do with their blocking sockets."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

from incdump.errors import ConnectionLost, XferError

_CONNECT_TIMEOUT = 10.0
_LONGEST = 1e8
"""Three years: what the kernel takes for a timeout."""


def connect(address: str, port: int, timeout: float) -> socket.socket:
    """Connect to a page server. Blocks.

    :param timeout: seconds for which it may take nothing, or not answer; see `limit_calls`.
    :raises XferError: there is no server.
    """
    try:
        connection = socket.create_connection((address, port), min(timeout, _CONNECT_TIMEOUT))
        limit_calls(connection, timeout)
    except (OSError, UnicodeError) as error:
        reason, number = why(error)
        raise XferError(
            f"no page server at {address} port {port}: {reason}; start one there (incdump page-server, "
            "criu page-server)",
            errno=number,
        ) from error
    return connection


def limit_calls(connection: socket.socket, seconds: float | None) -> None:
    """Have each system call on a blocking socket fail with EAGAIN after some time; and small messages leave at once.

    The kernel does it: Python's own timeouts have it poll before each call.

    :param seconds: None for ever.
    :raises OSError: the connection has broken.
    """
    connection.settimeout(None)
    limit = 0.0 if seconds is None else min(max(seconds, 1e-3), _LONGEST)
    value = struct.pack("@ll", int(limit), int(limit % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


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
        connection.shutdown(socket.SHUT_RDWR)


def broken(error: OSError) -> ConnectionLost:
    """The error for a system call that failed on the connection to a client."""
    return ConnectionLost(f"the connection broke: {error.strerror}", errno=error.errno)


def silence(timeout: float | None) -> ConnectionLost:
    """The error for a client that is silent."""
    return ConnectionLost(f"the client was silent for {timeout:g} s")
