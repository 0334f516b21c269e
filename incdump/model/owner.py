"""Who images are made for: the root of a user namespace."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class MappedRoot(NamedTuple):
    """The root of a user namespace, by the numbers that it has outside.

    CRIU restores a tree that was in a user namespace with the rights of this user: what it reads by then has to be
    within its reach.
    """

    uid: int
    gid: int


NOBODY = 2**32 - 1
"""What the kernel shows for who is nobody in the reader's own namespace."""


def outside(extents: Iterable[tuple[int, int, int]]) -> int | None:
    """What the 0 of a user namespace is outside of it; None: nothing.

    :param extents: first number inside, first outside, count: user_namespaces(7).
    """
    found = next((lower for first, lower, count in extents if first == 0 and count), None)
    return None if found == NOBODY else found
