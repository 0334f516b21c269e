"""Runs of tests leave the machine the memory that they found, also when they are killed."""

from __future__ import annotations

import pytest

from tests import huge_pages
from tests.kernel.support import require_root


def _pool() -> int:
    return int(huge_pages.POOL.read_text())


def test_a_run_is_content_with_what_a_killed_one_has_left() -> None:
    require_root()
    before = _pool()
    with huge_pages.exactly(8):
        left_by_a_killed_run = _pool()
        with huge_pages.at_least(8):
            assert _pool() == left_by_a_killed_run
        assert _pool() == left_by_a_killed_run
        with huge_pages.at_least(10):
            if _pool() == left_by_a_killed_run:
                pytest.skip("no hugetlb pages can be reserved")
            assert _pool() == left_by_a_killed_run + 2
        assert _pool() == left_by_a_killed_run
    assert _pool() == before
