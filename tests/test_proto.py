"""The wire's words are the code's words, explained, and what is committed is what the protos say."""

import re
from collections.abc import Iterator
from enum import Enum
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from kvprefetch import MissReason, Outcome, Use

ROOT = Path(__file__).parents[1]
PROTO = ROOT / "proto"
SOURCES = sorted(PROTO.rglob("*.proto"))


def run_protoc(*options: str) -> None:
    include = str(files("grpc_tools") / "_proto")
    assert protoc.main(["protoc", f"-I{PROTO}", f"-I{include}", *options, *map(str, SOURCES)]) == 0


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDescriptorProto]:
    target = tmp_path_factory.mktemp("proto") / "set.bin"
    run_protoc(f"--descriptor_set_out={target}", "--include_source_info")
    return {file.name: file for file in FileDescriptorSet.FromString(target.read_bytes()).file}


@pytest.mark.parametrize("kind", [Outcome, Use, MissReason])
def test_the_proto_names_the_same_values_in_the_same_order(
    kind: type[Enum], described: dict[str, FileDescriptorProto]
) -> None:
    enums = {enum.name: [value.name for value in enum.value] for file in described.values() for enum in file.enum_type}
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).upper()
    assert enums[kind.__name__] == [f"{prefix}_UNSPECIFIED", *(f"{prefix}_{member.name}" for member in kind)]


def test_the_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    run_protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")
    generated = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*") if path.is_file()}
    committed = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "kvprefetch").rglob("*_pb2*.py*")}
    committed = {path: text for path, text in committed.items() if "__pycache__" not in path.parts}
    assert len(generated) == 3 * len(SOURCES)
    assert generated.keys() == committed.keys()
    assert [str(path) for path in generated if generated[path] != committed[path]] == []


def explained(file: FileDescriptorProto) -> set[tuple[int, ...]]:
    """The places that have a comment before them or behind them."""
    places = file.source_code_info.location
    return {tuple(place.path) for place in places if place.leading_comments.strip() or place.trailing_comments.strip()}


def named(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Every message, field, enum, value, service and RPC: its place (by the numbers of descriptor.proto), its name."""
    for i, message in enumerate(file.message_type):
        yield (4, i), message.name
        for j, each in enumerate(message.field):
            yield (4, i, 2, j), f"{message.name}.{each.name}"
    for i, enum in enumerate(file.enum_type):
        yield (5, i), enum.name
        for j, value in enumerate(enum.value[1:], start=1):  # "unspecified" says it itself
            yield (5, i, 2, j), value.name
    for i, service in enumerate(file.service):
        yield (6, i), service.name
        for j, method in enumerate(service.method):
            yield (6, i, 2, j), f"{service.name}.{method.name}"


def test_everything_on_the_wire_is_explained(described: dict[str, FileDescriptorProto]) -> None:
    missing = {
        name: [what for place, what in named(file) if place not in explained(file)] for name, file in described.items()
    }
    assert not any(missing.values()), missing
