"""Values that an option cannot have are refused when the options are made, by the option's name."""

from __future__ import annotations

import copy
import inspect
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
    (PageServerOptions, "address", ""),
    (PageServerOptions, "address", None),
    (ReceiverOptions, "address", ""),
    (PageServerOptions, "rounds", 0),
    (PageServerOptions, "auto_dedup", "yes"),
    (PageServerOptions, "timeout", 0),
    (ReceiverOptions, "restore", "no"),
    (ReceiverOptions, "hook", "true"),
    (ReceiverOptions, "criu_options", ["--shell-job"]),
    (ReceiverOptions, "hook_timeout", None),
]


WRONG_ARGUMENTS: list[tuple[str, str, Any]] = [
    *(
        (name, "pid", value)
        for name in ("predump", "dump", "checkpoint", "precopy", "migrate")
        for value in ("7", 0, True)
    ),
    *(
        (name, "images_dir", value)
        for name in ("predump", "checkpoint", "precopy", "restore")
        for value in (None, b"x", "")
    ),
    *(
        (name, "options", value)
        for name in ("predump", "dump", "checkpoint", "precopy", "migrate")
        for value in ({}, "x")
    ),
    *((name, "criu_options", "--shell-job") for name in ("checkpoint", "precopy", "migrate", "restore")),
    *((name, "criu", 4.1) for name in ("checkpoint", "precopy", "migrate", "restore")),
    *((name, "way", "leashed") for name in ("checkpoint", "precopy", "migrate")),
    *((name, "progress", "yes") for name in ("predump", "dump", "checkpoint", "precopy", "migrate")),
    *((name, "policy", DumpOptions()) for name in ("precopy", "migrate")),
    *((name, "rule", "never") for name in ("precopy", "migrate")),
    *((name, "freezes", [1.0]) for name in ("precopy", "migrate")),
    ("dump", "parent", 1),
    ("dump", "images_dir", "a\0b"),
    ("checkpoint", "criu_options", [1]),
    ("precopy", "on_round", 1),
    ("migrate", "on_step", 1),
    ("migrate", "address", 7),
    ("migrate", "address", ""),
    ("migrate", "port", "7777"),
    ("migrate", "port", 0),
    ("migrate", "hook", "/bin/true"),
    ("migrate", "hook", (1,)),
    ("migrate", "hook_timeout", 0),
    ("migrate", "if_unknown", "kill"),
    ("migrate", "asking", -1),
    ("restore", "detached", "yes"),
    ("restore", "pidfile", 1),
    ("check", "images_dir", 1),
    ("check_against", "pid", None),
    ("check_against", "freeze_timeout", 0),
    ("check_against", "stall_timeout", 0),
    ("untrack", "pid", "7"),
    ("Session", "pid", "7"),
    ("Session", "options", {"afterwards": "run"}),
    ("Receiver", "images_dir", None),
    ("Receiver", "options", DumpOptions()),
    ("PageServer", "images_dir", 1),
    ("PageServer", "parent", 1),
    ("PageServer", "options", "once"),
]
RIGHT: dict[str, dict[str, Any]] = {
    "pid": {"pid": 1},
    "images_dir": {"images_dir": "/nowhere/at/all"},
    "address": {"address": "127.0.0.1"},
    "port": {"port": 1},
}


@pytest.mark.asyncio
@pytest.mark.parametrize(("name", "field", "value"), WRONG_ARGUMENTS)
async def test_a_function_refuses_a_wrong_argument_by_its_name(name: str, field: str, value: object) -> None:
    function = getattr(incdump, name)
    arguments: dict[str, Any] = {}
    for needed, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and needed in RIGHT:
            arguments |= RIGHT[needed]
    with pytest.raises(InvalidOption, match=rf"^{field}: .* cannot be used; (give|choose)") as raised:
        await _done(function(**{**arguments, field: value}))
    assert raised.value.field == field


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("predump", "images_dir", None),
        ("predump", "parent", 7),
        ("predump", "progress", 7),
        ("dump", "options", {}),
        ("dump", "images_dir", ""),
        ("checkpoint", "criu_options", "--shell-job"),
        ("checkpoint", "way", "leashed"),
        ("checkpoint", "criu", 4),
        ("checkpoint", "parent", b"x"),
        ("precopy", "policy", {}),
        ("precopy", "way", None),
        ("precopy", "criu_options", "-j"),
        ("precopy", "rule", None),
    ],
)
async def test_a_session_refuses_a_wrong_argument_by_its_name(method: str, field: str, value: object) -> None:
    async with incdump.Session(1) as session:
        with pytest.raises(InvalidOption, match=rf"^{field}: .* cannot be used; (give|choose)"):
            await _done(getattr(session, method)(**{"images_dir": "/nowhere/at/all", field: value}))
        assert session.rounds == []


async def _done(value: Any) -> None:
    """Await what is to be awaited."""
    if inspect.isawaitable(value):
        await value


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
