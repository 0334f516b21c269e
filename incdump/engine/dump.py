"""Pre-dumps and dumps: the stages joined.

A pre-dump leaves the target running and may be torn: what was written meanwhile is in the next one. A dump freezes the
tree first, so its images are one moment's memory.

    pre-dump   tree ─▶ [per process: lease, register, get-and-clear ─▶ classify ─▶ write] ─▶ images ─▶ commit
    dump       leases ─▶ freeze ─▶ [the same] ─▶ /proc facts ─▶ thaw ─▶ images ─▶ commit

With soft-dirty, which must be read and reset while nothing moves, a pre-dump too freezes the tree for the scan.

Any way out other than the last line gives back what was taken from the tracker and removes what was written; no await
lies between the two, so no cancellation can come between them either.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Literal

import anyio

from incdump import kerndat
from incdump.engine.metadata import Metadata, look_ahead
from incdump.engine.page_server_session import open_session
from incdump.engine.parent import Parent
from incdump.engine.pipeline import Pipeline
from incdump.engine.process import Means, ProcessDump, Warn
from incdump.engine.reach import refuse_out_of_reach
from incdump.engine.segments import SegmentDump, find_segments
from incdump.engine.tasks import first_cause
from incdump.engine.threads import in_thread, surely_in_thread
from incdump.engine.trackers import choose
from incdump.errors import ImagesOutOfReach, LazyMemory, TargetExited, TargetUnsuitable, TrackerLost
from incdump.freeze.seize import Freezer
from incdump.holder.client import HolderKeeper, keep_holder_out_of_trees, runtime_dir
from incdump.holder.mappings import Growth, Pace
from incdump.images.images_dir import ImagesDir
from incdump.images.inventory import encode_dump_inventory, encode_pre_dump_inventory
from incdump.images.new_dir import INVENTORY, SIDECAR, NewImagesDir
from incdump.images.stats import encode_stats
from incdump.model.arguments import check_arguments
from incdump.model.options import TRACK_FOR, DumpOptions
from incdump.model.runs import PAGE_SIZE, empty_runs
from incdump.model.stats import DumpResult, DumpStats
from incdump.proc.identity import Identity, boot_id, signal_same
from incdump.proc.lazy_memory import check_tree_supplied
from incdump.proc.limits import names_limits
from incdump.proc.pagemap import make_reader
from incdump.proc.served import refuse_served
from incdump.proc.sharing import may_share_pages, shares_address_space, sharing_address_space
from incdump.proc.tree import check_target, process_tree
from incdump.proc.user_namespace import mapped_root, mapped_root_if_any
from incdump.tracking import content, soft_dirty, uffd_wp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from incdump.engine.page_server_session import ServerSession
    from incdump.engine.pipeline import PageOwner
    from incdump.freeze.seize import Frozen
    from incdump.holder.client import Keeper
    from incdump.images.proved import ProvedChain
    from incdump.model.hot import HotPages
    from incdump.model.owner import MappedRoot
    from incdump.proc.tree import Task

Kind = Literal["pre-dump", "dump"]

_LAZY_POLL = 0.2
"""Seconds between two looks whether pages that are to come have come."""
_LOOKING_AHEAD = 2
"""Processes that are looked at side by side before the freeze; nearly all of it is the kernel's work."""


async def predump(
    pid: int,
    images_dir: str | os.PathLike[str],
    *,
    parent: str | os.PathLike[str] | None = None,
    options: DumpOptions | None = None,
    progress: Callable[[str, DumpStats], None] | None = None,
) -> DumpResult:
    """Dump a running process tree's memory, or what was written of it since the parent dump; the target runs on.

    The images may be torn, and are meant as the parent of a later dump. Tracking is kept by the holder process; see
    `incdump.Session` to keep it in this program.

    :param pid: the root of the tree.
    :param images_dir: where to; made if missing, refused if it holds images.
    :param parent: the previous images dir, as CRIU's ``--prev-images-dir``: relative to `images_dir`, or absolute.
    :param progress: called at every step with a word for it and the counters so far; must be quick.
    :raises incdump.InvalidOption: an argument cannot be; nothing was begun.
    :raises incdump.IncdumpError: nothing was written then that could be taken for a dump, the target runs on, and the
        next dump against the same parent is right.
    """
    return await _with_holder("pre-dump", pid, images_dir, parent, options, progress)


async def dump(
    pid: int,
    images_dir: str | os.PathLike[str],
    *,
    parent: str | os.PathLike[str] | None = None,
    options: DumpOptions | None = None,
    progress: Callable[[str, DumpStats], None] | None = None,
) -> DumpResult:
    """Freeze a process tree and dump its memory, or what was written of it since the parent dump.

    Parameters and errors are those of `predump`; ``options.afterwards`` says what becomes of the tree. If it is to be
    killed, its images are complete before that, and are kept even if the call is cancelled in the very moment.
    """
    return await _with_holder("dump", pid, images_dir, parent, options, progress)


async def _with_holder(
    kind: Kind,
    pid: int,
    images_dir: str | os.PathLike[str],
    parent: str | os.PathLike[str] | None,
    options: DumpOptions | None,
    progress: Callable[[str, DumpStats], None] | None,
) -> DumpResult:
    check_arguments(pid=pid, images_dir=images_dir, parent=parent, options=options, progress=progress)
    keeper = HolderKeeper(pid)
    try:
        return await DumpRun(kind, pid, images_dir, parent, options or DumpOptions(), keeper, progress).run()
    finally:
        keeper.close()


class DumpRun:
    """One dump, from its checks to its result."""

    _restorable = False
    """Whether what is dumped is to be restored from these images: no other could do it."""

    def __init__(
        self,
        kind: Kind,
        pid: int,
        images_dir: str | os.PathLike[str],
        parent: str | os.PathLike[str] | None,
        options: DumpOptions,
        keeper: Keeper,
        progress: Callable[[str, DumpStats], None] | None = None,
        hot: HotPages | None = None,
        proved: ProvedChain | None = None,
    ) -> None:
        """
        :param hot: of the dumps of a loop: pages that are written in every round are left by pre-dumps to a later dump.
        :param proved: what the caller has proved of the chain that it makes; None: all of it is proved anew.
        """
        self._kind: Kind = kind
        self._pid = pid
        self._path = images_dir
        self._parent_text = None if parent is None else os.fspath(parent)
        self._options = options
        self._keeper = keeper
        self._progress = progress
        self._hot = hot if kind == "pre-dump" else None  # nothing comes after a dump
        self._rounds = hot
        self._proved = proved
        self._stats = DumpStats()
        self._warn = Warn()
        self._generation = os.urandom(16).hex()
        self._processes: dict[tuple[int, int], ProcessDump] = {}
        self._segments: list[SegmentDump] = []
        self._gone: list[int] = []
        self._may_share: set[int] = set()
        self._sharing: dict[int, int] = {}
        self._owner: MappedRoot | None = None
        self._sending: ServerSession | None = None
        self._images: NewImagesDir | None = None
        self._freezer: Freezer | None = None
        self._growth: dict[int, Growth] = {}
        self._pace = Pace()
        self._has_outgrown = False
        self._looking = threading.Lock()
        self._left: Frozen | None = None  # the tree, once it is being stopped or killed for good

    def _tell(self, step: str) -> None:
        if self._progress is not None:
            self._progress(step, self._stats)

    @names_limits
    async def run(self) -> DumpResult:
        """Do it; see `predump` and `dump`."""
        began = time.monotonic_ns()
        self._tell("checking")
        self._root = await in_thread(check_target, self._pid)
        self._owner = await in_thread(mapped_root if self._restorable else mapped_root_if_any, self._pid)
        await in_thread(keep_holder_out_of_trees)
        if self._options.wait_for_lazy:
            await self._wait_for_lazy(time.monotonic() + self._options.wait_for_lazy)
        self._tracker, self._reason = await in_thread(choose, self._options.tracker)
        self._reader = await in_thread(make_reader, self._options.pagemap)
        self._boot_id = boot_id()
        if self._kind == "dump" or self._tracker == soft_dirty.NAME:
            await in_thread(refuse_served, self._path, self._pid)
        failed = False
        try:
            await in_thread(self._make_images_dir)  # on a file system that may not answer
            assert self._images is not None
            await self._dump_into(self._images)
        except BaseException:
            if self._left is None or self._options.afterwards != "killed":
                failed = True
                for process in self._processes.values():
                    if self._has_outgrown:
                        process.let_go()
                    else:
                        process.give_back()
            # else the images are whole, and all that is left of the tree.
            raise
        finally:
            with contextlib.ExitStack() as steps:  # each is taken, whatever becomes of the others; the last one first
                if self._sending is not None:
                    steps.callback(self._sending.close)
                for owner in self._all_owners():
                    steps.callback(owner.close)
            if failed:  # by now none of the files is open: FUSE and NFS would keep it, under another name
                await surely_in_thread(self._undo)
        self._stats.total_time = (time.monotonic_ns() - began) // 1000
        return self._result(self._images)

    async def _wait_for_lazy(self, deadline: float) -> None:
        """While the tree runs, another program supplies the pages that are still to come."""
        while True:
            try:
                return await in_thread(check_tree_supplied, self._pid)
            except LazyMemory:
                if time.monotonic() > deadline:
                    raise
            self._tell("waiting for lazy pages")
            await anyio.sleep(_LAZY_POLL)

    def _make_images_dir(self) -> None:
        make = NewImagesDir.create if self._restorable else NewImagesDir.create_if_possible_for
        self._images = make(self._path, self._parent_text, self._owner_number)

    @property
    def _owner_number(self) -> int | None:
        return None if self._owner is None else self._owner.uid

    def _check_reach(self, images: NewImagesDir) -> None:
        """Make sure that what is dumped here can be restored from here.

        :raises incdump.errors.ImagesOutOfReach: it cannot, and is to be.
        """
        if self._owner is None or self._options.page_server is not None:
            return
        try:
            refuse_out_of_reach(images.path, self._owner, self._pid)
        except ImagesOutOfReach as error:
            if self._restorable:
                raise
            self._warn(f"{error}; no checkpoint that stands on this dump can be restored else")

    async def _dump_into(self, images: NewImagesDir) -> None:
        if self._options.page_server is not None:
            self._sending = await in_thread(self._connect, images)
        self._parent = None
        if images.parent is not None:
            is_there = None if self._sending is None else self._sending.has_parent
            self._parent = await in_thread(Parent, images.parent, self._boot_id, is_there, self._proved)
            self._parent.check_root(self._root)
        await in_thread(self._check_reach, images)
        self._means = self._make_means(images)
        if self._tracker == soft_dirty.NAME and not (await in_thread(kerndat.sees_moves)):
            self._warn(f"tracker soft-dirty: {kerndat.soft_dirty_moves().why}: such a move goes unseen")
        await self._dump(images)

    def _connect(self, images: NewImagesDir) -> ServerSession:
        meta = None if images.parent is None else ImagesDir(images.parent).meta()
        generation = None if meta is None else meta.get("generation")
        return open_session(self._options, generation if isinstance(generation, str) else None, self._owner_number)

    @property
    def _break_off(self) -> Callable[[], None] | None:
        """What is to be done when the dump is cancelled: no thread is to wait for the page server, or for a tree that
        it waits for."""
        if self._freezer is None:
            return None if self._sending is None else self._sending.break_off

        def break_off() -> None:
            if self._sending is not None:
                self._sending.break_off()
            if self._freezer is not None:
                self._freezer.abandon()

        return break_off

    def _report(self) -> None:
        """Something was done. From any thread.

        :raises incdump.errors.TargetUnsuitable: a process that runs on, and is tracked, has too many mappings by now.
        """
        if self._freezer is not None:
            self._freezer.report()
        elif self._looking.acquire(blocking=False):
            try:
                if not self._pace.left:
                    began = time.monotonic()
                    self._refuse_growth()
                    hurry = any(growth.is_growing for growth in self._growth.values())
                    self._pace.took(time.monotonic() - began, hurry=hurry)
            finally:
                self._looking.release()

    def _refuse_growth(self) -> None:
        """The keeper lets go of a process that has too many mappings, but for the time of a dump: that ends."""
        for pid, growth in list(self._growth.items()):
            if growth.is_too_large():
                self._has_outgrown = True
                raise TargetUnsuitable(
                    f"process {pid} has {growth.count:,} mappings by now: it exchanges them all the time, and tracked "
                    "ones do not merge; dump it frozen (incdump dump), or with --tracker content",
                    pid=pid,
                )

    def _undo(self) -> None:
        if self._images is not None:
            self._images.discard()
        stopped = {task.pid for task in self._left.tasks if task.state_before != "T"} if self._left is not None else ()
        for pid, start_time in self._processes:
            if pid in stopped:
                signal_same(Identity(pid, start_time, self._boot_id), signal.SIGCONT)

    def _make_means(self, images: NewImagesDir) -> Means:
        log = soft_dirty.SoftDirtyLog(runtime_dir()) if self._tracker == soft_dirty.NAME else None
        seed = None if self._parent is None else self._parent.seed
        lasts = self._tracked_for()
        return Means(
            images=images,
            tracker=self._tracker,
            reader=self._reader,
            keeper=self._keeper,
            soft_dirty_log=log,
            rearm=lasts > 0,
            lasts=lasts,
            keeps_huge=self._options.thp == "keep",
            sending=self._sending,
            seed=content.new_seed() if seed is None else seed,
            boot_id=self._boot_id,
            warn=self._warn,
            stats=self._stats,
            runs_in_memory_of=self._runs_in_memory_of,
            check_incremental=self._check_incremental,
            hot=self._hot,
        )

    def _tracked_for(self) -> float:
        """Seconds for which what is dumped stays tracked afterwards."""
        if self._kind == "dump" and self._options.afterwards == "killed":
            return 0
        asked = self._options.track_for
        if asked is None:
            asked = TRACK_FOR if self._kind == "pre-dump" else 0
        return self._keeper.lasts(asked)

    def _lasts(self) -> float | None:
        """The same; None: as long as the keeper."""
        return self._means.lasts if math.isfinite(self._means.lasts) else None

    # -- the two kinds of dump ------------------------------------------------------------------------------------

    def _pipeline(self) -> Pipeline:
        writers = self._options.writers if self._sending is None else self._sending.writers
        return Pipeline(writers, self._stats, lambda: self._tell("dumping"), self._break_off, self._report)

    async def _dump(self, images: NewImagesDir) -> None:
        freezes = self._kind == "dump" or self._tracker == soft_dirty.NAME
        if freezes:
            timeout, stall_timeout = self._options.freeze_timeout, self._options.stall_timeout
            self._freezer = freezer = Freezer(timeout=timeout, stall_timeout=stall_timeout)
        pipeline = self._pipeline()
        async with AsyncExitStack() as stack:
            if freezes:
                await in_thread(self._prepare_tree, break_off=self._break_off)
                await stack.enter_async_context(freezer)
                self._tell("freezing")
                frozen = await freezer.freeze(self._pid)
                self._gone.extend(frozen.exited)
                await in_thread(self._take_up_frozen, break_off=self._break_off)
                if self._kind == "pre-dump":
                    await in_thread(self._collect_all)
                    await freezer.thaw()
                    self._note_frozen(frozen, freezer.frozen_time)
            self._tell("dumping")
            self._uptime = _uptime()
            metadata = await self._transfer(pipeline)
            if self._kind == "dump":
                frozen_time = (time.monotonic_ns() - frozen.frozen_at) // 1000  # so far, if it is to stay stopped
                if self._options.afterwards == "running":
                    await freezer.thaw()
                    frozen_time = freezer.frozen_time
                self._note_frozen(frozen, frozen_time)
            self._tell("finishing")
            await in_thread(self._finish, images, metadata, break_off=self._break_off)
            if self._kind == "dump" and self._options.afterwards != "running":
                self._left = frozen  # a cancellation does not hold the thawing up any more
                await freezer.thaw(self._options.afterwards)
        self._commit()

    def _note_frozen(self, frozen: Frozen, frozen_time: int) -> None:
        self._stats.freezing_time = frozen.freezing_time
        self._stats.frozen_time = frozen_time
        self._stats.stopped_time += frozen.freezing_time + frozen_time

    async def _transfer(self, pipeline: Pipeline) -> Metadata | None:
        """Copy all pages; of a dump also read, side by side with that, what there is to know beside them."""
        metadata: list[Metadata] = []

        async def read_metadata() -> None:
            await pipeline.under_way.wait()
            known = list(self._processes.values())
            ahead = {p.task.pid: p.ahead for p in known if p.ahead is not None}
            tables = {p.task.pid: p.vmas for p in known if p.vmas is not None}
            metadata.append(await in_thread(Metadata.read, [p.task for p in known], ahead, tables))

        try:
            async with anyio.create_task_group() as tasks:
                if self._kind == "dump":
                    tasks.start_soon(read_metadata)
                await pipeline.run(self._owners())
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        root = self._processes.get((self._root.pid, self._root.start_time))
        if root is None or root.exited:
            raise TargetExited(
                f"process {self._pid} exited, or replaced its program, while it was being dumped: "
                "if it is still there, dump it again",
                pid=self._pid,
            )
        return metadata[0] if metadata else None

    def _owners(self) -> Iterator[PageOwner]:
        """Processes, then the segments that they share. Runs in the reader's thread."""
        if not self._processes:
            self._find_tree()
        for process in list(self._processes.values()):
            if not process.prepared:
                self._prepare(process)
            yield process
        self._segments = find_segments([p for p in self._processes.values() if not p.exited], self._means, self._parent)
        yield from self._segments

    def _all_owners(self) -> list[ProcessDump | SegmentDump]:
        return [*self._processes.values(), *self._segments]

    # -- processes ------------------------------------------------------------------------------------------------

    def _find_tree(self) -> list[ProcessDump]:
        """Take up every process of the tree that is not yet known, and let go of those that are gone.

        :returns: the ones that are in the tree now.
        """
        tasks = {(t.pid, t.start_time): t for t in process_tree(self._pid) if t.state != "Z"}
        for key in [key for key in self._processes if key not in tasks]:
            gone = self._processes.pop(key)
            self._gone.append(gone.task.pid)
            gone.discard()
        for key, task in tasks.items():
            if key not in self._processes:
                parent = None if self._parent is None else self._parent.process(task)
                self._processes[key] = ProcessDump(task, self._means, parent)
            self._processes[key].task = task
        if self._tracker == soft_dirty.NAME:
            self._sharing = sharing_address_space(task.pid for task in tasks.values())
        return [self._processes[key] for key in tasks]

    def _runs_in_memory_of(self, task: Task) -> int | None:
        """The first process of the tree with a process's address space, if that is another one.

        A userfaultfd watches nothing that another one does, so there it need be known of parents only, who are tracked
        first. Soft-dirty bits that are reset for one are reset for all.
        """
        if self._tracker == soft_dirty.NAME:
            return self._sharing.get(task.pid)
        return task.ppid if shares_address_space(task.pid, task.ppid) else None

    def _prepare_tree(self) -> None:
        processes = self._find_tree()
        ahead = processes if self._kind == "dump" else []
        with ThreadPoolExecutor(max(1, min(len(ahead), _LOOKING_AHEAD))) as beside:
            found = [beside.submit(look_ahead, process.task.pid) for process in ahead]
            self._may_share = may_share_pages(process.task for process in ahead)
            for process in processes:
                self._prepare(process)
            for process in ahead:
                process.lay_out()
        for process, look in zip(ahead, found, strict=True):
            process.ahead = look.result()
            process.make_room(empty_runs() if self._rounds is None else self._rounds.left(process.identity))

    def _take_up_frozen(self) -> None:
        processes = self._find_tree()
        forked = {pid for p in processes if p.task.forked for pid in (p.task.pid, p.task.ppid)}
        for process in processes:
            known = process.prepared
            until_read = self._kind == "dump"
            # A process that runs on while it is read may fork at any moment.
            may_share = not until_read or not known or process.task.pid in forked | self._may_share
            process.freeze(process.task, may_share=may_share, until_read=until_read)
            self._report()
            if not known:
                self._check_incremental(process)

    def _prepare(self, process: ProcessDump) -> None:
        if self._kind == "pre-dump" and self._tracker == uffd_wp.NAME:
            self._growth[process.task.pid] = Growth(process.task.pid)
        process.prepare()
        self._check_incremental(process)

    def _check_incremental(self, process: ProcessDump) -> None:
        """Say so, or fail, where the parent has the process and the tracker cannot tell what it wrote since."""
        if self._parent is None or process.incremental or process.exited:
            return
        if process.task.pid != self._pid and not self._parent.holds(process.task):
            return  # a process that is new since the parent
        if self._parent.lacks_pages(process.task):
            why = f"the page server has no parent images of process {process.task.pid}"
        else:
            since = f"what process {process.task.pid} wrote since {self._parent.path}"
            why = f"the tracker ({self._tracker}) cannot tell {since}"
            if ended := process.tracking_ended or self._parent.tracking_ended:
                why += f"; {ended}"
            else:
                why = self._parent.why_untold(process.task) or why
        if self._options.require_incremental:
            raise TrackerLost(f"{why}; dump without --prev-images-dir", pid=process.task.pid, path=self._parent.path)
        self._warn(f"{why}: all of it is dumped")

    def _collect_all(self) -> None:
        for process in self._processes.values():
            process.collect()
            self._report()

    # -- the end --------------------------------------------------------------------------------------------------

    def _finish_pages(self) -> None:
        """Write all pagemaps."""
        for owner in self._all_owners():
            owner.finish()
            self._report()
        self._stats.bytes_written = (self._stats.pages_written + self._stats.shpages_written) * PAGE_SIZE

    def _finish(self, images: NewImagesDir, metadata: Metadata | None) -> None:
        """Write all that is left, inventory.img last."""
        self._finish_pages()
        if metadata is not None:
            metadata.write(images)
        images.write_raw("stats-dump", encode_stats(self._stats))
        encode = encode_dump_inventory if self._kind == "dump" else encode_pre_dump_inventory
        self._complete(images, encode(self._uptime))

    def _complete(self, images: NewImagesDir, inventory: bytes) -> None:
        """Write what makes the images dir complete; the page server has everything before that."""
        meta = self._meta()
        if self._sending is not None:
            self._sending.end(images, {SIDECAR: json.dumps(meta).encode(), INVENTORY: inventory})
            meta["page_server"] = self._sending.server
        images.write_raw(SIDECAR, json.dumps(meta).encode())
        images.finish(inventory)

    def _commit(self) -> None:
        """The images are complete. No await: a cancellation could come between one process and the next."""
        for process in self._processes.values():
            if not process.exited and self._means.rearm:
                process.commit(self._generation)
            elif not process.exited and self._options.afterwards != "killed":
                process.let_go()
        if self._hot is not None:
            told = {process.identity: process.written() for process in self._processes.values()}
            self._hot.note({identity: runs for identity, runs in told.items() if runs is not None})

    def _meta(self) -> dict[str, object]:
        alive = [p for p in self._processes.values() if not p.exited]
        holder = self._keeper.holder
        return {
            "version": 1,
            "kind": self._kind,
            "boot_id": self._boot_id,
            "root": self._root.vpid,
            "tracker": self._tracker,
            "generation": self._generation,
            "hash_seed": self._means.seed,
            "holder": None if holder is None else {"pid": holder.pid, "start_time": holder.start_time},
            "tracked_for": self._lasts(),
            "finished": time.time(),
            "processes": {str(p.task.vpid): p.meta(self._generation) for p in alive},
        }

    def _result(self, images: NewImagesDir) -> DumpResult:
        processes = list(self._processes.values())
        root = self._processes[(self._root.pid, self._root.start_time)]
        exited = [*self._gone, *(p.task.pid for p in processes if p.exited)]
        return DumpResult(
            images_dir=str(images.path),
            parent=None if images.parent is None else str(images.parent),
            pid=self._pid,
            pids=[p.task.pid for p in processes if not p.exited],
            exited=sorted(set(exited)),
            tracker=self._tracker,
            tracker_reason=self._reason,
            pagemap=self._reader.name,
            generation=self._generation,
            tracked_for=self._lasts() if self._tracker == uffd_wp.NAME else 0,
            incremental=root.incremental,
            stats=self._stats,
            warnings=self._warn.lines,
        )


def _uptime() -> int:
    """Microseconds since boot, from /proc/uptime: 10 ms granularity, as CRIU has it."""
    with open("/proc/uptime", encoding="ascii") as file:
        return round(float(file.read().split()[0]) * 100) * 10_000
