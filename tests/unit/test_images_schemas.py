"""The generated modules are those of the schemas, and get along with every protobuf that is allowed."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "incdump/images/_pb"
SCHEMAS = sorted((ROOT / "images").glob("*.proto"))
MODULES = sorted(f"{schema.stem}_pb2{suffix}" for schema in SCHEMAS for suffix in (".py", ".pyi"))

# What is another compiler's business: its version, and how it types the arguments of a stub's constructor.
VERSION = re.compile(r"^(# Protobuf Python Version: .*|    [0-9]+,|    def __init__\(.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules, generated anew by whatever version of grpcio-tools is there."""
    pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    output = tmp_path_factory.mktemp("generated")
    script = runpy.run_path(str(ROOT / "images" / "generate"), run_name="generate")
    command = [sys.executable, "-m", "grpc_tools.protoc", *script["protoc_arguments"](output)[1:]]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return output / PACKAGE


def version_of(module: Path) -> str:
    """The version of the compiler that a module is from."""
    return next(line for line in module.read_text().splitlines() if line.startswith("# Protobuf Python Version"))


def test_there_is_a_module_for_each_schema_and_no_other() -> None:
    committed = {path.name for path in (ROOT / PACKAGE).iterdir() if path.suffix in (".py", ".pyi")}
    assert committed == {*MODULES, "__init__.py"}


@pytest.mark.parametrize("name", MODULES)
def test_generating_a_module_again_changes_nothing(generated: Path, name: str) -> None:
    ours, theirs = (ROOT / PACKAGE / name).read_text(), (generated / name).read_text()
    if version_of(generated / "mm_pb2.py") != version_of(ROOT / PACKAGE / "mm_pb2.py"):
        ours, theirs = VERSION.sub("", ours), VERSION.sub("", theirs)
    assert ours == theirs, "run images/generate"


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.stem)
def test_a_module_has_names_of_its_own(schema: Path) -> None:
    """CRIU's modules can be loaded in the same process: neither the file's nor a message's name is theirs."""
    module = importlib.import_module(f"incdump.images._pb.{schema.stem}_pb2")
    assert module.DESCRIPTOR.name == f"{PACKAGE}/{schema.name}"
    assert module.DESCRIPTOR.package == "incdump.images"


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.stem)
def test_a_module_is_of_a_generator_old_enough_for_protobuf_6(schema: Path) -> None:
    assert version_of(ROOT / PACKAGE / f"{schema.stem}_pb2.py").endswith(" 6.31.1")


ROUND_TRIP = """
import google.protobuf
from incdump.images.inventory import decode_inventory, encode_dump_inventory
from incdump.images.stats import decode_stats, encode_stats
from incdump.model.stats import DumpStats

stats = DumpStats(pages_written=1 << 40, frozen_time=7)
assert decode_stats(encode_stats(stats), "stats-dump").pages_written == 1 << 40
assert decode_inventory(encode_dump_inventory(12_340_000), "inventory.img").dump_uptime == 12_340_000
print(google.protobuf.__version__)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("wanted", "first"), [("protobuf>=6.31.1,<7", "6."), ("protobuf>=7,<8", "7.")])
def test_the_modules_work_with_protobuf_6_and_7(tmp_path: Path, wanted: str, first: str) -> None:
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--target"]
    subprocess.run([*install, str(tmp_path), wanted], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Versions of the Python package are 6.31.1, 7.34.0 and so on.
    assert done.stdout.startswith(first)
