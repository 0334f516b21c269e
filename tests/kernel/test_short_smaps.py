"""Flags of mappings without smaps: always what smaps would tell, or nothing."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from incdump._uapi import bpf, mapping
from incdump.model.runs import PAGE_SIZE
from incdump.proc import short_smaps
from incdump.proc.short_smaps import ShortSmaps, words_of_bits
from tests import oracle
from tests.kernel.victims import victim
from tests.targets.build import churn

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel

ADVISED = """
addresses = []
for advice in (0, 1, 2, 10, 12, 14, 15, 16, 18):
    start = mapping.map_pages(6 * PAGE, mapping.PROT_NONE, mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS)
    mapping.protect(start + PAGE, 4 * PAGE, mapping.PROT_READ | mapping.PROT_WRITE)
    mapping.advise(start + PAGE, 4 * PAGE, advice)
    addresses.append(start + PAGE)
mapping.lock(mapping.map_anonymous(4 * PAGE), 4 * PAGE)
mapping.map_pages(PAGE, 3, mapping.MAP_SHARED | mapping.MAP_ANONYMOUS)
mapping.map_pages(PAGE, 3, mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS | mapping.MAP_GROWSDOWN)
mapping.map_pages(PAGE, 5, mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS | mapping.MAP_NORESERVE)
tell(plain=addresses[0])
wait()
mapping.advise(addresses[0], 4 * PAGE, mapping.MADV_DONTFORK)
tell()
"""


@pytest.fixture
def smaps() -> Iterator[ShortSmaps]:
    try:
        reader = ShortSmaps()
    except OSError as error:
        pytest.skip(f"the kernel does not tell flags but in smaps: {error}")
    yield reader
    reader.close()


def wanted(pid: int) -> bytes:
    """The first lines and the VmFlags of smaps."""
    text = Path(f"/proc/{pid}/smaps").read_bytes()
    lines = [line for line in text.split(b"\n") if re.match(rb"[0-9a-f]+-[0-9a-f]+ |VmFlags:", line)]
    return b"\n".join([*lines, b""])


def test_every_flag_that_a_program_can_set_is_told(smaps: ShortSmaps) -> None:
    with victim(ADVISED) as target:
        text = smaps.read(target.pid)
        assert text == wanted(target.pid)
        assert {b"rr", b"sr", b"dc", b"hg", b"nh", b"dd", b"wf", b"lo", b"sh", b"gd", b"nr"} <= set(text.split())


def test_flags_that_change_and_no_bound_with_them_are_told(smaps: ShortSmaps) -> None:
    with victim(ADVISED) as target:
        maps = Path(f"/proc/{target.pid}/maps").read_bytes()
        before = smaps.read(target.pid).split(b"\n")
        at = next(n for n, line in enumerate(before) if line.startswith(b"%x-" % target.told["plain"])) + 1
        target.go_and_listen()
        after = smaps.read(target.pid)
        assert after == wanted(target.pid)
        assert Path(f"/proc/{target.pid}/maps").read_bytes() == maps
        assert b" dc " not in before[at]
        assert b" dc " in after.split(b"\n")[at]


def test_whatever_a_program_maps_it_is_what_smaps_tells(smaps: ShortSmaps) -> None:
    with churn(seed=31, threads=2, processes=2, ops="all") as target:
        for _ in range(10):
            target.step(100)
            with oracle.stopped_tree(target.pid) as pids:
                for pid in pids.values():
                    assert smaps.read(pid) == wanted(pid)


MANY = """
for number in range(5000):
    mapping.map_pages(PAGE, 1 + 2 * (number % 2), mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS)
tell()
"""


@pytest.mark.timeout(60)
def test_more_mappings_than_the_kernel_tells_in_one_read(smaps: ShortSmaps) -> None:
    """The iterator begins again after its end: it was read for ever."""
    with victim(MANY) as target:
        assert smaps.read(target.pid) == wanted(target.pid)


@pytest.mark.timeout(60)
def test_the_end_is_found_while_others_wait_for_the_mappings(smaps: ShortSmaps) -> None:
    """The kernel lets go of the lock for them, and then does not know its end either."""
    ended = threading.Event()

    def map_and_unmap() -> None:
        while not ended.is_set():
            mapping.unmap(mapping.map_anonymous(PAGE_SIZE), PAGE_SIZE)

    others = [threading.Thread(target=map_and_unmap) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for _ in range(300):
            rows = bpf.iterate_vmas(smaps._program, os.getpid())
            assert 10 < len(rows) < 5000
    finally:
        ended.set()
        for other in others:
            other.join()


def test_a_flag_that_is_not_known_is_not_guessed(smaps: ShortSmaps, monkeypatch: pytest.MonkeyPatch) -> None:
    with victim(ADVISED) as target:
        locked = next(bit for bit, word in smaps._words.items() if word == b"lo")
        monkeypatch.setattr(smaps, "_words", {bit: word for bit, word in smaps._words.items() if bit != locked})
        with pytest.raises(OSError, match="not known"):
            smaps.read(target.pid)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        pytest.param([("0 4", "rd mr")], "0:rd 4:mr", id="as many words as bits"),
        pytest.param([("0 4 37", "rd mr")], "", id="fewer words than bits"),
        pytest.param([("0 4 37", "rd mr"), ("0 4", "rd mr")], "0:rd 4:mr 37:", id="a bit without a word"),
        pytest.param(
            [("0 1 4 37", "rd wr mr"), ("0 4 37", "rd mr"), ("0 4", "rd mr")],
            "0:rd 1:wr 4:mr 37:",
            id="one follows from the other",
        ),
        pytest.param([("0 2 3", "rd ex"), ("0", "rd")], "0:rd", id="either of two bits"),
        pytest.param([("", "")], "", id="no bits"),
    ],
)
def test_what_follows_from_mappings_is_learned_and_no_more(samples: list[tuple[str, str]], words: str) -> None:
    learned = words_of_bits([(list(map(int, bits.split())), said.encode().split()) for bits, said in samples])
    assert " ".join(f"{bit}:{word.decode()}" for bit, word in sorted(learned.items())) == words


@pytest.mark.parametrize("samples", [["rd mr", "rd sh"], ["rd mr", "mr rd"]])
def test_words_that_contradict_each_other_are_not_believed(samples: list[str]) -> None:
    with pytest.raises(OSError, match="do not go with"):
        words_of_bits([([0, 4], said.encode().split()) for said in samples])


def test_other_mappings_than_those_of_maps_are_not_believed(smaps: ShortSmaps, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = bpf.iterate_vmas
    with victim(ADVISED) as target:
        rows = iterate(smaps._program, target.pid)
        start, end, flags = rows[3]
        for others in (
            rows[:-1],
            rows[1:],
            [],
            [*rows, (end, end, 0)],
            [*rows[:3], (start, end + 1, flags), *rows[4:]],
        ):
            monkeypatch.setattr(bpf, "iterate_vmas", lambda *_, others=others: others)
            with pytest.raises(BlockingIOError):
                smaps.read(target.pid)


def test_a_process_that_is_gone(smaps: ShortSmaps) -> None:
    with victim(ADVISED) as target:
        pid = target.pid
    with pytest.raises(FileNotFoundError):
        smaps.read(pid)


def test_where_there_is_no_bpf_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf, "VMLINUX", "/nowhere")
    bpf._kernel.cache_clear()
    with pytest.raises(FileNotFoundError):
        ShortSmaps()
    bpf._kernel.cache_clear()


def test_learning_leaves_no_mapping_and_no_descriptor(smaps: ShortSmaps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_smaps, "_memory", {})
    fds = sorted(os.listdir("/proc/self/fd"))
    mapped: list[tuple[int, int]] = []
    unmapped: list[tuple[int, int]] = []
    real_map, real_unmap = mapping.map_pages, mapping.unmap
    monkeypatch.setattr(mapping, "map_pages", lambda n, *a: mapped.append((real_map(n, *a), n)) or mapped[-1][0])
    monkeypatch.setattr(mapping, "unmap", lambda a, n: unmapped.append((a, n)) or real_unmap(a, n))
    ShortSmaps().close()
    assert sorted(os.listdir("/proc/self/fd")) == fds
    assert len(mapped) > 10
    assert sorted(unmapped) == sorted(mapped)
    assert mapped[0][1] == 3 * PAGE_SIZE
