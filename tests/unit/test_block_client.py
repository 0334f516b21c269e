"""What the client of incdump's own protocol sends, and what it makes of the answers."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from incdump.errors import XferError
from incdump.xfer.block_client import ON_THEIR_WAY, Channel
from incdump.xfer.blocks import Coding
from incdump.xfer.compression import CodingChoice
from tests.page_client import PAGE, noise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from incdump.model.options import CompressionName

MIB = 1 << 20
DONE, FAILED = b"\x06", b"\x15"


@contextmanager
def channel(compress: CompressionName = "off") -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the server's end of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, "here", 5, CodingChoice(compress, ON_THEIR_WAY, agreed=True)), theirs


def bytes_sent(data: bytes, compress: CompressionName = "off") -> int:
    """How many bytes leave for some pages."""
    counts: list[int] = []

    def count(theirs: socket.socket) -> None:
        counts.extend(iter(lambda: len(theirs.recv(MIB)), 0))

    with channel(compress) as (client, theirs):
        reader = threading.Thread(target=count, args=(theirs,))
        reader.start()
        client.send(1, 0, np.frombuffer(data, np.uint8))
        client.connection.shutdown(socket.SHUT_WR)
        reader.join()
    return sum(counts)


def test_pages_of_zeros_are_not_sent() -> None:
    assert bytes_sent(bytes(MIB)) < 100
    assert len(noise(56)) < bytes_sent(noise(28) + bytes(200 * PAGE) + noise(28)) < len(noise(57))


def test_what_gets_no_smaller_is_sent_as_it_is() -> None:
    assert MIB < bytes_sent(noise(256), "lz4") < MIB + PAGE
    assert bytes_sent(b"the same again. " * (MIB // 16), "lz4") < MIB // 50


@pytest.mark.parametrize("before", range(ON_THEIR_WAY))
def test_why_the_server_refuses_is_heard_whatever_comes_before_it(before: int) -> None:
    with channel() as (client, theirs):
        theirs.sendall(DONE * before + FAILED + struct.pack("<I", 13) + b"the disk died")
        for number in range(ON_THEIR_WAY):
            client.send(1, number * PAGE, np.frombuffer(noise(1), np.uint8))
        with pytest.raises(XferError, match=r"here refuses: the disk died$"):
            client.flush()


def test_no_more_is_on_its_way_than_there_may_be() -> None:
    with channel() as (client, theirs):
        done = threading.Event()

        def send() -> None:
            for number in range(ON_THEIR_WAY + 1):
                client.send(1, number * PAGE, np.frombuffer(noise(1), np.uint8))
            done.set()

        sender = threading.Thread(target=send)
        sender.start()
        assert not done.wait(0.3)
        theirs.sendall(DONE)
        assert done.wait(10)
        sender.join()


# -- compression --------------------------------------------------------------------------------------------------


def share_of_lz4(choice: CodingChoice, raw: float, packed: float, *, size: float = 0.5, chunks: int = 1000) -> float:
    """How many chunks are compressed, where they take so many seconds as they are, and compressed."""
    used = 0
    for _ in range(chunks):
        if choice.coding is Coding.LZ4:
            used += 1
            choice.note(MIB, int(MIB * size), packed)
        else:
            choice.note(MIB, MIB, raw)
    return used / chunks


def test_chunks_are_compressed_where_they_get_through_quicker() -> None:
    assert share_of_lz4(CodingChoice("auto", ON_THEIR_WAY, agreed=True), raw=2, packed=1) > 0.8


def test_chunks_are_not_compressed_where_that_takes_longer() -> None:
    assert share_of_lz4(CodingChoice("auto", ON_THEIR_WAY, agreed=True), raw=1, packed=2) < 0.2


def test_what_compression_does_not_make_smaller_is_hardly_ever_tried() -> None:
    assert share_of_lz4(CodingChoice("auto", ON_THEIR_WAY, agreed=True), raw=1, packed=0.1, size=0.95) < 0.02


def test_a_link_that_becomes_slow_is_noticed() -> None:
    choice = CodingChoice("auto", ON_THEIR_WAY, agreed=True)
    assert share_of_lz4(choice, raw=1, packed=2) < 0.2
    share_of_lz4(choice, raw=10, packed=2)
    assert share_of_lz4(choice, raw=10, packed=2) > 0.8


@pytest.mark.parametrize(("name", "agreed", "share"), [("off", True, 0), ("auto", False, 0), ("lz4", True, 1)])
def test_what_was_asked_for_or_cannot_be_is_not_measured(name: CompressionName, agreed: bool, share: float) -> None:
    assert share_of_lz4(CodingChoice(name, ON_THEIR_WAY, agreed=agreed), raw=1, packed=1) == share
