"""The part of ``incdump doctor`` about CRIU: which one is used, what it can do here, what to install."""

from __future__ import annotations

import os
import shutil
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from incdump.errors import CriuError

if TYPE_CHECKING:
    from incdump.criu.program import Criu


def examine(path: str | None) -> dict[str, Any]:
    """Find CRIU, and try it on a child of this process.

    :param path: as for `incdump.criu.program.find`.
    :raises incdump.cli.signals.Stopped: a signal came; CRIU and the child have ended.
    """
    from incdump.cli.signals import run
    from incdump.criu.program import WHERE_FROM, find
    from incdump.criu.trial import SECONDS, try_out
    from incdump.engine.threads import in_thread

    try:
        criu = find(path)
    except CriuError as error:
        return {
            "path": error.path,
            "version": None,
            "named_by": _named_by(path),
            "works": False,
            "why": str(error),
            "tcp": None,
            "advice": [WHERE_FROM],
        }
    give_up = threading.Event()
    why = run(partial(in_thread, try_out, criu, SECONDS, give_up, break_off=give_up.set))
    if why is None and shutil.which("flock") is None:
        why = "it works, but incdump has it wait by the program flock (util-linux), which is not on the PATH"
    return {
        "path": criu.path,
        "version": ".".join(map(str, criu.version)),
        "named_by": _named_by(path),
        "works": why is None,
        "why": why or "a child process was dumped and restored",
        **_network(criu),
    }


def _named_by(path: str | None) -> str:
    if path:
        return "--criu"
    return "INCDUMP_CRIU" if os.environ.get("INCDUMP_CRIU") else "PATH"


def _network(criu: Criu) -> dict[str, Any]:
    from incdump.criu.program import WHERE_FROM
    from incdump.criu.trial import tells_of_tcp_sockets

    advice = []
    tcp = tells_of_tcp_sockets(criu)
    if not tcp:
        advice += ["TCP sockets cannot be dumped: from Linux 6.18 on that takes CRIU 4.2.1 or later", WHERE_FROM]
    if shutil.which("iptables-restore") is None:
        advice.append(
            "there is no program iptables-restore: for a tree that has TCP connections, or a network namespace of its "
            "own, give `-- --network-lock nftables`"
        )
    return {"tcp": tcp, "advice": advice}


def row(criu: dict[str, Any]) -> tuple[str, bool, tuple[str, ...]]:
    """What there is to say, for `incdump.cli.text.show_verdicts`."""
    which = f"{criu['path']}, named by {criu['named_by']}"
    if criu["version"] is None:
        return "CRIU", False, (criu["why"], *criu["advice"])
    return f"CRIU {criu['version']}", criu["works"], (which, criu["why"], *criu["advice"])
