"""What ``incdump predump`` and ``incdump dump`` have in common: their options, their way through the engine, their
report."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import click

from incdump.cli.completion import directories, files, parents, processes
from incdump.cli.durations import DURATION_OR_NONE, time_option
from incdump.cli.invocation import Invocation, json_option, print_json, verbose_option
from incdump.cli.log import Log
from incdump.cli.signals import run
from incdump.cli.target import TargetPid
from incdump.cli.tls import take_tls, tls_options
from incdump.model.options import (
    COMPRESSIONS,
    PAGEMAPS,
    PROTOCOLS,
    THP,
    TRACK_FOR,
    TRACKERS,
    DumpOptions,
    default_writers,
)
from incdump.proc.tree import check_target

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from incdump.cli.text import Fact
    from incdump.model.options import Afterwards, CompressionName, ProtocolName, ThpName
    from incdump.model.stats import DumpResult, DumpStats

_DAY = 86400
Kind = Literal["pre-dump", "dump", "checkpoint"]

stall_timeout_option = time_option(
    "--stall-timeout",
    "30s",
    "How long the target may stand still while nothing gets done; it is let run on then, and the dump fails.",
)

track_for_option = click.option(
    "--track-for",
    type=DURATION_OR_NONE,
    metavar="TIME",
    show_default="1h after a pre-dump, 0s after a dump",
    help="How long the target's writes stay tracked, for a dump on top of this one. Each dump says it anew.",
)

thp_option = click.option(
    "--thp",
    type=click.Choice(THP),
    default="split",
    show_default=True,
    help="Transparent huge pages that are tracked. split: the first write to one splits it, and is told page by page. "
    "keep: they stay, and each is dumped whole every time.",
)
wait_for_lazy_option = time_option(
    "--wait-for-lazy",
    "0s",
    "How long to wait for pages that another program has yet to supply (a lazy restore), before anything is done.",
    DURATION_OR_NONE,
)

_TARGET_OPTIONS = (
    click.option(
        "-t",
        "--tree",
        "pid",
        type=TargetPid(),
        required=True,
        metavar="PID",
        help="The target: the root of a process tree.",
        shell_complete=processes,
    ),
    click.option(
        "-D",
        "--images-dir",
        default=".",
        metavar="DIR",
        show_default="the working directory",
        help="Where the images go; made if it does not exist, refused if it holds images.",
        shell_complete=directories,
    ),
    click.option(
        "--tracker",
        type=click.Choice(TRACKERS),
        default="auto",
        show_default=True,
        help="How to find out what was written; auto is the first that proves itself.",
    ),
    click.option(
        "--pagemap", type=click.Choice(PAGEMAPS), default="auto", show_default=True, help="How to read the pagemap."
    ),
    click.option(
        "--writers",
        type=click.IntRange(1, 64),
        default=default_writers,
        metavar="N",
        show_default="a processor each, at most 4",
        help="Writers side by side.",
    ),
)
_DUMP_OPTIONS = (
    *_TARGET_OPTIONS[:2],
    click.option(
        "--prev-images-dir",
        "parent",
        metavar="DIR",
        help="The previous images dir, relative to DIR of -D: dump only what was written since.",
        shell_complete=parents,
    ),
    *_TARGET_OPTIONS[2:],
    click.option(
        "--require-incremental", is_flag=True, help="Fail rather than dump everything in spite of --prev-images-dir."
    ),
    time_option("--timeout", "10s", "How long to wait for every thread to stop."),
    stall_timeout_option,
    wait_for_lazy_option,
    track_for_option,
    thp_option,
    click.option("--track-mem", is_flag=True, hidden=True),  # CRIU's: a dump on top of this one is to come
    click.option(
        "-o",
        "--log-file",
        metavar="FILE",
        help="Add log lines to FILE, which is relative to the images dir (as CRIU's is to its work dir).",
        shell_complete=files,
    ),
    json_option,
    verbose_option,
)


_PAGE_SERVER_OPTIONS = (
    click.option(
        "--page-server",
        is_flag=True,
        help="Send the images to a page server; DIR keeps what is small, CRIU's gets pages only.",
    ),
    click.option("--address", default="127.0.0.1", metavar="ADDRESS", show_default=True, help="Of the page server."),
    click.option("--port", type=click.IntRange(1, 65535), metavar="PORT", help="Of the page server."),
    click.option(
        "--protocol",
        type=click.Choice(PROTOCOLS),
        default="auto",
        show_default=True,
        help="auto: incdump's own, which sends all images, with a server that has it; else CRIU's, which sends pages.",
    ),
    click.option(
        "--compression",
        type=click.Choice(COMPRESSIONS),
        default="auto",
        show_default=True,
        help="Of pages on their way, in incdump's protocol. auto: where it turns out to be quicker.",
    ),
    tls_options,
)


def all_of(options: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that puts several options on a click command, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


target_options = all_of(_TARGET_OPTIONS)
"""What to dump, where to, and how, for a click command."""
tree_options = all_of((_TARGET_OPTIONS[0], *_TARGET_OPTIONS[2:]))
"""What to dump, and how, for a click command."""
dump_options = all_of(_DUMP_OPTIONS)
"""The options of all single dumps, for a click command."""
page_server_options = all_of(_PAGE_SERVER_OPTIONS)
"""The options of a command whose pages may go to a page server."""


def run_dump(
    kind: Kind,
    invocation: Invocation,
    *,
    pid: int,
    images_dir: str,
    parent: str | None,
    tracker: Any,
    pagemap: Any,
    writers: int,
    require_incremental: bool,
    track_for: float | None,
    track_mem: bool,
    thp: ThpName,
    timeout: float,
    stall_timeout: float,
    wait_for_lazy: float,
    log_file: str | None,
    afterwards: Afterwards = "running",
    page_server: bool = False,
    address: str = "",
    port: int | None = None,
    protocol: ProtocolName = "auto",
    compression: CompressionName = "auto",
    **given: Any,
) -> None:
    """Dump, and report.

    :param given: the values of `incdump.cli.tls.tls_options`; and for a checkpoint what
        `incdump.engine.checkpoint.checkpoint` is to be told besides.
    """
    tls = take_tls(given)
    with_criu = given
    if require_incremental and parent is None:
        raise click.UsageError("--require-incremental needs --prev-images-dir: without it everything is dumped")
    if page_server and port is None:
        raise click.UsageError("--page-server needs --port, as the page server prints it")
    if port is not None and not page_server:
        raise click.UsageError("--port is of a page server: it needs --page-server")
    if tls is not None and not page_server:
        raise click.UsageError("--tls is for a page server: it needs --page-server")
    for name, text in (("-D", images_dir), ("--prev-images-dir", parent), ("-o", log_file)):
        if text == "" or (text is not None and "\0" in text):
            raise click.BadParameter("an empty name", param_hint=name)
    options = DumpOptions(
        tracker=tracker,
        pagemap=pagemap,
        writers=writers,
        require_incremental=require_incremental,
        afterwards=afterwards,
        track_for=TRACK_FOR if track_mem and track_for is None else track_for,
        thp=thp,
        freeze_timeout=timeout,
        stall_timeout=stall_timeout,
        wait_for_lazy=wait_for_lazy,
        page_server=(address, port) if port is not None else None,
        page_server_protocol=protocol,
        compression=compression,
        tls=tls,
    )
    with Log(invocation.verbosity, log_file, images_dir) as log:
        log.line(f"{kind} of process {pid} into {images_dir}" + (f", on top of {parent}" if parent else ""))
        check_target(pid)  # before the engine is loaded: who named a wrong process hears of it at once
        engine = _engine(kind, with_criu)
        result = run(lambda: _dump(engine, pid, images_dir, parent, options, log, show=invocation.shows_progress))
        for warning in result.warnings:
            log.warning(warning)
        log.line(_summary(result))
    if invocation.json:
        print_json(result.as_dict())
    else:
        from incdump.cli.text import show_facts

        show_facts(_title(kind, result), facts(kind, result, afterwards))


def _engine(kind: Kind, with_criu: dict[str, Any]) -> Callable[..., Awaitable[DumpResult]]:
    """The engine's function for a kind of dump."""
    if kind == "checkpoint":
        from incdump.engine.checkpoint import checkpoint

        return partial(checkpoint, **with_criu)
    from incdump.engine.dump import dump, predump

    return predump if kind == "pre-dump" else dump


async def _dump(
    engine: Callable[..., Awaitable[DumpResult]],
    pid: int,
    images_dir: str,
    parent: str | None,
    options: DumpOptions,
    log: Log,
    *,
    show: bool,
) -> DumpResult:
    """Call the engine, with somebody to report progress to.

    :param show: progress may be shown, if there is a terminal to show it on.
    """
    if not show or sys.stderr is None or not sys.stderr.isatty():
        return await engine(pid, images_dir, parent=parent, options=options, progress=log.progress)
    from incdump.cli.progress import Progress

    progress = Progress()

    def note(step: str, stats: DumpStats) -> None:
        log.progress(step, stats)
        progress.update(step, stats)

    with progress.shown():
        return await engine(pid, images_dir, parent=parent, options=options, progress=note)


def _summary(result: DumpResult) -> str:
    """The log's last line."""
    s = result.stats
    return (
        f"done: tracker {result.tracker} ({result.tracker_reason}), pagemap {result.pagemap}, "
        f"pages_scanned {s.pages_scanned} pages_skipped_parent {s.pages_skipped_parent} "
        f"pages_written {s.pages_written}, stopped {s.stopped_time} us, in all {s.total_time} us"
    )


def _title(kind: Kind, result: DumpResult) -> str:
    return f"{kind} of process {result.pid} into {result.images_dir}"


def facts(kind: Kind, result: DumpResult, afterwards: Afterwards) -> list[Fact]:
    """What happened, for people."""
    from incdump.cli.text import Fact, bytes_text, time_text

    s = result.stats
    scanned, written = s.pages_scanned + s.shpages_scanned, s.pages_written + s.shpages_written
    skipped = s.pages_skipped_parent + s.shpages_skipped_parent
    shared = f", {s.shpages_scanned:,} of them shared" if s.shpages_scanned else ""
    lines = [
        Fact("processes", f"{len(result.pids):,}", _exited(result)),
        Fact("pages scanned", f"{scanned:,}", f"populated pages that were looked at{shared}"),
        Fact("pages written", f"{written:,}", bytes_text(s.bytes_written)),
        Fact("pages skipped", f"{skipped:,}", _parent_note(result)),
    ]
    if s.pages_compared:
        lines.append(Fact("pages compared", f"{s.pages_compared:,}", "read and compared by hash"))
    if s.pages_untracked:
        lines.append(Fact("pages untracked", f"{s.pages_untracked:,}", "written whole: no tracker vouched for them"))
    if s.pages_vanished:
        lines.append(Fact("pages vanished", f"{s.pages_vanished:,}", "unmapped before they could be read"))
    if (times := result.checkpoint) is not None:
        parts = f"memory {time_text(times.memory)}, then waiting for CRIU {time_text(times.waited)}"
        lines.append(Fact("all else", result.criu or "", f"{parts}, putting together {time_text(times.in_place)}"))
        lines.append(Fact("way", times.way, times.why))
        lines.append(Fact("mappings", "", times.mappings))
    return [
        *lines,
        Fact("time stopped", time_text(s.stopped_time), _stopped_note(kind, result, afterwards)),
        Fact("time in all", time_text(s.total_time)),
        Fact("tracker", result.tracker, result.tracker_reason),
        Fact("pagemap reader", result.pagemap),
        *_tracked(result),
    ]


def _tracked(result: DumpResult) -> list[Fact]:
    """Until when the target is tracked, which is not without cost to it."""
    from incdump.cli.text import Fact

    if not result.tracked_for:
        return []
    until = time.strftime("%H:%M:%S" if result.tracked_for < _DAY else "%Y-%m-%d %H:%M", _after(result.tracked_for))
    return [Fact("tracked until", until, "for the next dump; see --track-for, `incdump untrack`")]


def _after(seconds: float) -> time.struct_time:
    return time.localtime(time.time() + seconds)


def _exited(result: DumpResult) -> str:
    if not result.exited:
        return ""
    return f"exited meanwhile: {', '.join(map(str, result.exited))}"


def _parent_note(result: DumpResult) -> str:
    if result.parent is None:
        return "there is no parent dump"
    if not result.incremental:
        return f"dumped whole in spite of its parent {result.parent}"
    return f"not written since the parent dump, {result.parent}"


def _stopped_note(kind: Kind, result: DumpResult, afterwards: Afterwards) -> str:
    from incdump.cli.text import time_text

    s = result.stats
    if s.frozen_time or s.freezing_time:
        after = {"running": "", "stopped": "; left stopped, until SIGCONT", "killed": "; then killed"}[afterwards]
        return f"freezing {time_text(s.freezing_time)}, frozen {time_text(s.frozen_time)}{after}"
    if s.stopped_time:
        return "one thread at a time, to start the tracking"
    return "never" if kind == "pre-dump" else ""
