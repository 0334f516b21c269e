"""Probes of the ways to another process's memory, files and descriptors."""

from __future__ import annotations

import os
from functools import cache

import numpy as np

from incdump._uapi import bpf, mapping
from incdump._uapi.arch import ARCH
from incdump._uapi.kcmp import KCMP_VM, order
from incdump._uapi.libc import syscall
from incdump._uapi.memory import process_vm_readv as readv
from incdump.kerndat.trying import FailedError, Feature, opened, pages_for_a_while, try_feature
from incdump.model.runs import PAGE_SIZE

_VM_READ, _VM_READ_WRITE_EXEC = 1, 7


@cache
def process_vm_readv() -> Feature:
    """process_vm_readv(2)."""

    def attempt() -> str:
        source, copy = np.arange(64, dtype=np.uint8), np.zeros(64, np.uint8)
        remote = np.array([[source.ctypes.data, 64]], np.uint64)
        if readv(os.getpid(), copy.ctypes.data, 64, remote) != 64 or not (copy == source).all():
            raise FailedError("what was read is not what is there")
        return "read own memory"

    return try_feature(
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

    return try_feature(
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
        with opened("/proc/self/maps") as fd:
            lines = os.read(fd, 1 << 16).splitlines()
        names = [line.split()[0].decode() for line in lines if b" /" in line]
        if not names:
            raise FailedError("found no mapping of a file to try it on")
        start, end = (int(bound, 16) for bound in names[0].split("-"))
        with opened(f"/proc/self/map_files/{start:x}-{end:x}"):
            return "opened the file of an own mapping"

    return try_feature(
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
        if order(pid, pid, KCMP_VM) != 0:
            raise FailedError("a process does not share memory with itself, it says")
        return "compared own memory with itself"

    return try_feature(
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
        with pages_for_a_while(1) as address, opened("/proc/self/mem") as fd:
            mapping.write_byte(address, 42)
            mapping.protect(address, PAGE_SIZE, mapping.PROT_NONE)
            if os.pread(fd, 1, address) != b"*":
                raise FailedError("what was read is not what is there")
        return "read a page of a PROT_NONE mapping"

    return try_feature(
        "proc_mem_force",
        "PROT_NONE memory through /proc/PID/mem (proc_mem.force_override= may forbid it, Linux 6.12)",
        attempt,
        then="pages of mappings without PROT_READ are read as well",
        otherwise="pages of mappings without PROT_READ may be unreadable; that is an error when a dump meets one",
    )


@cache
def vma_flags() -> Feature:
    """The flags of mappings through a BPF iterator."""

    def attempt() -> str:
        program = bpf.load_vma_iterator()
        try:
            with pages_for_a_while(1) as address:
                mapping.protect(address, PAGE_SIZE, mapping.PROT_READ)
                told = [flags for start, end, flags in bpf.iterate_vmas(program, os.getpid()) if start <= address < end]
        finally:
            os.close(program)
        if [flags & _VM_READ_WRITE_EXEC for flags in told] != [_VM_READ]:
            raise FailedError("the flags of an own mapping are not what they are")
        return "read those of an own mapping"

    return try_feature(
        "vma_flags",
        "flags of mappings through a BPF iterator (Linux 6.1, CONFIG_DEBUG_INFO_BTF; CAP_BPF and CAP_PERFMON)",
        attempt,
        then="a checkpoint's CRIU does not read smaps of big processes",
        otherwise="a checkpoint stops its tree for 8 to 17 ms more for each GiB of memory",
    )
