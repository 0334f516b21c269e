"""What the shell offers when Tab is pressed: commands and options by click's own completion, for bash, zsh and fish;
and here their values: directories, files, running processes.

A process is offered by its number, with its name and command line beside it where the shell shows such (zsh, fish).
What was typed may also be the beginning of a name: the numbers of the processes that bear it take its place.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click
    from click.shell_completion import CompletionItem

_MOST_OF_A_COMMAND_LINE = 60


def directories(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Directories, which the shell itself looks for."""
    return [_item(incomplete, kind="dir")]


def files(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files, which the shell itself looks for."""
    return [_item(incomplete, kind="file")]


def parents(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Directories as seen from the images dir, which need not be there yet: what ``--prev-images-dir`` takes."""
    images_dir = os.path.abspath(ctx.params.get("images_dir") or ".")
    above, beginning = os.path.split(incomplete)
    try:
        # The kernel would look for what is above a directory in the directory, and find nothing before that is made.
        entries = sorted(os.scandir(os.path.normpath(os.path.join(images_dir, above))), key=lambda entry: entry.name)
    except OSError:
        return []
    names = [entry.name for entry in entries if entry.name.startswith(beginning) and entry.is_dir()]
    own = os.path.basename(images_dir) if os.path.normpath(above) == ".." else None
    return [_item(os.path.join(above, name)) for name in names if name != own]


def processes(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Running processes, by the beginning of their number or their name."""
    return [
        _item(str(pid), text=command)
        for pid, name, command in _running()
        if str(pid).startswith(incomplete) or name.startswith(incomplete)
    ]


def _item(value: str, *, kind: str = "plain", text: str | None = None) -> CompletionItem:
    from click.shell_completion import CompletionItem  # only a shell that asks has need of it

    return CompletionItem(value, type=kind, help=text)


def _running() -> Iterator[tuple[int, str, str]]:
    """Number, name, and both name and command line, of each process but this and the kernel's own."""
    for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        if pid == os.getpid():
            continue
        try:
            with open(f"/proc/{pid}/comm", "rb") as file:
                name = _printable(file.read().rstrip(b"\n"))
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read(4096).rstrip(b"\0").split(b"\0")
        except OSError:
            continue  # it has exited, or is somebody else's
        if words != [b""]:  # a kernel thread, or a zombie
            line = _printable(b" ".join(words))
            yield pid, name, f"{name}: {line[:_MOST_OF_A_COMMAND_LINE]}"


def _printable(data: bytes) -> str:
    """Of a line for the shell nothing but characters: whoever names a process does not get at it."""
    return "".join(c if c.isprintable() else "?" for c in os.fsdecode(data))
