"""Whoever connects to a server, heard as far as the first message.

That message says what the connection is to be: another channel of a session that is under way (`Joins`), which is taken
care of here; or a client of its own, for whoever serves clients (`Listener.clients`). Each is heard in a worker thread,
so a silent one holds up nobody.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias

import anyio

from incdump.engine.tasks import first_cause
from incdump.engine.threads import in_thread
from incdump.errors import ConnectionLost, IncdumpError, XferError
from incdump.xfer.block_server import Joins
from incdump.xfer.blocks import JOIN, OFFER, TOKEN
from incdump.xfer.sockets import broken, hang_up, limit_calls, why
from incdump.xfer.splicing import receive_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Any, Self

    from anyio.abc import TaskGroup
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from incdump.model.options import TlsFiles
    from incdump.xfer.sockets import Wrap

Introduction: TypeAlias = "Callable[[Client], None]"

_BACKLOG = 128
_WAITING = 32
"""Clients that wait to be served, and that are heard, at once."""
_AFTER_A_FAILED_ACCEPT = 0.2


class Client:
    """Somebody who has connected.

    :ivar connection: None once it is another channel of a session.
    :ivar name: address and port, for people.
    :ivar first: the beginning of its first message.
    :ivar said: what else it has said of itself, where that was asked for.
    :ivar error: why there is nothing to be served.
    """

    def __init__(self, connection: socket.socket | None, name: str, error: IncdumpError | None = None) -> None:
        self.connection = connection
        self.name = name
        self.error = error
        self.first = b""
        self.said: dict[str, Any] | None = None

    def hear(self, timeout: float | None, joins: Joins, wrap: Wrap | None, more: Introduction | None) -> None:
        """Hear what it begins with. Blocks."""
        assert self.connection is not None
        try:
            if wrap is not None:
                self.connection.settimeout(timeout)
                from incdump.xfer.tls import shake_hands  # was loaded when the server began

                self.connection = wrap(self.connection)
                shake_hands(self.connection)
            limit_calls(self.connection, timeout)
            self.first = self._take(len(OFFER), timeout)
            if self.first == JOIN:
                if joins.add(self._take(TOKEN, timeout), self.connection):
                    self.connection = None
                else:
                    self.error = ConnectionLost("it would join a session that is over")
            elif more is not None:
                more(self)
        except IncdumpError as error:
            self.error = error
        except OSError as error:
            self.error = broken(error)

    def _take(self, size: int, timeout: float | None) -> bytes:
        assert self.connection is not None
        data = bytearray(size)
        receive_all(self.connection, timeout, memoryview(data))
        return bytes(data)

    def hang_up(self) -> None:
        """End the connection. Never blocks, never fails."""
        if self.connection is not None:
            hang_up(self.connection)

    def close(self) -> None:
        """Close the connection."""
        if self.connection is not None:
            self.connection.close()


class Listener:
    """A listening socket, as an async context manager.

    :ivar host: where it listens.
    :ivar port: where it listens.
    :ivar joins: where the other channels of sessions arrive.
    """

    def __init__(
        self,
        address: str,
        port: int,
        *,
        timeout: float | None,
        tls: TlsFiles | None,
        patience: float | None = None,
        more: Introduction | None = None,
    ) -> None:
        """
        :param address: a name or an address.
        :param port: 0 for any that is free.
        :param timeout: seconds for which a client may be silent; None for ever.
        :param tls: for encrypted connections, from clients with a certificate; None: plain ones.
        :param patience: seconds within which a client has to have said what it begins with, all of it, with TLS the
            handshake too; None: any number, as long as it is not silent.
        :param more: hears what else a client has to say of itself first, in a worker thread; what it raises, of
            incdump's errors and OSError, is the client's error.
        """
        self.host, self.port = address, port
        self.joins = Joins()
        self._timeout = timeout
        self._tls = tls
        self._patience = patience
        self._more = more
        self._heard: dict[Client, None] = {}  # being heard, those first who have come first
        self._limiter = anyio.CapacityLimiter(2 * _WAITING)  # their own threads: nobody else has to wait for one
        self._wrap: Wrap | None = None
        self._socket: socket.socket | None = None

    async def __aenter__(self) -> Self:
        """Begin to listen.

        :raises incdump.errors.XferError: it cannot listen there.
        """
        if self._tls is not None:
            from incdump.xfer.tls import server_side  # not for everybody: it takes its time to load

            self._wrap = await in_thread(server_side, self._tls)
        try:
            self._socket = await in_thread(self._listen)
        except (OSError, UnicodeError) as error:
            reason, number = why(error)
            raise XferError(f"cannot listen on {self.host} port {self.port}: {reason}", errno=number) from error
        self.host, self.port = self._socket.getsockname()[:2]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()

    def _listen(self) -> socket.socket:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        family, _, _, _, where = found[0]
        listener = socket.create_server(where, family=family, backlog=_BACKLOG)
        listener.setblocking(False)
        return listener

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[MemoryObjectReceiveStream[Client]]:
        """Where those who connect arrive, as long as the context lasts; who takes one has to close it.

        One whose ``error`` is set is nobody to serve, and is there to be told of.
        """
        put, waiting = anyio.create_memory_object_stream[Client](_WAITING)
        try:
            async with anyio.create_task_group() as tasks, put:
                tasks.start_soon(self._welcome_all, tasks, put)
                yield waiting
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        finally:
            with suppress(anyio.WouldBlock, anyio.EndOfStream):
                while True:
                    waiting.receive_nowait().close()
            waiting.close()

    async def _welcome_all(self, tasks: TaskGroup, clients: MemoryObjectSendStream[Client]) -> None:
        """Hear whoever connects."""
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        places = anyio.Semaphore(2 * _WAITING)
        while True:
            await places.acquire()
            try:
                connection, peer = await loop.sock_accept(self._socket)
            except OSError as error:  # no descriptors left, a network that is down: of this client, not of the server
                places.release()
                problem = XferError(f"cannot take a client: {error.strerror}")
                await clients.send(Client(None, "", problem))
                await anyio.sleep(_AFTER_A_FAILED_ACCEPT)
            else:
                if len(self._heard) >= _WAITING:  # who has something to say says it at once
                    oldest = next(iter(self._heard))
                    del self._heard[oldest]
                    oldest.hang_up()
                name = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else str(peer)
                client = Client(connection, name)
                self._heard[client] = None
                tasks.start_soon(self._welcome, client, clients, places)

    async def _welcome(self, client: Client, clients: MemoryObjectSendStream[Client], places: anyio.Semaphore) -> None:
        is_waiting = False
        arguments = (self._timeout, self.joins, self._wrap, self._more)
        try:
            with anyio.move_on_after(self._patience) as limit:
                await in_thread(client.hear, *arguments, limiter=self._limiter, break_off=client.hang_up)
            self._heard.pop(client, None)
            if not limit.cancelled_caught:
                if client.connection is not None:
                    await clients.send(client)
                is_waiting = True
        finally:
            self._heard.pop(client, None)
            places.release()
            if not is_waiting:
                client.close()
