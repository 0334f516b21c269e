"""Probes of soft-dirty bits."""

from __future__ import annotations

import os
from functools import cache

from incdump._uapi import mapping
from incdump.kerndat.pagemap import zero_page_pfn
from incdump.kerndat.trying import FailedError, Feature, opened, pages_for_a_while, pme, try_feature
from incdump.model.runs import PAGE_SHIFT

_SOFT_DIRTY = 1 << 55


@cache
def soft_dirty() -> Feature:
    """Soft-dirty bits tell what was written."""
    return try_feature(
        "soft_dirty",
        "dirty tracking by soft-dirty bits (CONFIG_MEM_SOFT_DIRTY, not on every architecture)",
        _attempt_soft_dirty,
        then="tracker `soft-dirty` works, and CRIU can go on from an incdump pre-dump",
        otherwise="no tracker `soft-dirty`; CRIU cannot track memory on this kernel either",
    )


def _attempt_soft_dirty() -> str:
    """Touch a page, clear, touch again. clear_refs is written only when the bit is there at all."""
    with pages_for_a_while(1) as address:
        mapping.write_byte(address, 1)
        if not pme(address) & _SOFT_DIRTY:
            raise FailedError("bit 55 of a fresh page's pagemap entry is not set: the kernel is built without it")
        with opened("/proc/self/clear_refs", os.O_WRONLY) as fd:
            os.write(fd, b"4")
        if pme(address) & _SOFT_DIRTY:
            raise FailedError("bit 55 of the pagemap entry is still set after clear_refs")
        mapping.write_byte(address, 2)
        if not pme(address) & _SOFT_DIRTY:
            raise FailedError("bit 55 of the pagemap entry is not set after a write")
    return "bit 55 of the pagemap entry was cleared by clear_refs and set by a write"


@cache
def soft_dirty_moves() -> Feature:
    """Soft-dirty bits tell that a mapping was moved, too."""
    return try_feature(
        "soft_dirty_moves",
        "soft-dirty bits of mappings that are moved by whole page tables (mremap)",
        _attempt_soft_dirty_moves,
        then="tracker `soft-dirty` may be chosen by `auto`",
        otherwise="such a move goes unseen by CRIU; incdump finds it out by page frame numbers, and where these are "
        "hidden uses tracker `soft-dirty` only when asked for",
    )


def sees_moves() -> bool:
    """Whether mappings that are moved by whole page tables are found out, by the bits or by page frame numbers."""
    return soft_dirty_moves().works or zero_page_pfn() is not None


def _attempt_soft_dirty_moves() -> str:
    """Move 2 MiB at once: the kernel then moves the page table as it is, and may leave the bits in it clear.

    What lies at the new address is other memory than before, and nothing would tell.
    """
    if not soft_dirty().works:
        raise FailedError(soft_dirty().why)
    length = 512 << PAGE_SHIFT
    with pages_for_a_while(1024) as source, pages_for_a_while(1024) as target:
        old, new = (address + length - 1 & -length for address in (source, target))
        mapping.write_byte(old, 1)
        with opened("/proc/self/clear_refs", os.O_WRONLY) as fd:
            os.write(fd, b"4")
        mapping.move(old, length, new, leave_empty=True)
        if not pme(new) & _SOFT_DIRTY:
            raise FailedError("a mapping that was moved by 2 MiB at once does not count as written")
    return "a mapping that was moved by 2 MiB at once counts as written"
