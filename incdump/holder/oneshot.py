"""A userfaultfd of another process, made by a helper that lives just for that.

A `incdump.Session` keeps its userfaultfds itself; it still does not run the system call in the target from its own
process, for the reason that the holder does it: whatever signal ends the program, no target is left with an altered
register. The helper's descriptor comes back over a socket pair.
"""

from __future__ import annotations

import signal
import socket
import sys

from incdump.errors import IncdumpError
from incdump.freeze.inject import Held
from incdump.holder import wire
from incdump.holder.server import make_tracking_uffd


def main() -> None:
    """Run as ``python -c "from incdump.holder.oneshot import main; main()" PID PIDFD SOCKET_FD HOLDER_PID UFFD...``.

    The last ones are the userfaultfds that the program holds already.
    """
    pid, pidfd, fd, holder, *held = map(int, sys.argv[1:])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    with socket.socket(fileno=fd) as sock:
        try:
            uffd, stopped = make_tracking_uffd(pid, pidfd, [Held(holder, uffd) for uffd in held])
        except IncdumpError as error:
            wire.send(sock, {"error": str(error), "kind": type(error).__name__, "errno": error.errno})
        except OSError as error:
            wire.send(sock, {"error": str(error), "kind": "OSError", "errno": error.errno})
        else:
            wire.send(sock, {"generation": None, "started": True, "stopped_us": stopped}, (uffd,))
