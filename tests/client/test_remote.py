"""A worker's calls to its node's cache, where the answers come too late."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from processes import until

from kvprefetch.client.remote import CacheClient, LookupTimedOut
from kvprefetch.errors import ServiceUnavailable
from kvprefetch.v1 import cache_pb2, cache_pb2_grpc

KEY = bytes(32)


class SlowCache(cache_pb2_grpc.CacheServicer):
    """Grants everything, once it may."""

    def __init__(self) -> None:
        self.may = threading.Event()

    def Lookup(self, request: cache_pb2.LookupRequest, context: grpc.ServicerContext) -> cache_pb2.LookupReply:
        self.may.wait(10)
        return cache_pb2.LookupReply(lease=7, slots=bytes(4), found=1)

    def Reserve(self, request: cache_pb2.ReserveRequest, context: grpc.ServicerContext) -> cache_pb2.ReserveReply:
        self.may.wait(10)
        return cache_pb2.ReserveReply(reservation=8, slots=bytes(4))


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[tuple[SlowCache, CacheClient, dict[str, list[int]]]]:
    """The service, its client, and what the client was granted and did not want."""
    service, unwanted = SlowCache(), dict[str, list[int]](lease=[], reservation=[])
    server = grpc.server(ThreadPoolExecutor(4))
    cache_pb2_grpc.add_CacheServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{tmp_path}/service.sock")
    server.start()

    def keep(*, lease: int = 0, reservation: int = 0) -> None:
        unwanted["lease"] += [lease] if lease else []
        unwanted["reservation"] += [reservation] if reservation else []

    with grpc.insecure_channel(f"unix:{tmp_path}/service.sock") as channel:
        grpc.channel_ready_future(channel).result(10)
        yield service, CacheClient(channel, bytes(16), time.monotonic, keep), unwanted
        service.may.set()
    server.stop(None)


def test_a_lease_that_is_granted_too_late_is_unwanted(
    slow: tuple[SlowCache, CacheClient, dict[str, list[int]]],
) -> None:
    service, client, unwanted = slow
    with pytest.raises(LookupTimedOut):
        client.look_up("tenant", "", [KEY], timeout_s=0.02)
    assert unwanted == {"lease": [], "reservation": []}
    service.may.set()
    until(lambda: unwanted["lease"] == [7], "nobody hears of the late lease")


def test_a_reservation_that_is_granted_too_late_is_unwanted(
    slow: tuple[SlowCache, CacheClient, dict[str, list[int]]],
) -> None:
    service, client, unwanted = slow
    with pytest.raises(ServiceUnavailable):
        client.reserve("tenant", "", b"", [KEY], None, 0.02)
    service.may.set()
    until(lambda: unwanted["reservation"] == [8], "nobody hears of the late reservation")


def test_what_comes_in_time_is_the_callers(slow: tuple[SlowCache, CacheClient, dict[str, list[int]]]) -> None:
    service, client, unwanted = slow
    service.may.set()
    assert client.look_up("tenant", "", [KEY], timeout_s=5).lease == 7
    assert unwanted == {"lease": [], "reservation": []}
