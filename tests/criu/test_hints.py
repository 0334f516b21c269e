"""What incdump says to errors of the real CRIU that people meet: each is provoked, and what is advised helps."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anyio
import pytest

import incdump
from incdump.criu.program import find
from incdump.criu.trial import tells_of_tcp_sockets
from tests.command import is_untouched
from tests.criu.criu import criu_path, exists, until
from tests.criu.namespaces import in_own_namespaces, own_network
from tests.criu.services import criu_for_sockets
from tests.criu.test_confined import own_cgroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from incdump.model.options import Afterwards

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300), pytest.mark.usefixtures("real_criu")]

TROUBLED = Path(__file__).with_name("troubled.py")
AS_A_CHILD = ("sh", "-c", '"$0" "$@" & wait')
AT_A_TERMINAL = ("setsid", "--ctty", "sh", "-c", 'exec 3<&0; setsid "$0" "$@" <&3 3<&- & wait')
WITH_A_MOUNT = (
    *("unshare", "--mount", "sh", "-c"),
    """mount -t tmpfs none /mnt && mkdir /mnt/sub m && mount --bind /mnt/sub m && umount /mnt &&
    cd "$PWD" && exec "$0" "$@" < /dev/null > /dev/null 2>&1""",
)


class Case(NamedTuple):
    """A target that CRIU refuses.

    :ivar kind: of troubled.py.
    :ivar quoted: what CRIU says of it.
    :ivar hint: words of what incdump says to that.
    :ivar helps: options for CRIU that help; ``WORK`` is the target's directory. Empty: none do.
    :ivar under: a program and its arguments that becomes the target, or starts it.
    :ivar below: how many generations below that program the target is.
    :ivar options: for CRIU, with which it fails.
    """

    kind: str
    quoted: str
    hint: str
    helps: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    below: int = 0
    options: tuple[str, ...] = ()


@contextlib.contextmanager
def troubled(
    root: Path, case: Case, *, stdin: int = subprocess.DEVNULL, own_session: bool = True
) -> Iterator[tuple[int, Path]]:
    """A target in a directory of its own, both of which it yields."""
    work = root / "work"
    work.mkdir(exist_ok=True)
    command = [*case.under, sys.executable, "-IS", str(TROUBLED), case.kind]
    with (root / "said").open("w+b") as said:
        process = subprocess.Popen(
            command, cwd=work, stdin=stdin, stdout=said, stderr=said, start_new_session=own_session
        )
        pid = process.pid
        try:
            until(lambda: (work / "ready").exists() or process.poll() is not None, 60)
            assert process.poll() is None, (root / "said").read_text()
            for _ in range(case.below):
                pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
            yield pid, work
        finally:
            for number in {pid, process.pid}:
                if exists(number):
                    os.kill(number, signal.SIGKILL)
            process.wait()


def checkpoint(
    pid: int, images: Path, options: Sequence[str] = (), afterwards: Afterwards = "killed", criu: Path | None = None
) -> None:
    call = partial(incdump.checkpoint, options=incdump.DumpOptions(afterwards=afterwards), criu_options=tuple(options))
    anyio.run(partial(call, pid, images, criu=str(criu or criu_path())))


def restore(images: Path, options: Sequence[str] = (), criu: Path | None = None) -> int:
    call = partial(incdump.restore, images, criu=str(criu or criu_path()), criu_options=tuple(options))
    return anyio.run(call).pid


def refuse_restore(pid: int, images: Path, match: str, options: Sequence[str] = (), criu: Path | None = None) -> None:
    """CRIU cannot bring back a tree, whose root's number is free then."""
    with pytest.raises(incdump.CriuError, match=match):
        restore(images, options, criu)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)  # what is left of the attempt


def refuse(pid: int, root: Path, case: Case, criu: Path | None = None) -> None:
    """CRIU's own words are quoted, and what they mean is said after them; with what is advised it works."""
    match = f"{case.quoted}.*; hint: .*{case.hint}.*; its log is kept in "
    with pytest.raises(incdump.CriuError, match=match) as raised:
        checkpoint(pid, root / "refused", case.options, criu=criu)
    assert "RLIMIT_NOFILE" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert is_untouched(pid)
    if case.helps:
        helps = [option.replace("WORK", str(root / "work")) for option in case.helps]
        checkpoint(pid, root / "images", helps, "running", criu)
        assert is_untouched(pid)


@pytest.mark.parametrize(
    "case",
    [
        Case("nothing", "not a session leader", "-- --shell-job", ("--shell-job",), AS_A_CHILD, 1),
        Case("nothing", r"session leader of 3\(1\) is outside", "by setsid", (), ("unshare", "--pid", "--fork"), 1),
        Case("locks", "file locks are hold", "-- --file-locks", ("--file-locks",)),
        Case("deleted_but_linked", "Can't create link remap", "-- --link-remap", ("--link-remap",)),
        Case("big_and_deleted", "ghost file .* increase limit", "-- --ghost-limit", ("--ghost-limit", "64M")),
        Case("watches", "Can't dump that handle", "irmap-scan", ("--force-irmap", "--irmap-scan-path", "/proc/sys")),
        Case("has_an_io_uring", r"(pie: send_fds failed \(-22\)|Can't dump file)", "io_uring"),
        Case("has_a_ruleset", "Can't dump file 3 of that type .*landlock", "cannot dump"),
        Case("shares_memory", "doesn't live in IPC ns", "unshare --ipc"),
        Case("has_a_users_namespace", "target user namespace", "unshare --user"),
        Case("has_a_nested_namespace", "Can't dump nested uts namespace", "process 1"),
        Case("nothing", "Can't dump nested pid namespace", "process 1", (), ("unshare", "--pid", "--fork")),
        Case("nothing", "Can't lookup mount=", "redirect them there", (), ("unshare", "--mount")),
        Case("nothing", "proper root mount", "mnt.PATH.:NAME", ("--external", "mnt[WORK/m]:it"), WITH_A_MOUNT),
        Case("nothing", "Neither a cgroupv1", "as mounted here", options=("--freeze-cgroup", "/no/such")),
    ],
    ids=lambda case: f"{case.kind}-{case.quoted[:30]}",
)
@in_own_namespaces
def test_what_criu_refuses_is_explained(images_root: Path, case: Case) -> None:
    with troubled(images_root, case) as (pid, _):
        refuse(pid, images_root, case)


@in_own_namespaces
def test_a_terminal_outside_of_the_tree(images_root: Path) -> None:
    case = Case("nothing", "tty: ", "-- --shell-job", ("--shell-job",), AT_A_TERMINAL, 1)
    ours, theirs = pty.openpty()
    with troubled(images_root, case, stdin=theirs, own_session=False) as (pid, work):
        refuse(pid, images_root, case)
        checkpoint(pid, images_root / "killed", case.helps)
        (work / "ready").unlink()
        refuse_restore(pid, images_root / "killed", "without correspond master.*hint: .*-- --shell-job")
        refuse_restore(
            pid, images_root / "killed", "Don't have tty to inherit.*hint: .*from a terminal", ["--shell-job"]
        )
    os.close(ours)
    os.close(theirs)


@in_own_namespaces
def test_a_session_that_was_begun_elsewhere(images_root: Path) -> None:
    case = Case("nothing", r"session leader of 2\(2\) is outside", "by setsid")
    with troubled(images_root, case, own_session=False) as (pid, _):
        refuse(pid, images_root, case)


@in_own_namespaces
def test_a_unix_socket_of_a_stranger(images_root: Path) -> None:
    case = Case("sends_to_a_stranger", "External socket is used", "-- --ext-unix-sk", ("--ext-unix-sk",))
    (images_root / "work").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(images_root / "work" / "strangers"))
        with troubled(images_root, case) as (pid, work):
            refuse(pid, images_root, case)
            checkpoint(pid, images_root / "killed", case.helps)
            os.waitpid(pid, 0)
            (work / "strangers").unlink()
            refuse_restore(pid, images_root / "killed", "Can't connect .* socket.*hint: .*start it first", case.helps)


@in_own_namespaces
def test_a_conversation_with_a_stranger(images_root: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, troubled(images_root, Case("nothing", "", ""), stdin=theirs.fileno()) as (pid, _):
        refuse(pid, images_root, Case("nothing", "External socket is used", "has to include that process"))
        refuse(pid, images_root, Case("nothing", "half of stream", "hang up first", options=("--ext-unix-sk",)))


@in_own_namespaces
def test_tcp_sockets_and_a_criu_that_is_too_old_for_the_kernel(images_root: Path) -> None:
    own_network()
    case = Case("listens", "Can't get 1:16 opt", "CRIU 4.2.1")
    with troubled(images_root, case) as (pid, _):
        if tells_of_tcp_sockets(find(str(criu_path()))):
            checkpoint(pid, images_root / "images", afterwards="running")
        else:
            refuse(pid, images_root, case)


NFTABLES = ("--tcp-established", "--network-lock", "nftables")


@pytest.mark.parametrize(
    "case",
    [
        Case("waited_for", "In-flight connection", "-- --skip-in-flight"),
        Case("connected", "Connected TCP socket", "-- --tcp-established", NFTABLES),
        Case("connected", "Iptables", "network-lock nftables", NFTABLES, options=("--tcp-established",)),
    ],
    ids=lambda case: case.quoted,
)
@pytest.mark.usefixtures("real_criu_for_sockets")
@in_own_namespaces
def test_a_tcp_connection(images_root: Path, case: Case) -> None:
    own_network()
    for name in ("flock", "true"):  # the gate's
        (images_root / name).symlink_to(str(shutil.which(name)))
    os.environ["PATH"] = str(images_root)  # no iptables there
    with troubled(images_root, case) as (pid, _):
        refuse(pid, images_root, case, criu_for_sockets())


@pytest.mark.parametrize(
    ("options", "quoted", "hint"),
    [
        (NFTABLES, "Connected TCP socket in image", "-- --tcp-established"),
        (("--tcp-close",), "Need to set the --tcp-close", "-- --tcp-close` to the restore"),
    ],
)
@pytest.mark.usefixtures("real_criu_for_sockets")
@in_own_namespaces
def test_the_restore_of_a_tcp_connection(images_root: Path, options: tuple[str, ...], quoted: str, hint: str) -> None:
    own_network()
    with troubled(images_root, Case("connected", "", "")) as (pid, _):
        checkpoint(pid, images_root / "images", options, criu=criu_for_sockets())
        os.waitpid(pid, 0)
        refuse_restore(pid, images_root / "images", f"{quoted}.*hint: .*{hint}", criu=criu_for_sockets())
        os.kill(restore(images_root / "images", options, criu_for_sockets()), signal.SIGKILL)


@pytest.mark.parametrize("way", ["it runs", "it is a zombie"])
@in_own_namespaces
def test_a_process_number_that_is_in_use(images_root: Path, way: str) -> None:
    with troubled(images_root, Case("nothing", "", "")) as (pid, _):
        checkpoint(pid, images_root / "images", afterwards="running" if way == "it runs" else "killed")
        with pytest.raises(incdump.CriuError, match=f"Can't fork for {pid}: File exists; hint: .*unshare --pid"):
            restore(images_root / "images")


@pytest.mark.parametrize(
    ("kind", "change", "quoted", "hint"),
    [
        ("has_a_file", lambda work: (work / "file").write_text("other words"), "has bad size", "put the old one back"),
        ("has_a_file", lambda work: (work / "file").chmod(0o755), "has bad mode", "put the old one back"),
        ("has_a_file", lambda work: (work / "file").unlink(), "file .* on restore", "copy it to the place"),
        ("nothing", lambda work: work.rename(work.with_name("other")), "Can't open cwd", "copy it to the place"),
    ],
    ids=["longer", "mode", "gone", "directory"],
)
@in_own_namespaces
def test_a_file_that_is_not_what_it_was(
    images_root: Path, kind: str, change: Callable[[Path], object], quoted: str, hint: str
) -> None:
    with troubled(images_root, Case(kind, "", "")) as (pid, work):
        checkpoint(pid, images_root / "images")
        os.waitpid(pid, 0)
        change(work)
        refuse_restore(pid, images_root / "images", f"{quoted}.*hint: .*{hint}")


@pytest.mark.parametrize(
    ("mode", "quoted"), [("strict", "cg: Abort restore of existing"), ("none", "cg: Cgroup dir .* doesn't exist")]
)
@in_own_namespaces
def test_a_cgroup_that_is_not_what_it_was(images_root: Path, mode: str, quoted: str) -> None:
    with own_cgroup("cgroup2", "") as group:
        joining = ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$0" "$@"')
        with troubled(images_root, Case("nothing", "", "", (), joining)) as (pid, _):
            checkpoint(pid, images_root / "images", ["--manage-cgroups=full"])
            os.waitpid(pid, 0)
            if mode == "none":
                group.rmdir()
            match = f"{quoted}.*hint: .*-- --manage-cgroups=ignore"
            refuse_restore(pid, images_root / "images", match, [f"--manage-cgroups={mode}"])
            os.kill(restore(images_root / "images", ["--manage-cgroups=ignore"]), signal.SIGKILL)
            group.mkdir(exist_ok=True)
