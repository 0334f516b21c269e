"""The kernel's types: numbers by name, members within nameless unions, and what is damaged or not known."""

from __future__ import annotations

import errno
import struct

import pytest

from incdump._uapi.btf import FUNCTION, STRUCT, UNION, Btf

INTEGER, POINTER, ARRAY, TYPEDEF, ENUMERATION, PROTOTYPE = 1, 2, 3, 8, 6, 13
_NAMES = b"\0int\0part\0whole\0low\0high\0run\0other\0"


def name(text: str) -> int:
    return _NAMES.index(b"\0" + text.encode() + b"\0") + 1 if text else 0


def of_type(kind: int, text: str, after: bytes = b"", *, count: int = 0, bits: bool = False, size: int = 0) -> bytes:
    return struct.pack("=III", name(text), bits << 31 | kind << 24 | count, size) + after


def member(text: str, number: int, bit: int) -> bytes:
    return struct.pack("=III", name(text), number, bit)


def btf(*types: bytes) -> bytes:
    data = b"".join(types)
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(data), len(data), len(_NAMES)) + data + _NAMES


TYPES = btf(
    of_type(INTEGER, "int", bytes(4)),
    of_type(POINTER, "", size=1),
    of_type(ARRAY, "", bytes(12)),
    of_type(ENUMERATION, "", bytes(16), count=2),
    of_type(PROTOTYPE, "", bytes(8), count=1),
    of_type(TYPEDEF, "whole", size=7),
    of_type(
        STRUCT, "whole", member("low", 1, 0) + member("", 8, 64) + member("other", 1, 8 << 24 | 256), count=3, bits=True
    ),
    of_type(UNION, "", member("part", 1, 0) + member("", 9, 32), count=2),
    of_type(STRUCT, "", member("high", 1, 64), count=1),
    of_type(FUNCTION, "run", size=5),
)


def test_types_are_numbered_by_their_place() -> None:
    types = Btf(TYPES)
    assert types.number(FUNCTION, "run") == 10
    assert types.number(STRUCT, "whole") == 7
    assert types.number(TYPEDEF, "whole") == 6
    assert types.number(INTEGER, "int") == 1


def test_members_of_nameless_structs_and_unions_are_a_structs_own() -> None:
    types = Btf(TYPES)
    assert types.offsets(7, ("low", "part", "high", "other")) == [0, 8, 20, 32]
    assert types.offsets(7, ("other", "low")) == [32, 0]


@pytest.mark.parametrize("missing", ["int", "nobody"])
def test_what_is_not_there(missing: str) -> None:
    types = Btf(TYPES)
    with pytest.raises(FileNotFoundError):
        types.number(STRUCT, missing)
    with pytest.raises(FileNotFoundError):
        types.offsets(7, ("low", missing))


def test_what_is_not_known() -> None:
    with pytest.raises(OSError, match="kind of type 20") as raised:
        Btf(btf(of_type(20, "other"), of_type(STRUCT, "whole"))).number(STRUCT, "whole")
    assert raised.value.errno == errno.EOPNOTSUPP
    with pytest.raises(OSError, match="magic"):
        Btf(b"\0" * 24)
