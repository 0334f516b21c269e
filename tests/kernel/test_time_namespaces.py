"""Start times are shown shifted by the reader's time namespace: commands, holder and images go by one count."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import incdump
from incdump.proc.identity import boot_offset, identify
from tests.kernel.support import Chain, Odd, kill_holder, require_root, require_tracker, tracked_pids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.kernel, pytest.mark.asyncio]

SHIFTED = ("unshare", "-T", "--boottime", "100000", "--fork")
RUN = "import sys; from incdump.cli.main import main; sys.exit(main(sys.argv[1:]))"
WHO = "from incdump.proc.identity import *; import sys; print(identify(int(sys.argv[1])).start_time, boot_offset())"
SESSION = """
import anyio, json, sys
import incdump

async def work():
    async with incdump.Session(int(sys.argv[1])) as session:
        await session.predump(sys.argv[2] + "/s1")
        result = await session.dump(sys.argv[2] + "/s2")
        print(json.dumps(result.incremental))

anyio.run(work)
"""


@pytest.fixture(autouse=True)
def _needs() -> None:
    require_root()
    require_tracker("uffd-wp")
    if subprocess.run([*SHIFTED, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs time namespaces")


@pytest.fixture(params=["target as we are", "target in another time namespace"])
def odd(request: pytest.FixtureRequest) -> Iterator[Odd]:
    """A victim, here or shifted."""
    shifted = request.param != "target as we are"
    # Not --fork: what is started is to be the target.
    prefix = ("unshare", "-T", "--boottime", "777", "sh", "-c", 'exec "$@"', "sh") if shifted else ()
    with Odd(prefix=prefix) as target:
        yield target


def shifted(program: str, *arguments: object) -> str:
    """What a Python program says that runs in another time namespace."""
    done = subprocess.run(
        [*SHIFTED, sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_a_process_has_one_start_time_for_all_readers(odd: Odd) -> None:
    assert boot_offset() == 0
    assert shifted(WHO, odd.pid).split() == [str(identify(odd.pid).start_time), str(100_000 * 100)]


async def test_a_chain_goes_on_from_one_time_namespace_to_another(odd: Odd, images_root: Path) -> None:
    def command(*words: object) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(shifted(RUN, *words, "--json"))
        return answer

    chain = Chain(odd, images_root)
    chain.rounds.append(await incdump.predump(odd.pid, chain.next_dir()))
    second = command("predump", "-t", odd.pid, "-D", images_root / "b", "--prev-images-dir", chain.last.images_dir)
    assert second["incremental"]
    kill_holder()
    third = command("predump", "-t", odd.pid, "-D", images_root / "c", "--prev-images-dir", images_root / "b")
    assert not third["incremental"]  # the holder is in the other namespace now
    fourth = await incdump.predump(odd.pid, images_root / "d", parent=str(images_root / "c"))
    assert fourth.incremental
    chain.rounds.append(fourth)
    await chain.prove(check=False)
    assert json.loads(shifted(RUN, "untrack", odd.pid, "--json"))["untracked"] == [odd.pid]
    assert tracked_pids() == []


async def test_a_session_in_another_time_namespace_tracks(odd: Odd, images_root: Path) -> None:
    assert json.loads(shifted(SESSION, odd.pid, images_root)) is True
