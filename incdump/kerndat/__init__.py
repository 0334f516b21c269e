"""What this kernel, for this user, can do: found by trying, never by version.

Each probe is a function without arguments that tries the feature on this very process and returns a `Feature`; it runs
once per process. `probe` runs them all, for ``incdump doctor``. Nothing here changes another process.

A feature is more than a call that does not fail: asynchronous write protection, for example, is armed, written through,
read back, dropped and moved, and passes only if every page is reported as it must be.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from incdump.kerndat.access import kcmp, map_files, pidfd_getfd, proc_mem_force, process_vm_readv, vma_flags
from incdump.kerndat.pagemap import (
    page_frame_numbers,
    pagemap_scan,
    pagemap_scan_guard,
    scan_categories,
    zero_page_pfn,
)
from incdump.kerndat.soft_dirty_bits import sees_moves, soft_dirty, soft_dirty_moves
from incdump.kerndat.trying import Feature
from incdump.kerndat.uffd_wp import uffd_wp_async, userfaultfd_user_mode, watches_droppable

__all__ = [
    "Feature",
    "Kerndat",
    "kcmp",
    "map_files",
    "page_frame_numbers",
    "pagemap_scan",
    "pagemap_scan_guard",
    "pidfd_getfd",
    "probe",
    "proc_mem_force",
    "process_vm_readv",
    "scan_categories",
    "sees_moves",
    "soft_dirty",
    "soft_dirty_moves",
    "uffd_wp_async",
    "userfaultfd_user_mode",
    "vma_flags",
    "watches_droppable",
    "zero_page_pfn",
]


@dataclass(frozen=True, slots=True)
class Kerndat:
    """All features, as `probe` found them. Each has the name of its own probe function."""

    pagemap_scan: Feature
    pagemap_scan_guard: Feature
    uffd_wp_async: Feature
    userfaultfd_user_mode: Feature
    soft_dirty: Feature
    soft_dirty_moves: Feature
    process_vm_readv: Feature
    pidfd_getfd: Feature
    map_files: Feature
    kcmp: Feature
    proc_mem_force: Feature
    page_frame_numbers: Feature
    vma_flags: Feature

    def features(self) -> tuple[Feature, ...]:
        """All of them, in order."""
        return tuple(getattr(self, f.name) for f in fields(self))


def probe() -> Kerndat:
    """Try everything; a tenth of a second the first time."""
    return Kerndat(
        pagemap_scan=pagemap_scan(),
        pagemap_scan_guard=pagemap_scan_guard(),
        uffd_wp_async=uffd_wp_async(),
        userfaultfd_user_mode=userfaultfd_user_mode(),
        soft_dirty=soft_dirty(),
        soft_dirty_moves=soft_dirty_moves(),
        process_vm_readv=process_vm_readv(),
        pidfd_getfd=pidfd_getfd(),
        map_files=map_files(),
        kcmp=kcmp(),
        proc_mem_force=proc_mem_force(),
        page_frame_numbers=page_frame_numbers(),
        vma_flags=vma_flags(),
    )
