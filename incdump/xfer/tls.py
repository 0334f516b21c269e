"""TLS between a page server and its client: each end shows a certificate that the other's authority has signed.

As with CRIU, whose options have the same names. Neither end can splice then: every byte goes through the
process, to be encrypted.
"""

from __future__ import annotations

import ssl
from functools import partial
from typing import TYPE_CHECKING

from incdump.errors import XferError

if TYPE_CHECKING:
    import socket

    from incdump.model.options import TlsFiles
    from incdump.xfer.sockets import Wrap


def client_side(files: TlsFiles, address: str) -> Wrap:
    """What makes a client's connection an encrypted one, once both have shaken hands (`shake_hands`).

    :param address: whom the server's certificate is to name.
    :raises XferError: a file cannot be used.
    """
    context = _context(files, ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = files.verify_name
    return partial(context.wrap_socket, server_hostname=address, do_handshake_on_connect=False)


def server_side(files: TlsFiles) -> Wrap:
    """The same for a server, which refuses clients without a certificate.

    :raises XferError: a file cannot be used.
    """
    context = _context(files, ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # nobody resumes a session, and CRIU takes a ticket for a failed read
    return partial(context.wrap_socket, server_side=True, do_handshake_on_connect=False)


def _context(files: TlsFiles, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    path = files.cacert
    try:
        context.load_verify_locations(path)
        path = f"{files.cert} with {files.key}"
        context.load_cert_chain(files.cert, files.key)
        if files.cacrl is not None:
            path = files.cacrl
            context.load_verify_locations(path)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (OSError, ValueError) as error:
        raise XferError(f"cannot use {path} for TLS: {getattr(error, 'strerror', None) or error}", path=path) from error
    return context


def shake_hands(connection: socket.socket) -> None:
    """Have both ends show their certificates; nothing to do on a plain connection. Blocks.

    :raises XferError: the other end is not who it should be, or does not speak TLS.
    """
    if not isinstance(connection, ssl.SSLSocket):
        return
    try:
        connection.do_handshake()
    except TimeoutError:
        raise XferError("TLS with the other end failed: it was silent") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)
        raise XferError(f"TLS with the other end failed: {str(reason).replace('_', ' ').lower()}") from error
