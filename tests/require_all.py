"""A pytest plugin: with ``INCDUMP_REQUIRE_ALL=1`` a test that was skipped counts as failed.

A test that cannot run says what is missing. On a machine that is meant to have everything (CI), a skip means that the
machine, or a probe, is broken: then it must not pass unseen. Only what a kind of machine cannot have is excused: a skip
is let through if its reason matches one of `EXCUSED`.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

EXCUSED = (
    r"soft-dirty",  # a kernel with CONFIG_MEM_SOFT_DIRTY: not on this kernel, nor on any aarch64
    r"\b(aarch64|x86_64)\b",  # the other architecture
    r"hugetlb",  # huge pages, where none can be reserved
    r"\(netem\)",  # a kernel without it: tests/guest/kernel_tests makes sure that the guest's has it
    r"PostgreSQL is tested in the guest",  # tests/guest/kernel_tests: there a skip of it is a failure
)


def must_run(reason: str) -> bool:
    """Whether a skip for this reason is a failure."""
    required = os.environ.get("INCDUMP_REQUIRE_ALL", "") not in ("", "0")
    return required and not any(re.search(pattern, reason, re.IGNORECASE) for pattern in EXCUSED)


def _reason(longrepr: Any) -> str:
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = _reason(report.longrepr)
    if must_run(reason):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, and INCDUMP_REQUIRE_ALL is set: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tests that were skipped."""
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Whole modules that were skipped."""
    report = yield
    _fail_if_skipped(report)
    return report
