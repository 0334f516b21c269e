"""Reading another process's memory, page runs at a time.

process_vm_readv(2) is the way: one call copies up to 1024 runs into the buffer. It obeys the target's page protections
and ends at the first page it may not read. From there on the rest of that run is read through /proc/PID/mem, which
reads PROT_NONE memory as well (unless the kernel is told otherwise, see `incdump.kerndat.proc_mem_force`). A page that
neither can read is skipped: it was unmapped meanwhile, or is a guard page, or lies beyond the end of its file. Where
nothing is mapped at all, the whole hole is skipped at once.

Pages that are shared copy-on-write (fork, KSM) are not for process_vm_readv(2): it would have the kernel copy them, in
the target (`incdump.proc.sharing`). So where there may be such pages, pagemap is asked which are mapped only once, and
all others are read through /proc/PID/mem, at two thirds of the speed.

process_vm_readv goes by pid, /proc/PID/mem by the address space that the process had when the file was opened. Both
are the same until the process exits or calls exec; then /proc/PID/mem reads nothing any more, which is asked after
each read: so bytes of a new program, or of a new process under the old pid, are never taken for the target's. Of a
process that is kept stopped by ptrace this need not be asked: it cannot call exec, and if it is killed it keeps its
pid, without any memory, until its tracer lets it go.
"""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import numpy as np

from incdump._uapi.memory import IOV_MAX, process_vm_readv, query_vma
from incdump.errors import NoSuchTarget, TargetDenied, TargetExited
from incdump.model.runs import PAGE_SHIFT, PAGE_SIZE, Runs, canonical, empty_runs, page_addresses
from incdump.proc.pagemap import pmes_at
from incdump.proc.pagemap.pme import MAPPED_ONCE

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ProcessMemory:
    """The memory of one process, open for reading. Any number of threads may read at once.

    Use it as a context manager, or `close` it.

    :param pid: the process; it must be alive, and readable with ptrace rights, now.
    :param may_share: whether pages of it may be shared copy-on-write; asking pagemap costs a twentieth of the time.
    :param stopped: it is kept stopped by ptrace for as long as this object is used.
    :raises NoSuchTarget: it is not there.
    :raises TargetDenied: it may not be read.
    """

    def __init__(self, pid: int, *, may_share: bool = True, stopped: bool = False) -> None:
        self.pid = pid
        self._stopped = stopped
        self._mem_fd = -1
        self._pagemap_fd = -1
        try:
            self._mem_fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            if may_share:
                self._pagemap_fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as e:
            self.close()
            message = f"no permission to read the memory of process {pid}: run as its user or as root (CAP_SYS_PTRACE)"
            raise TargetDenied(message, pid=pid, errno=e.errno) from None
        except (FileNotFoundError, ProcessLookupError) as e:
            self.close()
            raise NoSuchTarget(f"there is no process {pid}", pid=pid, errno=e.errno) from None

    def __repr__(self) -> str:
        return f"<ProcessMemory of {self.pid}{', closed' if self._mem_fd < 0 else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors; reads that are under way in other threads must be over."""
        fds = self._mem_fd, self._pagemap_fd
        self._mem_fd = self._pagemap_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def read_into(
        self, buffer: memoryview | NDArray[np.uint8], runs: Runs, *, unreadable: NDArray[np.bool_] | None = None
    ) -> Runs:
        """Read runs of pages, back to back, into a buffer.

        :param buffer: writable, contiguous, at least as many bytes as the runs have; the rest is left alone.
        :param runs: shape (n, 2), start and end in bytes.
        :param unreadable: hint, shape (n,): runs known to be in mappings without PROT_READ, to be read through
            /proc/PID/mem at once. A wrong hint costs time only.
        :returns: the pages that could not be read; in the buffer they are zero.
        :raises TargetExited: the process, or the program it ran, is gone: the buffer's contents mean nothing.
        """
        into = np.frombuffer(buffer, np.uint8)
        if self._pagemap_fd >= 0 and len(runs):
            runs, unreadable = self._set_apart(runs, unreadable)
        if unreadable is None and self._read_at_once(into, runs):
            return empty_runs()
        reading = _Reading(self.pid, self._mem_fd, into, runs)
        if unreadable is None or not unreadable.any():
            reading.read(0, len(runs))
        else:
            reading.read_by_hint(unreadable)
        self._check_alive(int(runs[0, 0]) if len(runs) else 0)
        return canonical(np.array(reading.failed, np.uint64)) if reading.failed else empty_runs()

    def _read_at_once(self, into: NDArray[np.uint8], runs: Runs) -> bool:
        """Read what one call can read, as nearly all can be; False if anything at all is special about it."""
        if not 0 < len(runs) <= IOV_MAX:
            return False
        remote = runs.copy()
        remote[:, 1] -= remote[:, 0]
        wanted = int(remote[0, 1] if len(remote) == 1 else remote[:, 1].sum())
        if wanted > len(into) or not into.flags.writeable:
            return False
        try:
            copied = process_vm_readv(self.pid, into.ctypes.data, wanted, remote)
        except OSError:
            return False
        if copied != wanted:
            return False
        if not self._stopped:
            self._check_alive(int(runs[0, 0]))
        return True

    def _set_apart(self, runs: Runs, slowly: NDArray[np.bool_] | None) -> tuple[Runs, NDArray[np.bool_] | None]:
        """Cut runs where pages that process_vm_readv(2) may read meet others.

        :param slowly: of each run, whether it is to be read through /proc/PID/mem anyhow.
        :returns: the pieces, and the same of them.
        """
        try:
            once = pmes_at(self._pagemap_fd, runs) & np.uint64(MAPPED_ONCE) != 0
        except TargetExited:
            raise _exited(self.pid) from None
        if once.all():
            return runs, slowly
        sizes = ((runs[:, 1] - runs[:, 0]) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        of = np.repeat(np.arange(len(runs)), sizes)
        cut = np.concatenate(([True], (of[1:] != of[:-1]) | (once[1:] != once[:-1])))
        first = np.flatnonzero(cut)
        length = np.diff(first, append=len(once)).astype(np.uint64)
        start = page_addresses(runs)[first]
        pieces = np.stack((start, start + (length << np.uint64(PAGE_SHIFT))), axis=1)
        return pieces, ~once[first] if slowly is None else ~once[first] | slowly[of[first]]

    def _check_alive(self, address: int) -> None:
        """Make sure that the address space that was opened is still in use: reading it gives a byte, or an error."""
        try:
            if os.pread(self._mem_fd, 1, address):
                return
        except OSError as e:
            if e.errno in (errno.EIO, errno.EFAULT):
                return
            raise
        raise _exited(self.pid)


def _exited(pid: int) -> TargetExited:
    message = f"process {pid} exited, or replaced its program by exec, while its memory was being read"
    return TargetExited(message, pid=pid, errno=errno.ESRCH)


class _Reading:
    """One call of `ProcessMemory.read_into`: where each run goes, and what failed so far."""

    def __init__(self, pid: int, mem_fd: int, into: NDArray[np.uint8], runs: Runs) -> None:
        lengths = runs[:, 1] - runs[:, 0]
        self.pid = pid
        self.mem_fd = mem_fd
        self.into = into
        self.view = into.data
        self.base = into.ctypes.data
        self.remote = np.stack((runs[:, 0], lengths), axis=1)
        self.ends = np.cumsum(lengths).astype(np.int64)  # in the buffer, of each run
        self.failed: list[tuple[int, int]] = []
        if len(runs) and int(self.ends[-1]) > len(into):
            raise ValueError(f"the runs have {int(self.ends[-1])} bytes, the buffer only {len(into)}")
        if not into.flags.writeable:
            raise ValueError("the buffer is read-only")

    def begin_of(self, run: int) -> int:
        """Where a run begins in the buffer."""
        return int(self.ends[run - 1]) if run else 0

    def read_by_hint(self, unreadable: NDArray[np.bool_]) -> None:
        """Read groups of runs that are readable or not, according to the hint."""
        bounds = [0, *(np.flatnonzero(np.diff(unreadable)) + 1).tolist(), len(unreadable)]
        for first, last in pairwise(bounds):
            if unreadable[first]:
                for run in range(first, last):
                    self.read_slowly(run, 0)
            else:
                self.read(first, last)

    def read(self, first: int, last: int) -> None:
        """Read runs ``[first, last)``."""
        while first < last:
            stop = min(first + IOV_MAX, last)
            begin = self.begin_of(first)
            wanted = int(self.ends[stop - 1]) - begin
            copied = self.copy(self.base + begin, wanted, self.remote[first:stop])
            if copied == wanted:
                first = stop
                continue
            # The page at which the copy ended lies in this run: the first that ends beyond it.
            run = int(np.searchsorted(self.ends, begin + copied, "right"))
            self.read_slowly(run, begin + copied - self.begin_of(run))
            first = run + 1

    def copy(self, address: int, length: int, remote: NDArray[np.uint64]) -> int:
        """Copy as far as it goes; 0 when the very first page cannot be read, or process_vm_readv is not allowed."""
        try:
            return process_vm_readv(self.pid, address, length, remote)
        except ProcessLookupError:
            raise _exited(self.pid) from None
        except OSError as e:
            if e.errno in (errno.EFAULT, errno.EPERM, errno.ENOSYS):
                return 0
            raise

    def read_slowly(self, run: int, done: int) -> None:
        """Read a run through /proc/PID/mem, from `done` bytes into it; note what cannot be read."""
        start, length = (int(number) for number in self.remote[run])
        begin = self.begin_of(run)
        while done < length:
            copied = self.pread(begin + done, begin + length, start + done)
            done += copied
            if done >= length:
                return
            if not copied:
                skipped = min(self.unmapped(start + done), length - done)
                self.failed.append((start + done, start + done + skipped))
                self.into[begin + done : begin + done + skipped] = 0
                done += skipped

    def pread(self, begin: int, end: int, address: int) -> int:
        """Fill ``[begin, end)`` of the buffer from an address, as far as it goes, in whole pages; 0 on a bad page."""
        try:
            copied = os.preadv(self.mem_fd, (self.view[begin:end],), address)
        except OSError as e:
            if e.errno in (errno.EIO, errno.EFAULT):
                return 0
            raise
        if copied == 0:
            raise _exited(self.pid)
        return copied & -PAGE_SIZE

    def unmapped(self, address: int) -> int:
        """How many bytes can be skipped at an unreadable page: to the next mapping, or a page if it is mapped."""
        try:
            # Opened where it is needed, which is seldom: a tree may have a thousand processes. If it is another
            # program's by now, that is found out when the reading is over.
            maps = os.open(f"/proc/{self.pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = query_vma(maps, address)
            finally:
                os.close(maps)
        except (ProcessLookupError, FileNotFoundError):
            raise _exited(self.pid) from None
        except OSError:  # a kernel without PROCMAP_QUERY: page by page
            return PAGE_SIZE
        if found is None:
            return 1 << 63
        return max(found[0] - address, PAGE_SIZE)
