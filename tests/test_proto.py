"""The wire's words are the code's words."""

import re
from enum import Enum
from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

from kvprefetch import MissReason, Outcome, Use

PROTO = Path(__file__).parents[1] / "proto"


@pytest.fixture(scope="module")
def enums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    target = tmp_path_factory.mktemp("proto") / "set.bin"
    source = PROTO / "kvprefetch" / "v1" / "outcomes.proto"
    include = str(files("grpc_tools") / "_proto")
    done = protoc.main(["protoc", f"-I{PROTO}", f"-I{include}", f"--descriptor_set_out={target}", str(source)])
    assert done == 0
    described = FileDescriptorSet.FromString(target.read_bytes())
    return {enum.name: [value.name for value in enum.value] for enum in described.file[0].enum_type}


@pytest.mark.parametrize("kind", [Outcome, Use, MissReason])
def test_the_proto_names_the_same_values_in_the_same_order(kind: type[Enum], enums: dict[str, list[str]]) -> None:
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).upper()
    assert enums[kind.__name__] == [f"{prefix}_UNSPECIFIED", *(f"{prefix}_{member.name}" for member in kind)]
