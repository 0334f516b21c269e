"""A proxy on this host, to have connections break, or one direction of them, when a test wants it."""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_PIECE = 1 << 16
_NOTICED = 0.2
"""Seconds: TCP's least time after which it sends something once more."""


class Proxy:
    """Hands on whatever is said between those who connect to it and a server.

    :ivar port: to connect to.
    """

    def __init__(self, port: int, *, delay: float = 0.0, loss: float = 0.0) -> None:
        """
        :param port: the server's.
        :param delay: seconds that each piece takes, in each direction.
        :param loss: part of the pieces that have to be sent once more, which takes a sender some time to notice.
        """
        self._loss = loss
        self._chance = random.Random(1)
        self._server = port
        self._delay = delay
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._takes, self._answers = True, True
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self._listener.close()

    def cut(self, *, for_good: bool = True) -> None:
        """Break all connections.

        :param for_good: there are to be no more of them.
        """
        self._takes = not for_good
        with self._lock:
            for pair in self._pairs:
                for end in pair:
                    with suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
                    with suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()
        self._answers = True

    def mute(self) -> None:
        """What the server says from now on on the connections that there are is lost."""
        self._answers = False

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._takes:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._server))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._pairs.append((client, server))
            threading.Thread(target=self._hand_on, args=(client, server), daemon=True).start()

    def _hand_on(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while True:
                for end in select.select([client, server], [], [])[0]:
                    data = end.recv(_PIECE)
                    if not data:
                        return
                    if self._delay:
                        time.sleep(self._delay)
                    if self._chance.random() < self._loss:
                        time.sleep(_NOTICED)
                    if end is client:
                        server.sendall(data)
                    elif self._answers:
                        client.sendall(data)
        except (OSError, ValueError):
            pass
        finally:
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
