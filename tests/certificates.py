"""Certificates for tests of TLS, made by openssl(1)."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from incdump import TlsFiles
from tests.guest.debian import require_tool

if TYPE_CHECKING:
    from pathlib import Path


class Authority:
    """A certificate authority in a directory."""

    def __init__(self, path: Path) -> None:
        require_tool("openssl", "openssl")
        self._path = path
        path.mkdir()
        self.cacert = path / "ca.pem"
        self._key = path / "ca.key"
        self._run("req", "-x509", "-subj", "/CN=authority", "-keyout", self._key, "-out", self.cacert, *self._NEW_KEY)

    _NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")

    def _run(self, *arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

    def signs(self, name: str) -> TlsFiles:
        """The files of somebody whom it knows by this name."""
        key, request, cert, more = (self._path / f"{name}.{end}" for end in ("key", "csr", "pem", "ext"))
        self._run("req", "-subj", f"/CN={name}", "-keyout", key, "-out", request, *self._NEW_KEY)
        kind = "IP" if name[0].isdigit() else "DNS"
        more.write_text(f"subjectAltName={kind}:{name}\n")
        self._run("x509", "-req", "-in", request, "-CA", self.cacert, "-CAkey", self._key, "-CAcreateserial",
                  "-out", cert, "-extfile", more)  # fmt: skip
        return TlsFiles(cacert=str(self.cacert), cert=str(cert), key=str(key))
