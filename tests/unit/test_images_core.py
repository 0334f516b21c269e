"""core-PID.img, byte by byte."""

from __future__ import annotations

import pytest

from incdump._uapi.arch import ARCH
from incdump.errors import BadImage
from incdump.images.core import encode_core, has_registers
from incdump.model.core import TaskCore

TASK = TaskCore(comm="sh", flags=0x400000, personality=0, blocked_signals=1 << 14)
MAGICS = bytes.fromhex("19435654 47380555")


def test_the_bytes() -> None:
    task = bytes.fromhex("1a 13  08 01  10 00  18 00  20 80808002  28 808001  32 02 7368")
    record = bytes([0x08, ARCH.core_mtype]) + task
    assert encode_core(TASK) == MAGICS + len(record).to_bytes(4, "little") + record


def test_there_are_no_registers_in_ours() -> None:
    assert not has_registers(encode_core(TASK), "core-1.img")


@pytest.mark.parametrize("field", ["12 00", "42 00"], ids=["x86_64", "aarch64"])
def test_registers_are_seen_in_crius(field: str) -> None:
    record = bytes.fromhex(f"0801 {field} 1a0c 0801 1000 1800 2000 2800 3200")
    assert has_registers(MAGICS + len(record).to_bytes(4, "little") + record, "core-1.img")


def test_damage_is_told() -> None:
    with pytest.raises(BadImage, match="core-1"):
        has_registers(encode_core(TASK)[:-1], "core-1.img")
