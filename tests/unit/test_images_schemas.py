"""The generated modules are those of the schemas, and get along with every protobuf that is allowed."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCHEMAS = sorted((ROOT / "images").glob("*.proto"))
PACKAGE = "incdump/images/_pb"


def generator() -> dict[str, object]:
    return runpy.run_path(str(ROOT / "images" / "generate"), run_name="generate")


def run_protoc(arguments: list[str]) -> None:
    pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    command = [sys.executable, "-m", "grpc_tools.protoc", *arguments[1:]]
    subprocess.run(command, check=True, capture_output=True, text=True)


def version_line(module: Path) -> str:
    return next(line for line in module.read_text().splitlines() if line.startswith("# Protobuf Python Version"))


def test_there_is_a_module_for_each_schema_and_no_other() -> None:
    committed = {path.name for path in (ROOT / PACKAGE).iterdir() if path.suffix in (".py", ".pyi")}
    expected = {f"{schema.stem}_pb2{suffix}" for schema in SCHEMAS for suffix in (".py", ".pyi")}
    assert committed == expected | {"__init__.py"}


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.stem)
def test_a_module_describes_what_its_schema_says(schema: Path, tmp_path: Path) -> None:
    """Holds for any version of the compiler: the descriptor is the same, whatever surrounds it."""
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    arguments = generator()["protoc_arguments"]
    assert callable(arguments)
    run_protoc(arguments(tmp_path, f"--descriptor_set_out={tmp_path / 'set'}"))
    compiled = {
        file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file
    }
    module = importlib.import_module(f"incdump.images._pb.{schema.stem}_pb2")
    committed = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(committed)
    expected = compiled[f"{PACKAGE}/{schema.name}"]
    for message in _messages(expected.message_type):
        for field in message.field:
            field.ClearField("json_name")
    assert committed == expected


def _messages(messages: object) -> list[object]:
    found = list(messages)  # type: ignore[call-overload]
    for message in messages:  # type: ignore[attr-defined]
        found += _messages(message.nested_type)
    return found


def test_generating_again_gives_the_same_files(tmp_path: Path) -> None:
    arguments = generator()["protoc_arguments"]
    assert callable(arguments)
    run_protoc(arguments(tmp_path))
    generated = tmp_path / PACKAGE
    committed = ROOT / PACKAGE
    ours, theirs = (version_line(at / "pagemap_pb2.py") for at in (committed, generated))
    if ours != theirs:
        pytest.skip(f"grpcio-tools of another version than the committed modules: {theirs}, not {ours}")
    for path in sorted(generated.iterdir()):
        assert path.read_text() == (committed / path.name).read_text()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.stem)
def test_a_module_has_names_of_its_own(schema: Path) -> None:
    """CRIU's modules can be loaded in the same process: neither the file's nor a message's name is theirs."""
    module = importlib.import_module(f"incdump.images._pb.{schema.stem}_pb2")
    assert module.DESCRIPTOR.name == f"{PACKAGE}/{schema.name}"
    assert module.DESCRIPTOR.package == "incdump.images"


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.stem)
def test_a_module_is_of_a_generator_old_enough_for_protobuf_6(schema: Path) -> None:
    assert version_line(ROOT / PACKAGE / f"{schema.stem}_pb2.py").endswith(" 6.31.1")
