"""The holder: a small process that keeps userfaultfds between two commands.

A userfaultfd's write protection, and with it the knowledge of what was written, lasts as long as somebody holds the
descriptor. ``incdump predump`` ends after each round, so it leaves the descriptor with this process, as keys are left
with an ssh-agent. It starts on demand, talks to the same user alone, and ends when its last target has exited, was
given up with ``incdump untrack``, or has not been dumped for as long as its last dump said (``--track-for``). It lets
go of a target whose mappings become too many (`incdump.holder.mappings`), and says so at the next dump.

It is also the process that makes the userfaultfd, by running one system call in the target (`incdump.freeze.inject`):
killing incdump, by whatever signal, never meets the moment in which a register of the target is altered.

It serves its own pid namespace alone (`incdump.holder.wire`), and takes no number for a process without a pidfd.

Run as ``python -c "from incdump.holder.server import main; main()" SOCKET CHANNEL_FD``, which `incdump.holder.client`
does. It listens under a name of its own and says that over the channel; who started it, and has the lock, gives the
socket its place. A holder whose starter has given up is told so by the channel's end, and ends. Only the standard
library is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from incdump._uapi import userfaultfd as uapi
from incdump.errors import IncdumpError, TargetExited, TargetUnsuitable
from incdump.freeze.inject import Held, inject_userfaultfd
from incdump.holder import huge_pages, wire
from incdump.holder.mappings import Growth, Pace
from incdump.proc.identity import HOLDER_COMM, has_ended, identify, pid_of, read_stat
from incdump.proc.limits import limit_is_near, limit_of, raise_open_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LINGER = 5.0
"""Seconds without target and client after which the holder ends, unless it was told that no more are to come."""

_FDS_LEFT = 24
"""Descriptors that are left to talk with clients: one that gives up targets has to get in."""
_NO_DESCRIPTORS = 0.1
"""Seconds of rest where not even that can be said to a client."""
_OTHER_NAMESPACE = {
    "error": "this holder serves another pid namespace: give incdump a runtime directory of its own there",
    "kind": "HolderError",
    "errno": None,
}
PR_SET_NAME = 15
_FLAGS = uapi.UFFD_USER_MODE_ONLY | os.O_CLOEXEC | os.O_NONBLOCK


@dataclass(slots=True)
class Target:
    """One process that is tracked.

    :ivar roots: of the trees that it was dumped with: number and start time.
    :ivar generation: of the last dump that was committed; None while a dump is under way, and after one that failed.
    :ivar owner: the connection that acquired it, or None.
    :ivar until: when its tracking ends, seconds of CLOCK_BOOTTIME; None: no dump of it has been committed yet.
    :ivar growth: of its mappings.
    :ivar huge_pages: where it had some when tracking began.
    :ivar ended: why it is not tracked any more; None: it is. What is left then is this word, for the next dump.
    """

    pid: int
    start_time: int
    pidfd: int
    uffd: int = -1
    roots: set[tuple[int, int]] = field(default_factory=set)
    generation: str | None = None
    owner: socket.socket | None = field(default=None, repr=False)
    until: float | None = None
    growth: Growth | None = field(default=None, repr=False)
    huge_pages: huge_pages.Ranges = field(default_factory=list, repr=False)
    ended: str | None = None

    def end_tracking(self) -> None:
        """Give it up: the kernel takes all write protection off with the last descriptor."""
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1
            huge_pages.collapse_apart(self.pidfd, self.huge_pages)
        self.huge_pages = []

    def close(self) -> None:
        """Give up tracking, and all that is known of it."""
        if self.pidfd >= 0:
            self.end_tracking()
            os.close(self.pidfd)
        self.pidfd = -1


def make_tracking_uffd(pid: int, pidfd: int, held: Sequence[Held] = ()) -> tuple[int, int]:
    """A userfaultfd of another process's address space, ready for asynchronous write protection.

    :param pidfd: of that process: while it has not exited, the number that was stopped is its.
    :param held: those of other processes, see `inject_userfaultfd`.
    :returns: the descriptor, and the microseconds for which one thread of the target was stopped.
    :raises incdump.errors.TargetError: the target does not allow it.
    """

    def check_stopped() -> None:
        if pid_of(pidfd) != pid or has_ended(pidfd):
            raise TargetExited(f"process {pid} exited, and its number is another's by now", pid=pid)

    with _signals_wait():
        uffd, stopped = inject_userfaultfd(pid, _FLAGS, held=held, on_stopped=check_stopped)
    try:
        uapi.api(uffd, uapi.FEATURE_WP_ASYNC | uapi.FEATURE_WP_UNPOPULATED)
    except OSError:
        os.close(uffd)
        raise
    return uffd, stopped


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that would end this process come later: a register of the target may be altered meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Holder:
    """The event loop: clients, targets, and nothing else."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.inode: os.stat_result | None = None
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self._accept)
        self.targets: dict[int, Target] = {}
        self.clients: set[socket.socket] = set()
        self.linger = LINGER
        self.has_to_end = False
        self.stays = False  # also without targets
        self.spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.pace = Pace()

    def run(self) -> None:
        """Serve until there is nothing left to hold."""
        while True:
            idle = not (self.stays or self.targets or self.clients)
            ready = self.selector.select(self.linger if idle else self._until_next_look())
            self._look_at_targets()
            if idle and not ready and self._may_end():
                return
            for key, _events in ready:
                key.data(key.fileobj)
            if self.has_to_end:
                with contextlib.suppress(BlockingIOError):  # whoever has the lock finds the socket dead
                    self._remove_traces()
                return

    def end_when_readable(self, fd: int) -> None:
        """Have the loop end, all tracking given up, when something can be read from a descriptor."""

        def end(_fd: int) -> None:
            self.has_to_end = True

        self.selector.register(fd, selectors.EVENT_READ, end)

    def release(self) -> None:
        """Give up all tracking."""
        for target in list(self.targets.values()):
            self._remove(target)

    def _until_next_look(self) -> float | None:
        return self.pace.left if self.targets else None

    def _look_at_targets(self) -> None:
        """Let go of those whose time is over, or whose mappings have become too many."""
        if not self.targets or self.pace.left:
            return
        began = time.monotonic()
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        for target in [target for target in self.targets.values() if target.owner is None]:
            if target.until is not None and now >= target.until:
                self._remove(target)
            elif target.uffd >= 0 and target.growth is not None and target.growth.is_too_large():
                target.ended, target.generation, target.growth = target.growth.why, None, None
                target.end_tracking()
        hurry = any(target.growth is not None and target.growth.is_growing for target in self.targets.values())
        self.pace.took(time.monotonic() - began, hurry=hurry)

    def _may_end(self) -> bool:
        """Take the lock under which clients look for a holder, and the socket out of their sight; or find one waiting.

        The lock is held until this process is gone: a client that comes now starts another holder after that.
        """
        directory = os.path.dirname(self.listener.getsockname())
        try:
            lock = wire.lock_socket(directory, wait=False)
        except BlockingIOError:
            return False
        if self.selector.select(0):
            os.close(lock)
            return False
        wire.remove_traces(directory, self.inode)
        return True

    def _remove_traces(self) -> None:
        """:raises BlockingIOError: somebody has the lock."""
        directory = os.path.dirname(self.listener.getsockname())
        wire.lock_socket(directory, wait=False)
        wire.remove_traces(directory, self.inode)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError as error:
            if limit_of(error) is not None:
                self._refuse_for_want_of_descriptors(listener)
            return
        try:
            _, uid = wire.peer(client)
            refusal = None if wire.is_neighbour(client) else _OTHER_NAMESPACE
        except Exception as error:
            refusal = _refusal(error)
        if uid != os.geteuid() or refusal is not None:
            if uid == os.geteuid() and refusal is not None:
                self._send(client, refusal)
            client.close()
            return
        self.clients.add(client)
        self.selector.register(client, selectors.EVENT_READ, self._serve)

    def _refuse_for_want_of_descriptors(self, listener: socket.socket) -> None:
        """A client that cannot be taken on is told so, by way of the descriptor that is kept for that."""
        os.close(self.spare)
        try:
            with listener.accept()[0] as client:
                self._send(client, _refusal(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
        except OSError:
            time.sleep(_NO_DESCRIPTORS)
        finally:
            with contextlib.suppress(OSError):
                self.spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _serve(self, client: socket.socket) -> None:
        try:
            message, fds = wire.receive(client)
        except OSError as error:
            if limit_of(error) is not None and self._send(client, _refusal(error)):
                return
            message, fds = None, []
        except ValueError:
            message, fds = None, []
        try:
            self._respond(client, message, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _respond(self, client: socket.socket, message: dict[str, Any] | None, fds: list[int]) -> None:
        if message is None:
            self._drop(client)
            return
        try:
            answer, passed = self._answer(client, message, fds)
        except Exception as error:  # the targets of all other clients hang on this process
            answer, passed = _refusal(error), ()
        if not self._send(client, answer, passed):
            self._drop(client)

    @staticmethod
    def _send(client: socket.socket, answer: dict[str, Any], fds: tuple[int, ...] = ()) -> bool:
        """Whether it could be sent."""
        try:
            wire.send(client, answer, fds)
        except OSError:
            return False
        return True

    def _drop(self, client: socket.socket) -> None:
        """A client is gone: what it acquired and did not commit is lost, and free for the next."""
        for target in [target for target in self.targets.values() if target.owner is client]:
            target.owner = None
            if target.until is None:  # tracked for nothing
                self._remove(target)
        self.clients.discard(client)
        self.selector.unregister(client)
        client.close()

    def _answer(
        self, client: socket.socket, message: dict[str, Any], fds: list[int]
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        match message["do"]:
            case "hello":
                return {"pid": os.getpid(), "version": wire.VERSION}, ()
            case "acquire":
                return self._acquire_for(message, client, fds, renew=False)
            case "renew":
                return self._acquire_for(message, client, fds, renew=True)
            case "commit":
                return self._commit(client, int(message["pid"]), message["generation"], message["lasts"]), ()
            case "forget":
                return self._forget(client, message["pids"], message.get("root")), ()
            case "end":
                self.has_to_end = True
                return {"forgotten": list(self.targets)}, ()
            case "list":
                rows: list[dict[str, Any]] = [
                    {"pid": t.pid, "start_time": t.start_time, "generation": t.generation, "busy": t.owner is not None}
                    | {"left": None if t.until is None else t.until - time.clock_gettime(time.CLOCK_BOOTTIME)}
                    for t in self.targets.values()
                    if t.ended is None
                ]
                idle = not self.stays and not rows and self.clients == {client}
                return {"targets": rows[:500], "count": len(rows), "idle": idle}, ()
            case other:
                raise ValueError(other)

    def _acquire_for(
        self, message: dict[str, Any], client: socket.socket, fds: list[int], *, renew: bool
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        pid, root = int(message["pid"]), message.get("root")
        answer = self._acquire(client, pid, int(message["start_time"]), fds, renew=renew)
        if root is not None and pid in self.targets:
            with contextlib.suppress(ProcessLookupError):
                self.targets[pid].roots.add((int(root), read_stat(int(root)).start_time))
        return answer

    def _acquire(
        self, client: socket.socket, pid: int, start_time: int, fds: list[int], *, renew: bool
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        self.linger = LINGER
        if not fds or pid_of(fds[0]) != pid or has_ended(fds[0]):
            raise ProcessLookupError(errno.ESRCH, f"no pidfd of process {pid} came, or it exited")
        target = self.targets.get(pid)
        if target is not None and has_ended(target.pidfd):
            self._remove(target)
            target = None
        if target is not None and target.start_time != start_time:  # whoever asks is mistaken, not what is tracked
            raise ProcessLookupError(errno.ESRCH, f"process {pid} did not start then")
        if target is not None and target.owner not in (None, client):
            return {"error": f"another incdump is dumping process {pid}", "kind": "HolderError", "errno": 16}, ()
        if target is None and limit_is_near(_FDS_LEFT):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        stopped = 0
        started = target is None or target.uffd < 0 or renew
        if target is None:
            target = self._adopt(pid, start_time, os.dup(fds[0]))
        if started:
            target.generation = None
            if target.uffd >= 0:
                os.close(target.uffd)
                target.uffd = -1
            target.growth, target.huge_pages = Growth(pid), huge_pages.find(pid)
            try:
                if target.growth.is_too_large_to_begin:
                    raise TargetUnsuitable(target.ended or target.growth.why_not, pid=pid)
                held = [Held(os.getpid(), other.uffd) for other in self.targets.values() if other.uffd >= 0]
                target.uffd, stopped = make_tracking_uffd(pid, target.pidfd, held)
            except BaseException:
                self._remove(target)
                raise
        answer = {"generation": target.generation, "started": started, "stopped_us": stopped, "ended": target.ended}
        target.owner, target.generation, target.ended = client, None, None
        return answer, (target.uffd,)

    def _adopt(self, pid: int, start_time: int, pidfd: int) -> Target:
        try:
            if identify(pid).start_time != start_time or has_ended(pidfd):
                raise ProcessLookupError(errno.ESRCH, f"process {pid} is another one by now")
        except BaseException:
            os.close(pidfd)
            raise
        target = Target(pid, start_time, pidfd)
        self.targets[pid] = target
        self.selector.register(pidfd, selectors.EVENT_READ, lambda _fd: self._remove(target))
        return target

    def _commit(self, client: socket.socket, pid: int, generation: str | None, lasts: float | None) -> dict[str, Any]:
        target = self.targets.get(pid)
        if target is None or target.owner is not client:
            return {"error": f"process {pid} is not held for this client", "kind": "HolderError", "errno": None}
        target.owner, target.generation = None, generation
        if lasts is not None:
            target.until = time.clock_gettime(time.CLOCK_BOOTTIME) + lasts
        if target.until is None or lasts == 0:
            self._remove(target)
        return {}

    def _forget(self, client: socket.socket, pids: list[int] | None, root: list[int] | None) -> dict[str, Any]:
        wanted = None if pids is None else set(pids)
        chosen = [t for t in self.targets.values() if wanted is None or t.pid in wanted or _is_of(t, root)]
        told = [t.pid for t in chosen if t.ended is None]
        busy = [t.pid for t in chosen if t.owner is not None]
        if busy:
            return {"error": f"another incdump is dumping process {busy[0]}", "kind": "HolderError", "errno": 16}
        for target in chosen:
            self._remove(target)
        ends = not self.stays and not self.targets and self.clients == {client}
        self.linger = 0 if ends else LINGER
        return {"forgotten": told, "ends": ends}

    def _remove(self, target: Target) -> None:
        if self.targets.get(target.pid) is target:
            del self.targets[target.pid]
        if target.pidfd >= 0:
            with contextlib.suppress(KeyError):
                self.selector.unregister(target.pidfd)
        target.close()


def _is_of(target: Target, root: list[int] | None) -> bool:
    """Whether a process was dumped with the tree of a root: its number and start time, or null where it is gone."""
    if root is None:
        return False
    return any(pid == root[0] and root[1] in (None, start_time) for pid, start_time in target.roots)


def _refusal(error: Exception) -> dict[str, Any]:
    """An error as an answer."""
    if (limit := limit_of(error, is_holder=True)) is not None:
        error = limit
    if isinstance(error, IncdumpError):
        return {"error": str(error), "kind": type(error).__name__, "errno": error.errno}
    if isinstance(error, OSError):
        return {"error": str(error), "kind": "OSError", "errno": error.errno}
    traceback.print_exception(error)
    return {"error": f"the holder failed: {error!r}", "kind": "HolderError", "errno": None}


def main() -> None:
    """Daemonise, listen, have the socket put in its place, serve."""
    path, channel = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.umask(0o077)
    raise_open_files()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ctypes.CDLL(None).prctl(PR_SET_NAME, HOLDER_COMM.encode(), 0, 0, 0)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    mine = f"{path}.{os.getpid()}"
    listener.bind(mine)
    listener.listen(16)
    holder = Holder(listener)
    holder.inode = inode = os.lstat(mine)
    try:
        with channel:
            channel.settimeout(wire.LOCK_TIMEOUT)
            channel.sendall(os.fsencode(mine))
            has_place = channel.recv(1) == b"1"
    except OSError:
        has_place = False
    if not has_place:  # nobody will ever ask: the starter has given up, or was killed
        for name in (mine, path):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(name), inode):
                    os.unlink(name)
        return
    holder.run()
