"""What the user tells CRIU: options after ``--``, and configuration files that it reads besides.

incdump looks for a few options there. CRIU takes them as getopt_long(3) does: a word may be shortened as long as it can
mean one option only, its value is a word of its own or stands after ``=``, and ``--`` ends the options. A configuration
file has them line by line, without the leading ``--`` (criu(8), "CONFIGURATION FILES").
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from incdump.errors import CriuError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ACTION_SCRIPT = "--action-script"
FREEZE_CGROUP = "--freeze-cgroup"
_SHORTEST = {ACTION_SCRIPT: len("--ac"), FREEZE_CGROUP: len("--fr")}
"""So many characters tell an option from all others of CRIU 4.1 to 4.2; it refuses what is shorter."""
_GLOBAL = Path("/etc/criu/default.conf")
_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')


def is_option(word: str, name: str) -> bool:
    """Whether CRIU takes a word for an option.

    :param name: `ACTION_SCRIPT` or `FREEZE_CGROUP`.
    """
    given = word.partition("=")[0]
    return len(given) >= _SHORTEST[name] and name.startswith(given)


def take_scripts(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide options for CRIU.

    :returns: the options but for action scripts; and these, in the order in which CRIU runs them: the last one first.
    """
    left: list[str] = []
    scripts: list[str] = []
    words = iter(options)
    for word in words:
        if word == "--":
            left += [word, *words]
        elif not is_option(word, ACTION_SCRIPT):
            left.append(word)
        elif "=" in word:
            scripts.append(word.partition("=")[2])
        elif (value := next(words, None)) is not None:
            scripts.append(value)
        else:
            left.append(word)  # CRIU says what it lacks
    return left, scripts[::-1]


def is_given(options: Sequence[str], name: str) -> bool:
    """Whether an option is among the user's, or in a configuration file that CRIU will read. Blocks.

    :param name: `ACTION_SCRIPT` or `FREEZE_CGROUP`.
    """
    return _is_among(options, name) or any(_is_among(words, name) for _, words in _files(options))


def refuse_scripts_in_files(options: Sequence[str]) -> None:
    """CRIU would run these itself, in a directory where there is no memory yet, and not any more. Blocks.

    :param options: the user's.
    :raises incdump.errors.CriuError: a configuration file that CRIU will read has an action script.
    """
    for path, words in _files(options):
        if _is_among(words, ACTION_SCRIPT):
            raise CriuError(
                f"CRIU's configuration file {path} has an action script, which would find images without memory: take "
                "it out of there (or have CRIU not read the file: -- --no-default-config), and give it after --",
                path=path,
            )


def _is_among(words: Sequence[str], name: str) -> bool:
    end = words.index("--") if "--" in words else len(words)
    return any(is_option(word, name) for word in words[:end])


def _files(options: Sequence[str]) -> Iterator[tuple[Path, list[str]]]:
    """The configuration files that CRIU will read, and their words, as the words of a command line."""
    named: str | None = None
    for n, word in enumerate(options):
        if word == "--config":
            named = next(iter(options[n + 1 :]), None)
        elif word.startswith("--config="):
            named = word.partition("=")[2]
    paths: list[Path] = []
    if named is None and "--no-default-config" not in options:
        home = os.environ.get("HOME")
        paths += [_GLOBAL] if home is None else [_GLOBAL, Path(f"{home}/.criu/default.conf")]
    paths += [Path(path) for path in (os.environ.get("CRIU_CONFIG_FILE"), named) if path]
    for path in paths:
        with suppress(OSError):
            yield path, _words(path.read_text(errors="replace"))


def _words(text: str) -> list[str]:
    found = []
    for line in text.splitlines():
        words = [quoted or plain for quoted, plain in _WORD.findall(line)]
        comment = next((n for n, word in enumerate(words) if word.startswith("#")), len(words))
        found += [f"--{word}" if n == 0 else word for n, word in enumerate(words[:comment])]
    return found
