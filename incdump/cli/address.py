"""Addresses with a port on the command line: ``HOST:PORT``, ``[::1]:PORT``."""

from __future__ import annotations

import re
from typing import Any

import click


class Address(click.ParamType):  # type: ignore[type-arg]
    """A host's name or address, and a port."""

    name = "address"

    def __init__(self, *, lowest: int = 0) -> None:
        """
        :param lowest: port that makes sense.
        """
        self._lowest = lowest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(?:\[([^\[\]\0]+)\]|([^:\[\]\0]+)):(\d{1,5})", str(value).strip(), re.ASCII)
        if match is None or not self._lowest <= int(match[3]) <= 65535:
            self.fail(f"{value!r} is no address with a port: give HOST:PORT, or [ADDRESS]:PORT", param, ctx)
        return match[1] or match[2], int(match[3])


ADDRESS = Address()
"""To listen on: port 0 is any that is free."""
PEER = Address(lowest=1)
"""To connect to."""
