"""The two ways to keep userfaultfds: with the holder process, or in this very program.

`HolderKeeper` is what commands use, `OwnKeeper` is a session's. Both lend a `Lease` on one process: its userfaultfd,
and the generation of the dump that was committed last. A lease that is not committed leaves the generation lost.

Calls block (a few milliseconds; starting the holder some 50): the engine makes them in a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

from incdump import errors
from incdump.holder import huge_pages, wire
from incdump.holder.mappings import Growth, Pace
from incdump.holder.start import await_first_process, spawn
from incdump.holder.waiting import await_readable
from incdump.proc.identity import (
    HOLDER_COMM,
    Identity,
    boot_id,
    check_own_proc,
    descends_from,
    identify,
    is_same,
    keep_out_of_trees,
    listens_as_holder,
    open_identified,
    open_pidfd,
    read_proc,
)
from incdump.proc.limits import limit_of, starting

START_TIMEOUT = 10.0
"""Seconds within which a new holder has to answer."""
ANSWER_TIMEOUT = 15.0
"""Seconds within which the holder has to answer a question: much longer than an injection may take."""
_FORGOTTEN_AT_ONCE = 4000

_END_TIMEOUT = 2.0
_CONNECT_TIMEOUT = 2


@dataclass(slots=True)
class Lease:
    """The loan of one process's userfaultfd, until it is committed.

    :ivar uffd: this program's own descriptor of it.
    :ivar generation: of the last committed dump; None when tracking has just started, or the last dump was lost.
    :ivar started: tracking began with this lease.
    :ivar stopped_us: for how long one thread of the target was stopped for that, microseconds.
    :ivar ended: why tracking ended before; None if it did not, or that is not known.
    """

    pid: int
    start_time: int
    uffd: int
    generation: str | None
    started: bool
    stopped_us: int
    ended: str | None = None

    def close(self) -> None:
        """Close this program's descriptor; the keeper has its own."""
        if self.uffd >= 0:
            uffd, self.uffd = self.uffd, -1
            os.close(uffd)


class Keeper(Protocol):
    """Keeps userfaultfds and generations from one dump to the next."""

    @property
    def holder(self) -> Identity | None:
        """The process that keeps them; None: this program does, or none has been asked yet."""

    def acquire(self, pid: int, start_time: int, *, renew: bool = False) -> Lease:
        """Borrow the userfaultfd of a process, made now if there is none (or if ``renew``).

        :raises incdump.errors.TargetError: the process is gone, or does not allow it.
        :raises incdump.errors.HolderError: somebody else is dumping it, or the holder cannot be reached.
        """

    def lasts(self, asked: float) -> float:
        """For how long tracking lasts after a dump that asks for so many seconds; endless: as long as the keeper."""

    def commit(self, lease: Lease, generation: str | None, lasts: float | None = None) -> None:
        """End a loan: the images of this generation are complete (or: the pages that were taken are given back).

        :param lasts: seconds for which tracking goes on; 0: it ends now. None: as was said before.
        """

    def close(self) -> None:
        """End every loan that was not committed; their generations are lost."""


def _raise_refusal(answer: dict[str, Any], pid: int | None) -> None:
    """Turn a refusal of the holder back into the exception that it was there."""
    kind = getattr(errors, str(answer.get("kind")), None)
    number = answer.get("errno")
    if answer.get("kind") == "OSError" and number == 3:
        raise errors.TargetExited(f"process {pid} exited", pid=pid, errno=3)
    if not (isinstance(kind, type) and issubclass(kind, errors.IncdumpError)):
        kind = errors.HolderError
    raise kind(str(answer["error"]), pid=pid, errno=number)


def connect(seconds: float | None = None) -> socket.socket | None:
    """A connection to the running holder, or None when there is none: then nothing that one left is left any more.

    :param seconds: to wait for it; None: for as long as it may take to answer when it is busy.
    :raises incdump.errors.ProcMismatch: /proc is another pid namespace's.
    :raises incdump.errors.HolderError: it does not answer, or is of another version of incdump.
    """
    directory = runtime_dir()
    if not os.path.exists(wire.socket_path()):
        return None
    try:
        lock = wire.lock_socket(directory, seconds=seconds)  # lest it ends right now
    except OSError as error:
        raise unusable(error) from error
    try:
        sock = connect_locked(seconds)
        if sock is None:
            wire.remove_traces(directory)
        return sock
    finally:
        os.close(lock)


def runtime_dir() -> str:
    """The directory of the holder's socket, made if it is missing (`incdump.holder.wire.runtime_dir`).

    :raises incdump.errors.HolderError: it cannot be used.
    """
    try:
        return wire.runtime_dir()
    except OSError as error:
        raise unusable(error) from error


def unusable(error: OSError) -> errors.IncdumpError:
    """What to say of a runtime directory that cannot be used, or whose lock somebody keeps."""
    if (limit := limit_of(error)) is not None:
        return limit
    if isinstance(error, BlockingIOError):
        said = "the holder lets nobody connect; is it stopped? (kill -CONT, or kill -KILL, the process incdump-holder)"
    elif isinstance(error, TimeoutError):
        said = f"{error.filename} is kept locked by another incdump: wait for that, or end it if it is stopped"
    else:
        place = error.filename or "its directory"
        said = f"cannot use the holder in {place}: {error.strerror}; set INCDUMP_RUNTIME_DIR to a directory of your own"
    return errors.HolderError(said, errno=error.errno, path=error.filename)


def _holder_pid() -> int | None:
    """The process that listens as this user's holder, or None: the kernel tells, it is asked nothing itself.

    :raises incdump.errors.HolderError: it is not known whether there is one: so many wait for it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
        # A socket that does not block (settimeout) would not wait for a place in the queue.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _CONNECT_TIMEOUT, 0))
        try:
            sock.connect(wire.socket_path())
            return wire.peer(sock)[0]
        except BlockingIOError as error:
            raise errors.HolderError("the holder lets nobody connect; is it stopped?", errno=error.errno) from error
        except OSError:
            return None


def keep_holder_out_of_trees() -> None:
    """Recognize the running holder, if there is one, before a tree is listed that may have adopted it.

    :raises incdump.errors.HolderError: it is not known whether there is one.
    """
    if (holder := _holder_pid()) is not None:
        keep_out_of_trees(holder)


def end_holder_within(root: int) -> bool:
    """Have the holder end if process `root` has adopted it; what was borrowed from it stays borrowed.

    CRIU dumps every process of a tree: the holder would stop with it, and be in the images.

    :returns: whether it ended; its tracking is lost but for what is lent.
    :raises incdump.errors.HolderError: it has to end, and does not.
    """
    holder = _holder_pid()
    for pid in _other_holders(holder):
        if descends_from(pid, root):
            raise errors.HolderError(
                f"process {pid} is the holder of another incdump (another user, or INCDUMP_RUNTIME_DIR), and process "
                f"{root} has adopted it, so that CRIU would dump it: end it first (kill {pid})",
                pid=pid,
            )
    if holder is None or not descends_from(holder, root):
        return False
    sock = connect()
    if sock is None:
        return True
    with sock:
        holder, _ = wire.peer(sock)
        pidfd = _holder_pidfd(sock)
        try:
            ask(sock, {"do": "end"}, holder)
            if not _wait_ended(pidfd):
                raise errors.HolderError(f"the holder, process {holder}, does not end: kill it first", pid=holder)
        finally:
            os.close(pidfd)
    return True


def _holder_pidfd(sock: socket.socket) -> int:
    """A pidfd of the holder at the other end, which the caller closes."""
    try:
        return wire.peer_pidfd(sock)
    except OSError:  # a kernel before 6.5
        return open_pidfd(wire.peer(sock)[0])


def _other_holders(own: int | None) -> list[int]:
    """Holders of other runtime directories."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != own:
            with contextlib.suppress(OSError):
                if read_proc(f"/proc/{name}/comm").rstrip(b"\n") == HOLDER_COMM.encode():
                    found.append(int(name))
    return [pid for pid in found if listens_as_holder(pid)]


def _wait_ended(pidfd: int) -> bool:
    """Wait `_END_TIMEOUT` for the end of a process; not by select(2), which takes no descriptor above 1023."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(_END_TIMEOUT * 1000))


def connect_locked(seconds: float | None = None) -> socket.socket | None:
    """The same for who has the lock."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.settimeout(ANSWER_TIMEOUT)
    try:
        sock.connect(wire.socket_path())
        holder, _ = wire.peer(sock)
        keep_out_of_trees(holder)
        answer, _ = ask(sock, {"do": "hello"}, seconds=seconds)
        if answer.get("version") != wire.VERSION:
            raise errors.HolderError(
                f"the holder, process {holder}, is of another version of incdump: end it (kill {holder}); what it "
                "tracks is dumped whole the next time",
                pid=holder,
            )
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def connect_or_start() -> socket.socket:
    """A connection to the holder, which is started when there is none.

    :raises incdump.errors.HolderError: it cannot be started or reached.
    """
    try:
        lock = wire.lock_socket(wire.runtime_dir())
        try:
            sock = connect_locked()
            if sock is None:
                _start_holder()
                sock = connect_locked()
        finally:
            os.close(lock)
    except OSError as error:
        raise unusable(error) from error
    if sock is None:
        raise errors.HolderError("the holder process ended right after its start; run `incdump doctor`")
    return sock


def _start_holder() -> None:
    """Start a holder, and give its socket its place; the caller has the lock.

    Whatever is raised, this end of the channel closes: a holder that is only getting to run then ends by itself.
    """
    path = wire.socket_path()
    ours, theirs = socket.socketpair()
    log = os.open(wire.log_path(os.path.dirname(path)), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        with ours:
            with theirs:
                child = spawn("incdump.holder.server", [path, str(theirs.fileno())], (theirs.fileno(),), log)
            try:
                await_readable(ours, START_TIMEOUT)
                mine = ours.recv(4096)
            finally:
                await_first_process(child)
            if not mine:
                raise errors.HolderError("the holder process does not start; run `incdump doctor`")
            os.rename(mine, path)
            ours.sendall(b"1")
    except TimeoutError as error:
        raise errors.HolderError("the holder process does not start; run `incdump doctor`") from error
    finally:
        os.close(log)


def ask(
    sock: socket.socket,
    message: dict[str, Any],
    pid: int | None = None,
    fds_passed: tuple[int, ...] = (),
    seconds: float | None = None,
) -> tuple[dict[str, Any], list[int]]:
    """One question to the holder, and its answer.

    :param seconds: within which it has to answer; None: `ANSWER_TIMEOUT`.
    :raises incdump.errors.IncdumpError: what the holder answered as an error.
    :raises incdump.errors.HolderError: also when it does not answer in time: the connection is closed then, since the
        answer may still come.
    """
    try:
        with contextlib.suppress(BrokenPipeError):  # it may have said why
            wire.send(sock, message, fds_passed)
        await_readable(sock, ANSWER_TIMEOUT if seconds is None else seconds)
        try:
            answer, fds = wire.receive(sock)
        except ConnectionResetError:  # it hung up without having read that, which is told before what it said
            answer, fds = wire.receive(sock)
    except TimeoutError as error:
        holder, _ = wire.peer(sock)
        sock.close()
        slow = f"the holder, process {holder}, does not answer; is it stopped? (kill -CONT {holder}, or kill -KILL)"
        raise errors.HolderError(slow, pid=pid, errno=errno.ETIMEDOUT) from error
    except (OSError, ValueError) as error:
        if (limit := limit_of(error)) is not None:
            raise limit from error
        gone = f"the holder process is gone ({error}); the next dump will be full"
        raise errors.HolderError(gone, pid=pid) from error
    if answer is None:
        raise errors.HolderError("the holder process is gone; the next dump will be full", pid=pid)
    if "error" in answer:
        for fd in fds:
            os.close(fd)
        _raise_refusal(answer, pid)
    return answer, fds


class HolderKeeper:
    """Keeps userfaultfds with the holder process of this user.

    :param root: of the tree that is dumped: `forget` finds its processes by it when it is gone; None: of none.
    """

    def __init__(self, root: int | None = None) -> None:
        self._root = root
        self._sock: socket.socket | None = None
        self._holder: Identity | None = None

    @property
    def holder(self) -> Identity | None:
        """See `Keeper.holder`."""
        return self._holder

    def acquire(self, pid: int, start_time: int, *, renew: bool = False) -> Lease:
        """See `Keeper.acquire`."""
        if self._sock is None or self._sock.fileno() < 0:
            self._sock = connect_or_start()
            with contextlib.suppress(errors.NoSuchTarget):  # it has ended already, as the question will find out
                self._holder = identify(wire.peer(self._sock)[0])
        question = {"do": "renew" if renew else "acquire", "pid": pid, "start_time": start_time, "root": self._root}
        pidfd = open_identified(pid, start_time)
        try:
            answer, fds = ask(self._sock, question, pid, (pidfd,))
        finally:
            os.close(pidfd)
        told = answer["generation"], answer["started"], answer["stopped_us"], answer["ended"]
        return Lease(pid, start_time, fds[0], *told)

    def lasts(self, asked: float) -> float:
        """See `Keeper.lasts`."""
        return asked

    def commit(self, lease: Lease, generation: str | None, lasts: float | None = None) -> None:
        """See `Keeper.commit`; a target that exited meanwhile is no error."""
        if self._sock is None:
            return
        question = {"do": "commit", "pid": lease.pid, "start_time": lease.start_time, "generation": generation}
        question["lasts"] = lasts
        with contextlib.suppress(errors.HolderError):
            ask(self._sock, question, lease.pid)

    def close(self) -> None:
        """See `Keeper.close`: the connection's end is what tells the holder."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


@dataclass(slots=True)
class _Held:
    """One process that `OwnKeeper` keeps track of."""

    uffd: int
    generation: str | None
    growth: Growth
    huge_pages: huge_pages.Ranges


class OwnKeeper:
    """Keeps userfaultfds in this program: for a session, or a loop inside one program. Any thread may `close` it.

    A thread looks at the number of mappings of what it keeps, and lets go of processes that have too many
    (`incdump.holder.mappings`).
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], _Held] = {}
        self._busy: set[tuple[int, int]] = set()
        self._ended: dict[tuple[int, int], str] = {}
        self._closed = threading.Event()
        self._lock = threading.Lock()  # never held for long
        self.holder = None
        self._watcher: threading.Thread | None = None

    def acquire(self, pid: int, start_time: int, *, renew: bool = False) -> Lease:
        """See `Keeper.acquire`.

        :raises incdump.errors.HolderError: also when this is closed, or is being closed meanwhile.
        """
        key = (pid, start_time)
        with self._lock:
            if key in self._busy and not renew:
                raise errors.HolderError(
                    f"another dump of process {pid} is under way in this session", pid=pid, errno=16
                )
            started, stopped = renew or key not in self._held, 0
            held = [each.uffd for each in self._held.values()]
        if started:
            growth, huge = Growth(pid), huge_pages.find(pid)
            if growth.is_too_large_to_begin:
                raise errors.TargetUnsuitable(self._ended.get(key, growth.why_not), pid=pid)
            fresh, stopped = _make_uffd_apart(pid, start_time, held)
            self._keep(key, _Held(fresh, None, growth, huge))
        with self._lock:
            if key not in self._held:
                raise errors.HolderError("the session was closed while it dumped", pid=pid)
            mine = self._held[key]
            duplicate = fcntl.fcntl(mine.uffd, fcntl.F_DUPFD_CLOEXEC, 0)
            generation, mine.generation = mine.generation, None
            self._busy.add(key)
            ended = self._ended.pop(key, None)
        return Lease(pid, start_time, duplicate, generation, started, stopped, ended)

    def _keep(self, key: tuple[int, int], fresh: _Held) -> None:
        """Have a new userfaultfd take the place of the one that is held, if there is one."""
        with self._lock:
            old = self._held.pop(key, None)
            if not self._closed.is_set():
                self._held[key] = fresh
                if self._watcher is None:
                    with starting():
                        self._watcher = threading.Thread(target=self._watch, name="incdump-mappings", daemon=True)
                        self._watcher.start()
            for each in (old, fresh if self._closed.is_set() else None):
                if each is not None:
                    os.close(each.uffd)

    def lasts(self, asked: float) -> float:
        """See `Keeper.lasts`: until this is closed."""
        return math.inf

    def commit(self, lease: Lease, generation: str | None, lasts: float | None = None) -> None:
        """See `Keeper.commit`."""
        key = (lease.pid, lease.start_time)
        with self._lock:
            if key in self._held:
                self._held[key].generation = generation
            self._busy.discard(key)
            held = self._held.get(key)
        if lasts == 0 and held is not None:
            self._let_go(key, held)

    def release(self) -> None:
        """End every loan that was not committed, and let go of processes that have exited."""
        with self._lock:
            self._busy.clear()
            for pid, start_time in list(self._held):
                if not is_same(Identity(pid, start_time, boot_id())):
                    os.close(self._held.pop((pid, start_time)).uffd)

    def close(self) -> None:
        """Give up all tracking."""
        with self._lock:
            self._closed.set()
            gone, self._held = self._held, {}
            self._busy.clear()
        for key, held in gone.items():
            _end_tracking(key, held)

    def _watch(self) -> None:
        pace = Pace()
        while not self._closed.wait(pace.left):
            began = time.monotonic()
            with self._lock:
                idle = [(key, held) for key, held in self._held.items() if key not in self._busy]
            for key, held in idle:
                if held.growth.is_too_large():
                    self._let_go(key, held)
            pace.took(time.monotonic() - began, hurry=any(held.growth.is_growing for _, held in idle))

    def _let_go(self, key: tuple[int, int], held: _Held) -> None:
        with self._lock:
            if key in self._busy or self._held.get(key) is not held:
                return
            del self._held[key]
            self._ended[key] = held.growth.why
        _end_tracking(key, held)


def _end_tracking(key: tuple[int, int], held: _Held) -> None:
    os.close(held.uffd)
    if held.huge_pages:
        with contextlib.suppress(errors.IncdumpError):
            pidfd = open_identified(*key)
            try:
                huge_pages.collapse_apart(pidfd, held.huge_pages)
            finally:
                os.close(pidfd)


def _make_uffd_apart(pid: int, start_time: int, held: list[int]) -> tuple[int, int]:
    """Have a helper process make the userfaultfd, see `incdump.holder.oneshot`."""
    check_own_proc()
    pidfd = open_identified(pid, start_time)
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = map(str, (pid, pidfd, theirs.fileno(), os.getpid(), *held))
            helper = spawn("incdump.holder.oneshot", list(arguments), (pidfd, theirs.fileno()))
    finally:
        os.close(pidfd)
    with ours:
        try:
            await_readable(ours, START_TIMEOUT)
            answer, fds = wire.receive(ours)
        except (OSError, ValueError) as error:
            raise errors.HolderError(f"the helper process failed: {error}", pid=pid) from error
        finally:
            helper.wait()
    if answer is None:
        raise errors.HolderError("the helper process that starts tracking ended without a word", pid=pid)
    if "error" in answer:
        _raise_refusal(answer, pid)
    return fds[0], int(answer["stopped_us"])


def held_targets(seconds: float | None = None) -> list[dict[str, Any]]:
    """What the holder of this user keeps: a list of ``pid``, ``start_time``, ``generation``, ``busy``.

    :param seconds: within which it has to answer each question; None: for as long as it may take when it is busy.
    :raises incdump.errors.HolderError: it does not.
    """
    sock = connect(seconds)
    if sock is None:
        return []
    with sock:
        answer, _ = ask(sock, {"do": "list"}, seconds=seconds)
        targets: list[dict[str, Any]] = answer["targets"]
        return targets


def forget(pids: list[int] | None, root: tuple[int, int | None] | None = None) -> list[int]:
    """Give up the tracking of processes, or of all; a holder that holds no more has ended when this returns.

    :param pids: their numbers; None for all.
    :param root: and all that were dumped with this tree: number and start time of its root; None for that: it is gone.
    :returns: the processes that were tracked until now.
    :raises incdump.errors.HolderError: one of them is being dumped right now.
    """
    sock = connect()
    if sock is None:
        return []
    with sock:
        pidfd = _holder_pidfd(sock)
        forgotten: list[int] = []
        try:
            for some in [None] if pids is None else _in_portions(pids):
                answer, _ = ask(sock, {"do": "forget", "pids": some, "root": root})
                forgotten += answer["forgotten"]
            sock.close()  # the holder waits for that
            if answer["ends"]:
                _wait_ended(pidfd)
        finally:
            os.close(pidfd)
    return forgotten


def _in_portions(pids: list[int]) -> list[list[int]]:
    """Numbers, as many at a time as fit into a message."""
    return [pids[i : i + _FORGOTTEN_AT_ONCE] for i in range(0, max(1, len(pids)), _FORGOTTEN_AT_ONCE)]
