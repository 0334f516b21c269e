"""What this kernel, for this user, can do: found by trying, never by version.

Each probe is a function without arguments that tries the feature on this very process and returns a `Feature`; it runs
once per process. `probe` runs them all, for ``incdump doctor``. Nothing here changes another process.

A feature is more than a call that does not fail: asynchronous write protection, for example, is armed, written through,
read back, dropped and moved, and passes only if every page is reported as it must be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from incdump._uapi import mapping, userfaultfd
from incdump._uapi.arch import ARCH
from incdump._uapi.libc import syscall
from incdump._uapi.memory import process_vm_readv as readv
from incdump._uapi.pagemap_scan import PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING
from incdump._uapi.pagemap_scan import pagemap_scan as scan_ioctl
from incdump.model.regions import PageIs
from incdump.model.runs import PAGE_SHIFT, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SOFT_DIRTY = 1 << 55
_PFN_MASK = (1 << 55) - 1
_KCMP_VM = 1


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that the kernel can do, or cannot.

    :ivar name: short name, as in `Kerndat`.
    :ivar what: what it is.
    :ivar works: whether it worked when it was tried.
    :ivar why: what was seen: how it failed, or what it passed.
    :ivar follows: what incdump does with it, or does without it.
    """

    name: str
    what: str
    works: bool
    why: str
    follows: str

    def __bool__(self) -> bool:
        return self.works


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

    def features(self) -> tuple[Feature, ...]:
        """All of them, in order."""
        return tuple(getattr(self, f.name) for f in fields(self))


def probe() -> Kerndat:
    """Try everything; a few milliseconds the first time."""
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
    )


# --- trying ---


class _FailedError(Exception):
    """A probe's own verdict: it ran, and the result was wrong."""


def _try(name: str, what: str, attempt: Callable[[], str], *, then: str, otherwise: str) -> Feature:
    """Run an attempt, which returns what it passed, or raises `OSError` or `_FailedError`."""
    try:
        return Feature(name, what, True, attempt(), then)
    except _FailedError as e:
        return Feature(name, what, False, str(e), otherwise)
    except OSError as e:
        code = errno.errorcode.get(e.errno, str(e.errno)) if e.errno is not None else "?"
        return Feature(name, what, False, f"{e.strerror or e} ({code})", otherwise)


@contextlib.contextmanager
def _pages(count: int) -> Iterator[int]:
    """Private anonymous memory for a while, without transparent huge pages; yields its address."""
    length = count << PAGE_SHIFT
    address = mapping.map_anonymous(length)
    try:
        mapping.advise_no_huge_pages(address, length)
        yield address
    finally:
        mapping.unmap(address, length)


@contextlib.contextmanager
def _opened(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor for a while."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _pme(address: int) -> int:
    """This process's pagemap entry of an address."""
    with _opened("/proc/self/pagemap") as fd:
        entry: int = struct.unpack("=Q", os.pread(fd, 8, address >> PAGE_SHIFT << 3))[0]
    return entry


def _scan(
    address: int, pages: int, *, flags: int = 0, inverted: int = 0, mask: int = 0, anyof: int = 0, returned: int = 0
) -> list[tuple[int, int]]:
    """Scan this process's own pages; for each region: its first page (0 is `address`) and one past its last."""
    vec = np.empty((16, 3), np.uint64)
    end = address + (pages << PAGE_SHIFT)
    with _opened("/proc/self/pagemap") as fd:
        masks = {"inverted": inverted, "mask": mask, "anyof": anyof, "returned": returned}
        count, _ = scan_ioctl(fd, address, end, vec, flags=flags, **masks)
    return [((int(a) - address) >> PAGE_SHIFT, (int(b) - address) >> PAGE_SHIFT) for a, b, _ in vec[:count]]


# --- pagemap ---

_ALL_CATEGORIES = int(sum(PageIs))


@cache
def scan_categories() -> int:
    """The `PageIs` bits that this kernel's PAGEMAP_SCAN knows; 0 without PAGEMAP_SCAN."""
    without_guard = _ALL_CATEGORIES & ~PageIs.GUARD
    for categories in (_ALL_CATEGORIES, without_guard, without_guard & ~PageIs.SOFT_DIRTY):
        try:
            with _pages(1) as address:
                _scan(address, 1, mask=PageIs.PRESENT, returned=categories)
        except OSError as e:
            if e.errno == errno.EINVAL:
                continue
            return 0
        return int(categories)
    return 0


@cache
def pagemap_scan() -> Feature:
    """ioctl(PAGEMAP_SCAN): the whole pagemap in one call."""

    def attempt() -> str:
        with _pages(3) as address:
            mapping.write_byte(address + PAGE_SIZE, 1)
            found = _scan(address, 3, mask=PageIs.PRESENT, returned=PageIs.PRESENT)
        if found != [(1, 2)]:
            raise _FailedError(f"page 1 of 3 was touched, the scan found {found}")
        return f"categories known: {PageIs(scan_categories())!r}".replace("PageIs.", "")

    return _try(
        "pagemap_scan",
        "PAGEMAP_SCAN, the whole pagemap in one call (Linux 6.7)",
        attempt,
        then="the pagemap is read with `scan`",
        otherwise="the pagemap is read with `cache`; no uffd-wp tracker",
    )


@cache
def pagemap_scan_guard() -> Feature:
    """PAGEMAP_SCAN knows guard regions."""

    def attempt() -> str:
        if not scan_categories() & PageIs.GUARD:
            raise _FailedError("this kernel's PAGEMAP_SCAN has no category for them")
        with _pages(3) as address:
            mapping.advise(address + PAGE_SIZE, PAGE_SIZE, mapping.MADV_GUARD_INSTALL)
            found = _scan(address, 3, mask=PageIs.GUARD, returned=PageIs.GUARD)
        if found != [(1, 2)]:
            raise _FailedError(f"page 1 of 3 is a guard page, the scan found {found}")
        return "a guard page was told from a swapped one"

    return _try(
        "pagemap_scan_guard",
        "guard regions (MADV_GUARD_INSTALL) are told apart in the pagemap (Linux 6.15)",
        attempt,
        then="guard pages are left out",
        otherwise="if the kernel has guard regions (6.13), their pages are found out by trying to read them",
    )


@cache
def zero_page_pfn() -> int | None:
    """The frame number of the shared zero page, or None when frame numbers are hidden (no CAP_SYS_ADMIN)."""
    try:
        with _pages(1) as address:
            mapping.read_byte(address)
            return _pme(address) & _PFN_MASK or None
    except OSError:
        return None


@cache
def page_frame_numbers() -> Feature:
    """Page frame numbers are visible in the pagemap."""

    def attempt() -> str:
        pfn = zero_page_pfn()
        if pfn is None:
            raise _FailedError("the kernel shows them as 0 (CAP_SYS_ADMIN is needed)")
        return f"the zero page is frame {pfn:#x}"

    return _try(
        "page_frame_numbers",
        "page frame numbers in /proc/PID/pagemap",
        attempt,
        then="readers `plain` and `cache` leave out zero pages",
        otherwise="readers `plain` and `cache` take zero pages for pages with contents: they are dumped",
    )


# --- trackers ---


@cache
def userfaultfd_user_mode() -> Feature:
    """userfaultfd(UFFD_USER_MODE_ONLY), which takes no privilege."""

    def attempt() -> str:
        os.close(_open_userfaultfd())
        return "created one"

    return _try(
        "userfaultfd_user_mode",
        "userfaultfd for user-mode faults, which needs no privilege (Linux 5.11)",
        attempt,
        then="the uffd-wp tracker has what it injects",
        otherwise="no uffd-wp tracker",
    )


def _open_userfaultfd() -> int:
    return userfaultfd.open_userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | userfaultfd.UFFD_USER_MODE_ONLY)


@cache
def uffd_wp_async() -> Feature:
    """Asynchronous write protection tells exactly what was written."""
    return _try(
        "uffd_wp_async",
        "dirty tracking by asynchronous write protection: userfaultfd and PAGEMAP_SCAN (Linux 6.7)",
        _attempt_uffd_wp,
        then="tracker `uffd-wp` works: pre-dumps do not stop the target",
        otherwise="no tracker `uffd-wp`",
    )


def _attempt_uffd_wp() -> str:
    """Arm 8 pages of our own, write, read back, drop, move; see that every page is reported as it must be."""
    if not pagemap_scan():
        raise _FailedError("needs PAGEMAP_SCAN")
    uffd = _open_userfaultfd()
    try:
        userfaultfd.api(uffd, userfaultfd.FEATURE_WP_ASYNC | userfaultfd.FEATURE_WP_UNPOPULATED)
        with _pages(8) as elsewhere:
            _exercise_uffd_wp(uffd, elsewhere)
            _exercise_exceptions(uffd)
            found = _scan(elsewhere, 8, mask=PageIs.WRITTEN, returned=PageIs.WRITTEN)
    finally:
        os.close(uffd)
    if found != [(0, 8)]:
        raise _FailedError(
            f"a moved mapping kept its protection though nobody tracks it: only pages {found} count as written"
        )
    return "armed, written, read back, dropped and moved: every page was reported right"


def _exercise_uffd_wp(uffd: int, elsewhere: int) -> None:
    """The steps of `_attempt_uffd_wp`, on 8 pages that move `elsewhere` in the end."""
    flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC
    length = 8 << PAGE_SHIFT

    def take(expected: list[tuple[int, int]], when: str) -> None:
        found = _scan(pages, 8, flags=flags, mask=PageIs.WRITTEN | PageIs.PRESENT, returned=PageIs.WRITTEN)
        if found != expected:
            raise _FailedError(f"{when}, pages {found} were reported as written instead of {expected}")

    pages = mapping.map_anonymous(length)
    try:
        mapping.advise_no_huge_pages(pages, length)
        for page in range(8):
            mapping.write_byte(pages + page * PAGE_SIZE, 1)
        userfaultfd.register_wp(uffd, pages, length)
        take([(0, 8)], "before any protection")
        take([], "right after protection")
        mapping.write_byte(pages + 2 * PAGE_SIZE, 2)
        mapping.write_byte(pages + 5 * PAGE_SIZE, 2)
        take([(2, 3), (5, 6)], "after writes to pages 2 and 5")
        mapping.advise(pages + 3 * PAGE_SIZE, PAGE_SIZE, mapping.MADV_DONTNEED)
        take([], "after page 3 was dropped")
        mapping.write_byte(pages + 3 * PAGE_SIZE, 3)
        take([(3, 4)], "after the dropped page 3 was written")
        mapping.move(pages, length, elsewhere)
    except BaseException:
        mapping.unmap(pages, length)
        raise


def _exercise_exceptions(uffd: int) -> None:
    """See that a scan for what is absent, not watched or written keeps silent about clean pages, and these alone."""
    odd = PageIs.PRESENT | PageIs.WPALLOWED
    most = 8 << 20 >> PAGE_SHIFT  # of these, whole page tables are not there

    def see(expected: list[tuple[int, int]], when: str) -> None:
        found = _scan(pages, most, inverted=odd, anyof=odd | PageIs.WRITTEN, returned=PageIs.PRESENT)
        if found != expected:
            raise _FailedError(f"{when}, pages {found} were reported as absent or written instead of {expected}")

    with _pages(most) as pages:
        for page in (0, 1, 2, 1500):
            mapping.write_byte(pages + page * PAGE_SIZE, 1)
        see([(0, 3), (3, 1500), (1500, 1501), (1501, most)], "while nobody watched")
        userfaultfd.register_wp(uffd, pages, most << PAGE_SHIFT)
        populated = PageIs.WRITTEN | PageIs.PRESENT
        _scan(pages, most, flags=PM_SCAN_WP_MATCHING, mask=populated, returned=PageIs.WRITTEN)
        see([(3, 1500), (1501, most)], "after protection")
        mapping.write_byte(pages + PAGE_SIZE, 2)
        mapping.advise(pages + 1024 * PAGE_SIZE, 1024 * PAGE_SIZE, mapping.MADV_DONTNEED)
        see([(1, 2), (3, most)], "after page 1 was written and pages 1024 to 2047 were dropped")


@cache
def soft_dirty() -> Feature:
    """Soft-dirty bits tell what was written."""
    return _try(
        "soft_dirty",
        "dirty tracking by soft-dirty bits (CONFIG_MEM_SOFT_DIRTY, not on every architecture)",
        _attempt_soft_dirty,
        then="tracker `soft-dirty` works, and CRIU can go on from an incdump pre-dump",
        otherwise="no tracker `soft-dirty`; CRIU cannot track memory on this kernel either",
    )


def _attempt_soft_dirty() -> str:
    """Touch a page, clear, touch again. clear_refs is written only when the bit is there at all."""
    with _pages(1) as address:
        mapping.write_byte(address, 1)
        if not _pme(address) & _SOFT_DIRTY:
            raise _FailedError("bit 55 of a fresh page's pagemap entry is not set: the kernel is built without it")
        with _opened("/proc/self/clear_refs", os.O_WRONLY) as fd:
            os.write(fd, b"4")
        if _pme(address) & _SOFT_DIRTY:
            raise _FailedError("bit 55 of the pagemap entry is still set after clear_refs")
        mapping.write_byte(address, 2)
        if not _pme(address) & _SOFT_DIRTY:
            raise _FailedError("bit 55 of the pagemap entry is not set after a write")
    return "bit 55 of the pagemap entry was cleared by clear_refs and set by a write"


@cache
def soft_dirty_moves() -> Feature:
    """Soft-dirty bits tell that a mapping was moved, too."""
    return _try(
        "soft_dirty_moves",
        "soft-dirty bits of mappings that are moved by whole page tables (mremap)",
        _attempt_soft_dirty_moves,
        then="tracker `soft-dirty` may be chosen by `auto`",
        otherwise="tracker `soft-dirty` is used only when asked for: such a move goes unseen (by CRIU as well)",
    )


def _attempt_soft_dirty_moves() -> str:
    """Move 2 MiB at once: the kernel then moves the page table as it is, and may leave the bits in it clear.

    What lies at the new address is other memory than before, and nothing would tell.
    """
    if not soft_dirty().works:
        raise _FailedError(soft_dirty().why)
    length = 512 << PAGE_SHIFT
    with _pages(1024) as source, _pages(1024) as target:
        old, new = (address + length - 1 & -length for address in (source, target))
        mapping.write_byte(old, 1)
        with _opened("/proc/self/clear_refs", os.O_WRONLY) as fd:
            os.write(fd, b"4")
        mapping.move(old, length, new, leave_empty=True)
        if not _pme(new) & _SOFT_DIRTY:
            raise _FailedError("a mapping that was moved by 2 MiB at once does not count as written")
    return "a mapping that was moved by 2 MiB at once counts as written"


# --- reading, and the rest ---


@cache
def process_vm_readv() -> Feature:
    """process_vm_readv(2)."""

    def attempt() -> str:
        source, copy = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
        remote = np.array([[source.ctypes.data, 64]], np.uint64)
        if readv(os.getpid(), copy.ctypes.data, 64, remote) != 64 or not (copy == source).all():
            raise _FailedError("what was read is not what is there")
        return "read own memory"

    return _try(
        "process_vm_readv",
        "process_vm_readv, the fast way to read another process's memory",
        attempt,
        then="pages are copied straight into incdump's buffers",
        otherwise="pages are read through /proc/PID/mem, at about half the speed",
    )


@cache
def pidfd_getfd() -> Feature:
    """pidfd_getfd(2)."""

    def attempt() -> str:
        pidfd = os.pidfd_open(os.getpid())
        try:
            os.close(syscall(ARCH.sys_pidfd_getfd, pidfd, pidfd, 0))
        finally:
            os.close(pidfd)
        return "copied an own descriptor"

    return _try(
        "pidfd_getfd",
        "pidfd_getfd, copying a descriptor out of another process (Linux 5.6)",
        attempt,
        then="the uffd-wp tracker can take over the userfaultfd made in the target",
        otherwise="no uffd-wp tracker",
    )


@cache
def map_files() -> Feature:
    """Opening files through /proc/PID/map_files."""

    def attempt() -> str:
        with _opened("/proc/self/maps") as fd:
            lines = os.read(fd, 1 << 16).splitlines()
        names = [line.split()[0].decode() for line in lines if b" /" in line]
        if not names:
            raise _FailedError("found no mapping of a file to try it on")
        start, end = (int(bound, 16) for bound in names[0].split("-"))
        with _opened(f"/proc/self/map_files/{start:x}-{end:x}"):
            return "opened the file of an own mapping"

    return _try(
        "map_files",
        "files of mappings through /proc/PID/map_files (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE)",
        attempt,
        then="shared memory is read from its segment",
        otherwise="shared memory is read through a descriptor of the target if it has one, else through its mappings",
    )


@cache
def kcmp() -> Feature:
    """kcmp(2)."""

    def attempt() -> str:
        pid = os.getpid()
        if syscall(ARCH.sys_kcmp, pid, pid, _KCMP_VM, 0, 0) != 0:
            raise _FailedError("a process does not share memory with itself, it says")
        return "compared own memory with itself"

    return _try(
        "kcmp",
        "kcmp, whether two processes share memory or files (CONFIG_KCMP)",
        attempt,
        then="processes that share their memory are dumped once",
        otherwise="processes that share their memory are dumped once each",
    )


@cache
def proc_mem_force() -> Feature:
    """/proc/PID/mem reads what the mapping's own protection forbids."""

    def attempt() -> str:
        with _pages(1) as address, _opened("/proc/self/mem") as fd:
            mapping.write_byte(address, 42)
            mapping.protect(address, PAGE_SIZE, mapping.PROT_NONE)
            if os.pread(fd, 1, address) != b"*":
                raise _FailedError("what was read is not what is there")
        return "read a page of a PROT_NONE mapping"

    return _try(
        "proc_mem_force",
        "PROT_NONE memory through /proc/PID/mem (proc_mem.force_override= may forbid it, Linux 6.12)",
        attempt,
        then="pages of mappings without PROT_READ are read as well",
        otherwise="pages of mappings without PROT_READ may be unreadable; that is an error when a dump meets one",
    )
