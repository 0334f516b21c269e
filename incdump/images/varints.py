"""Protobuf messages of integers, encoded many at a time.

A table with a column for each field becomes one byte string, a length-delimited message for each row, without a Python
object for any row. That is the whole of what pagemap.img and the VMAs of mm.img need; everything else goes through
protobuf itself. The wire format: https://protobuf.dev/programming-guides/encoding/.

Each chunk of rows is laid out as a byte matrix, one row a message, as wide as the widest message, beside a mask of the
bytes that count; taking the masked bytes in order gives the messages back to back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

CHUNK_ROWS = 16384
"""Rows encoded or decoded at a time: the scratch arrays stay in the processor's cache."""


class Field(NamedTuple):
    """A column to encode.

    :ivar number: the field's number, 1 to 15 (a tag of one byte).
    :ivar values: shape (n,), uint64.
    :ivar present: shape (n,), bool: the rows that have the field; None for all.
    """

    number: int
    values: NDArray[np.uint64]
    present: NDArray[np.bool_] | None = None


def varint(value: int) -> bytes:
    """One unsigned integer as a varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_messages(fields: Sequence[Field], before: bytes, after: bytes) -> bytes:
    """Encode a message for each row, each with its length in front.

    :param fields: the columns, in the order they are to have in the message; a message stays under 128 bytes.
    :param before: what stands before the byte with the message's length (the tag of a nested message, or nothing).
    :param after: what stands after that byte (three zeros make it a 32-bit length).
    :returns: all messages, back to back.
    """
    rows = len(fields[0].values)
    chunks = []
    for first in range(0, rows, CHUNK_ROWS):
        part = slice(first, first + CHUNK_ROWS)
        cut = [Field(f.number, f.values[part], None if f.present is None else f.present[part]) for f in fields]
        chunks.append(_encode_chunk(cut, before, after))
    return b"".join(chunks)


def _length(value: int) -> int:
    """Bytes of a varint."""
    return max(1, (value.bit_length() + 6) // 7)


def _encode_chunk(fields: Sequence[Field], before: bytes, after: bytes) -> bytes:
    rows = len(fields[0].values)
    widths = [_length(int(f.values.max())) for f in fields]
    head = len(before) + 1 + len(after)
    matrix = np.empty((rows, head + sum(widths) + len(fields)), np.uint8)
    matrix[:, : len(before)] = np.frombuffer(before, np.uint8)
    matrix[:, len(before) + 1 : head] = np.frombuffer(after, np.uint8)
    ragged: list[tuple[int, NDArray[np.bool_]]] = []
    at = head
    for field, width in zip(fields, widths, strict=True):
        matrix[:, at] = field.number << 3
        ragged += _encode_column(field.values, matrix[:, at + 1 : at + 1 + width], at + 1)
        if field.present is not None:
            ragged = _drop_absent(ragged, at, width, field.present)
        at += 1 + width
    if not ragged:
        matrix[:, len(before)] = at - head
        return matrix.tobytes()
    mask = np.ones(matrix.shape, bool)
    size = np.full(rows, at - head, np.uint8)
    for column, kept in ragged:
        mask[:, column] = kept
        size -= ~kept
    matrix[:, len(before)] = size
    return matrix[mask].tobytes()


def _encode_column(values: NDArray[np.uint64], out: NDArray[np.uint8], at: int) -> list[tuple[int, NDArray[np.bool_]]]:
    """Lay out varints, and return the columns (numbered from `at`) that not every row has."""
    width = out.shape[1]
    shortest = _length(int(values.min()))
    ragged = []
    for index in range(width):
        group = (values >> np.uint64(7 * index)).astype(np.uint8)
        if index + 1 < shortest:
            group |= 0x80
        elif index + 1 < width:
            longer = values >= np.uint64(1 << 7 * (index + 1))
            ragged.append((at + index + 1, longer))
            group &= 0x7F
            group |= longer.view(np.uint8) << 7
        out[:, index] = group
    return ragged


def _drop_absent(
    ragged: list[tuple[int, NDArray[np.bool_]]], at: int, width: int, present: NDArray[np.bool_]
) -> list[tuple[int, NDArray[np.bool_]]]:
    """Narrow a field's columns (its tag at `at`, then `width` bytes) to the rows that have the field."""
    masks = dict(ragged)
    for column in range(at, at + 1 + width):
        masks[column] = masks[column] & present if column in masks else present
    return list(masks.items())
