"""userns-N.img, which CRIU writes of a tree in a user namespace: who has to be able to read the images."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from incdump.images.framing import Magic, only_record, read_file
from incdump.images.messages import parse
from incdump.model.owner import MappedRoot, outside

if TYPE_CHECKING:
    from pathlib import Path

_NAME = "userns-"


def mapped_root_of(path: Path) -> MappedRoot | None:
    """The root of the user namespace that a checkpoint's tree was in; None: it was in that of whoever made it. Blocks.

    :param path: the images dir.
    :raises BadImage: the image is damaged.
    :raises ImagesIOError: it cannot be read.
    """
    names = [name for name in os.listdir(path) if name.startswith(_NAME) and name.endswith(".img")]
    if len(names) != 1:  # CRIU knows of no namespace within another one
        return None
    from incdump.images._pb import userns_pb2 as pb

    image = path / names[0]
    entry = parse(pb.userns_entry, only_record(read_file(image) or b"", Magic.USERNS, image), image)
    uid, gid = (
        outside((extent.first, extent.lower_first, extent.count) for extent in extents)
        for extents in (entry.uid_map, entry.gid_map)
    )
    return None if uid is None or gid is None else MappedRoot(uid, gid)
