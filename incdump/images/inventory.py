"""inventory.img: that a dump ended, and what kind of dump it was.

CRIU's pre-dumps and dumps differ in it: a pre-dump says only when it was made and how, with ``img_version`` 0, so that
nobody takes it for something to restore from; a dump has what a restore asks for first. ``dump_uptime`` is in both,
since CRIU compares the start time of a process with it to notice that a pid was used again.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from incdump.images.framing import Magic, frame, only_record
from incdump.images.messages import parse

if TYPE_CHECKING:
    import os

IMG_VERSION = 2
PRE_DUMP_SPLICE = 1
PRE_DUMP_READ = 2


@dataclass(frozen=True, slots=True)
class Inventory:
    """What an inventory says.

    :ivar img_version: 2 for a dump, 0 for a pre-dump.
    :ivar dump_uptime: time since boot at which the target was looked at, microseconds, or None.
    :ivar pre_dump_mode: `PRE_DUMP_SPLICE` or `PRE_DUMP_READ`, or None for a dump.
    :ivar run_id: the dump's UUID, or ``""``.
    """

    img_version: int
    dump_uptime: int | None
    pre_dump_mode: int | None
    run_id: str

    @property
    def is_pre_dump(self) -> bool:
        """Whether this is a pre-dump, good for a parent only."""
        return self.img_version == 0


def encode_pre_dump_inventory(dump_uptime: int) -> bytes:
    """The inventory.img of a pre-dump.

    :param dump_uptime: time since boot when the target was looked at, microseconds.
    :returns: the file's bytes.
    """
    from incdump.images._pb import inventory_pb2 as pb

    entry = pb.inventory_entry(img_version=0, dump_uptime=dump_uptime, pre_dump_mode=PRE_DUMP_READ)
    entry.plugins_entry.SetInParent()
    return frame(Magic.INVENTORY, [entry.SerializeToString()])


def encode_dump_inventory(dump_uptime: int, *, run_id: str | None = None) -> bytes:
    """The inventory.img of a dump.

    :param dump_uptime: time since boot while the target was frozen, microseconds.
    :param run_id: a UUID for this dump, as text; by default a new one.
    :returns: the file's bytes.
    """
    from incdump.images._pb import inventory_pb2 as pb

    # The numbers only have to be distinct from those of other objects of the same kind: the root task has the first.
    root_ids = pb.task_kobj_ids_entry(
        vm_id=1,
        files_id=1,
        fs_id=1,
        sighand_id=1,
        pid_ns_id=1,
        net_ns_id=2,
        ipc_ns_id=3,
        uts_ns_id=4,
        mnt_ns_id=5,
        user_ns_id=6,
        cgroup_ns_id=7,
        time_ns_id=8,
    )
    entry = pb.inventory_entry(
        img_version=IMG_VERSION,
        fdinfo_per_id=True,
        root_ids=root_ids,
        ns_per_id=True,
        lsm=pb.inventory_entry.NO_LSM,
        dump_uptime=dump_uptime,
        network_lock_method=0,
        dump_criu_run_id=run_id or str(uuid.uuid4()),
    )
    entry.plugins_entry.SetInParent()
    return frame(Magic.INVENTORY, [entry.SerializeToString()])


def decode_inventory(data: bytes, path: str | os.PathLike[str]) -> Inventory:
    """Decode an inventory.img, incdump's or CRIU's.

    :raises BadImage: it is damaged.
    """
    from incdump.images._pb import inventory_pb2 as pb

    entry = parse(pb.inventory_entry, only_record(data, Magic.INVENTORY, path), path)
    return Inventory(
        img_version=entry.img_version,
        dump_uptime=entry.dump_uptime if entry.HasField("dump_uptime") else None,
        pre_dump_mode=entry.pre_dump_mode if entry.HasField("pre_dump_mode") else None,
        run_id=entry.dump_criu_run_id,
    )
