"""A gate before which CRIU waits until it is told what is to be.

At the end of a dump all its images are written and the tree is still frozen: it waits until incdump has put its own. It
runs an action script then (``post-dump``), and lets the tree run on if that fails. At the end of a restore the tree is
complete and does not run yet (``post-restore``): if the script fails, CRIU ends what it has restored.

The script here says that it was reached, and waits for a file lock. Who holds that lock is this process; the kernel
takes it away from it however it ends. So the script never waits for nobody, and if what it finds then is no permission
to go on, it fails. It also looks before CRIU has stopped anything (``pre-dump``) whether anybody holds the lock: a CRIU
whose incdump is gone by then does not begin. Nor does one that should have been heard of by then, and was not.

Action scripts of the user's own are called by this one, after all that: at ``post-dump`` they find the images dir
complete, which CRIU, that runs one script after the other and knows another directory, could not give them.
"""

from __future__ import annotations

import fcntl
import os
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


_SCRIPT = """\
#!/bin/sh
cd {place} || exit 1
case "$CRTOOLS_SCRIPT_ACTION" in
    pre-dump) exec > begun && test ! -e unheard && ! flock --nonblock lock true ;;
    post-dump|post-restore) exec > reached && flock lock true && test -e go ;;
esac || exit 1
"""
_OTHERS = """\
cd {images} || exit 1
export CRTOOLS_IMAGE_DIR={images}
"""


class Gate:
    """A gate, closed. Close the object when CRIU has ended.

    :param place: an empty directory for it, absolute; from where programs can be executed.
    :param images: where the images will be, absolute.
    :param scripts: the user's own, as shell commands, in the order in which they are to run.
    :param is_heard_first: CRIU does not begin before `hear` was called.
    :ivar script: the action script's path.
    """

    def __init__(self, place: Path, images: Path, scripts: Sequence[str] = (), *, is_heard_first: bool = False) -> None:
        self._place = place
        self.script = place / "script"
        self._lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            (place / "stay").touch(mode=0o600)
            if is_heard_first:
                (place / "unheard").touch(mode=0o600)
            text = _SCRIPT.format(place=shlex.quote(str(place)))
            if scripts:
                text += _OTHERS.format(images=shlex.quote(str(images)))
                text += "".join(f"sh -c {shlex.quote(script)} || exit 1\n" for script in scripts)
            self.script.write_text(text)
            self.script.chmod(0o700)
        except BaseException:
            os.close(self._lock)
            raise

    def hear(self) -> None:
        """CRIU has been heard of, and may begin. From any thread."""
        (self._place / "unheard").unlink(missing_ok=True)

    @property
    def was_heard(self) -> bool:
        """Whether `hear` was called, or need not be."""
        return not (self._place / "unheard").exists()

    @property
    def begun(self) -> float:
        """When CRIU was about to freeze the tree: seconds since the epoch, as `time.time` counts them."""
        return (self._place / "begun").stat().st_mtime

    @property
    def has_begun(self) -> bool:
        """Whether CRIU is about to freeze the tree, or further. If not, a gate that is shut keeps it from that."""
        return (self._place / "begun").exists()

    @property
    def is_reached(self) -> bool:
        """Whether CRIU waits before it (or has been let through)."""
        return (self._place / "reached").exists()

    def open(self, *, may_pass: bool) -> None:
        """Let the script go on: to succeed, or to fail. May be called again; only the first time counts.

        :raises OSError: it was to succeed, and fails.
        """
        fd, self._lock = self._lock, -1
        if fd >= 0:
            try:
                if may_pass:
                    (self._place / "stay").rename(self._place / "go")  # takes no room on a disk that is full
            finally:
                os.close(fd)

    def close(self) -> None:
        """A script that still waits fails."""
        self.open(may_pass=False)
