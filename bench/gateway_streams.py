"""Streams of chat answers over raw connections, timed against the clock that the paced upstream writes into them.

What a request cost on its way is what it took at this end, less what it took at the upstream: of the first chunk, and
of the last. The same is measured without a gateway between, so that this process's own share can be taken away.
"""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from urllib.parse import urlsplit

from gateway_upstream import CHUNKS, TOKEN

WORDS = ("open", "the", "file", "and", "say", "which", "line", "fails", "when", "it", "is", "read", "for", "long")


@dataclass
class Costs:
    """Milliseconds on the way, of each request and each chunk."""

    first_ms: list[float] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)


class Reader(asyncio.Protocol):
    """One connection's end: it notes when each event comes."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self.events: list[tuple[int, bytes]] = []
        self.over = asyncio.Event()

    def start(self) -> None:
        """The next answer."""
        self.events, self.over = [], asyncio.Event()
        self._raw.clear()

    def data_received(self, data: bytes) -> None:
        """Events are told apart by what is between them; the framing of chunks is skipped."""
        now = time.monotonic_ns()
        self._raw += data
        while (end := self._raw.find(b"\n\n")) >= 0:
            event = bytes(self._raw[:end])
            del self._raw[: end + 2]
            self.events.append((now, event[event.find(b"data: ") + 6 :]))
        if self._raw.endswith(b"0\r\n\r\n") and self.events:
            self.over.set()

    def connection_lost(self, error: Exception | None) -> None:
        """The answer ends with it."""
        self.over.set()


def bodies(seed: int, model: str = "paced") -> Iterator[bytes]:
    """Bodies of chat requests, 2 to 8 KB each: conversations that grow turn by turn, and then others."""
    draw = random.Random(seed)
    for number in count():
        messages = [{"role": "system", "content": f"{seed} {number} " + _words(draw, 1_500)}]
        while sum(len(message["content"]) for message in messages) < 7_000:
            messages.append({"role": "user", "content": _words(draw, draw.randint(300, 1_500))})
            body = {"model": model, "stream": True, "messages": messages, "temperature": 0.7, "max_tokens": CHUNKS}
            yield json.dumps(body, separators=(",", ":")).encode()
            messages.append({"role": "assistant", "content": TOKEN * CHUNKS})


def costs_of(began: int, events: list[tuple[int, bytes]], costs: Costs) -> None:
    """Add those of one answer. Raises RuntimeError where it is not what the upstream sent."""
    chunks = [(at, json.loads(event)) for at, event in events if event.startswith(b"{")]
    text = "".join(chunk["choices"][0]["delta"]["content"] for _, chunk in chunks)
    if text != TOKEN * CHUNKS or events[-1][1] != b"[DONE]":
        raise RuntimeError(f"an answer of {len(chunks)} chunks is not what was sent; no times reported")
    (first_at, first), (last_at, last) = chunks[0], chunks[-1]
    received = first["received"]
    costs.first_ms.append((first_at - began - (first["sent"] - received)) / 1e6)
    costs.whole_ms.append((last_at - began - (last["sent"] - received)) / 1e6)
    costs.chunk_ms.extend((at - chunk["sent"]) / 1e6 for at, chunk in chunks)


async def stream_all(url: str, streams: list[Iterator[bytes]], seconds: float) -> Costs:
    """All streams at once, each asking again as soon as it is answered, until the time is over."""
    costs, place = Costs(), urlsplit(url)
    until = time.monotonic() + seconds

    async def one(requests: Iterator[bytes], delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        loop = asyncio.get_running_loop()
        transport, reader = await loop.create_connection(Reader, place.hostname or "", place.port or 0)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-type: application/json\r\n"
        while time.monotonic() < until:
            body = next(requests)
            reader.start()
            began = time.monotonic_ns()
            transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            await reader.over.wait()
            costs_of(began, reader.events, costs)
        transport.close()

    draw = random.Random(seconds)
    await asyncio.gather(*(one(requests, draw.uniform(0, 2)) for requests in streams))
    return costs


def _words(draw: random.Random, length: int) -> str:
    text = ""
    while len(text) < length:
        text += draw.choice(WORDS) + " "
    return text
