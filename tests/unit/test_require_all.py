"""INCDUMP_REQUIRE_ALL=1: a skip is a failure, unless its reason names what this kind of machine cannot have."""

from __future__ import annotations

import pytest

SKIPPING = """
import pytest

def test_without_a_compiler():
    pytest.skip("needs a C compiler")

def test_without_soft_dirty():
    pytest.skip("needs a kernel with soft-dirty")

@pytest.mark.skipif(True, reason="needs root")
def test_marked():
    pass

@pytest.mark.xfail(reason="known")
def test_expected_to_fail():
    assert False

def test_that_passes():
    pass
"""


@pytest.fixture
def run(pytester: pytest.Pytester, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    return pytester


def test_skips_stay_skips_without_it(run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INCDUMP_REQUIRE_ALL", raising=False)
    run.makepyfile(SKIPPING)
    run.runpytest_subprocess("-p", "tests.require_all").assert_outcomes(passed=1, skipped=3, xfailed=1)


def test_skips_are_failures_with_it(run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INCDUMP_REQUIRE_ALL", "1")
    run.makepyfile(SKIPPING)
    result = run.runpytest_subprocess("-p", "tests.require_all")
    result.assert_outcomes(passed=1, failed=1, errors=1, skipped=1, xfailed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*test_without_a_compiler was skipped, and INCDUMP_REQUIRE_ALL is set: *needs a C compiler*"]
    )


def test_a_module_that_skips_itself_is_a_failure_with_it(run: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INCDUMP_REQUIRE_ALL", "1")
    run.makepyfile("import pytest\npytest.importorskip('a_module_that_nobody_has')\n")
    result = run.runpytest_subprocess("-p", "tests.require_all")
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*was skipped, and INCDUMP_REQUIRE_ALL is set: *a_module_that_nobody_has*"])
