"""Memory that devices write to, past every tracker.

A page that is pinned for direct I/O is written by the device, or by the kernel through its own mapping, with no fault
that soft-dirty or userfaultfd write protection could see. A process that may have such pages cannot be vouched for by
either. They come from io_uring (registered buffers, rings in user memory), from reads of files opened with O_DIRECT,
and from drivers that map user memory for their device (RDMA, VFIO, GPUs).
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from incdump._uapi.kcmp import KCMP_FILES, shares

if TYPE_CHECKING:
    from collections.abc import Collection

_DEVICES = (
    *("/dev/infiniband/", "/dev/vfio/", "/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/habanalabs", "/dev/accel/"),
    "/dev/video",  # V4L2 takes buffers in user memory
)
_IO_URING = "anon_inode:[io_uring]"


def pinned_io(pid: int, mappings: Collection[str] | None = None) -> str | None:
    """Why the pages of a process might be written to unseen, or None.

    Costs a readlink(2) for each open descriptor, a read of fdinfo for each that is a file, and a read of maps: a ring
    of io_uring may be registered for use without its descriptor, which is then closed; what is left is its mapping.

    :param mappings: the names of its mappings, if they were read a moment ago.
    :returns: one clause for a person, for example ``"has a file open with O_DIRECT: /data/ibd"``. A process whose
        descriptors cannot be listed gets one too; one that is gone gets None.
    """
    try:
        reason = _by_descriptors(f"/proc/{pid}")
        for task in _with_other_descriptors(pid):
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended: the others count
                reason = reason or _by_descriptors(f"/proc/{pid}/task/{task}")
        if reason is not None:
            return reason
        if mappings is None:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
                mappings = {line.rstrip("\n").rpartition(" ")[2] for line in maps}
        return "uses io_uring" if _IO_URING in mappings else None
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return "has descriptors that cannot be looked at"


def _with_other_descriptors(pid: int) -> list[str]:
    """The threads whose descriptors are not those of the main thread (unshare(2), clone(2) without CLONE_FILES).

    Where the kernel has no kcmp(2), or refuses it, that is every thread.
    """
    threads = [task for task in os.listdir(f"/proc/{pid}/task") if int(task) != pid]
    return [task for task in threads if not shares(pid, int(task), KCMP_FILES)]


def _by_descriptors(directory: str) -> str | None:
    for name in os.listdir(f"{directory}/fd"):
        try:
            path = os.readlink(f"{directory}/fd/{name}")
        except OSError:
            continue
        if path == _IO_URING:
            return "uses io_uring"
        if path.startswith(_DEVICES):
            return f"has a device open that writes to memory by itself: {path}"
        is_file = path[0] == "/" and not path.startswith(("/dev/pts/", "/dev/null", "/memfd:"))
        if is_file and _reads_direct(f"{directory}/fdinfo/{name}"):
            return f"has a file open with O_DIRECT: {path}"
    return None


def _reads_direct(fdinfo: str) -> bool:
    """Whether a descriptor is open for reading with O_DIRECT (the flags line of fdinfo is octal)."""
    try:
        with open(fdinfo, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags:"):
                    flags = int(line.split()[1], 8)
                    return bool(flags & os.O_DIRECT) and flags & os.O_ACCMODE != os.O_WRONLY
    except (OSError, ValueError):
        pass
    return False
