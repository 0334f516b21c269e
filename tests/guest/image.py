"""The guest's disk and kernel: Debian packages, unpacked and never configured, and the project's dependencies.

One folder in the cache (tests/guest/debian.py) for each architecture and each version of what is asked for here::

    root.img     ext4, with Python, a compiler, criu, pytest, all that pyproject.toml names
    vmlinuz      the kernel
    modules/     the modules that it needs before it can read root.img
    busybox      the one program that runs before that
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tests.guest.debian import RELEASE, CannotFetchError, architecture, cached, call, require_tool, unpack

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = (
    "base-files", "base-passwd", "bash", "busybox-static", "coreutils", "criu", "dash", "findutils", "gcc", "grep",
    "iproute2", "kmod", "libc-bin", "libc6-dev", "mount", "nftables", "postgresql", "procps", "python3", "sed", "tar",
    "util-linux",
)  # fmt: skip
EARLY_MODULES = ("virtio_blk",)
NOT_IN_GUEST = ("grpcio-tools",)  # big, and only for a test that needs no kernel
DISK = "8G"
_ETC = {
    "hostname": "guest\n",
    "hosts": "127.0.0.1 localhost guest\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_USERS = {"passwd": "postgres:x:900:900::/tmp:/bin/sh\n", "group": "postgres:x:900:\n"}
"""Whom postgresql's own scripts would have added."""
_GLIBC = ("2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17", "2_12", "2_5")


def guest_image(arch: str) -> Path:
    """The folder in the cache, which is filled first if it is not there: a minute or so.

    :param arch: ``amd64`` or ``arm64``.
    :raises CannotFetchError: something cannot be had.
    """
    asked = repr((RELEASE, PACKAGES, EARLY_MODULES, DISK, _ETC, requirements()))
    digest = hashlib.sha256(asked.encode() + Path(__file__).read_bytes()).hexdigest()[:12]

    def make(folder: Path, _place: Path) -> None:
        if os.geteuid():
            raise CannotFetchError("needs root, to make the guest's disk")
        with tempfile.TemporaryDirectory(dir=folder) as name:
            tree = Path(name, "tree")
            unpack(tree, [*PACKAGES, f"linux-image-cloud-{arch}"], arch)
            _settle(tree)
            _install_dependencies(tree, arch)
            _compile(tree, arch, Path(name))
            _take_out_kernel(tree, folder)
            disk = folder / "root.img"
            mke2fs = require_tool("mke2fs", "e2fsprogs")
            call(mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(disk), DISK)

    return cached(f"guest-{arch}-{digest}", make)


def requirements() -> list[str]:
    """What the project and its tests import, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [one for one in wanted if not one.startswith(NOT_IN_GUEST)]


def _settle(tree: Path) -> None:
    """The little of what the packages' scripts would have done that is needed."""
    for name, text in _ETC.items():
        (tree / "etc" / name).write_text(text)
    for name, more in _USERS.items():
        (tree / "etc" / name).write_text((tree / f"usr/share/base-passwd/{name}.master").read_text() + more)
    for name in ("proc", "sys", "dev", "run", "tmp", "srv", "root", "var/tmp"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        (tree / name).chmod(0o1777)


def _python_version(tree: Path) -> str:
    (folder,) = (path for path in (tree / "usr/lib").iterdir() if re.fullmatch(r"python3\.\d+", path.name))
    return folder.name.removeprefix("python")


def _install_dependencies(tree: Path, arch: str) -> None:
    version = _python_version(tree)
    machine = {"amd64": "x86_64", "arm64": "aarch64"}[arch]
    command = [_python_with_pip(), "-m", "pip", "--disable-pip-version-check", "-qq", "install", "--no-compile"]
    command += ["--target", str(tree / f"usr/local/lib/python{version}/dist-packages"), "--only-binary=:all:"]
    command += [f"--python-version={version}", "--implementation=cp"]
    command += [f"--platform=manylinux_{glibc}_{machine}" for glibc in _GLIBC]
    call(*command, f"--platform=manylinux2014_{machine}", *requirements())


def _python_with_pip() -> str:
    virtual = Path(os.environ.get("INCDUMP_VENV", ROOT / ".venv"), "bin", "python")
    for python in (sys.executable, str(virtual), shutil.which("python3") or "python3"):
        if Path(python).exists() and not subprocess.run([python, "-m", "pip", "-V"], capture_output=True).returncode:
            return python
    raise CannotFetchError("needs pip, for the guest's Python packages")


def _compile(tree: Path, arch: str, scratch: Path) -> None:
    """Compile all modules here: under emulation that takes minutes, and the result is the same for any architecture."""
    native = tree
    if arch != architecture():
        native = scratch / "native"
        unpack(native, ["python3"])
    version = _python_version(native)
    (loader,) = (native / "usr").glob("lib*/ld-linux-*.so.*")
    (libraries,) = (native / "usr/lib").glob("*-linux-gnu")
    command = [loader, "--library-path", libraries, native / "usr/bin/python3", "-m", "compileall", "-q"]
    command += ["-s", tree, "-x", "/(test|tests|idlelib)/"]
    command += [tree / f"usr/lib/python{version}", tree / f"usr/local/lib/python{version}/dist-packages"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    call(*map(str, command), environment=environment | {"PYTHONHOME": str(native / "usr")})


def _take_out_kernel(tree: Path, folder: Path) -> None:
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    release = kernel.name.removeprefix("vmlinuz-")
    call(require_tool("depmod", "kmod"), "-b", str(tree), release)
    (folder / "modules").mkdir()
    for name in EARLY_MODULES:
        for path in (tree / "usr/lib/modules" / release / "kernel").rglob(f"{name}.ko.xz"):
            (folder / "modules" / f"{name}.ko").write_bytes(lzma.decompress(path.read_bytes()))
    shutil.copy(tree / "usr/bin/busybox", folder / "busybox")
    kernel.rename(folder / "vmlinuz")
