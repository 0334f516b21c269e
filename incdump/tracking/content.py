"""Telling what changed by what is there: a hash of every page, compared with the parent's.

It needs nothing of the kernel, and misses no write by whatever way it came: the last resort where no tracker works, and
the way for single mappings and segments that no tracker can vouch for. It costs a read of all memory.

The rule that keeps it right while the target runs: a hash that is stored was made from the very bytes in the pages
image. So a page is read twice, once to see whether it changed and once to be written, and what is stored is the hash of
the second reading; a page that is left to the parent keeps the parent's hash, which the first reading was equal to.

Hashes are XXH3, 128 bits, with a secret seed that a chain of images draws at random when it begins (XXH3 is no
cryptographic hash; the seed keeps a target from preparing two pages that hash alike).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, cast

import numpy as np
import xxhash

from incdump.errors import BadImage
from incdump.model.runs import PAGE_SIZE, empty_runs, member, page_addresses, page_count, runs_of_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from incdump.model.runs import Runs

NAME = "content"
BATCH_PAGES = 1024
"""Pages read and hashed in one go: 4 MiB."""

_MAGIC = b"incdumph"
_HEADER = struct.Struct("<8sQQ")
_ROW = np.dtype([("vaddr", "<u8"), ("low", "<u8"), ("high", "<u8")])


def new_seed() -> int:
    """A fresh secret for a chain of images."""
    return int.from_bytes(os.urandom(8), "little")


def hash_pages(buffer: NDArray[np.uint8], seed: int) -> NDArray[np.uint64]:
    """Hash pages that lie back to back.

    The loop over pages runs in C (map over the rows of an array, joined into one buffer).

    :param buffer: shape (n * 4096,), uint8.
    :returns: shape (n, 2), uint64.
    """
    rows = buffer.reshape(-1, PAGE_SIZE)
    digest = xxhash.xxh3_128_digest
    joined = b"".join(map(digest, cast("Iterable[Buffer]", rows), repeat(seed)))
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


@dataclass(frozen=True)
class HashTable:
    """The hashes of the pages that an images dir holds for one process or segment, itself or by its parents.

    :ivar seed: of the chain.
    :ivar rows: ``vaddr``, ``low``, ``high``; ascending by address.
    """

    seed: int
    rows: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self) -> tuple[bytes, memoryview]:
        """The table as a file, in parts."""
        return _HEADER.pack(_MAGIC, self.seed, len(self.rows)), self.rows.view(np.uint8).data

    @classmethod
    def decode(cls, data: bytes, path: str) -> HashTable:
        """Read a table.

        :raises incdump.errors.BadImage: it is not one.
        """
        if len(data) < _HEADER.size:
            raise BadImage(f"{path} is cut short; dump without --prev-images-dir", path=path)
        magic, seed, count = _HEADER.unpack_from(data)
        if magic != _MAGIC or len(data) - _HEADER.size != count * _ROW.itemsize:
            raise BadImage(f"{path} is no table of page hashes, or damaged; dump without --prev-images-dir", path=path)
        rows = np.frombuffer(data, _ROW, count, _HEADER.size)
        vaddr = np.ascontiguousarray(rows["vaddr"])
        bad = (vaddr & np.uint64(PAGE_SIZE - 1)) | (vaddr >> np.uint64(63))
        if bad.any() or (vaddr[1:] <= vaddr[:-1]).any():
            raise BadImage(f"{path} is damaged or out of order; dump without --prev-images-dir", path=path)
        return cls(seed, rows)

    def equal(self, addresses: NDArray[np.uint64], hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """For each page, whether the table has it, with this hash.

        :param addresses: shape (n,).
        :param hashes: shape (n, 2).
        """
        at, same = self._find(addresses)
        if same.any():
            row = self.rows[at]
            same &= (row["low"] == hashes[:, 0]) & (row["high"] == hashes[:, 1])
        return same

    def has(self, addresses: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """For each page, whether the table has it."""
        return self._find(addresses)[1]

    def _find(self, addresses: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where each page is, or would be, and whether it is there."""
        if not len(self.rows):
            return np.zeros(len(addresses), np.int64), np.zeros(len(addresses), bool)
        at = np.minimum(self._vaddr.searchsorted(addresses), len(self.rows) - 1)
        return at, self._vaddr[at] == addresses

    @cached_property
    def _vaddr(self) -> NDArray[np.uint64]:
        """The addresses; contiguous, unlike the table's column."""
        return np.ascontiguousarray(self.rows["vaddr"])

    def known(self) -> Runs:
        """The pages that it has."""
        return runs_of_pages(self._vaddr)


class HashCollector:
    """Gathers the hashes of one process or segment during a dump: of pages written, and of pages left to the parent."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._pieces: list[NDArray[np.void]] = []

    def add(self, addresses: NDArray[np.uint64], hashes: NDArray[np.uint64]) -> None:
        """Note hashes; safe to call from several threads.

        :param addresses: shape (n,).
        :param hashes: shape (n, 2).
        """
        rows = np.empty(len(addresses), _ROW)
        rows["vaddr"], rows["low"], rows["high"] = addresses, hashes[:, 0], hashes[:, 1]
        self._pieces.append(rows)

    def table(self, drop: Runs | None = None) -> HashTable:
        """What was gathered since the last call, in order; of a page noted twice, the later: it was read to be written.

        :param drop: pages to leave out: they could not be read after all.
        """
        pieces, self._pieces = self._pieces, []
        rows = np.concatenate([np.empty(0, _ROW), *pieces])
        pieces.clear()
        order = np.argsort(rows["vaddr"], kind="stable")
        vaddr = rows["vaddr"][order]
        kept = np.append(vaddr[1:] != vaddr[:-1], True)[: len(rows)]
        if drop is not None and len(drop):
            kept &= ~member(drop, vaddr)
        return HashTable(self.seed, rows[order[kept]])


def unchanged_pages(
    candidates: Runs,
    read_into: Callable[[NDArray[np.uint8], Runs], Runs],
    parent: HashTable,
    collector: HashCollector,
    buffer: NDArray[np.uint8],
) -> tuple[Runs, int]:
    """The pages whose content is what the parent images have.

    Only pages that the parent knows are read; their hashes go to the collector when they are equal.

    :param candidates: the pages in question.
    :param read_into: fills a buffer with the bytes of runs, returns those that could not be read.
    :param buffer: scratch space of at least `BATCH_PAGES` pages.
    :returns: the unchanged pages, and how many were compared.
    """
    addresses = page_addresses(candidates)
    addresses = addresses[parent.has(addresses)]
    kept: list[NDArray[np.uint64]] = []
    for first in range(0, len(addresses), BATCH_PAGES):
        batch = addresses[first : first + BATCH_PAGES]
        runs = runs_of_pages(batch)
        view = buffer[: page_count(runs) * PAGE_SIZE]
        failed = read_into(view, runs)
        hashes = hash_pages(view, parent.seed)
        same = parent.equal(batch, hashes) & ~member(failed, batch)
        collector.add(batch[same], hashes[same])
        kept.append(batch[same])
    unchanged = runs_of_pages(np.concatenate(kept)) if kept else empty_runs()
    return unchanged, len(addresses)
