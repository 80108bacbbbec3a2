"""Whatever bytes are sent to whatever method: a standard status, a line that says why, and every slot accounted for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from services import TestWorker, calling, running, small

from kvprefetch.v1 import admin_pb2, admin_pb2_grpc, cache_pb2, hints_pb2, workers_pb2

HOSTILE = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CODE = grpc.StatusCode
PROPER = {
    CODE.OK,
    CODE.INVALID_ARGUMENT,
    CODE.FAILED_PRECONDITION,
    CODE.NOT_FOUND,
    CODE.ALREADY_EXISTS,
    CODE.RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True)
class Method:
    path: str
    request: type[Message]
    streams: bool


METHODS = [
    Method(f"/{service.full_name}/{method.name}", getattr(file, method.input_type.name), method.server_streaming)
    for file in (cache_pb2, hints_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if method.name != "Drain"
]

packed = st.one_of(
    st.binary(max_size=40),
    st.integers(1, 40).map(lambda keys: bytes(range(32)) * keys),
    st.integers(1, 8).flatmap(lambda keys: st.binary(min_size=32 * keys, max_size=32 * keys)),
    st.sampled_from([b"{}", b"[]", b"[1]", b'[{"role":"user","content":"x"}]', b'{"a":', b"\xff"]),
    st.just(b"INSTANCE"),  # of a worker that has registered
)
scalars: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_UINT32: st.one_of(st.integers(0, 60), st.integers(0, 2**32 - 1)),
    FieldDescriptor.CPPTYPE_UINT64: st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: st.text(max_size=80),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 99),
}


def one(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return packed
    if field.message_type is not None:
        return messages(field.message_type)
    return scalars[field.cpp_type]


def messages(kind: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of a message, each there or not, with values that may mean nothing."""
    fields = {
        field.name: st.lists(one(field), max_size=3) if field.is_repeated else one(field) for field in kind.fields
    }
    return st.fixed_dictionaries({}, optional=fields)


def filled(said: Any, instance: bytes) -> Any:
    """With the worker's instance where it is meant."""
    if isinstance(said, dict):
        return {name: filled(value, instance) for name, value in said.items()}
    if isinstance(said, list):
        return [filled(value, instance) for value in said]
    return instance if said == b"INSTANCE" else said


@dataclass
class Site:
    channel: grpc.Channel
    worker: TestWorker


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder: Path = tmp_path_factory.mktemp("service")
    with running(small(folder)) as service, calling(service.address) as channel:
        worker = TestWorker(channel)
        yield Site(channel, worker)
        worker.leave()


def answer(site: Site, method: Method, body: bytes) -> tuple[grpc.StatusCode, str]:
    call: Any
    try:
        if method.streams:
            call = site.channel.unary_stream(method.path)
            for _ in call(body, timeout=0.05):  # a hint that was taken lives on
                break
        else:
            call = site.channel.unary_unary(method.path)
            call(body, timeout=20)
    except grpc.RpcError as error:
        if method.streams and error.code() is CODE.DEADLINE_EXCEEDED:
            return CODE.OK, ""
        return error.code(), error.details() or ""
    return CODE.OK, ""


def is_proper(site: Site, code: grpc.StatusCode, details: str) -> None:
    assert code in PROPER, f"{code.name}: {details}"
    assert code is CODE.OK or len(details) > 5
    admin_pb2_grpc.AdminStub(site.channel).Stats(admin_pb2.StatsRequest(check=True), timeout=20)


@given(data=st.data(), method=st.sampled_from(METHODS))
@HOSTILE
def test_messages_of_nonsense_are_told_what_is_wrong_with_them(site: Site, data: st.DataObject, method: Method) -> None:
    said = filled(data.draw(messages(method.request.DESCRIPTOR)), site.worker.instance)
    is_proper(site, *answer(site, method, method.request(**said).SerializeToString()))


@given(method=st.sampled_from(METHODS), body=st.binary(max_size=300))
@HOSTILE
def test_bytes_that_are_no_message_are_told_so(site: Site, method: Method, body: bytes) -> None:
    is_proper(site, *answer(site, method, body))


@given(said=st.lists(messages(workers_pb2.WorkerMessage.DESCRIPTOR), max_size=3), rest=st.binary(max_size=50))
@HOSTILE
def test_a_workers_stream_that_begins_with_anything_ends_with_a_reason(
    site: Site, said: list[dict[str, Any]], rest: bytes
) -> None:
    bodies = [workers_pb2.WorkerMessage(**filled(each, b"")).SerializeToString() for each in said]
    work: Any = site.channel.stream_stream("/kvprefetch.v1.Workers/Work")
    try:
        for _ in work(iter([*bodies, rest]), timeout=20):
            pass
    except grpc.RpcError as error:
        is_proper(site, error.code(), error.details() or "")


def test_what_a_registered_worker_says_next_may_be_nonsense(site: Site) -> None:
    """It ends its own stream, and nobody else's."""
    other = TestWorker(site.channel, "another")
    other.say(load=workers_pb2.LoadReport(tokens_per_s=float("nan"), free_blocks=2**64 - 1))
    other.say(preload=workers_pb2.PreloadReport(hint=2**64 - 1, tokens=2**64 - 1))
    other.say(session=workers_pb2.SessionReport(tenant="x" * 10_000, session="\0"))
    other.say(register=workers_pb2.Register())
    other.leave()
    assert other.error is not None
    assert other.error.code() is CODE.INVALID_ARGUMENT
    assert site.worker.error is None
    is_proper(site, CODE.OK, "")
