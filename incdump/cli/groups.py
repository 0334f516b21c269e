"""The options of all commands in groups, as ``--help`` and the man page show them.

Which group an option is in goes by its name, which means the same wherever it occurs: one table for all commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import click

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Target", ("--tree", "--all", "--against")),
    ("Images", ("--images-dir", "--prev-images-dir", "--require-incremental", "--auto-dedup", "--max-bytes")),
    ("Tracking and copying", ("--tracker", "--track-for", "--thp", "--pagemap", "--writers")),
    ("When to stop the target", ("--downtime", "--max-rounds", "--final")),
    (
        "Limits of time",
        ("--timeout", "--on-timeout", "--freeze-timeout", "--stall-timeout", "--wait-for-lazy", "--asking"),
    ),
    ("Afterwards", ("--leave-running", "--leave-stopped", "--kill", "--if-unknown")),
    ("CRIU", ("--restore", "--criu", "--way", "--restore-detached", "--pidfile")),
    ("Hook", ("--hook", "--hook-timeout")),
    (
        "Network",
        (
            *("--listen", "--page-server", "--address", "--port", "--once", "--rounds", "--status-fd"),
            *("--protocol", "--compression"),
        ),
    ),
    ("TLS", ("--tls", "--tls-cacert", "--tls-cert", "--tls-key", "--tls-cacrl", "--tls-no-cn-verify")),
    ("Output", ("--report", "--log-file", "--json", "--quiet", "--verbose", "--help")),
)


def grouped(options: Sequence[click.Parameter]) -> Iterator[tuple[str, list[click.Parameter]]]:
    """Options under the titles of their groups, in the order of the table, in each in their own."""
    left = list(options)
    for title, names in GROUPS:
        group = [option for option in left if set(option.opts) & set(names)]
        left = [option for option in left if option not in group]
        if group:
            yield title, group
    if left:
        yield "Other options", left
