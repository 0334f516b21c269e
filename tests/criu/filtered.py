"""Becomes another program, under a seccomp filter as containers and supervisors have them.

python filtered.py listener PROGRAM [ARGUMENT...]     somebody listens to its system calls already
python filtered.py no-scan PROGRAM [ARGUMENT...]      it has no PAGEMAP_SCAN, as on kernels before 6.7
"""

import errno
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from incdump._uapi.arch import ARCH
from incdump._uapi.pagemap_scan import PAGEMAP_SCAN
from incdump.criu import leashed

NEVER = 0xDEADBEEF
SECCOMP_RET_ERRNO = 0x00050000

if __name__ == "__main__":
    kind, *program = sys.argv[1:]
    if kind == "listener":
        listener = leashed.install(ARCH.sys_seccomp, (ARCH.sys_ioctl, NEVER))
        os.set_inheritable(listener, True)
    else:
        leashed.SECCOMP_RET_USER_NOTIF = SECCOMP_RET_ERRNO | errno.ENOTTY
        leashed.SECCOMP_FILTER_FLAG_NEW_LISTENER = 0
        leashed.install(ARCH.sys_seccomp, (ARCH.sys_ioctl, PAGEMAP_SCAN))
    os.execv(program[0], program)
