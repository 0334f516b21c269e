"""The limits that a process meets: descriptors, threads and processes; how they are raised, and what they are called.

Each process of a tree takes a few descriptors while it is dumped. The usual soft RLIMIT_NOFILE of 1,024 is there for
programs that use select(2); whoever does not may raise it to the hard one (systemd does so for its services). The
commands and the holder do (`raise_open_files`), and what they start has the old limit back (`as_before`). A program
that uses the library keeps its own.

Where a limit is the end all the same, the kernel says EMFILE, ENFILE or EAGAIN, and Python "can't start new thread":
`naming_limits` makes an `incdump.errors.ResourceLimit` of that, which has the limit's name, its value, and what to do.

This module is stdlib only: the small holder process uses it.
"""

from __future__ import annotations

import errno
import functools
import os
import resource
import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from incdump.errors import IncdumpError, ResourceLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

P = ParamSpec("P")
T = TypeVar("T")

_NO_THREAD = "can't start new thread"
_LOWERED = 'ulimit -Sn "$0" && exec "$@"'

_before: list[int] = []
"""The soft RLIMIT_NOFILE that this process was started with, if it was raised since."""


def raise_open_files() -> None:
    """Raise the soft RLIMIT_NOFILE of this process to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    with suppress(OSError, ValueError):  # then it stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        _before[:] = [soft]


def limit_is_near(left: int) -> bool:
    """Whether this process can open no more than so many descriptors: the kernel gives the least number that is free.

    :raises OSError: it can open none.
    """
    least = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(least)
    return least + left > resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def as_before(command: Sequence[str]) -> list[str]:
    """A command line that runs a program with the soft RLIMIT_NOFILE that this process was started with.

    By way of a shell, which the program takes the place of: a function that is run between fork and exec is not safe
    in a program with threads.

    :raises OSError: there is no such program, or it cannot be executed.
    """
    if not _before or resource.getrlimit(resource.RLIMIT_NOFILE)[0] == _before[0]:
        return list(command)
    if shutil.which(command[0]) is None:
        number = errno.EACCES if os.path.exists(command[0]) else errno.ENOENT
        raise OSError(number, os.strerror(number), command[0])
    return ["/bin/sh", "-c", _LOWERED, str(_before[0]), *command]


@contextmanager
def naming_limits() -> Iterator[None]:
    """What fails in here because of a limit is told by the limit's name.

    :raises incdump.errors.ResourceLimit: in the place of that.
    """
    try:
        yield
    except (OSError, RuntimeError, IncdumpError) as error:
        if (named := limit_of(error)) is not None:
            raise named from error
        raise


def names_limits(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """`naming_limits` for all that an asynchronous function does."""

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with naming_limits():
            return await function(*args, **kwargs)

    return call


@contextmanager
def starting() -> Iterator[None]:
    """A process is started in here: what the kernel says with EAGAIN is a limit then, and nothing else.

    :raises incdump.errors.ResourceLimit: in the place of that.
    """
    try:
        yield
    except BlockingIOError as error:
        raise _of_tasks(error.errno) from error


def limit_of(error: BaseException, *, is_holder: bool = False) -> ResourceLimit | None:
    """The limit that is behind an error, if there is one.

    :param is_holder: this is the holder process, which is started by others.
    """
    if isinstance(error, ResourceLimit):
        return None
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return _of_tasks(errno.EAGAIN)
    number = getattr(error, "errno", None)
    if not isinstance(error, OSError | IncdumpError):
        return None
    if number == errno.EMFILE:
        return _of_open_files(is_holder)
    if number == errno.ENFILE:
        most = _number_in("/proc/sys/fs/file-max")
        return ResourceLimit(
            f"no file can be opened any more on this machine: fs.file-max is {most}; "
            "raise it (sysctl -w fs.file-max=NUMBER), or end programs that hold many files open",
            limit="fs.file-max",
            errno=number,
        )
    return None


def _of_open_files(is_holder: bool) -> ResourceLimit:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name = "the holder" if is_holder else "incdump"
    who = f"process {os.getpid()} ({name}) has too many files open: RLIMIT_NOFILE is {_text(soft)}"
    if is_holder:
        what = "end it (incdump untrack --all), and raise the limit of the incdump that starts the next one (ulimit -n)"
    elif soft == hard:
        what = "raise it before incdump is started, as root (ulimit -n NUMBER; LimitNOFILE= of a systemd unit)"
    else:
        what = f"raise it before incdump is started (ulimit -n {_text(hard)}), or in your program (resource.setrlimit)"
    return ResourceLimit(f"{who}; {what}", limit="RLIMIT_NOFILE", errno=errno.EMFILE)


def _of_tasks(number: int | None) -> ResourceLimit:
    """The limits of threads and processes; the kernel says EAGAIN for each of them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    told = [f"RLIMIT_NPROC is {_text(soft)} for user {os.getuid()} (ulimit -u)"]
    in_group = _pids_max()
    if in_group is not None:
        told.append(f"pids.max of its cgroup is {in_group}")
    told.append(f"kernel.threads-max is {_number_in('/proc/sys/kernel/threads-max')}")
    return ResourceLimit(
        f"incdump can start no further thread or process: {', '.join(told)}; raise the one that is reached",
        limit="RLIMIT_NPROC",
        errno=number,
    )


def _pids_max() -> str | None:
    """The least pids.max on the way from this process's cgroup to the root; None: there is none, or it is not seen."""
    found: list[int] = []
    with suppress(OSError):
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
        for _, controllers, path in lines:
            if controllers and "pids" not in controllers.split(","):
                continue
            base = "/sys/fs/cgroup/pids" if controllers else "/sys/fs/cgroup"
            while path not in ("", "/"):
                number = _number_in(f"{base}{path}/pids.max")
                if number.isdigit():
                    found.append(int(number))
                path = os.path.dirname(path)
    return str(min(found)) if found else None


def _number_in(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "not known"


def _text(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
