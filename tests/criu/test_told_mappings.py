"""CRIU is told the mappings of big processes instead of reading smaps: it finds in images what it would have found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import incdump
from incdump.criu import leash
from incdump.criu.program import find
from incdump.engine import checkpoint as engine
from incdump.engine.checkpoint import CheckpointRun
from incdump.engine.dump import DumpRun
from incdump.proc.short_smaps import ShortSmaps
from tests import oracle
from tests.command import environment
from tests.command import incdump as command
from tests.criu.criu import RestorableTarget, criu_path, restorable_churn, revive
from tests.criu.namespaces import in_own_namespaces
from tests.criu.services import criu_for_sockets
from tests.criu.test_checkpoint import checkpoint, predump, prove_next, until_criu_has_ended

if TYPE_CHECKING:
    from incdump.model.options import WayName

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("real_criu", "real_criu_for_sockets"),
]

ADVISED = Path(__file__).with_name("advised.py")
RESTORED = {"sh", "gd", "lo", "nr", "rr", "sr", "dc", "dd", "hg", "nh", "mg"}
"""Flags that CRIU puts back: of how a mapping was made, and by madvise(2) and mlock(2)."""
RESTORED_SINCE_4_2 = {"wf"}


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_BIG", 0)
    try:
        ShortSmaps().close()
    except OSError as error:
        pytest.skip(f"the kernel does not tell flags but in smaps: {error}")


def advised(root: Path) -> RestorableTarget:
    return RestorableTarget([sys.executable, "-I", ADVISED, "24"], root)


def flags(pid: int, which: set[str] = RESTORED) -> dict[str, set[str]]:
    """Those of each mapping that has any, by its place."""
    found: dict[str, set[str]] = {}
    place = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith("VmFlags:"):
            found[place] = set(line.split()[1:]) & which
        elif "-" in line.split()[0]:
            place = line.split()[0]
    return {place: words for place, words in found.items() if words}


def told(result: incdump.DumpResult) -> str:
    assert result.checkpoint is not None
    return result.checkpoint.mappings


@pytest.mark.parametrize("way", ["leash", "preload"])
@pytest.mark.parametrize("criu", [criu_path, criu_for_sockets])
@in_own_namespaces
def test_restored_mappings_have_their_flags(images_root: Path, criu: object, way: WayName) -> None:
    assert callable(criu)
    path: Path = criu()
    with advised(images_root) as target:
        which = RESTORED | (RESTORED_SINCE_4_2 if find(str(path)).version >= (4, 2) else set())
        before = flags(target.pid, which)
        seen = set().union(*before.values())
        assert {"sh", "lo", "rr", "sr", "dc", "dd", "hg", "nh"} <= seen
        predump(target, images_root / "1")
        result = checkpoint(target, images_root / "2", "../1", criu=path, way=way)
        assert told(result) == "told by incdump"
        target.reap()
        anyio.run(partial(incdump.restore, images_root / "2", criu=str(path)))
        target.check()
        assert flags(target.pid, which) == before
        target.quit()


@pytest.mark.parametrize("way", ["leash", "preload"])
@pytest.mark.parametrize("criu", [criu_path, criu_for_sockets])
@in_own_namespaces
def test_crius_images_are_what_they_are_when_it_reads_smaps(images_root: Path, criu: object, way: WayName) -> None:
    """None of its lines but those that it is told is of any use to CRIU."""
    assert callable(criu)
    with advised(images_root) as target, pytest.MonkeyPatch.context() as patch:
        images: list[dict[str, bytes]] = []
        for name, big in (("read", 1 << 40), ("told", 0)):
            patch.setattr(engine, "_BIG", big)
            result = checkpoint(target, images_root / name, afterwards="running", criu=criu(), way=way)
            assert told(result).startswith(name)
            mine = (images_root / name).glob("*.img")
            images.append({path.name: path.read_bytes() for path in mine if path.name.startswith(("mm-", "files"))})
        assert images[0] == images[1]
        assert len(images[0]) >= 2
        target.quit()


@in_own_namespaces
def test_flags_that_change_just_before_the_freeze_are_those_of_the_freeze(images_root: Path) -> None:
    with advised(images_root) as target, pytest.MonkeyPatch.context() as patch:
        prepare = CheckpointRun._prepare_tree

        def prepare_and_flip(self: CheckpointRun) -> None:
            prepare(self)  # whatever is read before the freeze has been read
            target.command("flip")

        patch.setattr(CheckpointRun, "_prepare_tree", prepare_and_flip)
        parent = "1"
        predump(target, images_root / parent)
        for n in "23":
            before = flags(target.pid)
            result = checkpoint(target, images_root / n, f"../{parent}")
            assert told(result) == "told by incdump"
            revive(target, images_root / n)
            after = flags(target.pid)
            changed = {place for place in before.keys() | after.keys() if before.get(place) != after.get(place)}
            assert [before.get(place, set()) ^ after.get(place, set()) for place in changed] == [{"dc"}]
            parent = n
        target.quit()


@in_own_namespaces
def test_what_criu_is_told_is_what_it_would_have_read(images_root: Path) -> None:
    compared: list[int] = []
    read = ShortSmaps.read

    def smaps(pid: int) -> bytes:
        lines = Path(f"/proc/{pid}/smaps").read_bytes().split(b"\n")
        wanted = [line for line in lines if line.startswith(b"VmFlags:") or b"-" in line.split(b" ", 1)[0]]
        return b"\n".join([*wanted, b""])

    def read_and_compare(self: ShortSmaps, pid: int) -> bytes:
        while True:  # incdump begins, or ceases, to watch the mappings of one process while CRIU looks at another
            before = smaps(pid)
            try:
                text = read(self, pid)
            except BlockingIOError:
                continue
            if smaps(pid) == before:
                break
        compared.append(pid)
        assert text == before
        return text

    with (
        restorable_churn(images_root, seed=21, threads=2, processes=3) as target,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(ShortSmaps, "read", read_and_compare)
        predump(target, images_root / "1")
        for n in range(2, 6):
            target.step(200)
            result = checkpoint(target, images_root / str(n), f"../{n - 1}", afterwards="running")
            assert told(result) == "told by incdump"
            assert sorted(compared) == sorted(result.pids)
            compared.clear()
        target.step(50)
        checkpoint(target, images_root / "6", "../5")
        revive(target, images_root / "6")
        target.quit()


# --- where it cannot be, or may not be --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["leash", "preload"])
@in_own_namespaces
def test_in_any_doubt_criu_reads_smaps_itself(images_root: Path, way: WayName) -> None:
    def doubt(self: ShortSmaps, pid: int) -> bytes:
        raise OSError(0, "who knows")

    with restorable_churn(images_root, seed=22, processes=2) as target, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShortSmaps, "read", doubt)
        predump(target, images_root / "1")
        target.step(100)
        result = checkpoint(target, images_root / "2", "../1", way=way)
        assert told(result) == f"read by CRIU of {len(result.pids)} processes"
        revive(target, images_root / "2")
        target.quit()


@in_own_namespaces
def test_where_it_cannot_be_told_criu_reads_smaps_and_the_result_says_why(images_root: Path) -> None:
    def refuse(self: ShortSmaps) -> None:
        raise PermissionError(1, "not allowed")

    with restorable_churn(images_root, seed=23) as target, pytest.MonkeyPatch.context() as patch:
        for number, (owner, name, value, why) in enumerate(
            (
                (leash, "_LAST_KNOWN", (4, 0), "wants to know"),
                (engine, "_BIG", 1 << 40, "small"),
                (ShortSmaps, "__init__", refuse, "not allowed"),
            )
        ):
            with patch.context() as inner:
                inner.setattr(owner, name, value)
                result = checkpoint(target, images_root / str(number), afterwards="running")
            assert told(result).startswith("read by CRIU: ")
            assert why in told(result)
        result = checkpoint(target, images_root / "lazy", afterwards="running", way="lazy-pages")
        assert "listens" in told(result)
        target.quit()


# --- when something goes wrong ----------------------------------------------------------------------------------------


def _behind(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # what listed them
        return ""


def no_preparation(_: object) -> None:
    raise incdump.TargetExited("made up")


@in_own_namespaces
def test_a_checkpoint_that_cannot_be_prepared_leaves_nothing_open(images_root: Path) -> None:
    with restorable_churn(images_root, seed=29) as target, pytest.MonkeyPatch.context() as patch:
        patch.setattr(DumpRun, "_prepare_tree", no_preparation)
        with pytest.raises(incdump.TargetExited, match="made up"):
            checkpoint(target, images_root / "1")
        assert not [fd for fd in os.listdir("/proc/self/fd") if "bpf" in _behind(fd)]
        target.quit()


KILLED_AT = """
import os, signal, sys
from incdump._uapi.arch import ARCH
from incdump.cli.main import main
from incdump.criu.leash import LeashedCriu
from incdump.engine import checkpoint
checkpoint._BIG = 0
left, where = int(sys.argv.pop(1)), sys.argv.pop(1)
answer, tell = LeashedCriu._answer, LeashedCriu._tell_mappings
def die_at(self, notification):
    global left
    if notification.call == ARCH.sys_fcntl:
        left -= 1
        if left == 0 and where == "after":
            tell(self, notification)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    answer(self, notification)
LeashedCriu._answer = die_at
sys.exit(main())
"""


@pytest.mark.parametrize("where", ["before", "after"])
@in_own_namespaces
def test_incdump_is_killed_whenever_criu_waits_for_it_and_the_tree_runs_on(images_root: Path, where: str) -> None:
    """At each of the calls that are reported for it, before smaps was replaced and after."""
    with restorable_churn(images_root, seed=24, threads=2, processes=2, ops="write,zero,map,free,brk,stack") as target:
        predump(target, images_root / "0")
        number = 0
        lasting = ["-R", "--track-for", "1h", "--criu", str(criu_path())]
        while True:
            number += 1
            assert number < 40
            target.step(20)
            images = images_root / f"{number}-killed"
            arguments = ["checkpoint", "-t", str(target.pid), "-D", str(images), "--prev-images-dir", "../0"]
            done = subprocess.run(
                [sys.executable, "-c", KILLED_AT, str(number), where, *arguments, *lasting],
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=120,
                check=False,
            )
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL
            until_criu_has_ended(images)
            assert not any(oracle.states(pid) & set("tT") for pid in oracle.tree(target.pid).values())
            target.check()
            if (images / "inventory.img").exists():  # at the last of them, the script's, the gate has been reached
                assert (images / engine.GATE / "reached").exists()
                assert command("check", images).code == 0
        assert number > 3 * len(oracle.tree(target.pid))
        prove_next(target, images_root / "next", f"../{number}-killed")
        target.quit()
