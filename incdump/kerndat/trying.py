"""Trying a feature on this very process: what all probes have in common."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from incdump._uapi import mapping
from incdump._uapi.pagemap_scan import pagemap_scan
from incdump.model.runs import PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that the kernel can do, or cannot.

    :ivar name: short name, as in `Kerndat`.
    :ivar what: what it is.
    :ivar works: whether it worked when it was tried.
    :ivar why: what was seen: how it failed, or what it passed.
    :ivar follows: what incdump does with it, or does without it.
    """

    name: str
    what: str
    works: bool
    why: str
    follows: str

    def __bool__(self) -> bool:
        return self.works


class FailedError(Exception):
    """A probe's own verdict: it ran, and the result was wrong."""


def try_feature(name: str, what: str, attempt: Callable[[], str], *, then: str, otherwise: str) -> Feature:
    """Run an attempt, which returns what it passed, or raises `OSError` or `FailedError`."""
    try:
        return Feature(name, what, True, attempt(), then)
    except FailedError as e:
        return Feature(name, what, False, str(e), otherwise)
    except OSError as e:
        code = errno.errorcode.get(e.errno, str(e.errno)) if e.errno is not None else "?"
        return Feature(name, what, False, f"{e.strerror or e} ({code})", otherwise)


@contextlib.contextmanager
def pages_for_a_while(count: int) -> Iterator[int]:
    """Private anonymous memory for a while, without transparent huge pages; yields its address."""
    length = count << PAGE_SHIFT
    address = mapping.map_anonymous(length)
    try:
        mapping.advise_no_huge_pages(address, length)
        yield address
    finally:
        mapping.unmap(address, length)


@contextlib.contextmanager
def opened(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor for a while."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def pme(address: int) -> int:
    """This process's pagemap entry of an address."""
    with opened("/proc/self/pagemap") as fd:
        entry: int = struct.unpack("=Q", os.pread(fd, 8, address >> PAGE_SHIFT << 3))[0]
    return entry


def own_scan(
    address: int, pages: int, *, flags: int = 0, inverted: int = 0, mask: int = 0, anyof: int = 0, returned: int = 0
) -> list[tuple[int, int]]:
    """Scan this process's own pages; for each region: its first page (0 is `address`) and one past its last."""
    vec = np.empty((16, 3), np.uint64)
    end = address + (pages << PAGE_SHIFT)
    with opened("/proc/self/pagemap") as fd:
        masks = {"inverted": inverted, "mask": mask, "anyof": anyof, "returned": returned}
        count, _ = pagemap_scan(fd, address, end, vec, flags=flags, **masks)
    return [((int(a) - address) >> PAGE_SHIFT, (int(b) - address) >> PAGE_SHIFT) for a, b, _ in vec[:count]]
