"""Parsing of single protobuf records, with damage reported as `BadImage`.

protobuf is imported by the functions that need it, as are the generated modules wherever they are used: an import
costs more than encoding a whole pagemap, and a command that fails early needs none of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from incdump.errors import BadImage

if TYPE_CHECKING:
    from google.protobuf.message import Message

    MessageT = TypeVar("MessageT", bound=Message)


def load() -> None:
    """Import protobuf and the modules generated for it now: for somebody who is going to be waited for later."""
    from incdump.images._pb import inventory_pb2  # noqa: F401


def parse(message: type[MessageT], record: bytes | memoryview, path: str | os.PathLike[str]) -> MessageT:
    """Parse one record.

    :param message: the generated class.
    :param path: where the record came from, for errors.
    :raises BadImage: it does not parse, or lacks a required field.
    """
    from google.protobuf.message import DecodeError

    parsed = message()
    try:
        parsed.ParseFromString(bytes(record))
    except DecodeError as error:
        raise BadImage(f"{os.fspath(path)} is damaged: a {message.DESCRIPTOR.name} is no message", path=path) from error
    if not parsed.IsInitialized():
        raise BadImage(f"{os.fspath(path)} is damaged: a {message.DESCRIPTOR.name} lacks required fields", path=path)
    return parsed
