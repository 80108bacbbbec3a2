"""A worker in a process of its own: reads commands from its input, one a line, and answers each with a line of JSON.

register · reserve PATH · write · commit · lease PATH · hasty PATH · look PATH · exit
"""

import json
import os
import queue
import sys
from struct import pack, unpack

import grpc
from wire import BLOCK, FINGERPRINT, TAKEN, chain, content, packed

from kvprefetch.service.watch import start_time
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.checksum import checksum
from kvprefetch.v1 import cache_pb2, cache_pb2_grpc, workers_pb2, workers_pb2_grpc


class Worker:
    def __init__(self, address: str) -> None:
        options = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100))
        self.channel = grpc.insecure_channel(address, options=options)
        self.cache = cache_pb2_grpc.CacheStub(self.channel)
        self.instance = os.urandom(16)
        self.leases: list[int] = []
        self.reservation, self.path, self.slots = 0, "", b""
        self.arena: ArenaFile | None = None

    def register(self) -> object:
        outbox: queue.SimpleQueue[workers_pb2.WorkerMessage] = queue.SimpleQueue()
        outbox.put(
            workers_pb2.WorkerMessage(
                register=workers_pb2.Register(
                    instance=self.instance,
                    pid=os.getpid(),
                    started=start_time(os.getpid()),
                    model="tiny",
                    fingerprint=FINGERPRINT,
                    block_bytes=BLOCK,
                    block_tokens=16,
                    leases=self.leases,
                    reservations=[self.reservation] if self.reservation else [],
                )
            )
        )
        self.stream = workers_pb2_grpc.WorkersStub(self.channel).Work(iter(outbox.get, None), wait_for_ready=True)
        told = next(self.stream).registered
        self.arena = ArenaFile.attach(told.arena, told.namespace, prefault=False)
        return told.service

    def reserve(self, path: str) -> object:
        request = cache_pb2.ReserveRequest(instance=self.instance, tenant="ann", keys=packed(path))
        reply = self.cache.Reserve(request)
        self.reservation, self.path, self.slots = reply.reservation, path, reply.slots
        return self.reservation

    def write(self) -> object:
        for key, slot in self._mine():
            self.arena.slot(slot)[:] = content(key)
        return len(self._mine())

    def commit(self) -> object:
        sums = [checksum(content(key)) for key, _ in self._mine()]
        packed_sums = pack(f"<{len(sums)}Q", *sums)
        number, self.reservation = self.reservation, 0
        request = cache_pb2.CommitRequest(instance=self.instance, reservation=number, checksums=packed_sums)
        return self.cache.Commit(request).committed

    def lease(self, path: str) -> object:
        request = cache_pb2.LookupRequest(instance=self.instance, tenant="ann", keys=packed(path), lease=True)
        reply = self.cache.Lookup(request)
        self.leases.append(reply.lease)
        return reply.found

    def hasty(self, path: str) -> object:
        """A look-up that waits for hardly any time."""
        request = cache_pb2.LookupRequest(instance=self.instance, tenant="ann", keys=packed(path), lease=True)
        return self.cache.Lookup(request, timeout=0.2).found

    def look(self, path: str) -> object:
        request = cache_pb2.LookupRequest(instance=self.instance, tenant="ann", keys=packed(path), lease=True)
        reply = self.cache.Lookup(request)
        into, good = bytearray(BLOCK), 0
        for key, slot in zip(chain(path), unpack(f"<{len(reply.slots) // 4}I", reply.slots), strict=False):
            good += self.arena.read(slot, key, memoryview(into)) and bytes(into) == content(key)
        self.cache.Release(cache_pb2.ReleaseRequest(instance=self.instance, leases=[reply.lease]))
        return good

    def _mine(self) -> list[tuple[bytes, int]]:
        slots = unpack(f"<{len(self.slots) // 4}I", self.slots)
        return [(key, slot) for key, slot in zip(chain(self.path), slots, strict=False) if slot != TAKEN]


def main() -> None:
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        command, *words = line.split()
        if command == "exit":
            return
        try:
            answer = getattr(worker, command)(*words)
        except grpc.RpcError as error:
            answer = error.code().name
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
