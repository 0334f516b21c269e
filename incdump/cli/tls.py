"""The TLS options of both ends of a page-server session, named as CRIU's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from incdump.cli.completion import files
from incdump.model.options import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Callable

_DEFAULTS = TlsFiles()


def tls_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --tls and its files to a click command."""
    for option in (
        click.option(
            "--tls-no-cn-verify", is_flag=True, help="Let the server's certificate name another host than --address."
        ),
        click.option(
            "--tls-cacrl", metavar="FILE", shell_complete=files, help="Certificates that the authority has taken back."
        ),
        click.option(
            "--tls-key", metavar="FILE", shell_complete=files, help=f"The private key. [default: {_DEFAULTS.key}]"
        ),
        click.option(
            "--tls-cert", metavar="FILE", shell_complete=files, help=f"The own certificate. [default: {_DEFAULTS.cert}]"
        ),
        click.option(
            "--tls-cacert", metavar="FILE", shell_complete=files, help=f"The authority's. [default: {_DEFAULTS.cacert}]"
        ),
        click.option("--tls", is_flag=True, help="Encrypt; both ends show a certificate (files in PEM)."),
    ):
        function = option(function)
    return function


def take_tls(given: dict[str, Any]) -> TlsFiles | None:
    """Take the values of `tls_options` out of a command's.

    :raises click.UsageError: files without --tls.
    """
    wanted = given.pop("tls")
    no_verify = given.pop("tls_no_cn_verify")
    files = {name: given.pop(f"tls_{name}") for name in ("cacert", "cert", "key", "cacrl")}
    files = {name: path for name, path in files.items() if path is not None}
    if not wanted:
        if files or no_verify:
            raise click.UsageError("TLS is used with --tls only: add it")
        return None
    for name, path in files.items():
        if not path or "\0" in path:
            raise click.BadParameter("an empty name", param_hint=f"--tls-{name}")
    return TlsFiles(**files, verify_name=not no_verify)
