"""A page server that throws away what comes, unread: the time that a dump to it takes is all its client's.

A program of its own, which prints its port and takes one session in CRIU's protocol::

    python -m benchmarks.discard
"""

from __future__ import annotations

import socket

from incdump.xfer.wire import ENDS, LONGEST, Command, Headers, Message, encode_answer, encode_has_parent

_AT_ONCE = 1 << 20


def serve() -> None:
    """Take one session."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    headers = Headers()
    with connection:
        while (message := _next(connection, headers)).command not in ENDS:
            if message.command is Command.PARENT:
                connection.sendall(encode_answer(0))
            elif message.command is Command.OPEN2:
                connection.sendall(encode_has_parent(False))
            left = message.bytes_behind
            while left:
                left -= _some(len(connection.recv(min(left, _AT_ONCE), socket.MSG_TRUNC)))
        connection.sendall(encode_answer(0))
        connection.recv(LONGEST)  # until the client has gone


def _next(connection: socket.socket, headers: Headers) -> Message:
    data = b""
    while True:
        while len(data) < headers.needed:
            part = connection.recv(headers.needed - len(data))
            _some(len(part))
            data += part
        message, used = headers.decode(data)
        data = data[used:]
        if message is not None:
            return message


def _some(received: int) -> int:
    if not received:
        raise ConnectionError("the client went")
    return received


if __name__ == "__main__":
    serve()
