"""Hooks that fail, and hooks that hang: the tree is where it was, and stands still no longer than it has to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from incdump import MigrationError
from tests import command
from tests.criu.arrivals import receiving
from tests.criu.criu import criu_path, exists, restorable_churn, until
from tests.criu.namespaces import in_own_namespaces
from tests.criu.test_migrate import migrate, runs_here, runs_there

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600), pytest.mark.usefixtures("real_criu")]


@in_own_namespaces
def test_a_hook_that_fails_keeps_the_tree_here(images_root: Path) -> None:
    with (
        restorable_churn(images_root, seed=64, mib=4) as target,
        receiving(images_root / "arriving", "--hook", "sh -c 'test $INCDUMP_STEP != ready'") as there,
    ):
        with pytest.raises(MigrationError, match="failed at 'ready'"):
            migrate(target, there.port)
        runs_here(target, there)
        with pytest.raises(MigrationError, match="failed at 'stopped'"):
            migrate(target, there.port, hook=("sh", "-c", "test $INCDUMP_STEP != stopped"))
        runs_here(target, there)
        target.quit()
    assert list((images_root / "arriving").iterdir()) == []


@in_own_namespaces
def test_a_hook_that_hangs_at_either_end_keeps_the_tree_here(images_root: Path) -> None:
    pids = images_root / "pids"
    hangs = f"sh -c 'if [ $INCDUMP_STEP = {{}} ]; then sleep 600 & echo $$ $! >> {pids}; wait; fi'"
    with restorable_churn(images_root, seed=98, mib=4) as target:
        for step in ("restore", "ready"):
            options = ("--hook", hangs.format(step), "--hook-timeout", "300ms")
            with receiving(images_root / f"arriving-{step}", *options) as there:
                with pytest.raises(MigrationError, match=f"killed at '{step}', after 0.3 s"):
                    migrate(target, there.port)
                runs_here(target, there)
                assert there.migration()["outcome"] == "void"
        with receiving(images_root / "arriving") as there:
            done = command.incdump(
                *("migrate", "-t", target.pid, f"127.0.0.1:{there.port}", "--downtime", "5s"),
                *("--hook", hangs.format("stopped"), "--hook-timeout", "300ms", "--criu", criu_path()),
            )
            assert done.code == 10, done
            assert "killed at 'stopped', after 0.3 s" in done.err
            runs_here(target, there)
            result = migrate(
                target, there.port, hook=("sh", "-c", "test $INCDUMP_STEP = stopped || sleep 600"), hook_timeout=0.3
            )
            assert result.outcome == "runs"
            assert any("killed at 'moved'" in warning for warning in result.warnings)
            runs_there(target, there)
            target.quit()
    assert list((images_root / "arriving-ready").iterdir()) == []
    until(lambda: not any(exists(int(pid)) for pid in pids.read_text().split()), 5)
