"""Server-sent events: out of the bytes of a stream, whole or cut off, and into them."""

from collections.abc import Iterator

import msgspec

from kvprefetch.gateway.contract import Json

DONE = b"data: [DONE]\n\n"


def events(raw: bytes) -> Iterator[Json]:
    """The JSON objects that the stream's events carry; what is none is passed over. Never raises."""
    lines: list[bytes] = []
    for line in raw.splitlines():
        if line.startswith(b"data:"):
            lines.append(line[5:])
        elif not line and lines:
            yield from _decoded(b"\n".join(lines))
            lines = []
    if lines:  # cut off behind an event that may be whole
        yield from _decoded(b"\n".join(lines))


def event(value: Json, name: str = "") -> bytes:
    """One event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


def _decoded(data: bytes) -> Iterator[Json]:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if isinstance(value, dict):
        yield value
