"""What errors of CRIU's that people meet mean, and what to do about each: a table of patterns, in the order of asking.

The patterns are of CRIU 4.1 and 4.2. Each line's test provokes it where the machine lets it be provoked
(tests/criu/test_hints.py), or has the line as CRIU logs it (tests/unit/test_criu_hints.py). The options are CRIU's:
they stand after ``--``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Hint(NamedTuple):
    """A pattern, which is searched for in a line, and what is said then."""

    pattern: str
    text: str


_HINTS = (
    # Terminals and sessions
    _Hint(
        r"tty: Found dangling tty|is not a session leader\. Consider|tty: Found slave peer index",
        "the tree belongs to a terminal, or to a session, that is not part of it: give `-- --shell-job`, to restore it "
        "as well, or start the program by setsid, with its input and output in files",
    ),
    _Hint(
        r"session leader of (zombie process )?\S+ is outside of its pid namespace",
        "the session was begun outside of the tree's pid namespace: start the program there by setsid (a container's "
        "runtime does)",
    ),
    _Hint(r"Can't find a session leader", "the leader of the session has exited: start the program by setsid"),
    _Hint(
        r"tty: Don't have tty to inherit|tty: Standard stream is not a terminal",
        "a tree of a terminal (--shell-job) is restored from a terminal: run the restore in one, not detached",
    ),
    # Process numbers
    _Hint(
        r"Can't fork for \d+: File exists|Pid \d+ do not match expected",
        "the process numbers of the tree are in use here (a zombie has one as well): end whoever has them, or restore "
        "in a pid namespace of its own (`unshare --pid --fork --mount-proc incdump restore ...`)",
    ),
    # The network
    _Hint(
        r"sockets: Can't get 1:(16|34) opt",
        "Linux 6.18 and later do not tell CRIU this of TCP sockets: CRIU 4.2.1 or later does not ask",
    ),
    _Hint(
        r"In-flight connections? ",
        "a connection has not been accepted yet: give `-- --skip-in-flight` to leave it out, or try again",
    ),
    _Hint(
        r"Need to set the --tcp-close",
        "it was dumped with its connections closed: give `-- --tcp-close` to the restore",
    ),
    _Hint(
        r"inet: Connected TCP socket",
        "the tree has TCP connections: give `-- --tcp-established`, to restore it as well (or `-- --tcp-close`, by "
        "which they are lost)",
    ),
    _Hint(
        r"execvp\(\"ip6?tables|iptables-restore returned|Iptables configuration failed",
        "CRIU keeps the network from changing by the program iptables-restore, which is missing here or fails: install "
        "iptables, or give `-- --network-lock nftables`",
    ),
    _Hint(
        r"Locking (network|connection) failed using nftables|nft command error",
        "CRIU was built without nftables, or the kernel lacks it: give `-- --network-lock iptables`",
    ),
    _Hint(
        r"Unable to dump a socket from an external network namespace",
        "a socket belongs to another network namespace than the tree's: it can be checkpointed only together with that",
    ),
    # Unix sockets
    _Hint(
        r"unix: External socket (is used|found in image)",
        "a unix socket is connected to a process outside of the tree: if it is for datagrams, give `-- --ext-unix-sk`, "
        "to restore it as well (the other end must be there then); else the tree has to include that process",
    ),
    _Hint(
        r"unix: Can't dump (half of stream|name-less)|unix: Unix socket \d+ (without|with unreachable) peer",
        "the other end of a unix socket is a process outside of the tree: checkpoint the tree that has both, or have "
        "the program hang up first",
    ),
    _Hint(
        r"unix: Can't connect \d+ socket",
        "the process outside of the tree that a unix socket was connected to does not listen here: start it first",
    ),
    # Mounts
    _Hint(
        r"doesn't have a proper root mount",
        "a mount comes from outside of the tree's mount namespace: name it, `-- --external 'mnt[PATH]:NAME'`, and its "
        "source when you restore, `-- --external 'mnt[NAME]:SOURCE'`",
    ),
    _Hint(
        r"is autodetected external mount",
        "a mount comes from outside of the tree's mount namespace: give `-- --external 'mnt[]'`, to restore it as well",
    ),
    _Hint(
        r"has unreachable sharing",
        "mounts take part in those of a namespace outside of the tree: give `-- --external 'mnt[]:ms'`, to restore it "
        "as well, or make them private (`mount --make-rprivate /` in its namespace)",
    ),
    _Hint(
        r"The --root option is required to restore a mount namespace",
        "the tree has a mount namespace of its own: give `-- --root DIR`, a directory that is a mount, with its files",
    ),
    _Hint(
        r"Can't lookup mount=",
        "a file is open, or mapped, that is on a mount which the tree's mount namespace does not have: open it inside "
        "(input and output as well: redirect them there), or name it, `-- --external 'file[MOUNT:INODE]'`",
    ),
    _Hint(
        r"mnt: FS mnt .* unsupported|is a fuse mount but not external",
        "CRIU cannot rebuild a file system that is mounted there: name it, `-- --external 'mnt[PATH]:NAME'`, leave it "
        "out (`-- --skip-mnt PATH`), or have it tried (`-- --enable-fs NAME`)",
    ),
    # Namespaces
    _Hint(
        r"doesn't belong to the target user namespace|Unable to convert uid or gid",
        "the tree's user namespace does not own its other namespaces, or lacks a user that they have: make all of them "
        "together (`unshare --user --map-root-user --pid --fork --mount-proc --net --ipc --uts`)",
    ),
    _Hint(
        r"Can't dump nested \w+ namespace|Can't dump a pid namespace without the process init",
        "some of the tree is in namespaces that the rest is not in: give the first process of the inner ones (a "
        "container's process 1) for the root",
    ),
    _Hint(
        r"with SysVIPC shmem map|SysV(IPC)? .* doesn't live in IPC ns",
        "System V shared memory belongs to an IPC namespace: run the tree in one of its own (`unshare --ipc`)",
    ),
    # Files
    _Hint(
        r"Some file locks are hold|Unresolved lock found",
        "the tree holds locks of files: give `-- --file-locks`, to restore it as well, if nobody else uses these files",
    ),
    _Hint(
        r"Can't create link remap",
        "a file was deleted that is still open and has another name: give `-- --link-remap`, by which CRIU gives it "
        "one beside it",
    ),
    _Hint(
        r"Can't dump ghost file .* increase limit",
        "a file was deleted that is still open and is larger than CRIU takes along: give `-- --ghost-limit SIZE` "
        "(64M, for example)",
    ),
    _Hint(
        r"fsnotify: (Can't (find suitable path|open|dump that)|Unable to lookup a mount)|irmap: Failed to resolve",
        "CRIU does not find the name of what is watched by inotify or fanotify: give `-- --force-irmap`, with "
        "`--irmap-scan-path DIR` for where to look",
    ),
    _Hint(
        r"pie: .*send_fds failed \(-22\)|Can't dump file \d+ of that type|Unknown shit",
        "a file is open of a kind that CRIU cannot dump (a device, io_uring, a userfaultfd, another anonymous one): "
        "have the program close it first, or use a plugin (`-- --libdir DIR`)",
    ),
    _Hint(
        r"Unsupported mapping found",
        "memory of a device is mapped, which CRIU cannot dump: have the program unmap it first, or use a plugin "
        "(`-- --libdir DIR`)",
    ),
    _Hint(
        r"has bad (size|mode|build-ID)",
        "a file is not what it was at the checkpoint: put the old one back (`-- --file-validation filesize` looks at "
        "sizes only, `-- --skip-file-rwx-check` not at permissions)",
    ),
    _Hint(
        r"Can't open file .* on restore|Can't open cwd",
        "a file or directory of the tree is not here: copy it to the place that it had (images hold memory, not files)",
    ),
    # Control groups
    _Hint(
        r"Neither a cgroupv1 \(freezer\.state\) or cgroupv2",
        "--freeze-cgroup wants the directory of a cgroup, as mounted here (/sys/fs/cgroup/...)",
    ),
    _Hint(
        r"Unable to freeze cgroup",
        "something in the cgroup does not stop: give a longer --timeout, or a smaller cgroup to --freeze-cgroup",
    ),
    _Hint(
        r"cg: |Unable to (send packet to|receive from) cgroupd",
        "the tree's cgroups cannot be made, or entered, as they were: give `-- --manage-cgroups=ignore` to leave it in "
        "those of whoever restores it, `=soft` to go into what is there, or `--cgroup-root` for another place",
    ),
    # Scripts, the kernel, the machine, privileges
    _Hint(
        r"action scripts failed|Pre dump script failed",
        "an action script that was given after `--` failed, or the gate that incdump has CRIU wait at: it needs the "
        "program flock on the PATH, and an images dir where programs may be executed",
    ),
    _Hint(
        r"suspending seccomp failed|Kernel doesn't support PTRACE_O_SUSPEND_SECCOMP",
        "a process has a seccomp filter, which CRIU may not suspend from under one: use `--way preload`, and start "
        "incdump from where there is no filter (grep Seccomp /proc/self/status says 0)",
    ),
    _Hint(
        r"cpu: .*(do not match run time|not supported on host|mismatch|unsupported)",
        "this processor lacks what the one had that the tree was dumped on: restore on one that has it all, or, at "
        "your own risk, give `-- --cpu-cap none`",
    ),
    _Hint(
        r"CRIU needs to have the CAP_|Running as non-root requires",
        "CRIU cannot do this as this user: checkpoint and restore as root",
    ),
    _Hint(
        r"Can't get rlimit|Can't seize|Unseizable non-zombie|SEIZE \d+: ",
        "CRIU may not look at a process: run as root with all of root's capabilities (CAP_SYS_PTRACE and "
        "CAP_SYS_RESOURCE among them), and with no other tracer (gdb, strace) in the tree",
    ),
    _Hint(
        r"Zombies with threads|Zombie thread not supported|Individually stopped threads",
        "a thread was just exiting, or is stopped by itself: try again",
    ),
    _Hint(
        r"kernel is too old|Your kernel probably lacks|kernel newer than|fdinfo doesn't contain|"
        r"(kcmp|prctl: PR_\w+|Time namespaces|pidfd_open syscall|seccomp filters|TCP_REPAIR_WINDOW option)"
        r" (is|are|isn't|not) ?(not )?supported|kernel lacks",
        "the kernel lacks what CRIU needs: use a newer one, or one that was built with CONFIG_CHECKPOINT_RESTORE "
        "(`criu check` names the rest)",
    ),
    _Hint(
        r"No space left on device",
        "a disk is full: the one of the images dir, most likely",
    ),
)
_TABLE = tuple((re.compile(known.pattern), known.text) for known in _HINTS)


def hint(errors: Sequence[str]) -> str | None:
    """What the first of some errors that is known means, and what to do; None where none is.

    :param errors: lines of CRIU's log, without time and place.
    """
    for error in errors:
        for pattern, text in _TABLE:
            if pattern.search(error):
                return text
    return None
