"""Complete checkpoints: CRIU dumps all but the memory, incdump the memory, as an increment on a chain.

    incdump                                  CRIU (on a leash)
    -------                                  -----------------
    prepare: tracker, parent, smaps
    start CRIU ────────────────────────────▶ freeze the tree
    watch new mappings ◀── first page scan ─ wait
    scan, copy pages  ─────────────────────▶ dump everything else; "there are no pages"
      (process by process)                   write its images, cure the tree of its parasite
                      ◀── gate reached ───── post-dump: wait, everything frozen
    copy code again, write pagemaps,
    take over CRIU's images, inventory last
    open the gate ─────────────────────────▶ kill the tree, or let it go on

Where CRIU cannot be held on a leash, as with a process that has a seccomp filter, a library that is loaded into it does
the same (`incdump.criu.preloaded`). Where that cannot be had either it makes a lazy dump (`incdump.criu.lazy`): incdump
begins only when CRIU stands at the gate, and the tree is stopped for longer.

CRIU works in a directory of its own inside the images dir, and its images are renamed into place while it waits at the
gate (`incdump.criu.gate`): so there is no moment at which a crash leaves something that looks like a checkpoint and has
no memory in it. Whoever is killed before the gate opens, the tree runs on. Shared memory is CRIU's to write.

While CRIU works on a process it runs system calls in it, by putting instructions into its code for a moment. A page
of code that was copied in that moment would be wrong, so these are copied again at the gate.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio

from incdump.criu.gate import Gate
from incdump.criu.held import HeldCriu
from incdump.criu.lazy import LazyCriu
from incdump.criu.leash import LeashedCriu, uses_short_smaps
from incdump.criu.options import FREEZE_CGROUP, is_given, refuse_scripts_in_files, take_scripts
from incdump.criu.preloaded import PreloadedCriu
from incdump.criu.program import SECCOMP_REFUSED, failure, find, last_errors
from incdump.criu.progress import Progress
from incdump.engine.dump import DumpRun
from incdump.engine.sent_image import Sending
from incdump.engine.tasks import done_before
from incdump.engine.threads import in_thread
from incdump.errors import (
    CriuError,
    ImagesError,
    LeashUnusable,
    StopStalled,
    TargetExited,
    TargetUnsuitable,
    XferError,
)
from incdump.freeze.seize import Frozen, FrozenTask
from incdump.freeze.stall import StallGuard
from incdump.holder.client import HolderKeeper, end_holder_within
from incdump.images.new_dir import INVENTORY
from incdump.images.pagemap import decode_in_parts, decode_pagemap
from incdump.images.stats import decode_stats, encode_stats
from incdump.model.arguments import check_arguments
from incdump.model.options import WAYS, DumpOptions
from incdump.model.runs import PAGE_SIZE, present_entries
from incdump.model.stats import CheckpointTimes
from incdump.page_pipe import CHUNK_PAGES
from incdump.proc.confinement import filtered, frozen_cgroup
from incdump.proc.identity import is_same
from incdump.proc.limits import names_limits
from incdump.proc.mm_info import resident_bytes
from incdump.proc.short_smaps import ShortSmaps
from incdump.proc.tree import is_traced, process_tree
from incdump.xfer.local import make_buffer

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    from incdump.criu.program import Criu
    from incdump.criu.running import RunningCriu
    from incdump.engine.pipeline import PageOwner, Pipeline
    from incdump.holder.client import Keeper
    from incdump.images.new_dir import NewImagesDir
    from incdump.images.proved import ProvedChain
    from incdump.model.hot import HotPages
    from incdump.model.options import WayName
    from incdump.model.stats import DumpResult, DumpStats
    from incdump.proc.tree import Task

    AtGate: TypeAlias = Callable[["CheckpointRun", float], Awaitable[None]]

SUBDIR = "criu-unfinished"
"""Where CRIU works, in the images dir."""
GATE = "criu-gate"
LOG = "criu-dump.log"
STDERR = "criu-dump.stderr"
_GATE_POLL = 0.1
"""Seconds between two looks whether a CRIU that does not heed the leash stands at the gate."""
_STANDS_POLL = 0.05
_IDLE_BEYOND = 1.0
"""Seconds after its --timeout for which CRIU may do nothing at all before it is taken to wait for ever."""
_IDLE_AT_END = 2.0
"""Seconds for which a CRIU whose gate is shut may do nothing before it is left alone."""
_BIG = 128 << 20
"""Bytes of memory a process from which on it takes CRIU longer to read smaps than to be told the mappings."""
_FIRST_PAGES_ID = 1 << 20
"""CRIU numbers its own pages images from 1."""
_PROCESS_PAGEMAP = re.compile(r"pagemap-(\d+)\.img")


async def checkpoint(
    pid: int,
    images_dir: str | os.PathLike[str],
    *,
    parent: str | os.PathLike[str] | None = None,
    options: DumpOptions | None = None,
    criu: str | None = None,
    criu_options: Sequence[str] = (),
    way: WayName = "auto",
    progress: Callable[[str, DumpStats], None] | None = None,
) -> DumpResult:
    """Make a complete checkpoint of a process tree, which ``criu restore`` brings back to life.

    :param pid: the root of the tree.
    :param images_dir: where to; made if missing, refused if it holds images.
    :param parent: the previous images dir, as for `incdump.dump`: only what was written since is copied.
    :param options: ``options.afterwards`` says what becomes of the tree; left out, it is killed, as ``criu dump`` does.
    :param criu: CRIU's program, 4.1 or later; None: where it is installed.
    :param criu_options: further options for ``criu dump``.
    :param way: how CRIU is kept from the memory: ``"leash"``, ``"preload"``, ``"lazy-pages"``, or ``"auto"``: the first
        of these that can be used.
    :raises incdump.InvalidOption: an argument cannot be; nothing was begun.
    :raises incdump.errors.CriuError: CRIU is missing, too old, refused the tree or failed; its reason is in the text.
    :raises incdump.IncdumpError: as for `incdump.dump`. The tree runs on, no images are left.
    """
    check_arguments(pid=pid, images_dir=images_dir, parent=parent, options=options, progress=progress)
    check_arguments(criu=criu, criu_options=criu_options, way=way)
    keeper = HolderKeeper(pid)
    options = options or DumpOptions(afterwards="killed")
    try:
        run = CheckpointRun(pid, images_dir, parent, options, keeper, progress)
        return await run.with_criu(criu, criu_options, way)
    finally:
        keeper.close()


class CheckpointRun(DumpRun):
    """One checkpoint, from its checks to its result."""

    _restorable = True

    def __init__(
        self,
        pid: int,
        images_dir: str | os.PathLike[str],
        parent: str | os.PathLike[str] | None,
        options: DumpOptions,
        keeper: Keeper,
        progress: Callable[[str, DumpStats], None] | None,
        at_gate: AtGate | None = None,
        hot: HotPages | None = None,
        proved: ProvedChain | None = None,
    ) -> None:
        """
        :param at_gate: called when all images are complete and the tree still stands; what it raises is raised, and the
            tree runs on.
        :param hot: as for `DumpRun`.
        :param proved: as for `DumpRun`.
        """
        super().__init__("dump", pid, images_dir, parent, options, keeper, progress, hot, proved)
        self._times = CheckpointTimes()
        self._at_gate = at_gate
        self._run: _Run | None = None
        self._smaps: ShortSmaps | None = None
        self._guard: StallGuard | None = None
        self._stalled = False

    def tasks(self) -> list[Task]:
        """The processes that are dumped."""
        return [process.task for process in self._processes.values() if not process.exited]

    def stands(self) -> bool:
        """Whether the tree still stands at the gate: a CRIU that is killed there lets it run on."""
        return self._run is not None and self._run.is_running and all(is_traced(task.pid) for task in self.tasks())

    @names_limits
    async def with_criu(self, criu: str | None, criu_options: Sequence[str], way: WayName) -> DumpResult:
        """Do it; see `checkpoint`."""
        check_arguments(criu=criu, criu_options=criu_options, way=way)
        self._criu: Criu = await in_thread(find, criu)
        await in_thread(refuse_scripts_in_files, criu_options)
        self._criu_options = criu_options
        self._way = way
        result = await self.run()
        result.criu = str(self._criu)
        result.checkpoint = self._times
        return result

    async def _dump(self, images: NewImagesDir) -> None:
        images.number_pages_from(_FIRST_PAGES_ID)
        if isinstance(self._sending, Sending):
            raise XferError(
                f"the page server at {self._sending.server} speaks CRIU's protocol only, in which pages cannot be sent "
                "once more: checkpoint into a directory, or to incdump's page server"
            )
        pipeline = self._pipeline()
        buffer = make_buffer(CHUNK_PAGES)
        await in_thread(self._refuse_frozen)
        try:
            await in_thread(self._prepare_tree, break_off=self._break_off)
            await in_thread(self._end_adopted_holder)
            await self._dump_somehow(images, pipeline, buffer)
        finally:
            if self._smaps is not None:
                self._smaps.close()

    async def _dump_somehow(self, images: NewImagesDir, pipeline: Pipeline, buffer: NDArray[np.uint8]) -> None:
        """By the best way that there is.

        :raises incdump.errors.LeashUnusable: the only one that may be tried cannot be had.
        """
        ways: tuple[WayName, ...] = WAYS[1:] if self._way == "auto" else (self._way,)
        self._times.why = "it stops the tree least" if self._way == "auto" else "as asked for"
        why: list[LeashUnusable] = []
        for way in ways:
            if way == "preload" and why and isinstance(why[-1], _NoScans):
                continue  # it would be answered as little
            self._times.way = way
            try:
                if way == "leash":
                    await in_thread(self._refuse_filtered)
                await self._dump_by(way, images, pipeline, buffer)
            except LeashUnusable as error:
                if way == ways[-1]:
                    raise
                why.append(error)
                self._times.why = "; ".join(map(str, why))
            else:
                if why and way == "lazy-pages":
                    self._warn(f"{self._times.why}: it makes a lazy dump, for which the tree is stopped longer")
                return

    def _refuse_frozen(self) -> None:
        """:raises TargetUnsuitable: the tree is in a frozen cgroup, where CRIU would wait for ever."""
        if is_given(self._criu_options, FREEZE_CGROUP):
            return
        for task in process_tree(self._pid):
            with suppress(ProcessLookupError):
                if (place := frozen_cgroup(task.pid)) is not None:
                    raise TargetUnsuitable(
                        f"process {task.pid} is in the frozen cgroup {place}, where CRIU can have nothing run, and was "
                        f"not touched: thaw it, or have CRIU do that (-- --freeze-cgroup {place})",
                        pid=task.pid,
                        path=place,
                    )

    def _refuse_filtered(self) -> None:
        """:raises incdump.errors.LeashUnusable: a process has a seccomp filter."""
        if (pid := filtered(process_tree(self._pid))) is not None:
            raise LeashUnusable(
                f"CRIU cannot be held on a leash (process {pid} has a seccomp filter, which the kernel does not let a "
                "tracer under a filter suspend)",
                pid=pid,
            )

    def _end_adopted_holder(self) -> None:
        """CRIU would stop a holder that the tree has adopted, and dump it."""
        if end_holder_within(self._pid):
            self._warn(
                "the holder ended, as it had become part of the tree: what it tracked is dumped whole the next time; "
                "start incdump from outside of the tree's namespaces, or use a Session"
            )

    def _prepare_tree(self) -> None:
        with ThreadPoolExecutor(1) as beside:
            smaps = beside.submit(self._open_smaps)
            super()._prepare_tree()
        smaps.result()

    def _open_smaps(self) -> None:
        """Make what CRIU is told the mappings by, unless it is to read them itself."""
        if self._way == "lazy-pages":
            why = "nobody listens to it"
        elif not uses_short_smaps(self._criu.version):
            why = f"what {self._criu} wants to know of them is not known"
        elif sum(sizes := [resident_bytes(task.pid) for task in process_tree(self._pid)]) < _BIG * len(sizes):
            why = "the processes are small"
        else:
            try:
                self._smaps = ShortSmaps()
                return
            except OSError as error:
                why = f"the kernel does not tell their flags otherwise ({error})"
        self._times.mappings = f"read by CRIU: {why}"

    async def _dump_by(self, way: WayName, images: NewImagesDir, pipeline: Pipeline, buffer: NDArray[np.uint8]) -> None:
        """:raises incdump.errors.LeashUnusable: nothing has come of it, another way may be tried."""
        place = images.make_subdir(SUBDIR)
        self._tell("freezing")
        options, scripts = take_scripts(self._criu_options)
        gate = Gate(images.make_subdir(GATE), images.path, scripts, is_heard_first=way == "preload")
        self._guard = guard = StallGuard(self._options.stall_timeout, self._let_tree_go)
        try:
            command, said = self._command(images.path, place, gate, options), place / STDERR
            self._run = run = _Run(command, self._criu, way, gate, self._smaps, said, self._criu_timeout + _IDLE_BEYOND)
            began = time.monotonic_ns()
            try:
                await in_thread(run.start)
                await run.until_frozen()
                self._times.before_scan = _since(began)
                guard.start()
                guard.arm()
                await self._copy(run, pipeline)
                await run.until_gate()
                self._times.waited = _since(began) - self._times.before_scan - self._times.memory
                await in_thread(self._put_in_place, images, place, buffer, break_off=self._break_off)
                guard.stop()
                self._check_stands()
                if self._at_gate is not None:
                    await run.while_it_stands(partial(self._at_gate, self, gate.begun))
                self._left = self._frozen_now()  # what happens now cannot be taken back
            except BaseException as error:
                gate.open(may_pass=False)
                guard.stop()
                if await run.end(bounded=True) is None:
                    raise self._left_alone(run) from error
                if isinstance(error, LeashUnusable):
                    images.remove_subdirs()
                raise
            with suppress(OSError):  # CRIU fails then, and says so
                gate.open(may_pass=True)
            status = await run.end()
            assert status is not None  # without a bound it is waited for
            self._note_told(run.told)
            if way == "lazy-pages":  # CRIU's own times of such a dump mean nothing
                self._stats.frozen_time = int((time.time() - gate.begun) * 1e6)
        except _CriuEnded as ended:
            if (why := run.why_unusable(last_errors(place / LOG))) is not None:
                images.remove_subdirs()
                raise LeashUnusable(why) from None
            self._check_stands()
            raise self._failed(place, ended.status) from None
        finally:
            gate.close()
        await in_thread(self._conclude, images, place, status)

    @property
    def _break_off(self) -> Callable[[], None]:
        parents = super()._break_off

        def break_off() -> None:
            if parents is not None:
                parents()
            if self._run is not None:
                self._run.give_up()

        return break_off

    def _report(self) -> None:
        if self._guard is not None:
            self._guard.report()

    def _let_tree_go(self) -> None:
        """In the guard's thread: CRIU lets it go."""
        self._stalled = True
        if self._run is not None:
            self._run.give_up()

    def _check_stands(self) -> None:
        """:raises StopStalled: CRIU was told to let the tree go."""
        if self._stalled:
            raise StopStalled(
                f"nothing got done for {self._options.stall_timeout:g} s while process {self._pid} stood still, "
                "and CRIU was told to let it run: does the images' file system or the page server not answer?",
                pid=self._pid,
            )

    def _note_told(self, told: set[int]) -> None:
        if self._smaps is not None:
            others = len({task.pid for task in self.tasks()} - told)
            self._times.mappings = f"read by CRIU of {others} processes" if others else "told by incdump"

    def _command(self, images: Path, place: Path, gate: Gate, options: Sequence[str]) -> list[str]:
        """CRIU's command line. It works where the user's relative paths are meant from, in the images dir."""
        after = {"running": ["--leave-running"], "stopped": ["--leave-stopped"], "killed": []}
        place_options = ("--images-dir", str(place), "--work-dir", str(images), "--log-file", f"{SUBDIR}/{LOG}")
        return [
            *(self._criu.path, "dump", "--tree", str(self._pid), *place_options),
            *("--timeout", f"{self._criu_timeout:.0f}"),
            *after[self._options.afterwards],
            *options,
            *("--action-script", str(gate.script)),
        ]

    @property
    def _criu_timeout(self) -> float:
        """CRIU's --timeout, in seconds: for stopping the tree."""
        return max(1.0, self._options.freeze_timeout)

    def _left_alone(self, run: _Run) -> CriuError:
        """The error for a CRIU that waits, and must not be ended."""
        text = (
            f"{self._criu} (process {run.pid}) does nothing any more while it dumps process {self._pid}, as when a "
            "process cannot run, in a frozen cgroup for instance; it was left as it is, since what it works on would "
            "not survive its end: do not kill it, thaw the tree, and it lets go of it; no images are left"
        )
        return CriuError(text, pid=self._pid)

    async def _copy(self, run: _Run, pipeline: Pipeline) -> None:
        """Everything stands still: scan and copy, while CRIU does the rest."""
        began = time.monotonic_ns()
        await in_thread(self._take_up_frozen, break_off=self._break_off)
        if run.scanned:
            await in_thread(self._begin_but_for, run.scanned, break_off=self._break_off)
        run.go_on()
        self._tell("dumping")
        await pipeline.run(self._owners())
        self._times.memory = _since(began)
        root = self._processes.get((self._root.pid, self._root.start_time))
        if root is None or root.exited:
            raise TargetExited(f"process {self._pid} exited while it was being dumped", pid=self._pid)

    def _begin_but_for(self, scanned: set[int]) -> None:
        """Have the tree watched, but for processes whose mappings CRIU has looked at already: while it does, in several
        reads, none may begin to be watched. It could merge with its neighbour, and be seen twice."""
        for process in self._processes.values():
            if process.task.pid not in scanned:
                process.begin()

    def _owners(self) -> Iterator[PageOwner]:
        """Processes only: segments are CRIU's."""
        yield from self._processes.values()

    def _put_in_place(self, images: NewImagesDir, place: Path, buffer: NDArray[np.uint8]) -> None:
        """CRIU waits: make one images dir of its images and ours."""
        began = time.monotonic_ns()
        self._tell("finishing")
        for process in self._processes.values():
            process.write_code_again(buffer)
        self._finish_pages()
        ours = {process.task.vpid for process in self._processes.values() if not process.exited}
        names = sorted(path.name for path in place.iterdir() if path.suffix == ".img")
        emptied = {name: int(match[1]) for name in names if (match := _PROCESS_PAGEMAP.fullmatch(name))}
        if missing := set(emptied.values()) - ours:
            raise CriuError(f"CRIU dumped process {min(missing)}, which incdump did not find", pid=min(missing))
        replaced = {INVENTORY, *emptied}
        for name in emptied:
            pages_id, _ = decode_in_parts((place / name).read_bytes(), place / name)
            replaced.add(f"pages-{pages_id}.img")
        for name in names:
            if name not in replaced:
                images.adopt(name, place / name)
        self._complete(images, (place / INVENTORY).read_bytes())
        self._times.in_place = _since(began)

    def _meta(self) -> dict[str, object]:
        return {**super()._meta(), "kind": "checkpoint"}

    def _frozen_now(self) -> Frozen:
        tasks = [FrozenTask(task.pid, task.threads, "S") for task in self.tasks()]
        return Frozen(tuple(tasks), (), 0, time.monotonic_ns())

    def _conclude(self, images: NewImagesDir, place: Path, status: int) -> None:
        """CRIU has ended, the images are whole."""
        if status:
            error = self._failed(place, status)
            if is_same(self._root.identity):
                self._left = None  # the tree is as it was: so is everything else
                raise error
            self._warn(f"{error}; the images are complete")
        elif self._options.afterwards != "killed":
            self._commit()
        if self._times.way != "lazy-pages":
            self._take_over_times(images.path / "stats-dump")
        self._count_segments(images.path)
        self._stats.stopped_time += self._stats.freezing_time + self._stats.frozen_time
        (images.path / "stats-dump").write_bytes(encode_stats(self._stats))
        (place / LOG).rename(images.path / LOG)
        for name in (SUBDIR, GATE):
            shutil.rmtree(images.path / name, ignore_errors=True)

    def _take_over_times(self, path: Path) -> None:
        try:
            theirs = decode_stats(path.read_bytes(), path)
        except (OSError, ImagesError):
            self._warn("CRIU left no stats-dump: how long the tree was frozen is not known")
        else:
            self._stats.freezing_time, self._stats.frozen_time = theirs.freezing_time, theirs.frozen_time

    def _count_segments(self, path: Path) -> None:
        """Shared memory is CRIU's: what it wrote is counted."""
        for pagemap in path.glob("pagemap-shmem-*.img"):
            pages = int(present_entries(decode_pagemap(pagemap.read_bytes(), pagemap)[1])[:, 1].sum())
            self._stats.shpages_scanned += pages
            self._stats.shpages_written += pages
            self._stats.bytes_written += pages * PAGE_SIZE

    def _failed(self, place: Path, status: int) -> CriuError:
        return failure(self._criu, status, f"on process {self._pid}", place / LOG, place / STDERR, pid=self._pid)


class _CriuEnded(Exception):
    """CRIU has ended before it was told to."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _NoScans(LeashUnusable):
    """CRIU has dumped the memory itself, without a scan that could be answered."""


class _Run:
    """CRIU's run, as the event loop sees it."""

    def __init__(
        self,
        command: list[str],
        criu: Criu,
        way: WayName,
        gate: Gate,
        smaps: ShortSmaps | None,
        stderr: Path,
        patience: float,
    ) -> None:
        """:param patience: seconds for which CRIU may do nothing at all, once it has begun."""
        self._command = command
        self._patience = patience
        self._progress: Progress | None = None
        self._stderr = stderr
        self._mappings = None if smaps is None else smaps.read
        self._version = criu.version
        self._way = way
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._scanned = asyncio.Event()
        self._ended = asyncio.Event()
        self._criu: RunningCriu | None = None

    def start(self) -> None:
        """Start it. Blocks.

        :raises incdump.errors.LeashUnusable: it cannot be held on a leash, there is no library for it.
        """
        events = self._tell(self._scanned), self._tell(self._ended)
        if self._way == "leash":
            self._criu = LeashedCriu(self._command, self._mappings, *events, self._stderr)
        elif self._way == "preload":
            self._criu = PreloadedCriu(self._command, self._mappings, self._gate.hear, *events, self._stderr)
        else:
            self._criu = LazyCriu(self._command, self._version, self._tell(self._ended), self._stderr)
        self._progress = Progress(self._criu.pid)

    def _tell(self, event: asyncio.Event) -> Callable[[], None]:
        def tell() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(event.set)

        return tell

    def give_up(self) -> None:
        """Have it let the tree go, and fail. From any thread; does not block."""
        self._gate.open(may_pass=False)
        self.go_on()

    async def until_frozen(self) -> None:
        """Wait until the tree is frozen, and CRIU does not touch the memory any more.

        :raises incdump.errors.LeashUnusable: CRIU has dumped the memory itself, without such scans.
        :raises incdump.errors.CriuError: CRIU gets no further.
        :raises _CriuEnded: CRIU has ended instead.
        """
        while isinstance(self._criu, HeldCriu) and not self._scanned.is_set() and not self._ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(_first_of(self._scanned, self._ended), _GATE_POLL)
            self._check_progress()
            if self._gate.is_reached and not self._criu.scanned:
                raise _NoScans("CRIU's scans cannot be answered (it looks for pages otherwise than by PAGEMAP_SCAN)")
        if not self._scanned.is_set():
            await self.until_gate()

    def why_unusable(self, errors: str) -> str | None:
        """Why nothing has come of it, where that is for the way in which it was held.

        :param errors: what CRIU, that has ended, logged as errors.
        """
        if self._way == "leash" and not self.scanned and SECCOMP_REFUSED in errors:
            return "CRIU cannot be held on a leash (a process has got a seccomp filter)"
        if self._gate.has_begun and not self._gate.was_heard:
            return (
                "CRIU does not load the library that would answer its scans (it is linked statically, or started by "
                "something that does not pass the environment and open files on)"
            )
        return None

    def go_on(self) -> None:
        """The first scan of a CRIU whose scans are answered may end."""
        if isinstance(self._criu, HeldCriu):
            self._criu.go_on()

    async def until_gate(self) -> None:
        """Wait until CRIU stands before the gate.

        :raises incdump.errors.CriuError: CRIU gets no further.
        :raises _CriuEnded: CRIU has ended instead.
        """
        looked = time.monotonic()
        while not self._gate.is_reached:
            if time.monotonic() - looked > _GATE_POLL:
                self._check_progress()
                looked = time.monotonic()
            if self._ended.is_set():
                raise _CriuEnded(await self.end() or 0)
            await anyio.sleep(0.0005)  # a file appears, made by a shell

    def _check_progress(self) -> None:
        """:raises incdump.errors.CriuError: CRIU has begun, and does nothing any more."""
        if self._gate.has_begun and self._idle() > self._patience:
            raise CriuError(f"CRIU has done nothing for {self._patience:g} s: a process that it dumps does not run")

    def _idle(self) -> float:
        return 0.0 if self._progress is None else self._progress.idle()

    @property
    def scanned(self) -> set[int]:
        """The processes that a CRIU has scanned that is answered. One that is not has been at all of them by now."""
        return self._criu.scanned if isinstance(self._criu, HeldCriu) else set()

    @property
    def told(self) -> set[int]:
        """The processes of which CRIU was told the mappings."""
        return self._criu.told if isinstance(self._criu, HeldCriu) else set()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet, as far as is known."""
        return self._criu is not None and self._criu.is_running

    async def while_it_stands(self, job: Callable[[], Awaitable[None]]) -> None:
        """Do something at the gate; it is cancelled if CRIU ends meanwhile.

        :raises _CriuEnded: so it was.
        """
        if not await done_before(self._until_ended, job):
            self._gate.open(may_pass=False)  # its script waits there still
            raise _CriuEnded(await self.end() or 0)

    async def _until_ended(self) -> None:
        while self.is_running:  # noqa: ASYNC110 - no event tells of it
            await anyio.sleep(_STANDS_POLL)

    @property
    def pid(self) -> int | None:
        """CRIU's number."""
        return None if self._criu is None else self._criu.pid

    async def end(self, *, bounded: bool = False) -> int | None:
        """Wait until it has ended, whoever is cancelled meanwhile.

        :param bounded: the gate is shut, so CRIU fails, or never begins; but do not wait for one that does nothing.
        :returns: its exit status; None: it has not ended.
        """
        if self._criu is None:
            return 0
        self.go_on()
        with anyio.CancelScope(shield=True):
            return await in_thread(self._end, self._criu, bounded)
        raise AssertionError  # a shielded scope swallows nothing

    def _end(self, criu: RunningCriu, bounded: bool) -> int | None:
        if bounded and isinstance(criu, HeldCriu) and not self._gate.has_begun:
            criu.ask_to_end()
        while not criu.has_ended_within(_GATE_POLL):
            if bounded and self._idle() > _IDLE_AT_END:
                return None
        return criu.wait()


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _since(began: int) -> int:
    """Microseconds since a moment of time.monotonic_ns()."""
    return (time.monotonic_ns() - began) // 1000
