"""Strangers at the receiver before, during and after a migration: it goes on as if nobody were there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.criu.arrivals import receiving
from tests.criu.criu import restorable_churn
from tests.criu.namespaces import in_own_namespaces
from tests.criu.test_migrate import TWO_ROUNDS, migrate, runs_there
from tests.strangers import Strangers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.criu.arrivals import There
    from tests.criu.criu import RestorableTarget

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]

LATER = 4.5
"""Seconds: less than the shortest time for which a stranger could hold up anybody. Many of them take a processor's."""


def move(target: RestorableTarget, there: There, strangers: Strangers | None, each: int = 0) -> float:
    """To the other host, strangers coming in every round and at every step; returns how many seconds it takes."""

    def come(*_: object) -> None:
        if strangers is not None:
            strangers.come(each)

    began = time.monotonic()
    result = migrate(target, there.port, policy=TWO_ROUNDS, on_round=come, on_step=come)
    took = time.monotonic() - began
    assert result.outcome == "runs"
    runs_there(target, there)
    assert there.migration()["outcome"] == "runs"
    return took


@in_own_namespaces
def test_they_hold_up_nobody(images_root: Path) -> None:
    with receiving(images_root / "arriving", "--timeout", 60) as there:
        with restorable_churn(images_root, seed=111, mib=4) as target:
            alone = move(target, there, None)
            target.quit()
        for seed, each in ((112, 1), (113, 10)):
            with restorable_churn(images_root, seed=seed, mib=4) as target, Strangers(there.port) as strangers:
                strangers.come(each)
                assert move(target, there, strangers, each) < 2 * alone + LATER
                strangers.come(each)
                target.quit()
        with restorable_churn(images_root, seed=114, mib=4) as target:
            assert move(target, there, None) < 2 * alone + LATER
            target.quit()
