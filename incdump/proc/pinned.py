"""Memory that devices write to, past every tracker.

A page that is pinned for direct I/O is written by the device, or by the kernel through its own mapping, with no fault
that soft-dirty or userfaultfd write protection could see. A process that may have such pages cannot be vouched for by
either. They come from io_uring (registered buffers, rings in user memory), from reads of files opened with O_DIRECT,
and from drivers that map user memory for their device (RDMA, VFIO, GPUs).
"""

from __future__ import annotations

import os

_DEVICES = ("/dev/infiniband/", "/dev/vfio/", "/dev/nvidia", "/dev/kfd", "/dev/dri/", "/dev/habanalabs", "/dev/accel/")
_IO_URING = "anon_inode:[io_uring]"


def pinned_io(pid: int) -> str | None:
    """Why the pages of a process might be written to unseen, or None.

    Costs a readlink(2) for each open descriptor, and a read of fdinfo for each that is a file.

    :returns: one clause for a person, for example ``"has a file open with O_DIRECT: /data/ibd"``. A process whose
        descriptors cannot be listed gets one too; one that is gone gets None.
    """
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:
        return "has descriptors that cannot be looked at"
    for name in names:
        try:
            path = os.readlink(f"{directory}/{name}")
        except OSError:
            continue
        if path == _IO_URING:
            return "uses io_uring"
        if path.startswith(_DEVICES):
            return f"has a device open that writes to memory by itself: {path}"
        if path[0] == "/" and not path.startswith(("/dev/pts/", "/dev/null", "/memfd:")) and _reads_direct(pid, name):
            return f"has a file open with O_DIRECT: {path}"
    return None


def _reads_direct(pid: int, fd: str) -> bool:
    """Whether a descriptor is open for reading with O_DIRECT (the flags line of fdinfo is octal)."""
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags:"):
                    flags = int(line.split()[1], 8)
                    return bool(flags & os.O_DIRECT) and flags & os.O_ACCMODE != os.O_WRONLY
    except (OSError, ValueError):
        pass
    return False
