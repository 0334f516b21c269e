"""When the soft-dirty bits may be believed, and the record that this hangs on."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from incdump.errors import TrackerUnavailable
from incdump.model.regions import PageIs, Window
from incdump.tracking import soft_dirty
from incdump.tracking.soft_dirty import SoftDirtyLog, SoftDirtyRecord, may_trust
from tests.unit.pagesets import END, PAGE, Table, categories_of, moderately, page_dicts, page_sets, regions_of, runs_of

RECORD = SoftDirtyRecord(start_time=1234, boot_id="b-1", generation="g-1", uptime=5_000_000)
UNFINISHED = replace(RECORD, generation=None)


@pytest.fixture
def log(tmp_path: Path) -> SoftDirtyLog:
    """A log without a record."""
    return SoftDirtyLog(str(tmp_path))


# record, parent_generation, parent_uptime
TRUSTED = {
    "the parent dump was the last to reset": (RECORD, "g-1", None),
    "the same, and the parent has an uptime too": (RECORD, "g-1", 1),
    "CRIU made the parent, and incdump never reset": (None, None, 5_000_000),
    "CRIU made the parent after incdump's last reset": (RECORD, None, 5_000_001),
    "CRIU made the parent after a dump of incdump that failed": (UNFINISHED, None, 5_000_001),
}
NOT_TRUSTED = {
    "another dump has reset since": (RECORD, "g-0", None),
    "the dump that reset last was not finished": (UNFINISHED, "g-1", None),
    "no record of the reset that the parent made": (None, "g-1", None),
    "the parent's generation does not come with its uptime": (None, "g-1", 9_000_000),
    "another dump has reset since, whatever the uptime": (RECORD, "g-0", 9_000_000),
    "CRIU made the parent before incdump's last reset": (RECORD, None, 4_999_999),
    "CRIU made the parent at the very tick of incdump's last reset": (RECORD, None, 5_000_000),
    "CRIU made the parent before a dump of incdump that failed": (UNFINISHED, None, 4_999_999),
    "CRIU made the parent without tracking": (None, None, None),
    "CRIU made the parent without tracking, incdump reset": (RECORD, None, None),
    "two unfinished generations are not the same one": (UNFINISHED, None, None),
}


@pytest.mark.parametrize("case", TRUSTED)
def test_the_bits_are_trusted_if(case: str) -> None:
    assert may_trust(*TRUSTED[case])


@pytest.mark.parametrize("case", NOT_TRUSTED)
def test_the_bits_are_not_trusted_if(case: str) -> None:
    assert not may_trust(*NOT_TRUSTED[case])


def test_a_record_is_read_back_as_it_was_written(log: SoftDirtyLog, tmp_path: Path) -> None:
    for record in (RECORD, UNFINISHED, replace(RECORD, generation="g-2", uptime=0)):
        log.write(42, record)
        assert log.read(42, 1234, "b-1") == record
    assert os.listdir(tmp_path) == ["soft-dirty-42.json"]
    assert stat.S_IMODE(os.stat(tmp_path / "soft-dirty-42.json").st_mode) == 0o600


def test_the_record_of_another_process_with_the_same_pid_is_none(log: SoftDirtyLog) -> None:
    log.write(42, RECORD)
    assert log.read(42, 1235, "b-1") is None
    assert log.read(42, 1234, "b-2") is None
    assert log.read(43, 1234, "b-1") is None


@pytest.mark.parametrize("where", ["dump", "replace"])
def test_a_record_that_cannot_be_written_leaves_the_one_before(
    log: SoftDirtyLog, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    log.write(42, RECORD)

    def fail(*args: object) -> None:
        if where == "dump":
            args[1].write('{"start_time": 12')  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(json if where == "dump" else os, where, fail)
    with pytest.raises(OSError, match="no space"):
        log.write(42, UNFINISHED)
    monkeypatch.undo()
    assert log.read(42, 1234, "b-1") == RECORD
    assert log.pids() == [42]


def test_at_no_moment_is_there_half_a_record(log: SoftDirtyLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write(42, RECORD)
    seen: list[SoftDirtyRecord | None] = []
    dump = json.dump

    def watched(data: object, file: object) -> None:
        seen.append(log.read(42, 1234, "b-1"))
        dump(data, file)  # type: ignore[arg-type]
        file.flush()  # type: ignore[attr-defined]
        seen.append(log.read(42, 1234, "b-1"))

    monkeypatch.setattr(json, "dump", watched)
    log.write(42, UNFINISHED)
    assert seen == [RECORD, RECORD]
    assert log.read(42, 1234, "b-1") == UNFINISHED


@moderately
@given(
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=6
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_a_record_that_makes_no_sense_is_no_record(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "soft-dirty-1.json").write_bytes(data)
        assert SoftDirtyLog(directory).read(1, 1234, "b-1") is None


def test_a_record_is_forgotten_once(log: SoftDirtyLog) -> None:
    log.write(42, RECORD)
    assert log.forget(42)
    assert not log.forget(42)
    assert log.read(42, 1234, "b-1") is None


def test_the_processes_with_a_record_are_listed(log: SoftDirtyLog, tmp_path: Path) -> None:
    for pid in (9, 10, 1):
        log.write(pid, RECORD)
    for other in ("holder.sock", "soft-dirty-x.json", "soft-dirty-12.json.77", "soft-dirty-"):
        (tmp_path / other).touch()
    assert log.pids() == [1, 9, 10]


class Reader:
    """A pagemap reader that says what it was told to."""

    name = "plain"

    def __init__(self, window: Window) -> None:
        self.window = window

    def windows(self, _pagemap_fd: int, _vmas: object) -> list[Window]:
        """The one window."""
        return [self.window]


class Spans:
    """As much of a VMA table as is asked for."""

    def __init__(self, pages: set[int]) -> None:
        self.pages = pages

    def spans(self, _mask: object) -> Table:
        """start and end of the watched mappings."""
        return runs_of(self.pages)


@moderately
@given(page_dicts(st.integers(0, 511)), page_sets)
def test_a_page_is_written_if_soft_dirty_and_watched_if_its_mapping_is(
    pages: dict[int, int], watched: set[int]
) -> None:
    """Whatever the reader said of WRITTEN and WPALLOWED was about another tracker."""
    reader = Reader(Window(0, END * PAGE, regions_of(pages)))
    told: dict[int, int] = {}
    for window in soft_dirty.windows(-1, reader, Spans(watched), np.ones(1, bool)):  # type: ignore[arg-type]
        told |= categories_of(window.regions)
    others = ~(PageIs.WRITTEN | PageIs.WPALLOWED) & 511
    assert told == {
        p: c & others | (PageIs.WRITTEN if c & PageIs.SOFT_DIRTY else 0) | (PageIs.WPALLOWED if p in watched else 0)
        for p, c in pages.items()
    }


def test_a_reset_that_the_kernel_refuses_says_so() -> None:
    with pytest.raises(TrackerUnavailable, match="soft-dirty bits of process 4194999") as caught:
        soft_dirty.reset(4_194_999)
    assert (caught.value.pid, caught.value.errno) == (4_194_999, errno.ENOENT)


def test_the_notes_of_a_generation_come_back_for_that_generation_only(log: SoftDirtyLog) -> None:
    notes = np.array([[0x1000, 1 << 63 | 5], [0x2000, 1 << 62 | 7]], np.uint64)
    assert log.read_notes(7, "g-1") is None
    log.write_notes(7, "g-1", notes)
    found = log.read_notes(7, "g-1")
    assert found is not None
    assert (found == notes).all()
    assert log.read_notes(7, "g-0") is None
    assert log.read_notes(8, "g-1") is None


def test_notes_that_cannot_be_read_are_none(log: SoftDirtyLog, tmp_path: Path) -> None:
    log.write_notes(7, "g-1", np.empty((0, 2), np.uint64))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for part in (b"", b"junk", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(part)
        assert log.read_notes(7, "g-1") is None


def test_notes_are_forgotten_with_the_record(log: SoftDirtyLog, tmp_path: Path) -> None:
    log.write(7, RECORD)
    log.write_notes(7, "g-1", np.empty((0, 2), np.uint64))
    assert log.forget(7)
    assert list(tmp_path.iterdir()) == []
