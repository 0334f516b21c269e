"""Fixtures for tests with the real CRIU."""

from __future__ import annotations

import pytest

from tests.criu.criu import criu_path
from tests.criu.pycriu import Pycriu, PycriuMissingError, find_pycriu
from tests.criu.services import criu_for_sockets


@pytest.fixture
def real_criu() -> None:
    """Skips the test, by name, where CRIU cannot be had or does not work."""
    criu_path()


@pytest.fixture
def real_criu_for_sockets() -> None:
    """The same for one that can dump TCP sockets; a test with a network of its own could not fetch it."""
    criu_for_sockets()


@pytest.fixture(scope="session")
def pycriu() -> Pycriu:
    """Skips the test, by name, where pycriu cannot be had."""
    try:
        return find_pycriu()
    except PycriuMissingError as error:
        pytest.skip(str(error))
