"""What an address space knows of itself besides its mappings: where code, heap, stack and arguments are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MmInfo:
    """The fields of a process's mm that outlive no exec; addresses are bytes.

    :ivar start_code: first byte of the program's code.
    :ivar end_code: one past its last.
    :ivar start_data: first byte of its initialised data.
    :ivar end_data: one past its last.
    :ivar start_stack: where the main stack began.
    :ivar start_brk: where the heap begins.
    :ivar brk: where the heap ends; 0 if unknown, for then the end of the heap's mapping stands in.
    :ivar arg_start: first byte of the arguments.
    :ivar arg_end: one past their last.
    :ivar env_start: first byte of the environment.
    :ivar env_end: one past its last.
    :ivar auxv: the auxiliary vector, word by word, its end included.
    :ivar dumpable: as PR_GET_DUMPABLE has it, or None if that cannot be told from outside.
    :ivar thp_disabled: whether PR_SET_THP_DISABLE is on, or None if the kernel does not say.
    """

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_stack: int
    start_brk: int
    brk: int = 0
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    auxv: tuple[int, ...] = ()
    dumpable: int | None = None
    thp_disabled: bool | None = None
