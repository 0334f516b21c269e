"""Huge pages that tracking takes apart, and puts together again when it ends.

A write to a huge page that is write-protected has the kernel split it, and as long as the mapping is watched none is
made there again. So where they were is noted when tracking begins (`find`), and what is then still populated is put
together when it has ended (`collapse`): by process_madvise(2) with MADV_COLLAPSE, Linux 6.1, a block of 2 MiB at a time
and only where all of it is present, so that the process does not grow by it. A process of its own does that
(`collapse_apart`): nobody waits for it, and it goes on when the holder has ended.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from typing import TYPE_CHECKING

from incdump._uapi.libc import ioctl, syscall
from incdump._uapi.pagemap_scan import PAGEMAP_SCAN
from incdump.errors import IncdumpError
from incdump.holder.start import await_first_process, spawn
from incdump.proc.identity import has_ended, pid_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_IS_PRESENT, _IS_FILE, _IS_HUGE = 1 << 3, 1 << 2, 1 << 6  # PAGE_IS_*, include/uapi/linux/fs.h
_SYS_PROCESS_MADVISE = 440  # of all architectures
_MADV_COLLAPSE = 25
_BLOCK = 2 << 20
_REGIONS = 1024
_RANGE = struct.Struct("=QQ")
_END = (1 << 47) - 4096
"""Above is nothing but what a program has asked for by address."""

Ranges = list[tuple[int, int]]


def find(pid: int) -> Ranges:
    """Where a process has huge pages (not hugetlb, nor a file's), whole blocks, ascending; none if it is gone."""
    with contextlib.suppress(OSError):
        return list(_whole_blocks(_scan(pid, 0, _END, _IS_HUGE, _IS_FILE)))
    return []


def collapse_apart(pidfd: int, ranges: Ranges) -> None:
    """Have a new process do `collapse` for the process of a pidfd. Does not wait; without process none is done."""
    if not ranges or has_ended(pidfd):
        return
    told = os.memfd_create("incdump-huge-pages", os.MFD_CLOEXEC)
    try:
        os.write(told, b"".join(_RANGE.pack(*ends) for ends in ranges))
        with contextlib.suppress(OSError, IncdumpError):
            await_first_process(spawn("incdump.holder.huge_pages", [str(pidfd), str(told)], (pidfd, told)))
    finally:
        os.close(told)


def collapse(pidfd: int, ranges: Ranges) -> int:
    """Put blocks together again that are populated and are no huge pages any more. Blocks.

    :returns: how many blocks the kernel has put together; 0 also where it does not do so.
    """
    done = 0
    for lo, hi in ranges:
        pid = pid_of(pidfd)
        if pid <= 0 or has_ended(pidfd):
            break
        with contextlib.suppress(OSError):
            for start, end in _whole_blocks(_scan(pid, lo, hi, _IS_PRESENT, _IS_HUGE | _IS_FILE)):
                done += sum(_collapse_block(pidfd, block) for block in range(start, end, _BLOCK))
    return done


def _collapse_block(pidfd: int, address: int) -> bool:
    iovec = (ctypes.c_uint64 * 2)(address, _BLOCK)
    try:
        return syscall(_SYS_PROCESS_MADVISE, pidfd, ctypes.addressof(iovec), 1, _MADV_COLLAPSE, 0) == _BLOCK
    except OSError:  # no huge page to be had, another mapping by now, no permission (CAP_SYS_NICE)
        return False


def _whole_blocks(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for lo, hi in runs:
        start, end = -(-lo // _BLOCK) * _BLOCK, hi // _BLOCK * _BLOCK
        if start < end:
            yield start, end


def _scan(pid: int, lo: int, hi: int, wanted: int, unwanted: int) -> Iterator[tuple[int, int]]:
    """Runs of pages that are all of some categories, and none of others.

    :raises OSError: the kernel has no such call (before Linux 6.7), or the process is gone.
    """
    regions = (ctypes.c_uint64 * (3 * _REGIONS))()
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    begun: tuple[int, int] | None = None
    try:
        while lo < hi:
            mask = wanted | unwanted
            argument = (ctypes.c_uint64 * 12)(
                96, 0, lo, hi, 0, ctypes.addressof(regions), _REGIONS, 0, unwanted, mask, 0, 0
            )
            count = ioctl(fd, PAGEMAP_SCAN, ctypes.addressof(argument))
            for i in range(count):
                start, end = regions[3 * i], regions[3 * i + 1]
                if begun is not None and begun[1] == start:
                    begun = (begun[0], end)
                else:
                    if begun is not None:
                        yield begun
                    begun = (start, end)
            lo = hi if count < _REGIONS else max(argument[4], begun[1] if begun else lo)
    finally:
        os.close(fd)
    if begun is not None:
        yield begun


def main() -> None:
    """Run as ``python -c "from incdump.holder.huge_pages import main; main()" PIDFD RANGES_FD``."""
    if os.fork():
        os._exit(0)
    pidfd, told = map(int, sys.argv[1:])
    with open(told, "rb") as file:
        file.seek(0)
        collapse(pidfd, list(_RANGE.iter_unpack(file.read())))
