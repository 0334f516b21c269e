"""Whether CRIU will be able to open images where it restores a tree that was in a user namespace.

It opens them by then as that namespace's root: relative to the images dir, which it has opened before, and from there
by the ``parent`` links. So what has to let this user in is the images dir itself, every directory that such a link
leads through, and each file of the memory. It is tried, by a thread that has this user's rights and no others. What
CRIU reads before, as its own user but without any privilege, is looked at in the same way.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, NoReturn

from incdump._uapi.credentials import become
from incdump.errors import ImagesOutOfReach
from incdump.images.framing import raise_io_error
from incdump.images.new_dir import PARENT
from incdump.images.userns import mapped_root_of
from incdump.model.owner import MappedRoot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_READ_BY_ROOT = re.compile(r"(core|mm|pagemap|pages)-.*\.img")
_READ_BEFORE = re.compile(r"timens-.*\.img")
_MOST_LEVELS = 1 << 16
_FLAGS = os.O_DIRECTORY | os.O_CLOEXEC


class _Shut(Exception):
    """A directory, or a file, that does not let the user in."""

    def __init__(self, path: str, images: str | None = None) -> None:
        """:param images: the images dir whose owner is another one; None: it is a directory that cannot be entered."""
        super().__init__(path)
        self.path = path
        self.images = images


def refuse_out_of_reach(path: Path, root: MappedRoot, pid: int | None = None) -> None:
    """Make sure that a checkpoint in an images dir can be restored, as far as its files' owners go. Blocks.

    :param path: the images dir, which may be empty still.
    :param root: of the tree's user namespace.
    :param pid: the process that is to be dumped, for the error.
    :raises ImagesOutOfReach: something would be shut to this user.
    :raises ImagesIOError: it cannot be looked at.
    """
    try:
        with ExitStack() as stack:
            fd = os.open(path, os.O_RDONLY | _FLAGS)
            stack.callback(os.close, fd)
            _as_user(root, lambda: _walk(fd, os.fspath(path)))
            ourselves = MappedRoot(os.geteuid(), os.getegid())
            _as_user(ourselves, lambda: _look_into(fd, os.fspath(path), _READ_BEFORE))
    except _Shut as shut:
        _refuse(shut, root, pid)
    except OSError as error:
        raise_io_error(error, "look at", path)


def refuse_shut(path: Path, root: MappedRoot, pid: int) -> None:
    """Make sure that images dirs which are to be made in a directory can be found there; see `refuse_out_of_reach`.

    :param path: the directory; one that does not exist is made so that they can.
    """
    try:
        with ExitStack() as stack:
            fd = os.open(path, os.O_RDONLY | _FLAGS)
            stack.callback(os.close, fd)
            _as_user(root, lambda: _enter(fd, os.fspath(path)))
    except FileNotFoundError:
        return
    except _Shut as shut:
        _refuse(shut, root, pid)
    except OSError as error:
        raise_io_error(error, "look at", path)


def check_readable(path: Path) -> None:
    """Make sure that CRIU will be able to open a checkpoint, and what it stands on. Blocks.

    :raises ImagesError: it will not, or the images dir is damaged.
    """
    root = mapped_root_of(path)
    if root is not None:
        refuse_out_of_reach(path, root)


def _refuse(shut: _Shut, root: MappedRoot, pid: int | None) -> NoReturn:
    who = "its tree was" if pid is None else f"process {pid} is"
    to_do = (
        f"give that user these images (`chown -R {root.uid} {shut.images}`)"
        if shut.images is not None
        else "choose a directory that does not exist yet, in one that others may enter, or have them enter this one "
        f"(`chmod o+x {shut.path}`)"
    )
    raise ImagesOutOfReach(
        f"{who} in a user namespace whose root is user {root.uid} here, CRIU restores it with that user's rights, and "
        f"{shut.path} is shut to it: {to_do}",
        pid=pid,
        path=shut.path,
    ) from None


def _as_user(user: MappedRoot, job: Callable[[], None]) -> None:
    """Do something with a user's rights; raises what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            become(user.uid, user.gid)
            job()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="as-user", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _walk(fd: int, path: str) -> None:
    """From an images dir to its oldest parent.

    :raises _Shut: at the first that is shut.
    """
    with ExitStack() as stack:
        for _ in range(_MOST_LEVELS):
            _look_into(fd, path, _READ_BY_ROOT)
            try:
                link = os.readlink(PARENT, dir_fd=fd)
            except OSError:  # there is no parent
                return
            try:
                fd, path = _follow(fd, path, link)
            except FileNotFoundError:  # nor this one: whoever reads it says so
                return
            stack.callback(os.close, fd)


def _look_into(fd: int, path: str, files: re.Pattern[str]) -> None:
    _enter(fd, path)
    for name in os.listdir(fd):
        if files.fullmatch(name):
            try:
                os.close(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=fd))
            except PermissionError:
                raise _Shut(f"{path}/{name}", path) from None


def _enter(fd: int, path: str) -> None:
    try:
        os.close(os.open(".", os.O_PATH | os.O_CLOEXEC, dir_fd=fd))
    except PermissionError:
        raise _Shut(path) from None


def _follow(fd: int, path: str, link: str) -> tuple[int, str]:
    """Open a parent, as CRIU will; its descriptor, the caller's to close, and its path."""
    with ExitStack() as stack:
        at, where = fd, path
        for part in (["/"] if link.startswith("/") else []) + [part for part in link.split("/") if part]:
            try:
                at = os.open(part, os.O_PATH | _FLAGS, dir_fd=at)
            except PermissionError:
                raise _Shut(where) from None
            stack.callback(os.close, at)
            where = os.path.normpath(os.path.join(where, part))
        try:
            return os.open(".", os.O_RDONLY | _FLAGS, dir_fd=at), where
        except PermissionError:
            raise _Shut(where, where) from None
