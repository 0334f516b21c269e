"""Whoever needs CRIU in the end looks for it in the beginning: nothing is begun where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.command import incdump as command
from tests.kernel.support import assert_untouched

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.targets.build import Target

pytestmark = [pytest.mark.kernel]


@pytest.mark.parametrize(
    "words",
    [
        ("checkpoint", "-t", "PID"),
        ("precopy", "-t", "PID", "--final", "checkpoint"),
        ("migrate", "-t", "PID", "127.0.0.1:1"),
        ("receive", "--restore"),
        ("restore",),
    ],
    ids=lambda words: words[0],
)
def test_without_criu_nothing_is_begun(
    rewriter: Callable[..., Target], images_root: Path, words: tuple[str, ...]
) -> None:
    target = rewriter(mib=1)
    images = images_root / "images"
    place = () if words[0] == "migrate" else ("-D", images)
    arguments = [target.pid if word == "PID" else word for word in words]
    done = command(*arguments, *place, "--criu", images_root / "none")
    assert done.code == 7, done
    assert done.error.startswith(f"there is no program {images_root}/none"), done
    assert not images.exists()
    assert_untouched(target)


@pytest.mark.parametrize("words", [("checkpoint",), ("precopy", "--final", "checkpoint")], ids=lambda words: words[0])
def test_a_script_that_would_run_too_early_is_refused_first(
    rewriter: Callable[..., Target], images_root: Path, words: tuple[str, ...]
) -> None:
    target = rewriter(mib=1)
    config, criu = images_root / "config", images_root / "criu"
    config.write_text("action-script /x\n")
    criu.write_text("#!/bin/sh\necho 'Version: 4.1'\n")
    criu.chmod(0o700)
    options = ("-t", target.pid, "-D", images_root / "images", "--criu", criu, "--", "--config", config)
    done = command(*words, *options)
    assert done.code == 7, done
    assert f"configuration file {config} has an action script" in done.error
    assert not (images_root / "images").exists()
    assert_untouched(target)
