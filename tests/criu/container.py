"""A process in a user namespace, as a rootless container has it: mapped users, its own pids, mounts and root directory.

Run as a program it becomes such a container: its working directory is the root directory, its arguments are the program
and its arguments. Standard input, output and error are ``commands``, ``words`` and ``errors`` in there. It writes its
maps by a child that stays outside. It ends with the program.
"""

from __future__ import annotations

import ctypes
import os
import sys

FIRST, COUNT = 100_000, 65_536
"""The users outside that are 0, 1, … inside."""

_NEW = 0x10000000 | 0x20000000 | 0x20000 | 0x8000000 | 0x4000000  # user, pid, mnt, ipc, uts
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_REC, _PRIVATE, _BIND, _DETACH = 0x4000, 1 << 18, 0x1000, 2
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), what)


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None), target)


def _enter(first: int) -> None:
    to_child, told = os.pipe(), os.pipe()
    ours = os.getpid()
    child = os.fork()
    if child == 0:
        os.read(to_child[0], 1)
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{ours}/{name}", "w", encoding="ascii") as file:
                file.write(f"0 {first} {COUNT}" if first else "0 0 1")
        os.write(told[1], b"x")
        os._exit(0)
    _check(_libc.unshare(_NEW), "unshare")
    os.write(to_child[1], b"x")
    os.read(told[0], 1)
    os.waitpid(child, 0)
    for fd in (*to_child, *told):
        os.close(fd)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _change_root() -> None:
    here = os.getcwd()
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount(here, here, "", _BIND)
    os.chdir(here)
    _mount("proc", f"{here}/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")


def main(first: int, command: list[str]) -> None:
    """:param first: the user outside that is root inside."""
    _enter(first)
    inside = os.fork()
    if inside:
        _, status = os.waitpid(inside, 0)
        sys.exit(os.waitstatus_to_exitcode(status) & 255)
    os.setsid()
    _change_root()
    for number, (name, flags) in enumerate(
        (("commands", os.O_RDWR), ("words", os.O_WRONLY | os.O_APPEND), ("errors", os.O_WRONLY | os.O_APPEND))
    ):
        fd = os.open(name, flags)
        if fd != number:
            os.dup2(fd, number)
            os.close(fd)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
