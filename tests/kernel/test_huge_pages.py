"""Runs of tests leave the machine the memory that they found, also when they are killed."""

from __future__ import annotations

import pytest

from tests import huge_pages
from tests.kernel.support import require_root


@pytest.mark.alone
def test_a_run_is_content_with_what_a_killed_one_has_left() -> None:
    require_root()
    before = huge_pages.pool()
    with huge_pages.exactly(8):
        left_by_a_killed_run = huge_pages.pool()
        with huge_pages.at_least(8):
            assert huge_pages.pool() == left_by_a_killed_run
        assert huge_pages.pool() == left_by_a_killed_run
        with huge_pages.at_least(10):
            if huge_pages.pool() == left_by_a_killed_run:
                pytest.skip("no hugetlb pages can be reserved")
            assert huge_pages.pool() == left_by_a_killed_run + 2
        assert huge_pages.pool() == left_by_a_killed_run
    assert huge_pages.pool() == before
