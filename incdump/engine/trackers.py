"""Which tracker: the one that was asked for, or the first that proves itself on this kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from incdump import kerndat
from incdump.errors import TrackerUnavailable
from incdump.tracking import content, soft_dirty, uffd_wp

if TYPE_CHECKING:
    from incdump.kerndat import Feature
    from incdump.model.options import TrackerName


def needs(tracker: TrackerName) -> tuple[Feature, ...]:
    """The kernel features that a tracker stands on, each tried now if it was not before."""
    if tracker == uffd_wp.NAME:
        return kerndat.pagemap_scan(), kerndat.uffd_wp_async(), kerndat.pidfd_getfd()
    if tracker == soft_dirty.NAME:
        return (kerndat.soft_dirty(),)
    return ()


def choose(tracker: TrackerName) -> tuple[str, str]:
    """The tracker to use.

    :param tracker: a tracker by name, or ``"auto"``.
    :returns: its name, and why that one.
    :raises incdump.errors.TrackerUnavailable: the one that was asked for does not work here.
    """
    if tracker != "auto":
        for feature in needs(tracker):
            if not feature.works:
                raise TrackerUnavailable(
                    f"tracker {tracker} does not work here: {feature.what}: {feature.why}; "
                    "leave out --tracker, or see `incdump doctor`"
                )
        return tracker, "as asked for"
    refused: list[str] = []
    for candidate in (uffd_wp.NAME, soft_dirty.NAME):
        wanted = needs(candidate)  # type: ignore[arg-type]
        if candidate == soft_dirty.NAME and not kerndat.sees_moves():
            wanted += (kerndat.soft_dirty_moves(),)
        missing = [f for f in wanted if not f.works]
        if not missing:
            return candidate, "; ".join(["it proved itself on this kernel", *refused])
        refused.append(f"{candidate} does not work: {missing[0].why}")
    return content.NAME, "; ".join(refused)
