"""Values that an option cannot have are refused when the options are made, by the option's name."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest

import incdump
from incdump import DumpOptions, InvalidOption, PageServerOptions, PrecopyPolicy, ReceiverOptions, TlsFiles
from incdump.model.precopy import Decision, Estimate
from incdump.model.stats import DumpResult

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = Estimate(dirty_rate=None, bandwidth=None, dirty_bytes=None, downtime=None)

WRONG: list[tuple[Callable[..., object], str, Any]] = [
    (DumpOptions, "afterwards", "run"),
    (DumpOptions, "afterwards", "leave-running"),
    (DumpOptions, "afterwards", None),
    (DumpOptions, "tracker", "uffd"),
    (DumpOptions, "pagemap", "fast"),
    (DumpOptions, "writers", 0),
    (DumpOptions, "writers", True),
    (DumpOptions, "writers", 2.0),
    (DumpOptions, "require_incremental", "no"),
    (DumpOptions, "freeze_timeout", 0),
    (DumpOptions, "freeze_timeout", float("nan")),
    (DumpOptions, "freeze_timeout", "10"),
    (DumpOptions, "page_server", "localhost:1"),
    (DumpOptions, "page_server", ("localhost", "1")),
    (DumpOptions, "page_server_protocol", "own"),
    (DumpOptions, "compression", "zstd"),
    (DumpOptions, "migration", 7),
    (DumpOptions, "tls", True),
    (TlsFiles, "cert", None),
    (TlsFiles, "verify_name", 1),
    (PrecopyPolicy, "downtime", -1),
    (PrecopyPolicy, "timeout", float("inf")),
    (PrecopyPolicy, "on_timeout", "kill"),
    (PrecopyPolicy, "max_rounds", 0),
    (PrecopyPolicy, "final", "dumps"),
    (PrecopyPolicy, "restore_rate", 0),
    (PageServerOptions, "port", 65536),
    (PageServerOptions, "rounds", 0),
    (PageServerOptions, "auto_dedup", "yes"),
    (PageServerOptions, "timeout", 0),
    (ReceiverOptions, "restore", "no"),
    (ReceiverOptions, "hook", "true"),
    (ReceiverOptions, "criu_options", ["--shell-job"]),
    (ReceiverOptions, "hook_timeout", None),
]


@pytest.mark.parametrize(("options", "field", "value"), WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    options: Callable[..., object], field: str, value: object
) -> None:
    with pytest.raises(InvalidOption, match=rf"^{field}(\[1\])?: .* cannot be used; ") as raised:
        options(**{field: value})
    assert raised.value.exit_code == 2
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, incdump.IncdumpError)


def test_the_choices_are_named() -> None:
    with pytest.raises(InvalidOption, match="choose one of 'running', 'stopped', 'killed'"):
        DumpOptions(afterwards="run")  # type: ignore[arg-type]


def test_a_rule_cannot_decide_what_nobody_knows() -> None:
    with pytest.raises(InvalidOption, match=r"^verdict: "):
        Decision(verdict="done", why="", estimate=NOW)  # type: ignore[arg-type]


def test_the_error_can_be_copied() -> None:
    error = InvalidOption("port", 0, "give another")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(again), again.field, again.value) == (str(error), "port", 0)


def test_what_is_right_is_taken() -> None:
    DumpOptions(writers=64, page_server=("::1", 65535), freeze_timeout=1, migration="x", tls=TlsFiles(cacrl="a"))
    PrecopyPolicy(downtime=1e-6, timeout=1, max_rounds=1, final="none")
    PageServerOptions(timeout=None, max_bytes=0)
    ReceiverOptions(hook=("sh", "-c", "true"), criu="/usr/sbin/criu")
    assert DumpResult("x", 1).stats.pages_written == 0
