"""Names of files that a page server takes."""

from __future__ import annotations

import pytest

from incdump.errors import ProtocolError
from incdump.xfer.blocks import check_name

OF_CRIU = (
    *("inventory", "pstree", "core-1", "pagemap-1", "pagemap-shmem-57363", "ghost-file-1a", "ipcns-shm-10", "tty-info"),
    *("route6-9", "tcp-stream-1f", "mountpoints-12", "tmpfs-12.tar.gz", "tmpfs-dev-105.tar.gz", "amdgpu-pages-1-002a"),
)
NOT_TO_BE_SENT = ("", ".img", "..", "../a.img", "a/b.img", "a.b.img", "pages-1.img", "parent", "a.img\n")


@pytest.mark.parametrize("name", [*(f"{name}.img" for name in OF_CRIU), "stats-dump", "incdump.json"])
def test_images_of_criu_and_incdump_may_be_sent(name: str) -> None:
    assert check_name(name.encode()) == name


@pytest.mark.parametrize("name", NOT_TO_BE_SENT)
def test_nothing_else_may(name: str) -> None:
    with pytest.raises(ProtocolError, match="no image"):
        check_name(name.encode())
