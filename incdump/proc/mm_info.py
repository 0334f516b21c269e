"""What /proc says of an address space besides its mappings, as a `MmInfo`.

/proc/PID/stat has the bounds of code, data, heap, stack, arguments and environment (fields 26 to 28 and 45 to 51 of
proc(5)); all but the first are 0 for a reader without ptrace rights. The end of the heap is in no file; the end of its
mapping, which is that rounded up to a page, has to do. Whether the process is dumpable shows only in who owns its
files in /proc: root instead of its own user, if it is not.
"""

from __future__ import annotations

import os
import re
import sys
from array import array

from incdump.errors import TargetExited
from incdump.model.mm import MmInfo
from incdump.model.runs import PAGE_SIZE
from incdump.proc.identity import read_proc, reading

_FIRST_FIELD = 3  # of what follows the comm in /proc/PID/stat
_SUID_DUMP_USER = 1


def read_mm_info(pid: int) -> MmInfo:
    """Read it; exact only while the process is stopped.

    :raises NoSuchTarget: there is no such process.
    :raises TargetDenied: its files may not be read.
    :raises TargetExited: it has no address space any more.
    """
    with reading(pid):
        stat = read_proc(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        words = array("Q", _whole_words(read_proc(f"/proc/{pid}/auxv")))
        status = read_proc(f"/proc/{pid}/status")
        owner = os.stat(f"/proc/{pid}/auxv").st_uid
    if not words:
        raise TargetExited(f"process {pid} has no memory: it has exited, or is a kernel thread", pid=pid)
    fields = {line.partition(b":")[0]: line.partition(b":")[2].split() for line in status.splitlines()}
    return _mm_info([int(word) if word.isdigit() else 0 for word in stat], tuple(words), fields, owner)


def anonymous_pages(pid: int) -> int:
    """About how many pages of memory a process has for itself, in memory or swapped out.

    The kernel's counters lag a little, and a process that is gone has none.

    :raises NoSuchTarget: there is no such process.
    """
    with reading(pid):
        status = read_proc(f"/proc/{pid}/status")
    sizes = re.findall(rb"^(?:RssAnon|VmSwap|HugetlbPages):\s+(\d+) kB$", status, re.MULTILINE)
    return sum(int(size) for size in sizes) * 1024 // PAGE_SIZE


def resident_bytes(pid: int) -> int:
    """About how much memory of a process is there, what it shares included; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE_SIZE
    except OSError:
        return 0


def _whole_words(data: bytes) -> bytes:
    return data[: len(data) // 8 * 8]


def _mm_info(stat: list[int], auxv: tuple[int, ...], status: dict[bytes, list[bytes]], owner: int) -> MmInfo:
    def field(number: int) -> int:
        index = number - _FIRST_FIELD
        return stat[index] if index < len(stat) else 0

    effective_uid = int(status[b"Uid"][1])
    thp = status.get(b"THP_enabled")
    return MmInfo(
        start_code=field(26),
        end_code=field(27),
        start_stack=field(28),
        start_data=field(45),
        end_data=field(46),
        start_brk=field(47),
        arg_start=field(48),
        arg_end=field(49),
        env_start=field(50),
        env_end=field(51),
        auxv=auxv,
        dumpable=_dumpable(effective_uid, owner),
        thp_disabled=None if thp is None else thp == [b"0"],
    )


def _dumpable(effective_uid: int, owner: int) -> int | None:
    """1 if the process's own user owns its /proc files; else None: 0 looks as 2 does, and for root all look alike."""
    return _SUID_DUMP_USER if owner == effective_uid != 0 else None


assert sys.byteorder == "little"  # what the images have, and every machine that incdump runs on
