"""What the kernel says about its own types: BTF, in /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF).

Documentation/bpf/btf.rst: a header, the types one after the other, each numbered by its place, and their names. So to
know a type's number is to walk over all that come before it; which takes Python some tens of milliseconds, and is done
no further than it must.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

VMLINUX = "/sys/kernel/btf/vmlinux"
STRUCT, UNION, FUNCTION = 4, 5, 12
_HEADER = struct.Struct("=HBBIIIII")
_MAGIC = 0xEB9F
_TYPE = struct.Struct("=III")  # name, vlen and kind, size or type; a struct's member: name, type, offset in bits
_LAST_KIND = 19
_AFTER = {1: 4, 3: 12, 14: 4, 17: 4}
"""Bytes that follow a type, by its kind (an integer, an array, ...)."""
_AFTER_EACH = {STRUCT: 12, UNION: 12, 6: 8, 13: 8, 15: 12, 19: 12}
"""Bytes for each of its members (of an enumeration, a function's type, a section, ...)."""
_BITFIELDS, _OFFSET = 1 << 31, 0xFFFFFF


class Btf:
    """The types of a kernel.

    :param data: as `VMLINUX` has it.
    :raises OSError: EOPNOTSUPP: it is in a form not known here. The methods raise ENOENT: there is no such type.
    """

    def __init__(self, data: bytes) -> None:
        magic, _, _, header, types_at, types_len, names_at, names_len = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise _unknown("magic number")
        self._types = data[header + types_at : header + types_at + types_len]
        self._names = data[header + names_at : header + names_at + names_len]
        self._places = [-1]  # of each type, by its number; number 0 is void
        self._walk = self._places_from(0)

    def number(self, kind: int, name: str) -> int:
        """The number of the first type of this kind and name."""
        wanted = self._name(name)
        number = 1
        while True:
            offset, info, _ = _TYPE.unpack_from(self._types, self._place(number))
            if offset == wanted and info >> 24 & 31 == kind:
                return number
            number += 1

    def offsets(self, number: int, names: tuple[str, ...]) -> list[int]:
        """Where in a struct members are, bytes; those of nameless structs and unions within it count as its own."""
        wanted = {self._name(name): name for name in names}
        found = dict(self._members(number, 0, wanted))
        if len(found) < len(names):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), ", ".join(set(names) - set(found)))
        return [found[name] for name in names]

    def _members(self, number: int, base: int, wanted: dict[int, str]) -> Iterator[tuple[str, int]]:
        at = self._place(number)
        _, info, _ = _TYPE.unpack_from(self._types, at)
        if info >> 24 & 31 not in (STRUCT, UNION):
            return
        for n in range(info & 0xFFFF):
            name, inner, bits = _TYPE.unpack_from(self._types, at + _TYPE.size * (n + 1))
            offset = base + ((bits & _OFFSET if info & _BITFIELDS else bits) >> 3)
            if name == 0:
                yield from self._members(inner, offset, wanted)
            elif name in wanted:
                yield wanted[name], offset

    def _name(self, name: str) -> int:
        at = self._names.find(b"\0" + name.encode() + b"\0")
        if at < 0:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return at + 1

    def _place(self, number: int) -> int:
        while number >= len(self._places):
            place = next(self._walk, None)
            if place is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), VMLINUX)
            self._places.append(place)
        return self._places[number]

    def _places_from(self, at: int) -> Iterator[int]:
        unpack, types, length = _TYPE.unpack_from, self._types, len(self._types)
        while at < length:
            yield at
            _, info, _ = unpack(types, at)
            kind = info >> 24 & 31
            if kind > _LAST_KIND:
                raise _unknown(f"kind of type {kind}")
            at += _TYPE.size + _AFTER.get(kind, 0) + _AFTER_EACH.get(kind, 0) * (info & 0xFFFF)


def _unknown(what: str) -> OSError:
    return OSError(errno.EOPNOTSUPP, f"unknown {what}", VMLINUX)
