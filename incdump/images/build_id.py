"""The GNU build id of an ELF file, read with three small reads.

CRIU compares it at restore with that of the file then found under the name. The layout is in elf(5): the file header
tells where the program headers are, and one of those of type PT_NOTE holds a note of type NT_GNU_BUILD_ID.
"""

from __future__ import annotations

import os
import struct

_MAX_HEADERS = 64 << 10
_MAX_NOTES = 64 << 10
_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3


def read_build_id(fd: int) -> tuple[int, ...]:
    """The build id of an open file, in little-endian 32-bit words; empty if it has none or is no ELF file.

    :raises OSError: the file cannot be read.
    """
    try:
        for offset, size in _note_segments(fd):
            found = _find(os.pread(fd, min(size, _MAX_NOTES), offset))
            if found:
                padded = found + bytes(-len(found) % 4)
                return struct.unpack(f"<{len(padded) // 4}I", padded)
    except (struct.error, OverflowError):
        pass  # cut short, or no sense in it: nothing to compare with
    return ()


def _note_segments(fd: int) -> list[tuple[int, int]]:
    """Offset and size of the note segments of a little-endian ELF file."""
    start = os.pread(fd, 64, 0)
    if len(start) < 52 or not start.startswith(b"\x7fELF") or start[5] != 1:
        return []
    is_64 = start[4] == 2
    (table,) = struct.unpack_from("<Q", start, 32) if is_64 else struct.unpack_from("<I", start, 28)
    entry_size, count = struct.unpack_from("<HH", start, 54 if is_64 else 42)
    layout, offset_at, size_at = ("<Q", 8, 32) if is_64 else ("<I", 4, 16)
    headers = os.pread(fd, min(entry_size * count, _MAX_HEADERS), table)
    segments = []
    for at in range(0, len(headers) - size_at - 8, max(entry_size, 1)):
        if struct.unpack_from("<I", headers, at)[0] == _PT_NOTE:
            (offset,) = struct.unpack_from(layout, headers, at + offset_at)
            (size,) = struct.unpack_from(layout, headers, at + size_at)
            segments.append((offset, size))
    return segments


def _find(notes: bytes) -> bytes:
    """The build id among notes, or nothing."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name = at + 12
        description = name + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[name : name + name_size] == b"GNU\0":
            return notes[description : description + size]
        at = description + (size + 3 & ~3)
    return b""
