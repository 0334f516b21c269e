"""The bare copy loop: the memory of a process to a file, over TCP connections on loopback, and nothing else.

This is the server's side, a program of its own::

    python benchmarks/bare_copy.py PATH BLOCK CONNECTIONS

prints its port, takes that many connections, and writes what each sends, blocks with their offset before them, to the
file. `send` is the client's side.
"""

from __future__ import annotations

import itertools
import mmap
import os
import socket
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_OFFSET = 8
_END = (1 << 64) - 1


def receive(path: str, block: int, connections: int) -> None:
    """Be the server, until all clients have said that they are through."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        accepted = [listener.accept()[0] for _ in range(connections)]
    _side_by_side([partial(_write, each, fd, block) for each in accepted])
    os.close(fd)


def _write(connection: socket.socket, fd: int, block: int) -> None:
    buffer = memoryview(mmap.mmap(-1, block))
    offset = memoryview(bytearray(_OFFSET))
    with connection:
        while True:
            _fill(connection, offset)
            if (at := int.from_bytes(offset, "little")) == _END:
                connection.sendall(b"\0")
                return
            _fill(connection, buffer)
            os.pwrite(fd, buffer, at)


def _fill(connection: socket.socket, view: memoryview) -> None:
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionError("the client went")
        view = view[got:]


def send(read: Callable[[memoryview, int], object], size: int, port: int, block: int, connections: int) -> None:
    """Be the client: returns when the server has everything.

    :param read: fills a buffer with what is at an offset.
    :param size: bytes in all, a multiple of `block`.
    """
    turns = itertools.count()

    def one() -> None:
        buffer = memoryview(mmap.mmap(-1, block))
        buffer[:] = bytes(block)  # fresh memory is not the loop's matter
        with socket.create_connection(("127.0.0.1", port)) as connection:
            while (offset := next(turns) * block) < size:
                read(buffer, offset)
                connection.sendall(offset.to_bytes(_OFFSET, "little"))
                connection.sendall(buffer)
            connection.sendall(_END.to_bytes(_OFFSET, "little"))
            connection.recv(1)

    _side_by_side([one] * connections)


def _side_by_side(jobs: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    receive(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
