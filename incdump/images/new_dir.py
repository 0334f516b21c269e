"""An images dir being filled.

The directory is 0700 and every file 0600, since they hold another process's memory. Nothing is ever overwritten: a
directory that holds images is refused, and each file is created with O_EXCL. The order is what makes a dump whole or
nothing: inventory.img comes last, under another name first, so that a directory without it is an unfinished dump,
whatever ended it. `NewImagesDir.discard` takes back exactly what was created.

A tree in a user namespace is restored with the rights of that namespace's root, once CRIU has entered it, and with
those of CRIU's own user, without any privilege, before that. So what is made of such a tree belongs to the former from
the moment that it is made, and the directory is 0710, its group being the caller's: one that may look for files in it
by their names, and may read none but `_READ_BEFORE`, which has no memory in it. Directories above it, where they are
made, are 0711, so that a child finds its parent.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from incdump.errors import BrokenChain, ImagesDirInUse, ImagesError, ImagesIOError, UnfinishedImages
from incdump.images.framing import Magic, create_file, frame, raise_io_error, write_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

INVENTORY = "inventory.img"
PARENT = "parent"
SIDECAR = "incdump.json"
RECEIVED = "incdump-received.json"
"""In a directory that a page server has filled: all pages that there were to come have come. The inventory is with the
other images, where the pages came from."""
FINISHED = frozenset((INVENTORY, RECEIVED))
"""A directory with neither of these is an unfinished dump."""
_UNFINISHED_INVENTORY = "inventory.img.unfinished"
_IMAGE_NAME = re.compile(
    r"criu-(unfinished|gate)|.*\.img(\.unfinished)?|pagemap-.*|pages-.*|stats-dump|incdump\.json|"
    r"incdump-(received\.json(\.unfinished)?|hashes-.*)",
    re.DOTALL,
)
_READ_BEFORE = re.compile(r"timens-\d+\.img")
"""What CRIU reads of a tree in a user namespace before that has its maps."""


class NewImagesDir:
    """A new images dir, until it is finished or discarded.

    As a context manager it is discarded unless `finish` was called. Methods may be called from any thread, each blocks
    on the file system, and names of files are plain names in the directory.

    :ivar path: the directory, absolute.
    :ivar parent: the parent images dir, absolute and resolved, or None.
    """

    def __init__(self, path: Path, parent: Path | None, owner: int | None = None) -> None:
        """Not for callers: see `create`."""
        self.path = path
        self.parent = parent
        self._owner = owner
        self.finished = False
        self._dir_fd = -1
        self._made_dirs: list[Path] = []
        self._made_files: dict[str, None] = {}  # in the order in which they were made
        self._subdirs: list[Path] = []
        self._pages_ids = itertools.count(1)

    @classmethod
    def create(cls, path: str | os.PathLike[str], parent: str | None = None, owner: int | None = None) -> NewImagesDir:
        """Make the directory (and those above it, where missing), or take an existing one that holds no images.

        :param path: the directory.
        :param parent: the parent images dir; relative text is taken from `path`, as CRIU does, and becomes the target
            of the ``parent`` link as it is.
        :param owner: the user whose the images are to be; None: the caller's.
        :raises ImagesDirInUse: there are images in it already.
        :raises BrokenChain: the parent does not exist, or is `path` itself.
        :raises UnfinishedImages: the parent's dump never ended.
        :raises ImagesIOError: the directory cannot be made or written to.
        """
        absolute = Path(os.path.abspath(path))
        new = cls(absolute, None if parent is None else _check_parent(absolute, parent), owner)
        try:
            new._make(parent)
        except OSError as error:
            new.discard()
            raise_io_error(error, "make the images dir", absolute)
        except BaseException:
            new.discard()
            raise
        return new

    @classmethod
    def create_if_possible_for(
        cls, path: str | os.PathLike[str], parent: str | None = None, owner: int | None = None
    ) -> NewImagesDir:
        """The same, but the caller's own where files cannot be given away."""
        try:
            return cls.create(path, parent, owner)
        except ImagesIOError as error:
            if owner is None or error.errno not in (errno.EPERM, errno.EINVAL):
                raise
            return cls.create(path, parent)

    def _make(self, parent: str | None) -> None:
        missing = list(itertools.takewhile(lambda p: not os.path.lexists(p), (self.path, *self.path.parents)))
        for directory in reversed(missing):
            directory.mkdir(mode=0o700)
            self._made_dirs.append(directory)
            if self._owner is not None and directory != self.path:
                directory.chmod(0o711)
        self._dir_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._owner is not None and missing:
            os.fchown(self._dir_fd, self._owner, os.getegid())
            os.fchmod(self._dir_fd, 0o710)
        _refuse_images(self.path, os.listdir(self._dir_fd))
        link = os.readlink(PARENT, dir_fd=self._dir_fd) if self._exists(PARENT) else None
        if link is not None and link != parent:
            raise ImagesDirInUse(
                f"{self.path} has a parent link to {link} already; choose an empty directory", path=self.path
            )
        if parent is not None and link is None:
            os.symlink(parent, PARENT, dir_fd=self._dir_fd)
            self._made_files[PARENT] = None
        if self._owner is not None or not os.access(self.path, os.W_OK | os.X_OK, effective_ids=True):
            # Said now and not after minutes of scanning.
            probe = ".incdump-probe"
            os.close(create_file(probe, dir_fd=self._dir_fd, owner=self._owner))
            os.unlink(probe, dir_fd=self._dir_fd)

    def __enter__(self) -> NewImagesDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished:
            self.discard()

    def __repr__(self) -> str:
        state = "finished" if self.finished else "discarded" if self._dir_fd < 0 else "being filled"
        return f"<NewImagesDir {self.path} {state}, {len(self._made_files)} files>"

    def number_pages_from(self, first: int) -> None:
        """Leave the numbers below this one to somebody else's pages images."""
        self._pages_ids = itertools.count(first)

    def next_pages_id(self) -> int:
        """A number for a pages image that no other in this directory has, from 1."""
        return next(self._pages_ids)

    def open_pages(self, pages_id: int) -> int:
        """Create pages-N.img.

        :param pages_id: N, from `next_pages_id`.
        :returns: its descriptor, for reading and writing, which the caller closes.
        :raises ImagesDirInUse: it exists: somebody else dumps into this directory.
        :raises ImagesIOError: it cannot be created.
        """
        return self.open_file(f"pages-{pages_id}.img")

    def open_file(self, name: str) -> int:
        """Create a file; see `open_pages`."""
        try:
            fd = create_file(name, dir_fd=self._dir_fd, owner=self._owner)
            if self._owner is not None:
                self._share(fd, name)
        except FileExistsError as error:
            raise self._in_use(name) from error
        except OSError as error:
            raise_io_error(error, "create", self.path / name)
        self._made_files[name] = None
        return fd

    def write_image(self, name: str, magic: Magic, records: Iterable[bytes]) -> None:
        """Create an image from its records.

        :raises ImagesDirInUse: it exists: somebody else dumps into this directory.
        :raises ImagesIOError: it cannot be written.
        """
        self.write_raw(name, frame(magic, records))

    def write_raw(self, name: str, data: bytes | Iterable[bytes | memoryview]) -> None:
        """Create a file with these bytes.

        :param data: the file's bytes, whole or in parts.
        :raises ImagesDirInUse: it exists: somebody else dumps into this directory.
        :raises ImagesIOError: it cannot be written.
        """
        if os.path.basename(name) != name:
            raise ValueError(f"not a plain file name: {name!r}")
        # Noted first, so that what is left of a failed write goes too; a file of somebody else is not ours to note.
        is_ours = name in self._made_files
        self._made_files[name] = None
        try:
            parts = [data] if isinstance(data, bytes) else data
            write_file(name, parts, dir_fd=self._dir_fd, shown=self.path / name, owner=self._owner)
        except FileExistsError as error:
            if not is_ours:
                del self._made_files[name]
            raise self._in_use(name) from error

    def files(self) -> list[str]:
        """The files that were created here, the parent link left out."""
        return [name for name in self._made_files if name != PARENT]

    def remove(self, name: str) -> None:
        """Remove a file that was created here, for what it belongs to is not part of the dump after all.

        :raises ImagesIOError: it cannot be removed.
        """
        if name not in self._made_files:
            raise ValueError(f"not created here: {name!r}")
        try:
            os.unlink(name, dir_fd=self._dir_fd)
        except OSError as error:
            raise_io_error(error, "remove", self.path / name)
        del self._made_files[name]

    def make_subdir(self, name: str) -> Path:
        """Make a directory for somebody else's files, to be adopted later.

        :raises ImagesIOError: it cannot be made.
        """
        path = self.path / name
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise_io_error(error, "make a directory", path)
        self._subdirs.append(path)
        return path

    def remove_subdirs(self) -> None:
        """Remove the directories that `make_subdir` made."""
        while self._subdirs:
            shutil.rmtree(self._subdirs.pop(), ignore_errors=True)

    def rename(self, name: str, new: str) -> None:
        """Give a file that was created here its own name.

        :raises ImagesDirInUse: there is one of that name.
        :raises ImagesIOError: it cannot be renamed.
        """
        if self._exists(new):
            raise self._in_use(new)
        try:
            os.rename(name, new, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
        except OSError as error:
            raise_io_error(error, "rename", self.path / name)
        del self._made_files[name]
        self._made_files[new] = None

    def adopt(self, name: str, source: Path) -> None:
        """Take over a file that somebody else made, by renaming it.

        :param source: the file, on the same file system.
        :raises ImagesDirInUse: there is one of that name here.
        :raises ImagesIOError: it cannot be renamed.
        """
        if self._exists(name):
            raise self._in_use(name)
        self._made_files[name] = None
        try:
            if self._owner is not None:
                os.chown(source, self._owner, -1)
                self._share(source, name)
            os.rename(source, name, dst_dir_fd=self._dir_fd)
        except OSError as error:
            del self._made_files[name]
            raise_io_error(error, "take over", source)

    def _share(self, file: int | Path, name: str) -> None:
        if _READ_BEFORE.fullmatch(name):
            os.chown(file, -1, os.getegid())
            os.chmod(file, 0o640)

    def finish(self, inventory: bytes) -> None:
        """Write inventory.img: from now on the dump is whole.

        :param inventory: the file's bytes, see `incdump.images.inventory`.
        :raises ImagesDirInUse: it exists: somebody else dumps into this directory.
        :raises ImagesIOError: it cannot be written.
        """
        self.write_raw(_UNFINISHED_INVENTORY, inventory)
        self.rename(_UNFINISHED_INVENTORY, INVENTORY)
        self.finished = True
        self._close()

    def finish_received(self, summary: bytes) -> None:
        """Write incdump-received.json instead: from now on these pages are whole, and can be a parent's.

        :param summary: the file's bytes.
        :raises ImagesDirInUse: it exists: somebody else dumps into this directory.
        :raises ImagesIOError: it cannot be written.
        """
        self.write_raw(f"{RECEIVED}.unfinished", summary)
        self.rename(f"{RECEIVED}.unfinished", RECEIVED)
        self.finished = True
        self._close()

    def discard(self) -> None:
        """Remove everything that was created, the latest first; never fails, and may be called again.

        After `finish` it still works: inventory.img is then the first to go.
        """
        with suppress(OSError):
            if self._dir_fd < 0 and self._made_files:
                self._dir_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        while self._made_files:
            with suppress(OSError):
                os.unlink(self._made_files.popitem()[0], dir_fd=self._dir_fd)
        self._close()
        self.remove_subdirs()
        while self._made_dirs:
            with suppress(OSError):
                self._made_dirs.pop().rmdir()
        self.finished = False

    def _close(self) -> None:
        fd, self._dir_fd = self._dir_fd, -1
        if fd >= 0:
            os.close(fd)

    def _exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise_io_error(error, "look at", self.path / name)
        return True

    def _in_use(self, name: str) -> ImagesDirInUse:
        return ImagesDirInUse(
            f"{name} appeared in {self.path}: another dump writes there; choose another images dir", path=self.path
        )


def _refuse_images(path: Path, names: list[str]) -> None:
    """Raise `ImagesDirInUse` if any of the names is an image's."""
    found = sorted(name for name in names if _IMAGE_NAME.fullmatch(name))
    if FINISHED & set(found):
        raise ImagesDirInUse(f"{path} already holds a dump; choose another images dir", path=path)
    if found:
        raise ImagesDirInUse(
            f"{path} holds an unfinished dump ({found[0]}, no {INVENTORY}); remove it or choose another images dir",
            path=path,
        )


def _check_parent(path: Path, parent: str) -> Path:
    """Resolve a parent, relative to an images dir that may not exist yet, and prove it whole.

    :returns: the parent, absolute and resolved.
    """
    here = os.path.realpath(path)
    resolved = Path(os.path.realpath(os.path.join(here, parent)))
    if os.fspath(resolved) == here:
        raise BrokenChain(f"{path} cannot be its own parent; give the previous images dir", path=path)
    try:
        is_dir = resolved.is_dir()
        is_finished = is_dir and any((resolved / name).is_file() for name in FINISHED)
    except OSError as error:
        raise_io_error(error, "look into the parent images dir", resolved)
    if not is_dir:
        raise BrokenChain(
            f"the parent images dir {parent} does not exist: it is taken from {path}, so that is {resolved}"
            f"{_parent_hint(here, parent)}",
            path=resolved,
        )
    if not is_finished:
        raise unfinished(resolved)
    return resolved


def _parent_hint(here: str, parent: str) -> str:
    """What to give instead, when the path was given as seen from the working directory."""
    if os.path.isabs(parent) or not os.path.isdir(parent):
        return ""
    return f"; perhaps {os.path.relpath(os.path.realpath(parent), here)} is meant"


def unfinished(path: Path) -> ImagesError:
    """The error for a directory without an inventory. Only where it holds images, and so is an images dir at all, is
    removing it the advice."""
    what = f"{path} holds no finished dump (no {INVENTORY})"
    with suppress(OSError):
        if any(_IMAGE_NAME.fullmatch(name) for name in os.listdir(path)):
            return UnfinishedImages(f"{what}: remove it, and start from an older one", path=path)
    return UnfinishedImages(f"{what}, nor any images: give the directory of a dump", path=path)
