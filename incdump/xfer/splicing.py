"""Bytes from a socket to a file without a copy in this process: splice(2), through a pipe."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from incdump.errors import ConnectionLost
from incdump.images.framing import raise_io_error
from incdump.xfer.sockets import SILENT, broken, is_plain, silence

if TYPE_CHECKING:
    from collections.abc import Callable

_PIPE = 1 << 20
_WORTH_WAITING_FOR = 256 << 10
"""Bytes for which splice(2) is called: a client of the same machine is quicker than the calls for less."""


class Splicer:
    """The pipe between one connection and the files that its pages go to.

    :ivar works: False with TLS, and once a file system turned out not to take what is spliced.
    """

    def __init__(self, connection: socket.socket, timeout: float | None) -> None:
        """
        :param timeout: seconds for which the client may be silent; None for ever.
        """
        self.works = is_plain(connection)
        self._connection = connection
        self._timeout = timeout
        self._pipe: tuple[int, int] | None = None  # its reading and its writing end

    def move(self, size: int, fd: int, path: str, offset: int | None = None) -> None:
        """Move bytes that are to come. Blocks.

        :param fd: of the file.
        :param path: of the file, for messages.
        :param offset: where to, bytes; None: to the file's own position.
        :raises ConnectionLost: the client has gone, or is silent.
        :raises incdump.errors.ImagesIOError: the file cannot be written.
        """
        self._pipe = self._pipe or _make_pipe()
        try:
            while size:
                there = self._fill_pipe(size)
                size -= there
                self._empty_pipe(there, fd, offset)
                offset = None if offset is None else offset + there
        except OSError as error:
            raise_io_error(error, "write", path)
        finally:
            with suppress(OSError):
                self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _fill_pipe(self, size: int) -> int:
        """Take what has come, up to so many bytes, into the pipe."""
        assert self._pipe is not None
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(size, _WORTH_WAITING_FOR))
        poll = select.poll()  # until so many bytes are there, or as many as the kernel takes before they are fetched
        poll.register(self._connection, select.POLLIN)
        if not poll.poll(None if self._timeout is None else min(self._timeout * 1e3, 1 << 30)):
            raise silence(self._timeout)
        return receive(os.splice, self._timeout, self._connection.fileno(), self._pipe[1], min(size, _PIPE))

    def _empty_pipe(self, size: int, fd: int, offset: int | None) -> None:
        """Write what is in the pipe."""
        assert self._pipe is not None
        reader = self._pipe[0]
        while size and self.works:
            try:
                moved = os.splice(reader, fd, size, offset_dst=offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.works = False
            else:
                size -= moved
                offset = None if offset is None else offset + moved
        while size:
            data = os.read(reader, min(size, _PIPE))
            size -= len(data)
            while data:
                written = os.write(fd, data) if offset is None else os.pwrite(fd, data, offset)
                data = data[written:]
                offset = None if offset is None else offset + written

    def close(self) -> None:
        """Close the pipe."""
        pipe, self._pipe = self._pipe, None
        for fd in pipe or ():
            os.close(fd)


def receive(call: Callable[..., int], timeout: float | None, *arguments: object) -> int:
    """Make a receiving system call on a connection's socket.

    :raises ConnectionLost: the client has gone, or is silent.
    """
    try:
        got = call(*arguments)
    except SILENT:
        raise silence(timeout) from None
    except OSError as error:
        raise broken(error) from None
    if not got:
        raise ConnectionLost("the client went before it had said that it was through")
    return got


def receive_all(connection: socket.socket, timeout: float | None, view: memoryview) -> None:
    """Fill a buffer with what comes.

    :raises ConnectionLost: the client has gone, or is silent.
    """
    while view:
        view = view[receive(connection.recv_into, timeout, view) :]


def _make_pipe() -> tuple[int, int]:
    """A pipe that holds as much as the kernel allows, up to a MiB."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE)
    return reader, writer
