"""The tests that need another kernel, in the emulated machine that has it (tests/guest/run)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
LOST = 125
SECONDS = 1200
TRIES = 3


@pytest.mark.kernel
@pytest.mark.alone
@pytest.mark.timeout(TRIES * SECONDS + 60)
@pytest.mark.parametrize("part", ["uffd-wp", "soft-dirty", "criu", "postgresql"])
def test_on_a_kernel_that_has_soft_dirty(part: str) -> None:
    if os.geteuid():
        pytest.skip("needs root, for a machine of its own")
    if "INCDUMP_TEST_SLOWER" in os.environ:
        pytest.skip("soft-dirty: this is that machine")
    command = [HERE / "run", "--timeout", str(SECONDS), "tests/guest/kernel_tests", part]
    for _ in range(TRIES):  # a machine that is lost says nothing about the tests
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != LOST:
            break
    print(done.stdout)
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-80:])
