"""A Redis that is dead, stopped, paused, slow, cut off, evicting, full or no Redis at all: bounded, and never wrong."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis_servers import (
    BLOCK_BYTES,
    Clock,
    Proxy,
    RedisServer,
    blocks_of,
    come_back,
    free_port,
    keys_of,
    loaded,
    may_be_debugged,
    opened,
    wait_for,
)

from kvprefetch.errors import TierUnavailable
from kvprefetch.tiers.redis import RedisTier

SHORT_S = 0.05
FAR_LATER_S = 10.0  # nobody waits so long: the machine may be busy, the timeout is 50 ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path, *may_be_debugged()) as server:
        yield server


def was_asked(tier: RedisTier) -> bool:
    """Whether the tier's server was asked, where it did not answer."""
    began = time.monotonic()
    with pytest.raises(TierUnavailable) as raised:
        tier.find([bytes(32)])
    assert time.monotonic() - began < FAR_LATER_S
    return raised.value.__cause__ is not None


# -- dead, stopped, paused ---------------------------------------------------------------------------------
def test_nobody_listens(clock: Clock) -> None:
    with opened(f"redis://127.0.0.1:{free_port()}", clock=clock) as tier:
        assert was_asked(tier)
        assert not was_asked(tier)
        clock.now += 60.0
        assert was_asked(tier)
        assert not was_asked(tier)
        assert tier.usage().by_tenant == {}
        assert tier.usage().counters["failures"] == 2


def test_killed_it_costs_its_timeout_once_and_is_used_again_when_it_is_back(server: RedisServer, clock: Clock) -> None:
    with opened(server.url, clock=clock) as tier:
        blocks = blocks_of(3)
        tier.store(blocks)
        server.kill()
        assert was_asked(tier)
        for _ in range(100):
            assert not was_asked(tier)
        server.restart()
        assert not was_asked(tier)
        come_back(tier, clock)
        assert tier.find(keys_of(blocks)) == 0
        assert tier.store(blocks) == 3
        assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]


def test_stopped_it_costs_its_timeout_once_whatever_is_called(server: RedisServer, clock: Clock) -> None:
    blocks = blocks_of(40, block_bytes=2**18)  # more than fits in the buffers on the way
    calls = (
        lambda tier: tier.find(keys_of(blocks)),
        lambda tier: loaded(tier, keys_of(blocks)),
        lambda tier: tier.store(blocks),
        lambda tier: tier._write(blocks),
        lambda tier: tier.discard(keys_of(blocks)),
        lambda tier: tier.charges.by_tenant(),
    )
    for call in calls:
        with opened(server.url, block_bytes=2**18, timeout_s=SHORT_S, clock=clock) as tier:
            come_back(tier, clock)
            server.pause()
            began = time.monotonic()
            with pytest.raises(TierUnavailable):
                call(tier)
            assert time.monotonic() - began < FAR_LATER_S
            assert not was_asked(tier)
            server.resume()
            come_back(tier, clock)


def test_stopped_before_the_first_call(server: RedisServer, clock: Clock) -> None:
    """Its kernel accepts connections all the same; nobody waits for them."""
    server.pause()
    with opened(server.url, timeout_s=SHORT_S, clock=clock) as tier:
        assert was_asked(tier)
        assert not was_asked(tier)
        server.resume()
        come_back(tier, clock)


@pytest.mark.parametrize("how", [("CLIENT", "PAUSE", 2_000, "ALL"), ("DEBUG", "SLEEP", 2)])
def test_paused_from_within(server: RedisServer, clock: Clock, how: tuple[str | int, ...]) -> None:
    with opened(server.url, timeout_s=SHORT_S, clock=clock) as tier:
        blocks = blocks_of(3)
        come_back(tier, clock)
        tier.store(blocks)
        pausing = threading.Thread(target=lambda: server.client().execute_command(*how))
        pausing.start()
        wait_for(lambda: tier.link.breaker.is_open or _fails(tier, keys_of(blocks)))
        assert not was_asked(tier)
        come_back(tier, clock)
        assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]
        pausing.join()


def _fails(tier: RedisTier, keys: list[bytes]) -> bool:
    try:
        tier.find(keys)
    except TierUnavailable:
        return True
    return False


def test_many_who_wait_for_a_stopped_server_all_end(server: RedisServer) -> None:
    with opened(server.url, timeout_s=SHORT_S) as tier:
        wait_for(lambda: not _fails(tier, []) and not tier.link.breaker.is_open)
        server.pause()
        threads = [threading.Thread(target=_fails, args=(tier, [bytes(32)])) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(FAR_LATER_S)
            assert not thread.is_alive()
        server.resume()


# -- slow and cut off --------------------------------------------------------------------------------------
def test_a_load_may_take_long_as_long_as_blocks_keep_coming(server: RedisServer) -> None:
    blocks = blocks_of(12, block_bytes=2**16)
    with Proxy(server.port) as proxy, opened(proxy.url, block_bytes=2**16, timeout_s=1.0) as tier:
        assert tier.store(blocks) == 12
        proxy.pause_s = 0.1  # after each 64 KiB
        began = time.monotonic()
        assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]
        assert time.monotonic() - began > 1.0


@pytest.mark.parametrize("piece", [2, 7, 600, 5_000])
def test_however_answers_are_cut_they_are_understood(server: RedisServer, piece: int) -> None:
    """Blocks, what is missing, what is too short and what is no block, close upon each other."""
    good = blocks_of(12, block_bytes=512)
    with Proxy(server.port) as proxy, opened(proxy.url, block_bytes=512) as tier:
        tier.store(good)
        short, none, missing = (tier.names.block(good[n].key) for n in (3, 6, 9))
        server.client().set(short, (server.client().get(short) or b"")[:-1])
        server.client().delete(none, missing)
        server.client().lpush(none, "not a block")
        proxy.piece = piece
        for _ in range(2):
            for start, count in ((0, 3), (4, 2), (7, 2), (9, 0), (10, 2)):
                keys = keys_of(good[start:])
                assert loaded(tier, keys) == [bytes(block.data) for block in good[start : start + count]]
        assert tier.usage().counters["corrupt"] == 2
        assert tier.usage().counters["failures"] == 0


def test_bytes_that_trickle_are_no_progress(server: RedisServer) -> None:
    """Each receive is quick, and the block would take 40 minutes."""
    blocks = blocks_of(2, block_bytes=2**16)
    with Proxy(server.port) as proxy, opened(proxy.url, block_bytes=2**16, timeout_s=0.5) as tier:
        assert tier.store(blocks) == 2
        proxy.piece, proxy.pause_s = 1, 0.04
        rescue = threading.Timer(FAR_LATER_S, lambda: setattr(proxy, "pause_s", 0.0))
        rescue.start()
        with pytest.raises(TierUnavailable, match=r"[Tt]ime|no progress"):
            loaded(tier, keys_of(blocks))
        assert rescue.is_alive()
        rescue.cancel()


def test_what_came_before_the_stop_is_kept(server: RedisServer) -> None:
    blocks = blocks_of(200, block_bytes=2**16)
    with Proxy(server.port) as proxy, opened(proxy.url, block_bytes=2**16, timeout_s=0.5) as tier:
        tier.store(blocks)
        proxy.pause_s = 0.01
        threading.Timer(0.3, server.pause).start()
        found = loaded(tier, keys_of(blocks))
        assert 0 < len(found) < 200
        assert found == [bytes(block.data) for block in blocks[: len(found)]]
        assert tier.usage().counters["loaded"] == len(found)


def test_a_connection_that_was_cut_while_idle_is_replaced_unnoticed(server: RedisServer) -> None:
    with opened(server.url) as tier:
        blocks = blocks_of(2)
        tier.store(blocks)
        assert server.client().client_kill_filter(_type="normal", skipme=True) >= 1
        assert len(loaded(tier, keys_of(blocks))) == 2
        assert tier.usage().counters["failures"] == 0


def test_a_connection_that_nobody_waited_for_is_there_for_who_comes_later(server: RedisServer, clock: Clock) -> None:
    """Logging in takes longer than any call may: far away, by TLS, on a busy machine."""
    with Proxy(server.port) as proxy, opened(proxy.url, timeout_s=0.2, clock=clock) as tier:
        come_back(tier, clock)
        proxy.cut()
        proxy.greeting_s = 0.5
        assert was_asked(tier)
        come_back(tier, clock)


def test_cut_in_the_middle_of_a_load(server: RedisServer, clock: Clock) -> None:
    blocks = blocks_of(100, block_bytes=2**16)
    with Proxy(server.port) as proxy, opened(proxy.url, block_bytes=2**16, timeout_s=1.0, clock=clock) as tier:
        tier.store(blocks)
        proxy.pause_s = 0.01
        threading.Timer(0.3, proxy.cut).start()
        found = loaded(tier, keys_of(blocks))
        assert found == [bytes(block.data) for block in blocks[: len(found)]]
        proxy.pause_s = 0.0
        come_back(tier, clock)
        assert len(loaded(tier, keys_of(blocks))) == 100


def test_one_that_speaks_something_else(clock: Clock) -> None:
    def babble() -> None:
        with suppress(OSError):
            while True:
                visitor, _ = listener.accept()
                visitor.sendall(os.urandom(512))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=babble, daemon=True).start()
        with opened("redis://127.0.0.1:{1}".format(*listener.getsockname()), timeout_s=1.0, clock=clock) as tier:
            for _ in range(5):
                assert was_asked(tier)
                clock.now += 60.0


# -- evicting and full -------------------------------------------------------------------------------------
def test_one_that_evicts_gives_what_is_left_and_nothing_else(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru") as server:
        blocks = blocks_of(60, block_bytes=2**18)
        with opened(server.url, block_bytes=2**18) as tier:
            for start in range(0, 60, 5):
                assert tier.store(blocks[start : start + 5]) == 5
            for n, block in enumerate(blocks):
                assert loaded(tier, [block.key]) in ([], [bytes(block.data)]), n
            held = sum(tier.find([block.key]) for block in blocks)
            assert 0 < held < 60
            assert tier.usage().blocks <= held


def test_one_that_is_full_refuses_and_is_offered_no_more_for_a_while(tmp_path: Path, clock: Clock) -> None:
    with RedisServer(tmp_path, "--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as server:
        blocks = blocks_of(60, block_bytes=2**18)
        with opened(server.url, block_bytes=2**18, clock=clock) as tier:
            taken = tier.store(blocks)
            assert 0 < taken < 60
            assert tier.usage().counters["refused"] == 60 - taken
            assert len(loaded(tier, keys_of(blocks))) == taken
            assert tier.store(blocks) == taken  # those held before
            with pytest.raises(TierUnavailable, match="takes no blocks"):
                tier.store(blocks[taken:])
            assert tier.discard(keys_of(blocks[:taken])) == taken
            with pytest.raises(TierUnavailable, match="takes no blocks"):
                tier.store(blocks[taken : taken + 1])
            clock.now += 60.0
            assert tier.store(blocks[taken : taken + 1]) == 1
            assert tier.usage().counters["failures"] == 0


def test_one_that_takes_no_writes_is_still_read(server: RedisServer) -> None:
    with opened(server.url) as tier:
        blocks = blocks_of(2)
        tier.store(blocks[:1])
        server.client().config_set("min-replicas-to-write", 1)
        with pytest.raises(TierUnavailable, match="takes no blocks"):
            tier.store(blocks[1:])
        assert loaded(tier, keys_of(blocks)) == [bytes(blocks[0].data)]
        assert tier.usage().counters["refused"] == 1
        assert tier.usage().by_tenant == {"ann": BLOCK_BYTES}
