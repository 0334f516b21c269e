"""What a caller may ask for: one frozen value, handed down whole."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from incdump.model.fields import check_address, check_choice, check_count, check_flag, check_seconds, check_type

TrackerName: TypeAlias = Literal["auto", "uffd-wp", "soft-dirty", "content"]
PagemapName: TypeAlias = Literal["auto", "plain", "cache", "scan"]
Afterwards: TypeAlias = Literal["running", "stopped", "killed"]
ThpName: TypeAlias = Literal["split", "keep"]
WayName: TypeAlias = Literal["auto", "leash", "preload", "lazy-pages"]
ProtocolName: TypeAlias = Literal["auto", "criu"]
CompressionName: TypeAlias = Literal["auto", "off", "lz4"]

AFTERWARDS: tuple[Afterwards, ...] = ("running", "stopped", "killed")
THP: tuple[ThpName, ...] = ("split", "keep")
TRACKERS: tuple[TrackerName, ...] = ("auto", "uffd-wp", "soft-dirty", "content")
WAYS: tuple[WayName, ...] = ("auto", "leash", "preload", "lazy-pages")
PROTOCOLS: tuple[ProtocolName, ...] = ("auto", "criu")
COMPRESSIONS: tuple[CompressionName, ...] = ("auto", "off", "lz4")
PAGEMAPS: tuple[PagemapName, ...] = ("auto", "plain", "cache", "scan")


TRACK_FOR = 3600.0
"""Seconds for which a target stays tracked after a pre-dump, unless it is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """What TLS with a page server needs, all in PEM, as CRIU's options of the same names.

    :ivar cacert: the certificate of the authority that the other end's is signed by.
    :ivar cert: the own certificate.
    :ivar key: its private key.
    :ivar cacrl: certificates that the authority has taken back; None for none.
    :ivar verify_name: whether the server's certificate is to have the name that the client connects to.
    """

    cacert: str = "/etc/pki/CA/cacert.pem"
    cert: str = "/etc/pki/criu/cert.pem"
    key: str = "/etc/pki/criu/private/key.pem"
    cacrl: str | None = None
    verify_name: bool = True

    def __post_init__(self) -> None:
        """:raises incdump.errors.InvalidOption: a value is of another type."""
        for name in ("cacert", "cert", "key", "cacrl"):
            check_type(name, getattr(self, name), (str, os.PathLike), may_be_none=name == "cacrl")
        check_flag("verify_name", self.verify_name)


_MOST_WRITERS = 64


def default_writers() -> int:
    """As many page-xfer writers as there are processors to run them, at most 4."""
    return max(1, min(4, len(os.sched_getaffinity(0))))


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpOptions:
    """How to dump.

    :ivar tracker: which tracker, or ``"auto"``: the first that proves itself.
    :ivar pagemap: which pagemap reader, or ``"auto"``: the fastest that the kernel has.
    :ivar writers: how many page-xfer writers work side by side.
    :ivar require_incremental: fail with `incdump.TrackerLost` rather than dump everything against a parent.
    :ivar afterwards: what becomes of the tree after a dump; a pre-dump always leaves it running.
    :ivar track_for: seconds for which the writes of the target stay tracked afterwards, for a dump on top of this one;
        each dump says it anew. None: an hour after a pre-dump, not at all after a dump. A `incdump.Session` tracks as
        long as it lasts.
    :ivar thp: what becomes of transparent huge pages that are tracked: ``"split"``: the first write to one splits it,
        and what was written is told page by page; ``"keep"``: they stay, and each is dumped whole every time.
    :ivar wait_for_lazy: seconds to wait for pages that another program has yet to supply (a lazy restore); 0: a dump
        fails at once where there are some.
    :ivar freeze_timeout: seconds to wait for every thread to stop, as CRIU's ``--timeout``.
    :ivar stall_timeout: seconds for which the tree stays frozen while nothing gets done (no page copied, no image
        written): it is let go then, and the dump fails with `incdump.StopStalled`.
    :ivar page_server: address and port of a page server, incdump's or CRIU's, that is to have the pages; None: they go
        to the images dir.
    :ivar page_server_timeout: seconds for which it may take nothing, or not answer.
    :ivar page_server_protocol: ``"auto"``: incdump's own with a server that has it, which then gets all images; or
        ``"criu"``.
    :ivar migration: the token that a receiver has given to this migration, see `incdump.migrate`; None: it is none.
    :ivar tls: for an encrypted connection; None: whoever is in between can read and change what is sent.
    :ivar compression: of pages on their way to an incdump page server: ``"auto"``: where it turns out to be quicker.
    """

    tracker: TrackerName = "auto"
    pagemap: PagemapName = "auto"
    writers: int = field(default_factory=default_writers)
    require_incremental: bool = False
    afterwards: Afterwards = "running"
    track_for: float | None = None
    thp: ThpName = "split"
    wait_for_lazy: float = 0
    freeze_timeout: float = 10.0
    stall_timeout: float = 30.0
    page_server: tuple[str, int] | None = None
    page_server_timeout: float = 30.0
    page_server_protocol: ProtocolName = "auto"
    migration: str | None = None
    tls: TlsFiles | None = None
    compression: CompressionName = "auto"

    def __post_init__(self) -> None:
        """:raises incdump.errors.InvalidOption: a value that its field cannot have."""
        check_choice("tracker", self.tracker, TRACKERS)
        check_choice("pagemap", self.pagemap, PAGEMAPS)
        check_choice("thp", self.thp, THP)
        check_choice("afterwards", self.afterwards, AFTERWARDS)
        check_choice("page_server_protocol", self.page_server_protocol, PROTOCOLS)
        check_choice("compression", self.compression, COMPRESSIONS)
        check_count("writers", self.writers, 1, _MOST_WRITERS)
        check_flag("require_incremental", self.require_incremental)
        check_seconds("track_for", self.track_for, may_be_none=True, may_be_zero=True)
        check_seconds("wait_for_lazy", self.wait_for_lazy, may_be_zero=True)
        check_seconds("freeze_timeout", self.freeze_timeout)
        check_seconds("stall_timeout", self.stall_timeout)
        check_seconds("page_server_timeout", self.page_server_timeout)
        check_address("page_server", self.page_server)
        check_type("migration", self.migration, str, may_be_none=True)
        check_type("tls", self.tls, TlsFiles, may_be_none=True)
