"""The probes: what the kernel has is found, what is taken away is missed, and nothing is left over."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from incdump import kerndat
from incdump._uapi import mapping
from incdump.kerndat import pagemap, soft_dirty_bits, trying, uffd_wp
from incdump.model.regions import PageIs

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Probes run anew in each test, and what a test made them believe is forgotten."""
    caches = [value for value in vars(kerndat).values() if hasattr(value, "cache_clear")]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def refuse(number: int) -> Any:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refused


def test_every_feature_says_what_it_is_what_was_seen_and_what_follows() -> None:
    for feature in kerndat.probe().features():
        assert feature.name
        assert feature.what
        assert feature.why
        assert feature.follows
        assert bool(feature) == feature.works
        assert "\n" not in feature.what + feature.why + feature.follows


def test_a_probe_runs_once() -> None:
    assert kerndat.probe().uffd_wp_async is kerndat.uffd_wp_async()


def test_features_without_which_no_kernel_of_today_is_are_found() -> None:
    assert kerndat.process_vm_readv().works
    assert kerndat.pidfd_getfd().works


def test_probing_leaves_no_mapping_and_no_descriptor() -> None:
    kerndat.probe()  # imports and allocations of the first time
    for cached in vars(kerndat).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    fds = sorted(os.listdir("/proc/self/fd"))
    asked: list[tuple[int, int]] = []
    mapped: list[tuple[int, int]] = []
    real_map, real_unmap = mapping.map_anonymous, mapping.unmap
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "map_anonymous", lambda n, *a: mapped.append((real_map(n, *a), n)) or mapped[-1][0])
        patch.setattr(mapping, "unmap", lambda a, n: asked.append((a, n)) or real_unmap(a, n))
        patch.setattr(mapping, "move", _moving(mapped, mapping.move))
        kerndat.probe()
    assert sorted(os.listdir("/proc/self/fd")) == fds
    assert sorted(asked) == sorted(mapped)


def _moving(mapped: list[tuple[int, int]], real: Any) -> Any:
    def move(address: int, length: int, to: int, *, leave_empty: bool = False) -> None:
        real(address, length, to, leave_empty=leave_empty)
        if not leave_empty:
            mapped.remove((address, length))

    return move


def test_without_pagemap_scan_nothing_that_needs_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trying, "pagemap_scan", refuse(errno.ENOTTY))
    assert kerndat.scan_categories() == 0
    assert "ENOTTY" in kerndat.pagemap_scan().why
    for feature in (kerndat.pagemap_scan(), kerndat.pagemap_scan_guard(), kerndat.uffd_wp_async()):
        assert not feature.works


def test_a_kernel_that_knows_fewer_categories_is_asked_for_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    if not kerndat.pagemap_scan().works:
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    kerndat.scan_categories.cache_clear()
    real = trying.pagemap_scan

    def old(*args: Any, returned: int, **kwargs: Any) -> tuple[int, int]:
        if returned & (PageIs.GUARD | PageIs.SOFT_DIRTY):
            raise OSError(errno.EINVAL, "made up")
        return real(*args, returned=returned, **kwargs)

    monkeypatch.setattr(trying, "pagemap_scan", old)
    assert kerndat.scan_categories() == sum(PageIs) - PageIs.GUARD - PageIs.SOFT_DIRTY
    assert not kerndat.pagemap_scan_guard().works


def needs_uffd_wp() -> None:
    if not kerndat.uffd_wp_async().works:
        pytest.skip(f"no asynchronous write protection: {kerndat.uffd_wp_async().why}")
    kerndat.uffd_wp_async.cache_clear()


def test_write_protection_that_misses_a_write_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_uffd_wp()
    monkeypatch.setattr(mapping, "write_byte", _except(2, mapping.write_byte))
    feature = kerndat.uffd_wp_async()
    assert not feature.works
    assert "after writes to pages 2 and 5" in feature.why


def _except(value: int, real: Any) -> Any:
    """write_byte, but writes of one value get lost."""
    return lambda address, written: None if written == value else real(address, written)


def test_write_protection_that_leaks_through_a_move_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_uffd_wp()
    real = trying.own_scan

    def leaking(address: int, pages: int, *, flags: int = 0, **kwargs: int) -> list[tuple[int, int]]:
        found = real(address, pages, flags=flags, **kwargs)
        return found if flags or pages != 8 else [(0, 4)]

    monkeypatch.setattr(uffd_wp, "own_scan", leaking)
    feature = kerndat.uffd_wp_async()
    assert not feature.works
    assert "moved" in feature.why


def test_no_userfaultfd_is_no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uffd_wp.userfaultfd, "open_userfaultfd", refuse(errno.EPERM))
    assert not kerndat.userfaultfd_user_mode().works
    assert not kerndat.uffd_wp_async().works
    if kerndat.pagemap_scan().works:
        assert "EPERM" in kerndat.uffd_wp_async().why


def test_soft_dirty_is_believed_only_when_the_bit_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    bits = iter([1 << 55, 0, 1 << 55])
    monkeypatch.setattr(soft_dirty_bits, "pme", lambda address: next(bits))
    monkeypatch.setattr(soft_dirty_bits.os, "write", lambda fd, data: written.append(data) or len(data))
    assert kerndat.soft_dirty().works
    assert written == [b"4"]
    for sequence in ([0], [1 << 55, 1 << 55], [1 << 55, 0, 0]):
        kerndat.soft_dirty.cache_clear()
        bits = iter(sequence)
        assert not kerndat.soft_dirty().works


def test_clear_refs_is_left_alone_where_the_bit_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(soft_dirty_bits, "pme", lambda address: 1 << 63)
    monkeypatch.setattr(soft_dirty_bits.os, "write", lambda fd, data: written.append(data) or len(data))
    assert not kerndat.soft_dirty().works
    assert written == []


def test_the_zero_page_is_the_same_frame_everywhere() -> None:
    pfn = kerndat.zero_page_pfn()
    assert kerndat.page_frame_numbers().works == (pfn is not None)
    if pfn is None:
        pytest.skip("page frame numbers are hidden (CAP_SYS_ADMIN)")
    kerndat.zero_page_pfn.cache_clear()
    assert kerndat.zero_page_pfn() == pfn


def test_hidden_frame_numbers_are_no_zero_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "pme", lambda address: 1 << 63)
    assert kerndat.zero_page_pfn() is None
    assert not kerndat.page_frame_numbers().works
