"""A budget for our blocks in Redis: nodes that share one, and what may come between them."""

import os
import threading
from pathlib import Path

import pytest
from redis_servers import (
    BLOCK_BYTES,
    Clock,
    RedisCluster,
    RedisServer,
    block_of,
    blocks_of,
    come_back,
    keys_of,
    loaded,
    opened,
)

from kvprefetch.cache.shares import Share, Shares
from kvprefetch.errors import SettingsError, TierUnavailable
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.contract import Incoming
from kvprefetch.tiers.redis import RedisTier
from kvprefetch.tiers.redis_block import HEADER_BYTES


def size_of(blocks: int) -> str:
    return str(blocks * (BLOCK_BYTES + HEADER_BYTES))


def charged(tier: RedisTier) -> dict[str, int]:
    """Blocks by tenant."""
    return {tenant: size // BLOCK_BYTES for tenant, size in sorted(tier.usage().by_tenant.items())}


def preload(count: int, tenant: str) -> list[Incoming]:
    return [Incoming(b.key, b.parent, b.tenant, b.data, b.checksum, 1e9) for b in blocks_of(count, tenant)]


def test_nodes_have_one_budget_between_them(redis_server: RedisServer) -> None:
    clock, name = Clock(), os.urandom(8).hex()
    with (
        opened(redis_server.url, name, clock=clock, size=size_of(10)) as one,
        opened(redis_server.url, name, clock=clock, size=size_of(10)) as two,
    ):
        assert one.store(blocks_of(8, "ann")) == 8
        assert two.store(blocks_of(4, "bob")) == 4
        assert charged(one) == {"ann": 6, "bob": 4}
        assert one.usage().counters.get("evicted", 0) + two.usage().counters["evicted"] == 2
        assert one.store(blocks_of(3, "cid")) == 3, "it does not know yet what the other has done"
        clock.now += 1.0
        assert two.store(blocks_of(1, "cid")) == 1
        assert sum(charged(two).values()) == 10, "now they do"
        assert charged(two)["cid"] == 4


def test_what_is_charged_is_read_once_a_second(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with opened(redis_server.url, clock=clock, size=size_of(50)) as tier:
        readings, counted = [], tier.charges.counted
        monkeypatch.setattr(tier.charges, "counted", lambda: readings.append(clock.now) or counted())
        for _ in range(40):
            tier.store(blocks_of(3))
            clock.now += 0.125
        assert readings == [1_000.0, 1_001.0, 1_002.0, 1_003.0, 1_004.0]
        assert charged(tier) == {"ann": 50}
        loaded(tier, [bytes(32)])
        tier.find([bytes(32)])
        assert len(readings) == 5, "who reads blocks waits for no budget"


def test_a_node_that_knows_too_little_leaves_everybody_its_guarantee(redis_server: RedisServer) -> None:
    """Both believe that somebody is over the guarantee by three, and both need three."""
    guaranteed = {"ann": Share(guarantee=0.5), "bob": Share(guarantee=0.2), "cid": Share(guarantee=0.3)}
    clock, name, mine = Clock(), os.urandom(8).hex(), blocks_of(8, "ann")
    with (
        opened(redis_server.url, name, clock=clock, size=size_of(10)) as one,
        opened(redis_server.url, name, clock=clock, size=size_of(10)) as two,
    ):
        for tier in (one, two):
            tier.rule(Shares(guaranteed))
        assert one.store(mine) == 8
        assert two.store(blocks_of(2, "bob")) == 2
        clock.now += 1.0
        for tier in (one, two):
            assert tier.budget is not None
            assert tier.budget.reserve("cid", 0, ()) == 0, "each reads"
        for tier in (one, two):
            assert tier.store(blocks_of(3, "cid")) == 3
            assert one.find(keys_of(mine)) == 5, "what was stored with it, but behind it, went"
        assert charged(one) == {"ann": 5, "bob": 2, "cid": 6}
        clock.now += 1.0
        assert two.store(blocks_of(1, "dan")) == 0, "all is guaranteed"
        assert charged(one) == {"ann": 5, "bob": 2, "cid": 3}


@pytest.mark.parametrize("where", ["redis_server", "redis_cluster"])
def test_nodes_that_evict_at_the_same_time_leave_everybody_its_guarantee(
    where: str, request: pytest.FixtureRequest
) -> None:
    server: RedisServer | RedisCluster = request.getfixturevalue(where)
    name, shares = os.urandom(8).hex(), Shares({"ann": Share(guarantee=0.5), "bob": Share(guarantee=0.25)})
    with (
        opened(server.url, name, size=size_of(40)) as one,
        opened(server.url, name, size=size_of(40)) as two,
        opened(server.url, name, size=size_of(40)) as three,
    ):
        for tier in (one, two, three):
            tier.rule(shares)
        mine = blocks_of(20, "ann")
        assert one.store([*mine, *blocks_of(10, "bob")]) == 30
        lost: list[int] = []

        def flood(tier: RedisTier, tenant: str) -> None:
            for _ in range(30):
                tier.store(blocks_of(7, tenant))
                lost.append(20 - tier.find(keys_of(mine)))

        floods = [threading.Thread(target=flood, args=each) for each in ((one, "cid"), (two, "dan"), (three, "bob"))]
        for each in floods:
            each.start()
        for each in floods:
            each.join()
        assert len(lost) == 90
        assert not any(lost)
        assert charged(one)["ann"] == 20
        assert charged(one)["bob"] >= 10


def test_a_preload_without_room_is_refused_and_the_tier_goes_on(redis_server: RedisServer) -> None:
    with opened(redis_server.url, size=size_of(4)) as tier:
        assert tier.store(blocks_of(4, "bob")) == 4
        assert tier.store(preload(2, "ann")) == 0
        assert tier.usage().counters["refused"] == 2
        assert tier.store([*blocks_of(1, "bob"), *preload(2, "ann"), *blocks_of(1, "bob")]) == 1
        assert charged(tier) == {"bob": 4}


def test_blocks_of_the_call_itself_are_not_evicted_for_it(redis_server: RedisServer) -> None:
    with opened(redis_server.url, size=size_of(4)) as tier:
        blocks = blocks_of(7, "ann")
        assert tier.store(blocks[:3]) == 3
        assert tier.store(blocks_of(1, "ann")) == 1
        assert tier.store(blocks) == 4
        assert tier.find(keys_of(blocks)) == 4


def test_what_is_gone_on_with_is_not_the_oldest(redis_server: RedisServer) -> None:
    with opened(redis_server.url, size=size_of(4)) as tier:
        begun, others = blocks_of(3, "ann"), blocks_of(3, "ann")
        assert tier.store(begun[:1]) == 1
        assert tier.store(others) == 3
        assert tier.store(begun) == 3
        assert tier.find(keys_of(begun)) == 3
        assert tier.find(keys_of(others)) == 1


def test_what_redis_refuses_takes_no_room(tmp_path: Path) -> None:
    clock = Clock()
    with RedisServer(tmp_path) as server, opened(server.url, clock=clock, size=size_of(4)) as tier:
        assert tier.store(blocks_of(1, "ann")) == 1
        server.client().config_set("maxmemory", 1)
        with pytest.raises(TierUnavailable, match="takes no blocks"):
            tier.store(blocks_of(3, "bob"))
        assert tier.budget is not None
        assert tier.budget._charged == {"ann": 1}


def test_a_damaged_block_that_was_deleted_is_charged_no_more(redis_server: RedisServer) -> None:
    with opened(redis_server.url, size=size_of(4)) as tier:
        blocks = blocks_of(2, "ann")
        tier.store(blocks)
        redis_server.client().setrange(tier.names.block(blocks[1].key), HEADER_BYTES, b"other bytes")
        assert len(loaded(tier, keys_of(blocks))) == 1
        assert redis_server.client().zcard(tier.names.charged("ann")) == 1


def test_what_redis_evicted_itself_brings_no_room_and_costs_nobody_a_block(redis_server: RedisServer) -> None:
    clock = Clock()
    with opened(redis_server.url, clock=clock, size=size_of(8)) as tier:
        ann, bob = blocks_of(5, "ann"), blocks_of(3, "bob")
        tier.store(ann)
        tier.store(bob)
        redis_server.client().delete(*(tier.names.block(block.key) for block in ann[1:]))
        assert tier.store(blocks_of(2, "cid")) == 2
        assert tier.find(keys_of(bob)) == 3
        assert tier.find(keys_of(ann)) == 1
        assert tier.usage().counters["evicted"] == 0
        assert charged(tier) == {"ann": 1, "bob": 3, "cid": 2}


def test_a_block_that_is_another_tenants_by_now_stays(redis_server: RedisServer) -> None:
    """Redis evicted it, and somebody else of the same group has stored it again."""
    clock = Clock()
    with opened(redis_server.url, clock=clock, size=size_of(4)) as tier:
        tier.rule(Shares({"bob": Share(guarantee=0.5)}))
        shared, data = os.urandom(32), os.urandom(BLOCK_BYTES)
        tier.store([block_of(shared, data, "ann")])
        tier.store(blocks_of(1, "ann"))
        redis_server.client().delete(tier.names.block(shared))
        tier.store([block_of(shared, data, "bob")])
        assert tier.store(blocks_of(2, "cid")) == 2
        assert loaded(tier, [shared]) == [data]
        assert charged(tier)["bob"] == 1


def test_a_budget_that_has_become_smaller_is_met_little_by_little(redis_server: RedisServer) -> None:
    name = os.urandom(8).hex()
    with opened(redis_server.url, name, size=size_of(300)) as tier:
        assert tier.store(blocks_of(300, "ann")) == 300
    with opened(redis_server.url, name, size=size_of(10)) as tier:
        assert tier.store(blocks_of(5, "bob")) == 5
        assert charged(tier) == {"ann": 5, "bob": 5}


def test_redis_that_stops_while_room_is_made_costs_no_room(tmp_path: Path) -> None:
    clock = Clock()
    with RedisServer(tmp_path) as server, opened(server.url, clock=clock, size=size_of(6)) as tier:
        assert tier.store(blocks_of(6, "ann")) == 6
        assert tier.budget is not None
        run = tier.budget._run

        def stopped(commands: object) -> object:
            tier.link._lines.close_idle()
            server.pause()
            tier.link.timeout_s = 0.05
            return run(commands)

        tier.budget._run = stopped  # type: ignore[method-assign]
        with pytest.raises(TierUnavailable):
            tier.store(blocks_of(3, "bob"))
        server.resume()
        tier.budget._run = run  # type: ignore[method-assign]
        tier.link.timeout_s = 20.0
        assert tier.budget._charged == {"ann": 6}
        come_back(tier, clock)
        assert tier.store(blocks_of(3, "bob")) == 3
        assert sum(charged(tier).values()) <= 6


def test_as_a_user_with_no_more_rights_than_without_a_budget(redis_server: RedisServer) -> None:
    rights = ("~kvprefetch:*", "+@read", "+@write", "+@connection", "-@dangerous")
    redis_server.client().execute_command("ACL", "SETUSER", "bud", "reset", "on", ">secret", *rights)
    with opened(redis_server.url.replace("//", "//bud:secret@"), size=size_of(4)) as tier:
        assert tier.store(blocks_of(4, "ann")) == 4
        assert tier.store(blocks_of(2, "bob")) == 2
        assert charged(tier) == {"ann": 2, "bob": 2}


@pytest.mark.parametrize(("size", "why"), [("100", "not one block"), ("much", "write bytes"), ("-1", "write bytes")])
def test_a_size_that_is_none_is_a_mistake_in_the_settings(redis_server: RedisServer, size: str, why: str) -> None:
    with pytest.raises(SettingsError, match=rf"redis\.size.*{why}"):
        RedisTier(RedisSettings(url=redis_server.url, size=size), "namespace", BLOCK_BYTES)


def test_a_thousand_tenants_share_a_budget(redis_server: RedisServer) -> None:
    with opened(redis_server.url, block_bytes=64, size=str(1_500 * (64 + HEADER_BYTES))) as tier:
        tier.store([block for n in range(1_000) for block in blocks_of(1, f"tenant {n}", 64)])
        for _ in range(25):
            assert tier.store(blocks_of(32, "flood", 64)) == 32
        usage = tier.usage().by_tenant
        assert sum(usage.values()) == 1_500 * 64
        assert len(usage) == 1_001, "who has one block keeps it"
