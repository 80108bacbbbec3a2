"""A thousand malformed requests, over gRPC and HTTP: each is refused with a status that says why, and nothing breaks.

Refusals are counted by status. A status that means a bug of ours (UNKNOWN, 5xx, a closed connection), or an error
without a word, is complained of. INTERNAL is gRPC's own word for bytes that are no message, and for nothing else.
"""

import json
import random
import secrets
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
from faults_case import Campaign, Case
from faults_node import Node, Worker
from google.protobuf.message import DecodeError, Message

from kvprefetch.client.channel import open_channel
from kvprefetch.v1 import admin_pb2, cache_pb2, hints_pb2, workers_pb2

_PROPER = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
}
_NAMES = (r"service\.refused", r"http_requests_total\{[^}]*4\d\d\}")
_BODIES: tuple[Any, ...] = (
    None,
    [],
    "text",
    {},
    {"prompt": []},
    {"prompt": ""},
    {"prompt": [-1]},
    {"prompt": [10**9]},
    {"prompt": [1.5]},
    {"prompt": [[1], [2]]},
    {"prompt": [1] * 5000},
    {"prompt": [5], "model": "another"},
    {"prompt": [5], "max_tokens": -1},
    {"prompt": [5], "max_tokens": 10**9},
    {"prompt": [5], "max_tokens": "six"},
    {"prompt": [5], "temperature": -1},
    {"prompt": [5], "temperature": 1e400},
    {"prompt": [5], "top_p": 7},
    {"prompt": [5], "n": 3},
    {"prompt": [5], "logprobs": 5},
    {"prompt": [5], "stop": [1]},
    {"prompt": [5], "stream": "yes"},
    {"prompt": [5], "seed": "seed"},
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": 7, "content": "x"}]},
    {"messages": [{"role": "user", "content": {"a": 1}}]},
    {"messages": [{"role": "user", "content": "x"}], "tools": "none"},
)
_RAW = (
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 50_000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": NaN}',
    b'{"prompt": ' + b"9" * 5_000 + b"}",
    b'{"prompt": [1],' + b'"a":' * 3 + b"1}",
)
_PATHS = ("/v1/completions", "/v1/chat/completions")
_LINES = (  # what is hardly HTTP
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    b"GET\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: nonsense\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nshort",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5_000,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


def run(campaign: Campaign, node: Node, one: Worker, two: Worker) -> None:
    """Both halves. The node's service runs."""
    count = 100 if campaign.is_quick else 500
    with campaign.case("malformed gRPC", f"{count} calls", [node], _NAMES[:1]) as case:
        statuses = over_grpc(case, node, count, [one, two])
    campaign.rows[-1]["statuses"] = statuses
    with campaign.case("malformed HTTP", f"{count} requests", [node], _NAMES[1:]) as case:
        statuses = over_http(case, one, count, [one, two])
    campaign.rows[-1]["statuses"] = statuses


# -- gRPC ----------------------------------------------------------------------------------------------
def methods() -> Iterator[tuple[str, type[Message], bool]]:
    """Every method that is called with one message: path, request, whether many replies come."""
    for file in (cache_pb2, hints_pb2, admin_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if method.name != "Drain":
                    request = getattr(file, method.input_type.name)
                    yield f"/{service.full_name}/{method.name}", request, method.server_streaming


def garbage(kind: type[Message], rng: random.Random) -> bytes:
    """A request of this kind with random fields, or bytes that are hardly one."""
    if rng.random() < 0.3:
        return rng.randbytes(rng.choice((1, 7, 100, 5_000)))
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if rng.random() < 0.75 and field.message_type is None:
            _fill(message, field, rng)
    raw = bytearray(message.SerializeToString())
    if raw and rng.random() < 0.2:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def _fill(message: Message, field: Any, rng: random.Random) -> None:
    numbers = (0, 1, 2**31, 2**32 - 1)
    values: dict[int, Any] = {
        field.CPPTYPE_UINT32: rng.choice(numbers),
        field.CPPTYPE_UINT64: rng.choice((*numbers, 2**64 - 1)),
        field.CPPTYPE_DOUBLE: rng.choice((0.0, -1.0, 1e308, float("nan"), float("inf"))),
        field.CPPTYPE_BOOL: rng.random() < 0.5,
        field.CPPTYPE_STRING: rng.choice(("", "default", "\x00", "x" * 300, "ü" * 70)),
        field.CPPTYPE_ENUM: rng.choice((0, 1, 99)),
    }
    value: Any = values.get(field.cpp_type)
    if field.type == field.TYPE_BYTES:
        value = rng.randbytes(rng.choice((0, 1, 16, 31, 32, 33, 64, 32 * 40, 32 * 20_000)))
    if isinstance(getattr(message, field.name), str | bytes | int | float | bool):
        setattr(message, field.name, value)
    else:
        getattr(message, field.name).extend([value] * rng.randrange(3))


def over_grpc(case: Case, node: Node, count: int, workers: list[Worker]) -> dict[str, int]:
    """So many calls, and a good request to a worker now and then; how many answers of each status."""
    rng, known, statuses = random.Random(count), list(methods()), Counter[str]()
    with open_channel(node.address) as channel:
        for number in range(count):
            if number % 25 == 0:
                case.ask(workers[number // 25 % 2])
            if number % 20 == 19:
                code, detail = _stream(channel, rng)
                body, is_message = b"", True
            else:
                path, kind, is_stream = rng.choice(known)
                body = garbage(kind, rng)
                is_message = _parses(kind, body)
                code, detail = _call(channel, path, body, is_stream)
            statuses[code.name] += 1
            if code not in _PROPER and not (code is grpc.StatusCode.INTERNAL and not is_message):
                case.complain(f"{code.name}: {detail}"[:200])
            if code is not grpc.StatusCode.OK and not detail:
                case.complain(f"{code.name} without a word")
    return dict(statuses)


def _call(channel: grpc.Channel, path: str, body: bytes, is_stream: bool) -> tuple[grpc.StatusCode, str]:
    try:
        if is_stream:
            many: Any = channel.unary_stream(path)
            for _ in many(body, timeout=0.3):
                pass
        else:
            one: Any = channel.unary_unary(path)
            one(body, timeout=5)
    except grpc.RpcError as error:
        if is_stream and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return grpc.StatusCode.OK, ""  # it was taken, and went on
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def _stream(channel: grpc.Channel, rng: random.Random) -> tuple[grpc.StatusCode, str]:
    """A worker's stream that begins wrong."""
    first = workers_pb2.WorkerMessage(
        register=workers_pb2.Register(
            instance=secrets.token_bytes(rng.choice((0, 15, 16, 17))),
            pid=rng.choice((0, 1, 2**31)),
            started=rng.choice((0, 1, 2**63)),
            model=rng.choice(("", "m")),
            fingerprint=rng.choice(("", "{", "[]", '{"a":1}')),
            block_bytes=rng.choice((0, 1, 2**32 - 1)),
            block_tokens=rng.choice((0, 1)),
        )
    )
    body = rng.choice((first.SerializeToString(), b"", workers_pb2.WorkerMessage().SerializeToString()))
    try:
        work: Any = channel.stream_stream("/kvprefetch.v1.Workers/Work")
        for _ in work(iter([body]), timeout=5):
            pass
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def _parses(kind: type[Message], body: bytes) -> bool:
    try:
        kind.FromString(body)
    except DecodeError:
        return False
    return True


# -- HTTP ----------------------------------------------------------------------------------------------
def over_http(case: Case, one: Worker, count: int, workers: list[Worker]) -> dict[str, int]:
    """The same of requests to a worker's endpoint."""
    rng, statuses = random.Random(count), Counter[str]()
    with httpx.Client(base_url=one.url, timeout=20) as http:
        for number in range(count):
            if number % 25 == 0:
                case.ask(workers[number // 25 % 2])
            if number % 10 == 9:
                statuses["answered" if _line(one.url, rng.choice(_LINES)) else "closed"] += 1
                continue
            reply = _post(http, rng)
            statuses[str(reply.status_code)] += 1
            if reply.status_code >= 500:
                case.complain(f"{reply.status_code}: {reply.text}"[:200])
            elif reply.status_code >= 400 and not json.loads(reply.text)["error"]["message"]:
                case.complain(f"{reply.status_code} without a word")
    return dict(statuses)


def _post(http: httpx.Client, rng: random.Random) -> httpx.Response:
    path = rng.choice((*_PATHS, *_PATHS, "/v1/models/nobody", "/nowhere"))
    headers = {"content-type": rng.choice(("application/json",) * 4 + ("text/plain",))}
    if rng.random() < 0.3:
        return http.post(path, content=rng.choice(_RAW), headers=headers)
    body = rng.choice(_BODIES)
    if isinstance(body, dict):
        body = {"max_tokens": 1, **body}
    return http.request(rng.choice(("POST",) * 5 + ("PUT", "GET")), path, content=json.dumps(body), headers=headers)


def _line(url: str, data: bytes) -> bool:
    """Send bytes that are hardly HTTP; whether anything is answered before the line is closed."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=0.3) as line:
        try:
            line.sendall(data)
            return bool(line.recv(1))
        except OSError:
            return False
