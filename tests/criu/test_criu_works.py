"""The bench itself: the real CRIU dumps and restores a busy tree, which then finds all of its memory as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.criu.criu import dump, restorable_churn, revive
from tests.criu.namespaces import in_own_namespaces

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("real_criu")]


@in_own_namespaces
def test_a_tree_that_was_dumped_and_restored_is_as_it_was(images_root: Path) -> None:
    images = images_root / "images"
    with restorable_churn(images_root, seed=7, threads=3, processes=2) as target:
        target.step(400)
        dump(target.pid, images)  # at rest: a thread that exits right after its restore makes CRIU 4.1 fail
        revive(target, images)
        target.step(100)
        target.quit()


@in_own_namespaces
def test_a_tree_that_was_dumped_runs_on_where_it_is_asked_to(images_root: Path) -> None:
    with restorable_churn(images_root, seed=8) as target:
        target.run()
        dump(target.pid, images_root / "images", "--leave-running")
        target.stop()
        target.check()
        target.quit()
