"""Becomes another program, some of whose system calls are answered by who started it.

    python -I -S leashed.py SOCKET NUMBER_OF_SECCOMP CALL:SECOND[,...] PROGRAM [ARGUMENT...]

Installs a seccomp filter that reports calls (by number) whose second argument is the given one, and lets everything
else through, sends the filter's listener over the socket (a descriptor number), and executes the program. It is started
as a file, without site-packages and without incdump: Python's start is on the way to every checkpoint.
"""

import array
import ctypes
import os
import socket
import struct
import sys

SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
SECCOMP_RET_USER_NOTIF, SECCOMP_RET_ALLOW = 0x7FC00000, 0x7FFF0000
PR_SET_NO_NEW_PRIVS = 38
LD_W_ABS, JEQ_K, RET_K = 0x20, 0x15, 0x06
NUMBER, SECOND_ARGUMENT = 0, 24  # offsets in struct seccomp_data; the low half of the argument


def install(seccomp: int, *calls: tuple[int, int]) -> int:
    """Install the filter for calls with a second argument; returns its listener."""
    instructions = [
        instruction
        for call, argument in calls
        for instruction in (
            (LD_W_ABS, 0, 0, NUMBER),
            (JEQ_K, 0, 3, call),
            (LD_W_ABS, 0, 0, SECOND_ARGUMENT),
            (JEQ_K, 0, 1, argument),
            (RET_K, 0, 0, SECCOMP_RET_USER_NOTIF),
        )
    ]
    instructions.append((RET_K, 0, 0, SECCOMP_RET_ALLOW))
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    arguments = SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, ctypes.addressof(header)
    listener = libc.syscall(*map(ctypes.c_long, (seccomp, *arguments)))
    if listener < 0:  # not root
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = libc.syscall(*map(ctypes.c_long, (seccomp, *arguments)))
    if listener < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(listener)


def main() -> None:
    """See the module's text."""
    fd, seccomp, calls, *program = sys.argv[1:]
    numbers = [int(number) for call in calls.split(",") for number in call.split(":")]
    with socket.socket(fileno=int(fd)) as channel:
        try:
            listener = install(int(seccomp), *zip(numbers[0::2], numbers[1::2], strict=True))
        except OSError as error:
            channel.sendall(struct.pack("=i", error.errno or 1))
            sys.exit(1)
        fds = array.array("i", [listener])
        channel.sendmsg([struct.pack("=i", 0)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        os.close(listener)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
