"""Fixtures for tests with the real CRIU."""

from __future__ import annotations

import pytest

from tests.criu.criu import criu_path


@pytest.fixture
def real_criu() -> None:
    """Skips the test, by name, where CRIU cannot be had or does not work."""
    criu_path()
