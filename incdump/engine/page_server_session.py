"""A session with a page server, in the best protocol that it speaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from incdump.engine.sent_image import Sending
from incdump.engine.stored_image import Storing
from incdump.errors import XferError
from incdump.xfer.block_client import BlockClient
from incdump.xfer.page_client import PageClient
from incdump.xfer.sockets import connect

if TYPE_CHECKING:
    from incdump.model.options import DumpOptions

ServerSession: TypeAlias = "Sending | Storing"


def open_session(options: DumpOptions, parent: str | None, owner: int | None = None) -> ServerSession:
    """Connect to the page server. Blocks.

    :param options: which server, and how.
    :param parent: the generation of the parent dump, if there is one.
    :param owner: the user whose the images are to be; None: the server's own.
    :raises incdump.errors.XferError: there is no server, or it is not what was asked for.
    """
    assert options.page_server is not None
    address, port = options.page_server
    timeout = options.page_server_timeout
    client = PageClient(address, port, timeout=timeout, tls=options.tls)
    try:
        if options.page_server_protocol == "criu" or not client.speaks_blocks():
            if options.migration is not None:
                raise XferError(f"the receiver at {client.server} does not speak incdump's protocol")
            return Sending(client)
    except BaseException:
        client.close()
        raise
    more = {"migration": options.migration, "owner": owner}
    return Storing(
        BlockClient(
            client.detach(),
            client.server,
            lambda: connect(address, port, timeout, options.tls),
            channels=options.writers,
            parent=parent,
            compress=options.compression,
            timeout=timeout,
            more={name: value for name, value in more.items() if value is not None},
        )
    )
