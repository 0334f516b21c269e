"""A target that CRIU does not dump as it is: ``troubled.py KIND`` does what KIND says, then makes a file ``ready``.

What it needs of others (a socket's other end, a file) it finds in its working directory, and under number 0.
"""

import ctypes
import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
kept: list[object] = []
CLONE_NEWUTS, CLONE_NEWUSER = 0x04000000, 0x10000000


def nothing() -> None:
    """It has no trouble of its own."""


def locks() -> None:
    """A file that is locked."""
    file = open("locked", "w")  # noqa: SIM115
    kept.append(file)
    fcntl.flock(file, fcntl.LOCK_EX)


def deleted_but_linked() -> None:
    """An open file whose name is gone, and which has another."""
    file = open("one", "w")  # noqa: SIM115
    kept.append(file)
    os.link("one", "two")
    os.unlink("one")


def big_and_deleted() -> None:
    """An open file without a name that is larger than CRIU keeps by itself."""
    file = open("big", "wb")  # noqa: SIM115
    kept.append(file)
    file.write(bytes(3 << 20))
    file.flush()
    os.unlink("big")


def watches() -> None:
    """Inotify, of a file that has no handle."""
    assert libc.inotify_add_watch(libc.inotify_init(), b"/proc/sys", 2) > 0


def sends_to_a_stranger() -> None:
    """A datagram socket that is connected to somebody else's."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    kept.append(sock)
    sock.connect("strangers")


def connected() -> None:
    """A TCP connection with itself."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    kept.extend((server, client, *server.accept()))


def waited_for() -> None:
    """A TCP connection that nobody has accepted yet."""
    server = socket.create_server(("127.0.0.1", 0))
    kept.extend((server, socket.create_connection(server.getsockname())))


def listens() -> None:
    """A TCP socket."""
    kept.append(socket.create_server(("127.0.0.1", 0)))


def has_an_io_uring() -> None:
    """A ring, whose descriptor nobody may hand on."""
    assert libc.syscall(425, 4, ctypes.create_string_buffer(120)) > 0


def has_a_ruleset() -> None:
    """A file that has no name in any directory, of a kind that CRIU knows nothing of."""
    assert libc.syscall(444, ctypes.create_string_buffer(b"\1" + bytes(7), 8), 8, 0) > 0  # landlock_create_ruleset(2)


def shares_memory() -> None:
    """System V shared memory."""
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(0, 4096, 0o600)
    assert libc.shmat(number, None, 0)
    libc.shmctl(number, 0, None)


def has_a_file() -> None:
    """An open file."""
    file = open("file", "w")  # noqa: SIM115
    kept.append(file)
    file.write("words")
    file.flush()


def has_a_users_namespace() -> None:
    """In a user namespace, root being root there, that does not own its host name."""
    assert libc.unshare(CLONE_NEWUTS) == 0
    assert libc.unshare(CLONE_NEWUSER) == 0
    for name, text in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
        Path(f"/proc/self/{name}").write_text(text)


def has_a_nested_namespace() -> None:
    """A child with a host name of its own."""
    if os.fork() == 0:
        assert libc.unshare(CLONE_NEWUTS) == 0
        Path("ready").touch()
        signal.pause()
    while not Path("ready").exists():
        time.sleep(0.002)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    Path("ready").touch()
    while True:
        signal.pause()
