"""The Redis tier and the directory on a real Cluster of three nodes."""

from pathlib import Path

import pytest
import redis
from redis_servers import (
    BLOCK_BYTES,
    Clock,
    RedisCluster,
    RedisServer,
    blocks_of,
    come_back,
    keys_of,
    loaded,
    opened,
    wait_for,
)

from kvprefetch.errors import TierUnavailable
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.contract import Incoming
from kvprefetch.tiers.directory import Directory
from kvprefetch.tiers.redis import RedisTier


@pytest.fixture
def cluster(redis_cluster: RedisCluster) -> RedisCluster:
    """It is shared: each test has a namespace of its own."""
    return redis_cluster


def test_blocks_lie_on_all_nodes_and_come_back_in_order(cluster: RedisCluster) -> None:
    blocks = blocks_of(200)
    with opened(cluster.url) as tier:
        assert tier.store(blocks) == 200
        assert all(server.client().dbsize() > 30 for server in cluster.servers)
        assert tier.find(keys_of(blocks)) == 200
        assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]
        assert tier.discard(keys_of(blocks[100:101])) == 1
        assert tier.find(keys_of(blocks)) == 100
        assert len(loaded(tier, keys_of(blocks))) == 100


def test_charges_and_the_directory_work_across_nodes(cluster: RedisCluster) -> None:
    with opened(cluster.url, "shared") as tier, opened(cluster.url, "shared") as other:
        for n in range(9):
            tier.store(blocks_of(n + 1, f"tenant {n}"))
        assert other.usage().by_tenant == {f"tenant {n}": (n + 1) * BLOCK_BYTES for n in range(9)}
        directory = Directory(RedisSettings(url=cluster.url), "shared", link=tier.link)
        keys = keys_of(blocks_of(100))
        directory.announce(keys[:50], "10.0.0.1:7000")
        assert directory.who_has(keys) == [["10.0.0.1:7000"]] * 50


def test_a_slot_that_moves_is_followed(cluster: RedisCluster) -> None:
    """The map that the tier has is wrong for one answer."""
    with opened(cluster.url) as tier:
        clients = [server.client() for server in cluster.servers]
        blocks, slot = _in_an_empty_slot(tier, clients)
        assert tier.find(keys_of(blocks)) == 0
        target = clients[2 if slot < 10_000 else 0]
        name = target.execute_command("CLUSTER", "MYID")
        for client in (target, *clients):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", name)
        with pytest.raises(TierUnavailable, match="moved"):
            tier.find(keys_of(blocks))
        assert tier.find(keys_of(blocks)) == 0
        assert tier.store(blocks) == 1
        assert target.exists(tier.names.block(blocks[0].key))
        assert tier.usage().counters["failures"] == 0


def _in_an_empty_slot(tier: RedisTier, clients: list[redis.Redis]) -> tuple[list[Incoming], int]:
    """One block, and its slot: only a slot without keys can be given away just like that."""
    while True:
        blocks = blocks_of(1)
        slot = clients[0].execute_command("CLUSTER", "KEYSLOT", tier.names.block(blocks[0].key))
        if not any(client.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot) for client in clients):
            return blocks, slot


def test_a_node_that_dies_is_replaced_by_its_replica(tmp_path: Path) -> None:
    with RedisCluster(tmp_path) as cluster, RedisServer(tmp_path / "replica", *cluster.options) as replica:
        first, clock, blocks = cluster.servers[0], Clock(), blocks_of(50)
        _attach(replica, cluster)
        with opened(cluster.url, clock=clock) as tier:
            assert tier.store(blocks) == 50
            wait_for(lambda: replica.client().dbsize() == first.client().dbsize())
            first.kill()
            with pytest.raises(TierUnavailable):
                tier.find(keys_of(blocks))
            replica.client().execute_command("CLUSTER", "FAILOVER", "TAKEOVER")
            come_back(tier, clock, keys_of(blocks))
            assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]


def _attach(replica: RedisServer, cluster: RedisCluster) -> None:
    """Have it join the Cluster, and follow the first node, and all know of it."""
    client, first = replica.client(), cluster.servers[0]
    client.execute_command("CLUSTER", "MEET", "127.0.0.1", first.port)
    servers = [replica, *cluster.servers]
    wait_for(lambda: all(server.client().cluster("info")["cluster_known_nodes"] == "4" for server in servers))
    name = first.client().execute_command("CLUSTER", "MYID")
    client.execute_command("CLUSTER", "REPLICATE", name)
    wait_for(lambda: client.info("replication")["master_link_status"] == "up")
    wait_for(lambda: all(server.client().cluster("replicas", name) for server in cluster.servers))


def test_a_single_server_is_no_cluster(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        url = server.url.replace("redis:", "redis+cluster:")
        with opened(url) as tier, pytest.raises(TierUnavailable, match="Cluster"):
            tier.find([bytes(32)])
