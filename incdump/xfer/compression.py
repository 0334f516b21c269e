"""Compression of blocks on their way: lz4, where it is installed (``pip install incdump[lz4]``)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from incdump.errors import ProtocolError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

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
