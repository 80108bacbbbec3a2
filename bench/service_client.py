"""A worker without a model, for benches of the service: it registers, and looks blocks up as workers do.

As a program it takes orders, one JSON line each on standard input, and answers each with one line; it ends with its
input:

    python bench/service_client.py ADDRESS FILE-OF-KEYS
    {"keys": 2048, "lease": true, "rate": 20, "seconds": 5, "start": 1234.5, "seed": 1}
"""

import json
import os
import queue
import random
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvprefetch.client.channel import open_channel
from kvprefetch.client.remote import TAKEN, CacheClient
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.host import started_at
from kvprefetch.v1 import workers_pb2, workers_pb2_grpc

BLOCK_BYTES = 4_096
"""Look-ups move no bytes: small blocks let many fit."""
BLOCK_TOKENS = 32
TENANT = "default"
_PATIENCE_S = 5.0  # a look-up of the bench is waited for longer than one of a worker's
_RUN = 1_024  # blocks of one reservation


class Registered:
    """A worker's place at the service, from its registration to `close`. Holds the stream open."""

    def __init__(self, address: str, model: str = "bench", block_bytes: int = BLOCK_BYTES) -> None:
        self.channel = open_channel(address)
        instance = secrets.token_bytes(16)
        self.client = CacheClient(self.channel, instance, time.monotonic)
        self._outbox: queue.SimpleQueue[workers_pb2.WorkerMessage | None] = queue.SimpleQueue()
        register = workers_pb2.Register(
            instance=instance,
            pid=os.getpid(),
            started=started_at(os.getpid()),
            model=model,
            fingerprint=json.dumps({"model": model}),
            block_bytes=block_bytes,
            block_tokens=BLOCK_TOKENS,
            device_blocks=1,
        )
        self._outbox.put(workers_pb2.WorkerMessage(register=register))
        self._call: Any = workers_pb2_grpc.WorkersStub(self.channel).Work(self._messages(), wait_for_ready=True)
        self.place: workers_pb2.Registered = next(self._call).registered

    def fill(self, keys: Sequence[bytes], block: bytes) -> None:
        """Have the arena hold the sequence `keys`, each block with the bytes `block`."""
        arena = ArenaFile.attach(self.place.arena, self.place.namespace)
        data = memoryview(bytearray(block))
        for start in range(0, len(keys), _RUN):
            parent, run = keys[start - 1] if start else b"", keys[start : start + _RUN]
            reserved = self.client.reserve(TENANT, "", parent, run, None, _PATIENCE_S)
            if len(reserved.slots) < len(run):
                raise RuntimeError(f"the arena has room for {len(reserved.slots)} more blocks, not {len(run)}")
            sums = [arena.write(slot, data) for slot in reserved.slots if slot != TAKEN]
            self.client.commit(reserved.number, sums, _PATIENCE_S)
        arena.close()

    def close(self) -> None:
        """Leave."""
        self._outbox.put(None)
        self._call.cancel()
        self.channel.close()

    def _messages(self) -> Iterator[workers_pb2.WorkerMessage]:
        while (message := self._outbox.get()) is not None:
            yield message


def schedule(rate: float, seconds: float, seed: int) -> list[float]:
    """Times from 0 to `seconds` at which to ask, at random: `rate` a second on average, whatever was asked before."""
    draw, times, at = random.Random(seed), [], 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        times.append(at)
    return times


def chain(blocks: int, seed: int) -> list[bytes]:
    """Keys of a sequence that nobody else has."""
    draw = random.Random(seed)
    return [draw.randbytes(32) for _ in range(blocks)]


def obey(client: CacheClient, keys: Sequence[bytes], order: dict[str, Any]) -> dict[str, Any]:
    """Look up as ordered; milliseconds of each look-up, of each release, and how many began over 1 ms late."""
    asked, lease = keys[: order["keys"]], bool(order["lease"])
    if order.get("miss"):
        asked = chain(order["keys"], 10**9 + order["seed"])  # in no arena
    looks, releases, late = [], [], 0
    pause = max(order["start"] - time.monotonic(), 0.0)
    time.sleep(pause)
    start = time.monotonic()
    for due in _due(order, start):
        behind = time.monotonic() - start - due
        if behind < 0:
            time.sleep(-behind)
        elif order["rate"]:
            late += behind > 0.001
        began = time.perf_counter()
        answer = client.look_up(TENANT, "", asked, lease=lease, timeout_s=_PATIENCE_S)
        looks.append(1000 * (time.perf_counter() - began))
        if answer.found != (0 if order.get("miss") else len(asked)):
            raise RuntimeError(f"{answer.found} of {len(asked)} blocks were found")
        if answer.lease:
            began = time.perf_counter()
            client.release([answer.lease], timeout_s=_PATIENCE_S)
            releases.append(1000 * (time.perf_counter() - began))
    return {"look_ups": looks, "releases": releases, "late": late, "seconds": time.monotonic() - start}


def _due(order: dict[str, Any], start: float) -> Iterator[float]:
    """When to ask, in seconds from the start; without a rate at once, until the time is over."""
    if order["rate"]:
        yield from schedule(order["rate"], order["seconds"], order["seed"])
        return
    while (now := time.monotonic() - start) < order["seconds"]:
        yield now


def main() -> None:
    address, file = sys.argv[1:]
    raw = Path(file).read_bytes()
    keys = [raw[at : at + 32] for at in range(0, len(raw), 32)]
    worker = Registered(address)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(worker.client, keys, json.loads(line))), flush=True)
    worker.close()


if __name__ == "__main__":
    main()
