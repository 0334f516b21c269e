"""Hints for CRIU's errors, by the line that CRIU logs, where tests/criu/test_hints.py does not provoke it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from incdump.criu.hints import _HINTS, hint
from incdump.criu.program import Criu, failure

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tty: Found dangling tty with sid 7 pgid 9 (pts) on peer fd 0.", "-- --shell-job"),
        ("A session leader of zombie process 8(8) is outside of its pid namespace", "by setsid"),
        ("Can't find a session leader for 7", "by setsid"),
        ("Pid 8 do not match expected 7", "unshare --pid"),
        ('execvp("iptables-restore", ...) failed: No such file or directory', "nftables"),
        ("net: Locking network failed: iptables-restore returned 1. This may be connected to", "nftables"),
        ("Locking connection failed using nftables", "-- --network-lock iptables"),
        ("net: Unable to dump a socket from an external network namespace", "together with that"),
        ("unix: Can't dump half of stream unix connection. name: x; peer name: y", "hang up first"),
        ("unix: Unix socket 7 with unreachable peer 8 (9)", "hang up first"),
        ("unix: External socket found in image. Consider using the --ext-unix-sk option", "-- --ext-unix-sk"),
        ('mnt: Mount 7:/x is autodetected external mount. Try "--ext-mount-map auto" to allow them.', "mnt[]"),
        ("mnt: Mount 7 /x (master_id: 1 shared_id: 2) has unreachable sharing. Try", "mnt[]:ms"),
        ("mnt-v2: The --root option is required to restore a mount namespace", "-- --root DIR"),
        ("mnt: FS mnt ./x dev 0x31 root / unsupported id 49", "-- --skip-mnt"),
        ("/x is a fuse mount but not external", "-- --skip-mnt"),
        ("Can't dump a pid namespace without the process init", "process 1"),
        ("Unresolved lock found pid 7 ino 8", "-- --file-locks"),
        ("fsnotify: Can't find suitable path for handle (dev 0x31 ino 0x7): 0", "-- --force-irmap"),
        ("irmap: Failed to resolve 31:7", "--irmap-scan-path"),
        ("Unsupported mapping found 00007f0000000000-00007f0000001000", "of a device"),
        ("File x has bad build-ID", "--file-validation filesize"),
        ("Unable to freeze cgroup /x (3 x 100ms attempts, timeout: 10s)", "--timeout"),
        ("cg: cgroupd: Can't move thread 7 into pids/x", "-- --manage-cgroups=ignore"),
        ("One of more action scripts failed", "flock"),
        ("Pre dump script failed with 256!", "an action script"),
        ("suspending seccomp failed: Operation not permitted", "--way preload"),
        ("cpu: FPU feature required by image is not supported on host (fpu:1 fxsr:1", "-- --cpu-cap none"),
        ("cpu: CPU xsave size mismatch (7/8)", "-- --cpu-cap none"),
        ("CRIU needs to have the CAP_SYS_ADMIN or the CAP_CHECKPOINT_RESTORE capability: ", "as root"),
        ("Can't get rlimit 4: Operation not permitted", "CAP_SYS_RESOURCE"),
        ("SEIZE 7: task not stopped after seize", "no other tracer"),
        ("Zombies with threads are not supported", "try again"),
        ("System call kcmp is not supported: Function not implemented", "use a newer one"),
        ("prctl: PR_SET_MM_MAP_SIZE is not supported: Invalid argument", "use a newer one"),
        ("tun: No info about x filter, kernel is too old", "use a newer one"),
        ("fdinfo doesn't contain the mnt_id field", "use a newer one"),
        ("Time namespaces are not supported", "use a newer one"),
        ("Dumping seccomp filters not supported: Invalid argument", "use a newer one"),
        ("7 has rseq but kernel lacks get_rseq_conf feature", "use a newer one"),
        ("bfd: Error flushing image: No space left on device", "a disk is full"),
    ],
)
def test_a_line_that_people_meet_has_a_hint(line: str, words: str) -> None:
    assert words in str(hint([line]))


@pytest.mark.parametrize(
    "line",
    [
        "Dumping FAILED.",
        "Dump files (pid: 7) failed with -1",
        "exited, status=1",
        "Script /x/criu-gate/script exited with -1",
        "unix: BUG at criu/sk-unix.c:1",
        "Can't open 7/ns/mnt on procfs: No such file or directory",
    ],
)
def test_any_other_line_has_none(line: str) -> None:
    assert hint([line]) is None


def test_the_first_line_that_is_known_counts() -> None:
    known = ["exited, status=1", "Iptables configuration failed", "tcp: Failed to lock TCP connection 1"]
    assert "nftables" in str(hint(known))
    assert "nftables" in str(hint([*known, "Can't create link remap for /x."]))
    assert hint([]) is None


def test_every_hint_is_one_sentence_without_an_end() -> None:
    for known in _HINTS:
        assert "\n" not in known.text
        assert not known.text.endswith("."), known
        assert known.text.count("`") % 2 == 0, known


def test_the_hint_stands_after_criu_s_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    log = tmp_path / "log"
    log.write_text(
        "(00.01) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
        "(00.02)     12: Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try ...\n"
        "(00.03) Error (criu/cr-dump.c:2111): Dumping FAILED.\n"
    )
    text = str(failure(Criu("criu", (4, 1)), 1, "on process 7", log, tmp_path / "none"))
    quoted, _, told = text.partition("; hint: ")
    assert quoted.endswith("on process 7: Some file locks are hold by dumping tasks! You can try ...")
    assert told.startswith("the tree holds locks of files: give `-- --file-locks`")
    assert "; its log is kept in /" in told
