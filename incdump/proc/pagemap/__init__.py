"""Pagemap readers: which pages of a process are populated, and what they are.

Three ways to the same answer, behind one interface, `PagemapReader`:

``plain``
    A pread of /proc/PID/pagemap per VMA, big VMAs in pieces of 32 MiB (64 KiB of pagemap).

``cache``
    The pagemap cache: a pread per *window* of address space that spans many small VMAs. What is mapped in between is
    read along and thrown away, because that costs less than another system call::

        address space   |--A--|   |--B--| |-----C-----|                          |--D--|
        plain           [read ]   [read ] [   read    ]                          [read ]
        cache           [            one window       ]                          [read ]

    CRIU's windows are 2 MiB on a fixed plan. Here a window goes on as long as the next VMA begins within 1 MiB of the
    end of the last one, up to 32 MiB: a system call from Python costs as much as reading and dropping some 500
    entries of unmapped memory.

``scan``
    One PAGEMAP_SCAN over the whole address space (`incdump._uapi.pagemap_scan`), gone on with where it stopped when
    the buffer was full. Alone in telling zero pages without privilege, and in skipping what was never populated
    without reading an entry of it: a sparse mapping of terabytes costs the other two gigabytes of pagemap.

What `plain` and `cache` read are pagemap entries, which `incdump.proc.pagemap.pme` translates to the categories of
PAGEMAP_SCAN. They tell neither WPALLOWED nor HUGE; PFNZERO, and whether a page in "swap" is but a uffd-wp marker, they
tell only to who may see page frame numbers (CAP_SYS_ADMIN). PAGEMAP_SCAN takes markers for swapped pages, always.

Every reader yields `Window` s, ascending, whose regions lie in the given VMAs only. [vsyscall] is above the end of the
address space as far as pagemap goes, and is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from incdump import kerndat
from incdump.proc.pagemap.entries import CacheReader, PlainReader, pmes_at
from incdump.proc.pagemap.reader import PagemapReader
from incdump.proc.pagemap.scan import ScanReader

if TYPE_CHECKING:
    from incdump.model.options import PagemapName

__all__ = ["CacheReader", "PagemapReader", "PlainReader", "ScanReader", "make_reader", "pmes_at"]


def make_reader(name: PagemapName = "auto") -> PagemapReader:
    """The reader of this name; ``"auto"``: ``scan`` if the kernel has it, else ``cache``."""
    if name == "auto":
        name = "scan" if kerndat.pagemap_scan().works else "cache"
    if name == "scan":
        return ScanReader()
    return CacheReader() if name == "cache" else PlainReader()
