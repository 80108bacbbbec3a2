"""An upstream that costs next to nothing: it streams chat answers at an engine's pace, and says when it sent what.

    python bench/gateway_upstream.py      # says its port, and serves until it is ended

An answer's first chunk comes `HOLD_S` after the request, the others each `PACE_S`. Chunks look like vLLM's and carry,
besides, the clock that all processes of a machine share: `sent`, and in the first `received`.
"""

import asyncio
import json
import time
from typing import cast

import uvloop

CHUNKS, PACE_S, HOLD_S = 40, 0.05, 0.1
TOKEN = " token"
_MODELS = {"object": "list", "data": [{"id": "paced", "object": "model", "owned_by": "nobody"}]}
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_END = b"data: [DONE]\n\n"


def chunk(number: int, received: int, sent: int) -> bytes:
    """One event of an answer."""
    last = number == CHUNKS - 1
    choice = {"index": 0, "delta": {"content": TOKEN}, "logprobs": None, "finish_reason": "stop" if last else None}
    event = {"id": f"chatcmpl-{received}", "object": "chat.completion.chunk", "created": 1, "model": "paced"}
    return b"data: %b\n\n" % json.dumps({**event, "choices": [choice], "received": received, "sent": sent}).encode()


class Paced(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing is said yet."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is none by its class

    def connection_lost(self, error: Exception | None) -> None:
        """What is still to be sent has nowhere to go."""
        self._transport = None

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self._raw += data
        while (end := self._raw.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._raw[:end]).lower()
            _, _, length = head.partition(b"\r\ncontent-length:")
            total = end + 4 + (int(length.split(b"\r\n")[0]) if length else 0)
            if len(self._raw) < total:
                return
            body = bytes(self._raw[end + 4 : total])
            del self._raw[:total]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get /v1/models "):
            self._whole(b"200 OK", json.dumps(_MODELS).encode())
        elif not head.startswith(b"post /v1/chat/completions "):
            self._whole(b"404 Not Found", b"{}")
        elif b'"stream":true' in body:
            self._send(_STREAM)
            asyncio.get_running_loop().call_later(HOLD_S, self._next, 0, time.monotonic_ns())
        else:
            self._whole(b"200 OK", b'{"choices":[{"message":{"role":"assistant","content":"x"}}]}')

    def _next(self, number: int, received: int) -> None:
        self._chunk(chunk(number, received, time.monotonic_ns()))
        if number + 1 < CHUNKS:
            asyncio.get_running_loop().call_later(PACE_S, self._next, number + 1, received)
            return
        self._chunk(_END)
        self._send(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        self._send(b"%x\r\n%b\r\n" % (len(data), data))

    def _whole(self, status: bytes, body: bytes) -> None:
        self._send(b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n" % status)
        self._send(b"content-length: %d\r\n\r\n%b" % (len(body), body))

    def _send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def main() -> None:
    """Serve on a port that the system picks."""
    server = await asyncio.get_running_loop().create_server(Paced, "127.0.0.1", 0, backlog=256)
    print(f"listening at {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
