"""Incremental dumps of running Linux process trees, in images that CRIU reads.

::

    import incdump

    first = await incdump.predump(pid, "images/1")
    await incdump.predump(pid, "images/2", parent="../1")
    result = await incdump.dump(pid, "images/3", parent="../2")
    print(result.stats.pages_written, result.stats.frozen_time)

    async with incdump.Session(pid) as session:     # keeps the tracking in this program
        await session.predump("images/1")
        await session.dump("images/2")

    incdump.check("images/3")                       # proves the chain
    incdump.ImagesDir("images/3").read(pid, address, 4096)

Everything that can go wrong is an `IncdumpError`. Names are loaded when they are first used, so that a short command
pays only for what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from incdump.engine.arrival import MigrationReport, ReceiverOptions
    from incdump.engine.check import AgainstReport, check, check_against
    from incdump.engine.checkpoint import checkpoint
    from incdump.engine.dump import dump, predump
    from incdump.engine.migrate import MigrateResult, migrate
    from incdump.engine.page_server import Arriving, PageServer, PageServerOptions, SessionReport
    from incdump.engine.precopy import PrecopyResult, precopy
    from incdump.engine.receive import Receiver
    from incdump.engine.restore import restore
    from incdump.engine.session import PrecopyRounds, Session
    from incdump.engine.untrack import untrack
    from incdump.errors import (
        AlreadyTraced,
        BadImage,
        BrokenChain,
        CannotMigrate,
        CheckError,
        ConnectionLost,
        CriuError,
        DidNotConverge,
        FreezeTimeout,
        HolderError,
        HookTimeout,
        ImagesDirInUse,
        ImagesError,
        ImagesIOError,
        ImagesOutOfReach,
        IncdumpError,
        InjectionFailed,
        InvalidOption,
        LazyMemory,
        MigrationError,
        NoSuchTarget,
        NotInImages,
        OutcomeUnknown,
        ParentMismatch,
        ProcIncomplete,
        ProcMismatch,
        ProtocolError,
        ResourceLimit,
        StopStalled,
        TargetDenied,
        TargetError,
        TargetExited,
        TargetUnsuitable,
        TrackerError,
        TrackerLost,
        TrackerUnavailable,
        UnfinishedImages,
        UnsupportedPageSize,
        XferError,
    )
    from incdump.images.chain import ChainReport, LevelReport
    from incdump.images.images_dir import ImagesDir
    from incdump.images.inventory import Inventory
    from incdump.images.pagemap import Pagemap, PagemapSummary
    from incdump.model.options import DumpOptions, TlsFiles
    from incdump.model.precopy import (
        Decision,
        Estimate,
        Freeze,
        MappingWrites,
        PrecopyPolicy,
        PrecopyRound,
        Rule,
        should_stop,
    )
    from incdump.model.runs import Entries, Runs
    from incdump.model.stats import CheckpointTimes, DumpResult, DumpStats, FreezePart, RestoreResult, freeze_parts

__version__ = "0.1.0.dev0"

__all__ = (  # noqa: RUF022 - grouped by what they are for
    # dumping
    "predump",
    "dump",
    "checkpoint",
    "restore",
    # the pre-copy loop
    "precopy",
    "PrecopyPolicy",
    "PrecopyRound",
    "PrecopyResult",
    "PrecopyRounds",
    "Decision",
    "Estimate",
    "Freeze",
    "MappingWrites",
    "should_stop",
    "Rule",
    "DidNotConverge",
    # to another host
    "migrate",
    "MigrateResult",
    "Receiver",
    "ReceiverOptions",
    "MigrationReport",
    "MigrationError",
    "CannotMigrate",
    "HookTimeout",
    "OutcomeUnknown",
    "untrack",
    "Session",
    "DumpOptions",
    "TlsFiles",
    "DumpResult",
    "DumpStats",
    "CheckpointTimes",
    "FreezePart",
    "freeze_parts",
    "RestoreResult",
    # over the network
    "PageServer",
    "PageServerOptions",
    "SessionReport",
    "Arriving",
    # images
    "ImagesDir",
    "check",
    "check_against",
    "ChainReport",
    "AgainstReport",
    "LevelReport",
    "Inventory",
    "Pagemap",
    "PagemapSummary",
    "Entries",
    "Runs",
    # errors
    "IncdumpError",
    "InvalidOption",
    "UnsupportedPageSize",
    "TargetError",
    "NoSuchTarget",
    "TargetExited",
    "TargetUnsuitable",
    "TargetDenied",
    "ProcIncomplete",
    "ProcMismatch",
    "LazyMemory",
    "AlreadyTraced",
    "FreezeTimeout",
    "StopStalled",
    "InjectionFailed",
    "ImagesError",
    "ImagesIOError",
    "ImagesDirInUse",
    "ImagesOutOfReach",
    "UnfinishedImages",
    "NotInImages",
    "BadImage",
    "BrokenChain",
    "ParentMismatch",
    "TrackerError",
    "TrackerUnavailable",
    "TrackerLost",
    "HolderError",
    "CheckError",
    "CriuError",
    "XferError",
    "ConnectionLost",
    "ProtocolError",
    "ResourceLimit",
)

_HOME = {
    "predump": "incdump.engine.dump",
    "dump": "incdump.engine.dump",
    "checkpoint": "incdump.engine.checkpoint",
    "restore": "incdump.engine.restore",
    "precopy": "incdump.engine.precopy",
    "PrecopyResult": "incdump.engine.precopy",
    "PrecopyPolicy": "incdump.model.precopy",
    "PrecopyRound": "incdump.model.precopy",
    "Decision": "incdump.model.precopy",
    "Estimate": "incdump.model.precopy",
    "Freeze": "incdump.model.precopy",
    "MappingWrites": "incdump.model.precopy",
    "should_stop": "incdump.model.precopy",
    "Rule": "incdump.model.precopy",
    "Runs": "incdump.model.runs",
    "migrate": "incdump.engine.migrate",
    "MigrateResult": "incdump.engine.migrate",
    "Receiver": "incdump.engine.receive",
    "ReceiverOptions": "incdump.engine.arrival",
    "MigrationReport": "incdump.engine.arrival",
    "untrack": "incdump.engine.untrack",
    "Session": "incdump.engine.session",
    "PrecopyRounds": "incdump.engine.session",
    "PageServer": "incdump.engine.page_server",
    "PageServerOptions": "incdump.engine.page_server",
    "SessionReport": "incdump.engine.page_server",
    "Arriving": "incdump.engine.page_server",
    "DumpOptions": "incdump.model.options",
    "TlsFiles": "incdump.model.options",
    "DumpResult": "incdump.model.stats",
    "DumpStats": "incdump.model.stats",
    "CheckpointTimes": "incdump.model.stats",
    "FreezePart": "incdump.model.stats",
    "freeze_parts": "incdump.model.stats",
    "RestoreResult": "incdump.model.stats",
    "ImagesDir": "incdump.images.images_dir",
    "check": "incdump.engine.check",
    "check_against": "incdump.engine.check",
    "ChainReport": "incdump.images.chain",
    "LevelReport": "incdump.images.chain",
    "Inventory": "incdump.images.inventory",
    "Pagemap": "incdump.images.pagemap",
    "PagemapSummary": "incdump.images.pagemap",
    "Entries": "incdump.model.runs",
    "AgainstReport": "incdump.engine.check",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "incdump.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
