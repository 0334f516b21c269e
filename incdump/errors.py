"""Everything that can go wrong, as one tree of exceptions.

An error carries what happened as data (``pid``, ``vaddr``, ``path``, ``errno``); the text is one line for a person:
what happened, then what to do about it. Each branch of the tree has an exit code, which the commands return:

=====  ==========================  ==================================================================
code   class                       meaning
=====  ==========================  ==================================================================
0                                  success
1      `IncdumpError`              failure with no better class
2      `InvalidOption`             wrong usage (the command line itself; a value of the library's options)
3      `TargetError`               the target cannot be dumped: it is gone, not ours, traced by another
4      `ImagesError`               the images dir or the parent chain cannot be used
5      `TrackerError`              no dirty tracking where it was required
6      `CheckError`                ``incdump check`` found the chain, or a page, wrong
7      `CriuError`                 CRIU is missing, too old, or failed
8      `XferError`                 pages did not come through the network
9      `DidNotConverge`            a pre-copy loop did not come to its end in time
10     `MigrationError`            a migration failed: the tree is where it was
11     `OutcomeUnknown`            whether a migrated tree runs over there could not be found out
=====  ==========================  ==================================================================

Whatever is raised, the target runs on. (One exception: `OutcomeUnknown`.)
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any

__all__ = (
    "AlreadyTraced",
    "BadImage",
    "BrokenChain",
    "CannotMigrate",
    "CheckError",
    "ConnectionLost",
    "CriuError",
    "DidNotConverge",
    "FreezeTimeout",
    "HolderError",
    "HookTimeout",
    "ImagesDirInUse",
    "ImagesError",
    "ImagesIOError",
    "IncdumpError",
    "InjectionFailed",
    "InvalidOption",
    "LazyMemory",
    "LeashUnusable",
    "MigrationError",
    "NoSuchTarget",
    "NotInImages",
    "OutcomeUnknown",
    "ParentMismatch",
    "ProcIncomplete",
    "ProcMismatch",
    "ProtocolError",
    "ResourceLimit",
    "StopStalled",
    "TargetDenied",
    "TargetError",
    "TargetExited",
    "TargetUnsuitable",
    "TrackerError",
    "TrackerLost",
    "TrackerUnavailable",
    "UnfinishedImages",
    "UnsupportedPageSize",
    "XferError",
)


class IncdumpError(Exception):
    """Base of all errors that incdump raises on purpose.

    :ivar pid: the process concerned, or None.
    :ivar vaddr: the address concerned (bytes), or None.
    :ivar path: the file or directory concerned, or None.
    :ivar errno: the kernel's error number, or None.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        pid: int | None = None,
        vaddr: int | None = None,
        path: str | os.PathLike[str] | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.pid = pid
        self.vaddr = vaddr
        self.path = None if path is None else os.fspath(path)
        self.errno = errno

    @property
    def errno_name(self) -> str | None:
        """The symbolic name of `errno` (``"ENOSPC"``), or None."""
        return None if self.errno is None else _errno.errorcode.get(self.errno, str(self.errno))


class InvalidOption(IncdumpError, ValueError):
    """A value that an option cannot have. Nothing was begun.

    :ivar field: the option.
    :ivar value: what it was given.
    """

    exit_code = 2

    def __init__(self, field: str, value: Any, wanted: str) -> None:
        super().__init__(f"{field}: {value!r} cannot be used; {wanted}")
        self.field = field
        self.value = value

    def __reduce__(self) -> tuple[type, tuple[str, Any, str]]:
        return type(self), (self.field, self.value, str(self).rpartition("cannot be used; ")[2])


class UnsupportedPageSize(IncdumpError):
    """This kernel's pages are not of 4 KiB: pagemap would be read in the wrong places. Nothing was touched."""


class ResourceLimit(IncdumpError):
    """A limit of this process, its user or this machine is reached: of open files, of threads and processes.

    :ivar limit: its name, ``"RLIMIT_NOFILE"`` for example; None where only the holder knows it.
    """

    def __init__(
        self,
        message: str,
        *,
        limit: str | None = None,
        pid: int | None = None,
        path: str | os.PathLike[str] | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message, pid=pid, path=path, errno=errno)
        self.limit = limit


class TargetError(IncdumpError):
    """The target process cannot be dumped."""

    exit_code = 3


class NoSuchTarget(TargetError):
    """There is no process of that pid."""


class ProcMismatch(TargetError):
    """/proc is not that of this process's pid namespace: its numbers mean other processes. Nothing was touched."""


class ProcIncomplete(TargetError):
    """/proc lacks what is not a process's: it is mounted with ``subset=pid``. Nothing was touched."""


class LazyMemory(TargetError):
    """Pages of the target are yet to be supplied by another program (userfaultfd): it cannot be dumped whole."""


class TargetExited(TargetError):
    """The target exited while it was being dumped."""


class TargetUnsuitable(TargetError):
    """The process has no memory of its own to dump: a kernel thread, a zombie, or incdump itself."""


class TargetDenied(TargetError):
    """The kernel does not let this user look into the target."""


class AlreadyTraced(TargetError):
    """A debugger (or another dumper) is attached to the target."""


class FreezeTimeout(TargetError):
    """Some thread of the tree could not be stopped in time."""


class StopStalled(TargetError):
    """Nothing got done while the tree stood still: it was let run on, and the dump is given up."""


class InjectionFailed(TargetError):
    """The one system call that tracking needs could not be run in the target; its registers were put back."""


class ImagesError(IncdumpError):
    """An images dir cannot be read or written."""

    exit_code = 4


class ImagesIOError(ImagesError):
    """Reading or writing an images dir failed (no permission, disk full, I/O error)."""


class ImagesDirInUse(ImagesError):
    """The directory meant for a new dump already holds images."""


class ImagesOutOfReach(ImagesError):
    """Images, or those that they stand on, are not within the reach of the user as whom CRIU would restore them."""


class NotInImages(ImagesError):
    """The images dir holds nothing of this process, or of this shared memory segment."""


class UnfinishedImages(ImagesError):
    """The directory holds no inventory.img: its dump never ended."""


class BadImage(ImagesError):
    """A file is not the image that its name says, or is damaged."""


class BrokenChain(ImagesError):
    """A page is promised to be in a parent that does not have it, or a parent directory is missing."""


class ParentMismatch(ImagesError):
    """The parent holds another process (or an earlier process of the same pid)."""


class TrackerError(IncdumpError):
    """What was written since the parent dump is not known."""

    exit_code = 5


class TrackerUnavailable(TrackerError):
    """The tracker that was asked for does not work on this kernel or for this user."""


class TrackerLost(TrackerError):
    """``--require-incremental``: the tracker's generation is not the parent's."""


class HolderError(TrackerError):
    """The holder process, which keeps userfaultfds between commands, cannot be started or reached."""


class CheckError(IncdumpError):
    """``incdump check`` found something wrong."""

    exit_code = 6


class CriuError(IncdumpError):
    """CRIU is missing or too old, refused the process, or failed: the message has what it logged as errors."""

    exit_code = 7


class LeashUnusable(CriuError):
    """CRIU cannot be kept from the memory in this way here (`--way`); what was tried has changed nothing."""


class DidNotConverge(IncdumpError):
    """A pre-copy loop: the target writes faster than it can be copied."""

    exit_code = 9


class MigrationError(IncdumpError):
    """A tree could not be moved to another host; it is where it was."""

    exit_code = 10


class CannotMigrate(MigrationError):
    """The other host lacks something, or does not take the tree: nothing was begun.

    :ivar problems: what, a line each.
    """

    def __init__(self, message: str, *, pid: int | None = None, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, pid=pid)
        self.problems = problems


class HookTimeout(MigrationError):
    """A user's hook did not end in its time; its process group was killed."""


class OutcomeUnknown(MigrationError):
    """The other host has gone in the moment when the tree was to run there, and cannot be asked whether it does.

    The tree here is left stopped, unless told otherwise: so that it does not run twice.
    """

    exit_code = 11


class XferError(IncdumpError):
    """Pages did not come through the network."""

    exit_code = 8


class ConnectionLost(XferError):
    """The other side has gone, or is silent, before all was said."""


class ProtocolError(XferError):
    """The other side says something that CRIU's page-server protocol does not have, or that cannot be."""
