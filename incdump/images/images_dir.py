"""An images dir to read from, incdump's or CRIU's, alone or with the parents it stands on.

A chain is read as CRIU reads it. The newest pagemap decides: a page that it does not list is not in the process (zero,
or the file's own contents), whatever the parents hold. A page that it lists as in the parent is looked up there, by
the same rule, except that there it must be found::

    pagemap-42.img          0x1000 PRESENT   0x2000 PARENT   0x3000 PARENT
    parent/pagemap-42.img                    0x2000 PRESENT  0x3000 PARENT
    parent/parent/pagemap-42.img                             0x3000 PRESENT

Whole runs are looked up at a time, level by level, and what is neighbours in a pages image is read in one system call.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from incdump.errors import BadImage, BrokenChain, NotInImages, UnfinishedImages
from incdump.images.framing import raise_io_error, read_file
from incdump.images.inventory import Inventory, decode_inventory
from incdump.images.new_dir import FINISHED, INVENTORY, PARENT, SIDECAR, unfinished
from incdump.images.page_reads import cut, read_pieces
from incdump.images.pagemap import Pagemap, PagemapSummary, decode_pagemap, summarise
from incdump.images.stats import decode_stats
from incdump.model.runs import (
    PAGE_SIZE,
    PE_PARENT,
    PE_PRESENT,
    Entries,
    Runs,
    canonical,
    empty_regions,
    empty_runs,
    run,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from incdump.model.stats import DumpStats

Kind = Literal["pagemap", "pagemap-shmem"]
_PAGEMAP_NAME = re.compile(r"(pagemap|pagemap-shmem)-([0-9]{1,20})\.img")
_CACHED_PAGEMAPS = 16
_NO_PAGEMAP = Pagemap(0, empty_regions())


class ImagesDir:
    """An images dir, open for reading.

    Pagemaps are decoded when they are first asked for, the latest ones kept. Files are opened for each call and not
    held. Any number of threads may read.

    :ivar path: the directory, as given.
    :ivar identity: its device and inode.
    """

    def __init__(self, path: str | os.PathLike[str], *, must_be_complete: bool = True) -> None:
        """Open a directory.

        :param path: the directory.
        :param must_be_complete: refuse one without inventory.img (and without incdump-received.json, which incdump's
            page server leaves), and parents without, too. CRIU itself reads such parents, and a CRIU page server makes
            them.
        :raises UnfinishedImages: there is neither.
        :raises ImagesIOError: there is no such directory, or it cannot be read.
        """
        self.path = Path(path)
        self._must_be_complete = must_be_complete
        self._parent: ImagesDir | None = None
        self._pagemaps: dict[tuple[Kind, int], Pagemap | None] = {}
        try:
            self.identity = _identify(self.path)
            self._names = frozenset(os.listdir(self.path))
        except OSError as error:
            raise_io_error(error, "read the images dir", self.path)
        if must_be_complete and not FINISHED & self._names:
            raise unfinished(self.path)

    def __repr__(self) -> str:
        parent = " with a parent" if PARENT in self._names else ""
        return f"<ImagesDir {self.path}{parent}, pids {self.pids()}, shared memory {self.shmem_ids()}>"

    @property
    def parent(self) -> ImagesDir | None:
        """The parent images dir, or None if there is none.

        :raises BrokenChain: the ``parent`` link leads nowhere.
        :raises UnfinishedImages: the parent has no inventory.img.
        """
        if self._parent is None and PARENT in self._names:
            link = self.path / PARENT
            if not os.path.isdir(link):
                target = os.readlink(link) if link.is_symlink() else os.fspath(link)
                raise BrokenChain(
                    f"{link} leads to {target}, which is no images dir: put it back, or start a new chain", path=link
                )
            self._parent = ImagesDir(os.path.realpath(link), must_be_complete=self._must_be_complete)
        return self._parent

    def levels(self) -> Iterator[ImagesDir]:
        """This directory, its parent, the parent's parent, and so on.

        :raises BrokenChain: a parent is missing, or the links go in a circle.
        :raises UnfinishedImages: a parent has no inventory.img.
        """
        seen = set()
        level: ImagesDir | None = self
        while level is not None:
            if level.identity in seen:
                raise BrokenChain(f"the parent links of {self.path} lead back to {level.path}", path=level.path)
            seen.add(level.identity)
            yield level
            level = level.parent

    def names(self) -> list[str]:
        """What was in the directory when it was opened."""
        return list(self._names)

    def pids(self) -> list[int]:
        """The processes with a pagemap here, ascending, by their pid in the tree's pid namespace."""
        return self._ids("pagemap")

    def shmem_ids(self) -> list[int]:
        """The shared memory segments with a pagemap here, ascending."""
        return self._ids("pagemap-shmem")

    def has(self, kind: Kind, number: int) -> bool:
        """Whether there is a pagemap of a process or segment here."""
        return self.image_path(kind, number).name in self._names

    def _ids(self, kind: Kind) -> list[int]:
        matches = (_PAGEMAP_NAME.fullmatch(name) for name in self._names)
        return sorted(int(match[2]) for match in matches if match and match[1] == kind)

    def inventory(self) -> Inventory:
        """What inventory.img says.

        :raises BadImage: it is damaged.
        :raises UnfinishedImages: there is none.
        """
        path = self.path / INVENTORY
        data = read_file(path)
        if data is None:
            raise unfinished(self.path)
        return decode_inventory(data, path)

    def stats(self) -> DumpStats | None:
        """What stats-dump says, or None without one.

        :raises BadImage: it is damaged.
        """
        path = self.path / "stats-dump"
        data = read_file(path)
        return None if data is None else decode_stats(data, path)

    def meta(self) -> dict[str, Any] | None:
        """The contents of incdump.json, or None: CRIU wrote the directory.

        :raises BadImage: it is no JSON object.
        """
        return read_meta(self.path)

    def page_server(self) -> str | None:
        """Where the pages of these images were sent, for people; None if they are here.

        :raises BadImage: incdump.json is damaged.
        """
        server = (self.meta() or {}).get("page_server")
        return server if isinstance(server, str) else None

    def pagemap(self, pid: int) -> Entries | None:
        """The entries of a process, or None: this directory has no pagemap of it.

        :raises BadImage: the pagemap is damaged.
        """
        found = self.load("pagemap", pid)
        return None if found is None else found.entries

    def shmem_pagemap(self, shmem_id: int) -> Entries | None:
        """The entries of a shared memory segment (addresses are offsets in it), or None.

        :raises BadImage: the pagemap is damaged.
        """
        found = self.load("pagemap-shmem", shmem_id)
        return None if found is None else found.entries

    def covered(self, pid: int) -> Runs:
        """The pages of a process that this directory answers for: present here or promised by the parent.

        :raises NotInImages: it holds nothing of the process.
        :raises BadImage: the pagemap is damaged.
        """
        found = self.summary("pagemap", pid)
        if found is None:
            raise self._not_here("pagemap", pid)
        return found.covered

    def summary(self, kind: Kind, number: int) -> PagemapSummary | None:
        """The summary of a pagemap image, or None if there is no such pagemap. Nothing of it is kept.

        :raises BadImage: it is damaged.
        """
        path = self.image_path(kind, number)
        data = read_file(path)
        return None if data is None else summarise(data, path)

    def read(self, pid: int, vaddr: int, length: int) -> bytes:
        """Read a process's memory as it was; pages of it that are not in the images read as zeros.

        :param vaddr: any address, bytes.
        :param length: any length, bytes.
        :raises NotInImages: the directory holds nothing of the process.
        :raises BrokenChain: a page is not where the images promise it.
        :raises BadImage: an image is damaged.
        """
        lo = vaddr & -PAGE_SIZE
        hi = (vaddr + length + PAGE_SIZE - 1) & -PAGE_SIZE
        out = np.empty(hi - lo, np.uint8)
        self.read_pages(pid, run(lo, hi), out)
        return out[vaddr - lo : vaddr - lo + length].tobytes()

    def read_pages(self, pid: int, runs: Runs, out: NDArray[np.uint8]) -> Runs:
        """Read whole pages of a process through the chain.

        :param runs: the pages wanted.
        :param out: shape (bytes,), takes the pages back to back; zeros where a page is absent.
        :returns: the pages that are absent.
        :raises NotInImages: the directory holds nothing of the process.
        :raises BrokenChain: a page is not where the images promise it.
        :raises BadImage: an image is damaged.
        """
        return self._read("pagemap", pid, runs, out)

    def read_shmem_pages(self, shmem_id: int, runs: Runs, out: NDArray[np.uint8]) -> Runs:
        """Read whole pages of a shared memory segment; see `read_pages`, with offsets for addresses."""
        return self._read("pagemap-shmem", shmem_id, runs, out)

    def load(self, kind: Kind, number: int) -> Pagemap | None:
        """A pagemap image, decoded, or None if there is no such pagemap.

        :raises BadImage: it is damaged.
        """
        key = (kind, number)
        try:
            return self._pagemaps[key]
        except KeyError:
            pass
        path = self.image_path(kind, number)
        data = read_file(path)
        found = None if data is None else Pagemap(*decode_pagemap(data, path))
        while len(self._pagemaps) >= _CACHED_PAGEMAPS:
            self._pagemaps.pop(next(iter(self._pagemaps)), None)
        self._pagemaps[key] = found
        return found

    def image_path(self, kind: Kind, number: int) -> Path:
        """Where a pagemap image is, or would be."""
        return self.path / f"{kind}-{number}.img"

    def pages_path(self, pages_id: int) -> Path:
        """Where a pages image is, or would be."""
        return self.path / f"pages-{pages_id}.img"

    def _read(self, kind: Kind, number: int, runs: Runs, out: NDArray[np.uint8]) -> Runs:
        sizes = runs[:, 1] - runs[:, 0]
        if int(sizes.sum()) != out.nbytes:
            raise ValueError(f"{out.nbytes} bytes of room for runs of {int(sizes.sum())} bytes")
        # What is still wanted: start, end, and the place in out.
        wanted = np.column_stack((runs, np.cumsum(sizes) - sizes))
        absent = empty_runs()
        for depth, level in enumerate(self.levels()):
            found = level.load(kind, number)
            if not depth and found is None:
                raise self._not_here(kind, number)
            pieces, missing = cut(wanted, found or _NO_PAGEMAP)
            if depth and len(missing):
                raise level.lacks(kind, number, int(missing[0, 0]), no_pagemap=found is None)
            if len(missing):
                absent = canonical(missing[:, :2])
                out[:] = 0
            wanted = _take(level, found or _NO_PAGEMAP, pieces, out)
            if not len(wanted):
                return absent
            _refuse_orphans(level, kind, number, int(wanted[0, 0]))
        raise AssertionError("a level without a parent was to be the last")

    def _not_here(self, kind: Kind, number: int) -> NotInImages:
        if kind == "pagemap":
            what, held, pid = f"process {number}", self.pids(), number
        else:
            what, held, pid = f"shared memory {number}", self.shmem_ids(), None
        others = (
            f"there are {', '.join(map(str, held[:5]))}{' and others' if len(held) > 5 else ''}" if held else "none"
        )
        return NotInImages(f"{self.path} holds nothing of {what} ({others})", path=self.path, pid=pid)

    def lacks(self, kind: Kind, number: int, vaddr: int, *, no_pagemap: bool) -> BrokenChain:
        """The error for a page that a child expects here in vain."""
        what = f"has no {kind}-{number}.img" if no_pagemap else f"lacks the page at {vaddr:#x} of {kind}-{number}.img"
        return BrokenChain(
            f"the parent images dir {self.path} {what}, which its child relies on: start a new chain",
            path=self.image_path(kind, number),
            pid=number if kind == "pagemap" else None,
            vaddr=vaddr,
        )


def _take(level: ImagesDir, pagemap: Pagemap, pieces: NDArray[np.uint64], out: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Read the pieces (start, end, place, entry) that a level holds, and return those that its parent holds."""
    row = pieces[:, 3].astype(np.int64)
    flags = pagemap.entries[row, 2]
    here = (flags & np.uint64(PE_PRESENT)) != 0
    above = (flags & np.uint64(PE_PARENT)) != 0
    if not (here | above).all():
        raise lazy_left(level.path, int(pieces[int((~(here | above)).argmax()), 0]))
    if here.any():
        held, row = pieces[here], row[here]
        offsets = pagemap.offsets[row] + held[:, 0] - pagemap.start[row]
        read_pieces(level.pages_path(pagemap.pages_id), offsets, held[:, 2], held[:, 1] - held[:, 0], out)
    return pieces[above, :3]


def _refuse_orphans(level: ImagesDir, kind: Kind, number: int, vaddr: int) -> None:
    """Raise `BrokenChain` if a level without a parent has a page left to its parent."""
    if PARENT not in level.names():
        raise orphan(level, kind, number, vaddr)


def orphan(level: ImagesDir, kind: Kind, number: int, vaddr: int) -> BrokenChain:
    """The error for a page that is said to be in the parent of a directory that has none."""
    return BrokenChain(
        f"{level.image_path(kind, number)} leaves the page at {vaddr:#x} to a parent, but there is no parent link: "
        "put it back, or start a new chain",
        path=level.image_path(kind, number),
        pid=number if kind == "pagemap" else None,
        vaddr=vaddr,
    )


def lazy_left(path: Path, vaddr: int) -> UnfinishedImages:
    """The error for a page that a lazy dump never wrote."""
    return UnfinishedImages(
        f"the page at {vaddr:#x} was left to a lazy-pages server and is not in {path}: dump again without lazy pages",
        path=path,
        vaddr=vaddr,
    )


def _identify(path: Path) -> tuple[int, int]:
    """The device and inode of a directory."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def read_meta(directory: Path) -> dict[str, Any] | None:
    """The contents of a directory's incdump.json, finished or not; see `ImagesDir.meta`."""
    path = directory / SIDECAR
    data = read_file(path)
    if data is None:
        return None
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadImage(f"{path} is damaged: {error}", path=path) from error
    if not isinstance(meta, dict):
        raise BadImage(f"{path} is damaged: it is no JSON object", path=path)
    return meta
