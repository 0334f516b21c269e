"""Process trees and identities, on real processes; and every reason to refuse a target."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from incdump._uapi import ptrace
from incdump.errors import AlreadyTraced, NoSuchTarget, TargetDenied, TargetUnsuitable
from incdump.proc import tree
from incdump.proc.identity import identify, is_same, open_pidfd, parse_stat, read_stat
from incdump.proc.maps import read_vmas
from incdump.proc.tree import Task, check_target, is_traced, process_tree
from tests.kernel.victims import victim

pytestmark = pytest.mark.kernel

FAMILY = """
import threading
def child(*grandchildren):
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        pids = [child() for _ in grandchildren]
        os.write(w, b"x")
        sys.stdin.readline()
        os._exit(0)
    os.read(r, 1)
    return pid
first = child(1, 2)
stop = threading.Event()
def forks():
    children.append(child(1))
    ready.set()
    stop.wait()
children, ready = [], threading.Event()
threading.Thread(target=forks, daemon=True).start()
ready.wait()
gone = os.fork()
if gone == 0:
    os._exit(0)
os.waitid(os.P_PID, gone, os.WEXITED | os.WNOWAIT)
tell(first=first, of_thread=children[0], zombie=gone)
"""


def kill_tree(pid: int) -> None:
    for task in reversed(process_tree(pid)):
        if task.pid != pid:
            os.kill(task.pid, signal.SIGKILL)


def by_ppid(tasks: tuple[Task, ...]) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for task in tasks:
        children.setdefault(task.ppid, []).append(task.pid)
    return children


@pytest.mark.parametrize("by_file", [True, False], ids=["children files", "one pass over /proc"])
def test_a_tree_is_root_first_and_parents_before_children(by_file: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_file:
        exists = os.path.exists
        monkeypatch.setattr(tree.os.path, "exists", lambda path: False if "children" in str(path) else exists(path))
    with victim(FAMILY) as target:
        try:
            tasks = process_tree(target.pid)
            assert tasks[0].pid == target.pid
            assert len(tasks) == 7
            seen: set[int] = {tasks[0].ppid}
            for task in tasks:
                assert task.ppid in seen
                seen.add(task.pid)
            children = by_ppid(tasks)
            assert set(children[target.pid]) == {target.told[name] for name in ("first", "of_thread", "zombie")}
            assert len(children[target.told["first"]]) == 2
            assert len(children[target.told["of_thread"]]) == 1
            states = {task.pid: task.state for task in tasks}
            assert [pid for pid, state in states.items() if state == "Z"] == [target.told["zombie"]]
        finally:
            kill_tree(target.pid)


def test_threads_and_ids_are_told_as_the_kernel_has_them() -> None:
    with victim(FAMILY) as target:
        try:
            root = process_tree(target.pid)[0]
            assert sorted(int(name) for name in os.listdir(f"/proc/{target.pid}/task")) == list(root.threads)
            assert len(root.threads) == 2
            assert root.vtids == root.threads
            assert root.vpid == root.pid
            assert root.pgid == os.getpgid(root.pid)
            assert root.sid == os.getsid(root.pid)
            assert root.ppid == os.getpid()
        finally:
            kill_tree(target.pid)


def test_ids_in_an_inner_pid_namespace_are_told_too() -> None:
    script = """
    import subprocess
    inner = "import os, sys; os.setsid(); p = os.fork(); print(p, flush=True) if p else None; sys.stdin.readline()"
    command = ["unshare", "--fork", "--pid", "--kill-child", sys.executable, "-c", inner]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        line = process.stdout.readline()
    except FileNotFoundError:
        line = b""
    tell(unshare=process.pid if line else 0, child=int(line or 0))
    """
    with victim(script) as target:
        if not target.told["unshare"]:
            pytest.skip("no new pid namespace is to be had (unshare, root)")
        try:
            _, init, child = process_tree(target.told["unshare"])
            assert (init.vpid, child.vpid) == (init.pid, child.pid)  # seen from unshare's own namespace, ours
            init, child = process_tree(init.pid)
            assert (init.vpid, init.pgid, init.sid, init.vtids) == (1, 1, 1, (1,))
            assert (child.vpid, child.pgid, child.sid) == (target.told["child"], 1, 1)
            assert child.threads == (child.pid,)
            assert child.pid != child.vpid
        finally:
            kill_tree(target.pid)


def test_a_process_whose_main_thread_has_exited_is_no_zombie_and_not_passed_over() -> None:
    script = """
    import threading, time
    def outlive():
        leader = str(os.getpid())
        while " Z " not in open(f"/proc/{leader}/stat").read():
            time.sleep(0.001)
        tell()
        sys.stdin.readline()
        os._exit(0)
    threading.Thread(target=outlive).start()
    ctypes.CDLL(None).pthread_exit(None)
    """
    with victim(script) as target:
        assert read_stat(target.pid).state == "Z"
        (task,) = process_tree(target.pid)
        assert task.state != "Z"
        assert len(task.threads) == 2
        assert is_same(identify(target.pid))
        with pytest.raises(TargetUnsuitable, match="main thread"):
            check_target(target.pid)
        with pytest.raises(TargetUnsuitable, match="main thread"):
            read_vmas(target.pid, flags=False)


def test_a_command_name_may_hold_anything() -> None:
    text = b"77 (a) b (c) ) S 5 6 7 0 -1 4194304 " + b"0 " * 10 + b"3 0 99 " + b"0 " * 20
    stat = parse_stat(text)
    assert (stat.pid, stat.comm, stat.state, stat.ppid, stat.pgid, stat.sid) == (77, "a) b (c) ", "S", 5, 6, 7)
    with victim("open('/proc/self/comm', 'w').write(') R 1 (x'); tell()") as target:
        assert process_tree(target.pid)[0].comm == ") R 1 (x"
        assert process_tree(target.pid)[0].ppid == os.getpid()


def test_a_good_target_is_accepted() -> None:
    with victim("tell()") as target:
        assert check_target(target.pid).pid == target.pid


@pytest.mark.parametrize("pid", [0, -1, 0x7FFFFFFF, 1 << 40])
def test_a_pid_that_nobody_has_is_refused(pid: int) -> None:
    with pytest.raises(NoSuchTarget) as caught:
        check_target(pid)
    assert caught.value.pid == pid
    if pid > 0:
        with pytest.raises(NoSuchTarget):
            process_tree(pid)


def test_a_thread_is_refused_with_the_name_of_its_process() -> None:
    with victim("import threading\nthreading.Thread(target=wait, daemon=True).start()\ntell()") as target:
        tid = next(tid for tid in process_tree(target.pid)[0].threads if tid != target.pid)
        with pytest.raises(NoSuchTarget, match=str(target.pid)):
            check_target(tid)
        with pytest.raises(NoSuchTarget):
            open_pidfd(tid)


def test_a_kernel_thread_is_refused() -> None:
    threads = [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_kernel_thread(int(name))]
    if not threads:
        pytest.skip("no kernel thread is visible in this pid namespace")
    with pytest.raises(TargetUnsuitable, match="kernel thread"):
        check_target(threads[0])


def _is_kernel_thread(pid: int) -> bool:
    try:
        return bool(read_stat(pid).flags & 0x00200000)
    except ProcessLookupError:
        return False


def test_a_zombie_is_refused() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(TargetUnsuitable, match="zombie"):
            check_target(process.pid)
        assert process_tree(process.pid)[0].state == "Z"
    finally:
        process.wait()


def test_incdump_itself_and_whatever_holds_it_are_refused() -> None:
    with pytest.raises(TargetUnsuitable, match="incdump itself"):
        check_target(os.getpid())
    with pytest.raises(TargetUnsuitable, match="ancestor"):
        check_target(os.getppid())
    caught: list[Exception] = []

    def own_thread() -> None:
        try:
            check_target(threading.get_native_id())
        except NoSuchTarget as e:
            caught.append(e)

    thread = threading.Thread(target=own_thread)
    thread.start()
    thread.join()
    assert len(caught) == 1


TRACER = """
import sys, time
from incdump._uapi import ptrace
ptrace.seize(int(sys.argv[1]))
print(flush=True)
time.sleep(0.3)
"""


def test_a_tracer_that_comes_for_a_moment_is_waited_for() -> None:
    """As profilers do."""
    with victim("tell()") as target:
        command = [sys.executable, "-c", TRACER, str(target.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as tracer:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"\n"
            assert is_traced(target.pid)
            assert check_target(target.pid).pid == target.pid
            assert not is_traced(target.pid)


def test_a_traced_process_is_refused() -> None:
    script = """
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).ptrace(0, 0, None, None)  # PTRACE_TRACEME
        tell()
        wait()
        os._exit(0)
    os.waitpid(pid, 0)
    """
    with victim(script) as target:
        child = process_tree(target.pid)[1].pid
        with pytest.raises(AlreadyTraced, match=str(target.pid)) as caught:
            check_target(child)
        assert caught.value.pid == child
        target.go()
        with contextlib.suppress(ProcessLookupError):  # it may have come to its own end
            os.kill(child, signal.SIGKILL)


def test_a_tracer_of_our_own_that_ends_in_that_moment_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    seized, seen = threading.Event(), threading.Event()
    read = tree._status

    def trace(pid: int) -> None:
        ptrace.seize(pid)
        seized.set()
        seen.wait(10)  # then the kernel detaches it

    def status(pid: int) -> dict[bytes, bytes]:
        found = read(pid)
        if found.get(b"TracerPid", b"0") != b"0" and not seen.is_set():
            seen.set()
            tracer.join(10)
            while Path(f"/proc/self/task/{found[b'TracerPid'].decode()}").exists():
                pass
        return found

    with victim("tell(); wait()") as target:
        tracer = threading.Thread(target=trace, args=(target.pid,))
        tracer.start()
        assert seized.wait(10)
        monkeypatch.setattr(tree, "_status", status)
        assert check_target(target.pid).pid == target.pid
        assert seen.is_set()
        target.go()


def test_another_users_process_is_refused() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with victim("tell()") as target:
        script = (
            "import os, sys; os.setgid(65534); os.setuid(65534)\n"
            "from incdump.proc.tree import check_target\n"
            "from incdump.errors import TargetDenied\n"
            "try: check_target(int(sys.argv[1]))\n"
            "except TargetDenied as e: print(e.pid, e.errno_name)\n"
        )
        # What the other user may not read is not imported by it: the modules are, before it becomes that user.
        script = "import incdump.proc.tree, incdump.errors\n" + script
        done = subprocess.run(
            [sys.executable, "-c", script, str(target.pid)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [str(target.pid), "EACCES"]
    assert issubclass(TargetDenied, Exception)


def test_an_identity_holds_while_the_process_lives_and_no_longer() -> None:
    with victim("tell()") as target:
        identity = identify(target.pid)
        assert is_same(identity)
        assert identify(target.pid) == identity
        assert not is_same(type(identity)(identity.pid, identity.start_time + 1, identity.boot_id))
        assert not is_same(type(identity)(identity.pid, identity.start_time, "another boot"))
        target.process.kill()
        os.waitid(os.P_PID, target.pid, os.WEXITED | os.WNOWAIT)
        assert not is_same(identity)
        target.process.wait()
        assert not is_same(identity)
        with pytest.raises(NoSuchTarget):
            identify(target.pid)
        with pytest.raises(NoSuchTarget):
            open_pidfd(target.pid)


def test_a_pidfd_is_readable_when_the_process_has_exited() -> None:
    with victim("tell()") as target:
        pidfd = open_pidfd(target.pid)
        try:
            assert select.select([pidfd], [], [], 0)[0] == []
            target.process.kill()
            assert select.select([pidfd], [], [], 30)[0] == [pidfd]
        finally:
            os.close(pidfd)


@pytest.mark.parametrize(
    "module", ["incdump.proc.identity", "incdump.proc.tree", "incdump._uapi.userfaultfd", "incdump._uapi.mapping"]
)
def test_the_small_modules_do_without_numpy_and_anyio(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'numpy', 'anyio'}} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
