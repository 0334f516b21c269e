"""Compression of blocks on their way: lz4, where it is installed (the extra ``lz4``)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from incdump.errors import ProtocolError
from incdump.xfer.blocks import Coding

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from incdump.model.options import CompressionName

LZ4 = "lz4"


@cache
def _lz4() -> Any:
    try:
        import lz4.block
    except ImportError:
        return None
    return lz4.block


def available() -> tuple[str, ...]:
    """What can be used here."""
    return (LZ4,) if _lz4() is not None else ()


def compress(data: NDArray[Any] | memoryview) -> bytes:
    """A block, compressed; as fast as it goes. Releases the GIL."""
    packed: bytes = _lz4().compress(data, store_size=False)
    return packed


def decompress(data: Buffer, size: int) -> memoryview:
    """A block's own bytes.

    :param size: how many they are.
    :raises ProtocolError: it is none, or of another size.
    """
    lz4 = _lz4()
    if lz4 is None:
        raise ProtocolError("the client sends compressed pages, which was not agreed upon")
    try:
        raw = lz4.decompress(data, uncompressed_size=size)
    except (lz4.LZ4BlockError, ValueError, OverflowError) as error:
        raise ProtocolError(f"the client sends a compressed block that is damaged: {error}") from None
    if len(raw) != size:
        raise ProtocolError("the client sends a compressed block of another size than it says")
    return memoryview(raw)


class CodingChoice:
    """Which coding a channel uses: the one by which its blocks got through quicker, tried again now and then.

    What is measured is the time that it takes to send a chunk, which includes the wait for the server's answers; so the
    first few chunks after a change tell of the coding before.
    """

    EPOCH, KEEP = 16, 12
    WORTH_TRYING = 0.9

    def __init__(self, name: CompressionName, on_their_way: int, *, agreed: bool) -> None:
        """
        :param on_their_way: chunks that may be sent before the first is answered.
        :param agreed: whether the server takes compressed blocks.
        """
        self._settle = on_their_way + 2
        self.coding = Coding.LZ4 if name == "lz4" and agreed else Coding.RAW
        self._fixed = name != "auto" or not agreed
        self._count = self._keep = 0
        self._bytes = 0
        self._seconds = 0.0
        self._cost: dict[Coding, float] = {}

    def note(self, nbytes: int, sent: int, seconds: float) -> None:
        """A chunk was sent.

        :param nbytes: its bytes, of which `sent` went over the network.
        """
        if self._fixed:
            return
        if self.coding is Coding.LZ4 and sent > nbytes * self.WORTH_TRYING:
            self._turn(Coding.RAW, self.KEEP)  # what does not compress is not sent quicker for it
            return
        self._count += 1
        if self._count > self._settle:
            self._bytes += nbytes
            self._seconds += seconds
        if self._count == self.EPOCH:
            self._cost[self.coding] = self._seconds / self._bytes
            self._decide()

    def _decide(self) -> None:
        other = Coding.RAW if self.coding is Coding.LZ4 else Coding.LZ4
        if self._keep > 0 and self._cost.get(other, np.inf) >= self._cost[self.coding]:
            self._turn(self.coding, self._keep - 1)
        elif other not in self._cost or self._keep == 0:
            self._turn(other, -1)  # to try it
        else:
            self._turn(min(self._cost, key=lambda coding: self._cost[coding]), self.KEEP)

    def _turn(self, coding: Coding, keep: int) -> None:
        self.coding, self._keep = coding, keep
        self._count = self._bytes = 0
        self._seconds = 0.0
