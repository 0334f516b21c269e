"""Fixtures for tests with the real CRIU."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.criu.criu import criu_path
from tests.criu.pycriu import Pycriu, PycriuMissingError, find_pycriu
from tests.criu.services import criu_for_sockets

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A place of the test's own for temporary files, gone with it: logs of a CRIU that fails are kept there."""
    tmp_path_factory.getbasetemp()  # pytest's own is not to be in there
    with tempfile.TemporaryDirectory(prefix="incdump-tmp-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o1777)  # as /tmp is: programs of other users are started, too
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield


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
