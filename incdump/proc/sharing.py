"""Whether two processes run in one address space (vfork(2), clone(2) with CLONE_VM)."""

from __future__ import annotations

from incdump._uapi.arch import ARCH
from incdump._uapi.libc import syscall

_KCMP_VM = 1


def shares_address_space(pid: int, other: int) -> bool:
    """Ask kcmp(2); False where it cannot be told (another user's process, a kernel without it)."""
    if other <= 0:
        return False
    try:
        return syscall(ARCH.sys_kcmp, pid, other, _KCMP_VM, 0, 0) == 0
    except OSError:
        return False
