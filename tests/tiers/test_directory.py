"""Who has what: what nodes tell each other through Redis."""

import os
from collections.abc import Iterator

import pytest
from redis_servers import PATIENT_S, RedisServer, free_port

from kvprefetch.errors import TierUnavailable
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.directory import Directory, longest_run

ANN, BOB = "10.0.0.1:7000", "[fd00::2]:7000"
TTL_S = 100.0


class Nodes:
    """Directories of one namespace, with one time of their own."""

    def __init__(self, url: str) -> None:
        self.now = 1_000_000.0
        settings = RedisSettings(url=url, timeout_s=PATIENT_S, ttl_s=TTL_S)
        self.namespace = namespace = os.urandom(8).hex()
        self.ann, self.bob = (Directory(settings, namespace, now=lambda: self.now) for _ in range(2))


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    """It is shared: each test has a namespace of its own."""
    return redis_server


@pytest.fixture
def nodes(server: RedisServer) -> Iterator[Nodes]:
    nodes = Nodes(server.url)
    yield nodes
    nodes.ann.close()
    nodes.bob.close()


def some_keys(count: int) -> list[bytes]:
    return [os.urandom(32) for _ in range(count)]


def test_a_node_learns_what_another_has(nodes: Nodes) -> None:
    keys = some_keys(5)
    nodes.ann.announce(keys[:3], ANN)
    assert nodes.bob.who_has(keys) == [[ANN]] * 3
    assert nodes.bob.who_has(keys[3:]) == []
    assert nodes.bob.who_has([]) == []


def test_of_several_the_last_who_said_so_comes_first(nodes: Nodes) -> None:
    keys = some_keys(3)
    nodes.ann.announce(keys[:2], ANN)
    nodes.now += 1
    nodes.bob.announce(keys[1:], BOB)
    assert nodes.ann.who_has(keys) == [[ANN], [BOB, ANN], [BOB]]
    nodes.now += 1
    nodes.ann.announce(keys[:2], ANN)
    assert nodes.ann.who_has(keys) == [[ANN], [ANN, BOB], [BOB]]


def test_what_is_withdrawn_is_forgotten(nodes: Nodes) -> None:
    keys = some_keys(3)
    nodes.ann.announce(keys, ANN)
    nodes.bob.announce(keys[:1], BOB)
    nodes.ann.withdraw(keys[:2], ANN)
    assert nodes.bob.who_has(keys) == [[BOB]]
    nodes.bob.withdraw(keys, BOB)
    assert nodes.bob.who_has(keys) == []
    assert nodes.bob.who_has(keys[2:]) == [[ANN]]


def test_a_node_that_died_is_forgotten_though_others_stay(server: RedisServer, nodes: Nodes) -> None:
    keys = some_keys(2)
    nodes.ann.announce(keys, ANN)
    nodes.now += TTL_S / 2
    nodes.bob.announce(keys[:1], BOB)
    nodes.now += TTL_S / 2 + 1
    assert nodes.bob.who_has(keys) == [[BOB]]
    nodes.bob.announce(keys[:1], BOB)
    (name,) = server.client().scan_iter(f"*:{nodes.namespace}:*:{keys[0].hex()}")
    assert server.client().zcard(name) == 1, "nor does it take room for ever"


def test_what_is_announced_again_stays(nodes: Nodes) -> None:
    keys = some_keys(1)
    for _ in range(4):
        nodes.ann.announce(keys, ANN)
        nodes.now += 0.9 * TTL_S
    assert nodes.bob.who_has(keys) == [[ANN]]


def test_the_entries_themselves_expire_in_redis(server: RedisServer, nodes: Nodes) -> None:
    nodes.ann.announce(some_keys(20), ANN)
    client = server.client()
    assert all(0 < client.pttl(name) <= 1_000 * TTL_S for name in client.scan_iter(f"*:{nodes.namespace}:*"))


def test_very_many_keys_go_in_batches(nodes: Nodes) -> None:
    keys = some_keys(3_000)
    nodes.ann.announce(keys, ANN)
    assert len(nodes.bob.who_has(keys)) == 3_000


def test_a_directory_out_of_reach_says_so() -> None:
    directory = Directory(RedisSettings(url=f"redis://127.0.0.1:{free_port()}"), "namespace")
    with pytest.raises(TierUnavailable):
        directory.who_has(some_keys(1))
    with pytest.raises(TierUnavailable):
        directory.announce(some_keys(1), ANN)
    directory.close()


def test_the_longest_run_is_that_of_one_node_from_the_start_on() -> None:
    found = [[ANN, BOB], [BOB], [ANN, BOB], [ANN]]
    assert longest_run(found) == (BOB, 3)
    assert longest_run(found, but=BOB) == (ANN, 1)
    assert longest_run(found[1:], but=BOB) == ("", 0)
    assert longest_run([]) == ("", 0)
