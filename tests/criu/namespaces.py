"""Tests that run with a process table and mounts of their own, as CRIU wants it (`in_own_namespaces`).

Such a test may take a network of its own as well (`own_network`): every port is free there, and CRIU may lock it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import pickle
import socket
import struct
import tempfile
import traceback
from typing import TYPE_CHECKING, ParamSpec

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")

CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8


def in_own_namespaces(test: Callable[P, None]) -> Callable[P, None]:
    """A test that runs as process 1 of a pid namespace, with mounts and a runtime directory of its own.

    Whatever it started ends with it. It must not need the event loop of its caller.
    """

    @functools.wraps(test)
    def outer(*args: P.args, **kwargs: P.kwargs) -> None:
        if os.geteuid():
            pytest.skip("needs root, for namespaces")
        kind, text = _in_child(lambda: test(*args, **kwargs))
        if kind == "skipped":
            pytest.skip(text)
        if kind == "failed":
            pytest.fail(text, pytrace=False)

    return outer


def own_network() -> None:
    """Move this process, and what it starts from now on, into a network of its own, which is a loopback device."""
    _unshare(CLONE_NEWNET)
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("=16sH22x", b"lo", IFF_UP))


def _in_child(test: Callable[[], None]) -> tuple[str, str]:
    """What became of a test in namespaces: ``passed``, ``skipped`` or ``failed``, and why."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            _unshare(CLONE_NEWPID | CLONE_NEWNS)
            first = os.fork()
            if first == 0:
                os.write(writing, pickle.dumps(_outcome(test)))
            else:
                os.close(writing)
                os.waitpid(first, 0)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # none of the fixtures' and pytest's own ends: they are the parent's
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        return "failed", "the namespaces could not be made, or the test's process was killed"
    kind, text = pickle.loads(said)
    return str(kind), str(text)


def _outcome(test: Callable[[], None]) -> tuple[str, str]:
    try:
        _mount(b"none", b"/", b"", MS_REC | MS_PRIVATE)
        _mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
        with tempfile.TemporaryDirectory(prefix="incdump-run-", ignore_cleanup_errors=True) as name:
            os.environ["INCDUMP_RUNTIME_DIR"] = name
            test()
    except pytest.skip.Exception as error:
        return "skipped", str(error)
    except BaseException:
        return "failed", traceback.format_exc()
    return "passed", ""


_libc = ctypes.CDLL(None, use_errno=True)


def _unshare(flags: int) -> None:
    if _libc.unshare(ctypes.c_int(flags)):
        raise OSError(ctypes.get_errno(), "unshare")


def _mount(source: bytes, target: bytes, kind: bytes, flags: int) -> None:
    if _libc.mount(source, target, kind, ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), f"mount {target.decode()}")
