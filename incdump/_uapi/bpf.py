"""The flags of a process's mappings (``vm_flags``), told by the kernel through a BPF iterator: bpf(2).

/proc/PID/smaps tells them too, as VmFlags, but walks all page tables for its other lines: 8 to 17 ms a GiB of memory
that is there. The iterator ``task_vma`` (Linux 5.12; of one process: 6.1) goes over the mappings alone. It needs
CAP_BPF and CAP_PERFMON, which root has, and the kernel's BTF.

The structures are those of include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache

from incdump._uapi.arch import ARCH
from incdump._uapi.btf import FUNCTION, STRUCT, VMLINUX, Btf
from incdump._uapi.libc import syscall

_PROG_LOAD, _LINK_CREATE, _ITER_CREATE = 5, 28, 33
_PROG_TYPE_TRACING, _TRACE_ITER = 26, 28
_SEQ_WRITE = 127
_LOAD = struct.Struct("=IIQQIIQII16sIIIIQIIQII")
_LINK = struct.Struct("=IIIIQI4x")
_TASK = struct.Struct("=III4x")  # tid, pid, pid_fd
_LICENCE = b"Dual MIT/GPL"  # of the few instructions below, which the kernel asks for: its bpf_seq_write() is GPL only
_ROW = struct.Struct("=QQQ")
_BUFFER = 4096 * _ROW.size  # whole rows, however many the kernel has ready

# Instructions: operation, destination and source register, offset, immediate value.
_LOAD64, _STORE64, _MOVE, _SET, _ADD, _IF_ZERO, _CALL, _EXIT = 0x79, 0x7B, 0xBF, 0xB7, 0x07, 0x15, 0x85, 0x95
_FRAME = 10
_META, _VMA = 0, 16  # in struct bpf_iter__task_vma; struct bpf_iter_meta begins with the file that is read


@cache
def _kernel() -> tuple[int, list[int]]:
    """The number of the iterator, and where vm_start, vm_end and vm_flags are in struct vm_area_struct."""
    with open(VMLINUX, "rb") as file:
        btf = Btf(file.read())
    members = btf.offsets(btf.number(STRUCT, "vm_area_struct"), ("vm_start", "vm_end", "vm_flags"))
    return btf.number(FUNCTION, "bpf_iter_task_vma"), members


def load_vma_iterator() -> int:
    """Load the program that `iterate_vmas` runs.

    The first time in a process this reads the kernel's BTF, which takes some tens of milliseconds.

    :returns: its descriptor, which the caller closes.
    :raises OSError: EPERM: not allowed. ENOENT: no BTF, or no such iterator. EINVAL, ENOSYS: no BPF, or an older one.
    """
    iterator, members = _kernel()
    program = _program(members)
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(_LICENCE)
    where = ctypes.addressof(code), ctypes.addressof(licence)
    rest = (0, 0, 0, 0, 0, b"incdump_vmas", 0, _TRACE_ITER, 0, 0, 0, 0, 0, 0, 0, iterator)
    return _bpf(_PROG_LOAD, _LOAD.pack(_PROG_TYPE_TRACING, len(program) // 8, *where, *rest))


def iterate_vmas(program: int, pid: int) -> list[tuple[int, int, int]]:
    """The mappings of a process, ascending: start, end, vm_flags. The gate page ([vsyscall]) is none of them.

    :param program: from `load_vma_iterator`.
    :returns: none at all if there is no such process.
    :raises OSError: EINVAL, E2BIG: the kernel knows no iterator of one process.
    """
    task = ctypes.create_string_buffer(_TASK.pack(pid, 0, 0), _TASK.size)
    link = _bpf(_LINK_CREATE, _LINK.pack(program, 0, _TRACE_ITER, 0, ctypes.addressof(task), _TASK.size))
    try:
        fd = _bpf(_ITER_CREATE, struct.pack("=II", link, 0))
    finally:
        os.close(link)
    rows: list[tuple[int, int, int]] = []
    try:
        while part := os.read(fd, _BUFFER):
            more = list(_ROW.iter_unpack(part))
            # At its end the iterator does not stay: once it has let go of mmap_lock, for a writer or between two reads,
            # the next read begins again with the mapping where it did, and so on for ever.
            if rows and more[0][0] < rows[-1][1]:
                break
            rows += more
    finally:
        os.close(fd)
    return rows


def _program(members: list[int]) -> bytes:
    """For each mapping: write vm_start, vm_end and vm_flags to the file that is read."""
    rows = [-_ROW.size + 8 * n for n in range(len(members))]  # on the stack
    copied = [
        (operation, *where)
        for member, row in zip(members, rows, strict=True)
        for operation, where in ((_LOAD64, (2, 7, member, 0)), (_STORE64, (_FRAME, 2, row, 0)))
    ]
    write = [
        (_MOVE, 2, _FRAME, 0, 0),
        (_ADD, 2, 0, 0, -_ROW.size),
        (_SET, 3, 0, 0, _ROW.size),
        (_CALL, 0, 0, 0, _SEQ_WRITE),
    ]
    body = [(_LOAD64, 1, 6, 0, 0), *copied, *write]
    end = [(_SET, 0, 0, 0, 0), (_EXIT, 0, 0, 0, 0)]
    begin = [(_LOAD64, 6, 1, _META, 0), (_LOAD64, 7, 1, _VMA, 0), (_IF_ZERO, 7, 0, len(body), 0)]  # the end: no mapping
    return b"".join(
        struct.pack("=BBhi", operation, to | source << 4, offset, value)
        for operation, to, source, offset, value in (*begin, *body, *end)
    )


def _bpf(command: int, attributes: bytes) -> int:
    """:returns: a descriptor, which is closed on exec."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return syscall(ARCH.sys_bpf, command, ctypes.addressof(buffer), len(attributes))
