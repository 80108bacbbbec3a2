"""The Redis tier on one server: plain, by TLS, as a user with few rights; shared by nodes."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from redis_servers import (
    BLOCK_BYTES,
    RedisServer,
    block_of,
    blocks_of,
    keys_of,
    loaded,
    opened,
    wait_for,
)

from kvprefetch.errors import SettingsError, TierUnavailable
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers import redis_block
from kvprefetch.tiers.redis import RedisTier
from kvprefetch.tiers.redis_block import HEADER_BYTES, value_of
from kvprefetch.tiers.redis_charges import Charges
from kvprefetch.tiers.redis_connection import FILLED


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    """It is shared: each test has a namespace of its own."""
    return redis_server


@pytest.fixture
def tier(server: RedisServer) -> Iterator[RedisTier]:
    with opened(server.url) as tier:
        yield tier


# -- blocks ------------------------------------------------------------------------------------------------
def test_what_was_stored_is_found_and_loaded(tier: RedisTier) -> None:
    blocks = blocks_of(100)
    assert tier.find(keys_of(blocks)) == 0
    assert tier.store(blocks) == 100
    assert tier.find(keys_of(blocks)) == 100
    assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]


def test_only_the_leading_blocks_count(server: RedisServer, tier: RedisTier) -> None:
    blocks = blocks_of(100)
    tier.store([*blocks[:70], *blocks[71:]])
    assert tier.find(keys_of(blocks)) == 70
    connections = server.client().info("stats")["total_connections_received"]
    for _ in range(3):
        assert len(loaded(tier, keys_of(blocks))) == 70
    assert server.client().info("stats")["total_connections_received"] <= connections + 1, "none is closed half read"
    assert loaded(tier, keys_of(blocks[70:])) == []
    assert len(loaded(tier, keys_of(blocks[71:]))) == 29


def test_a_stream_goes_on_behind_what_was_missing(tier: RedisTier) -> None:
    """Answers that came together with it are with the parser, and not where they belong."""
    blocks = blocks_of(40)
    tier.store([block for n, block in enumerate(blocks) if n % 5])
    places = [memoryview(bytearray(HEADER_BYTES + BLOCK_BYTES)) for _ in blocks]
    commands = [("GET", tier.names.block(block.key)) for block in blocks]
    with tier.link.exchange() as exchange:
        for n, answer in enumerate(exchange.stream(commands, 20, ([place] for place in places))):
            value = bytes(places[n]) if answer is FILLED else answer
            assert value == (value_of(blocks[n]) if n % 5 else None)


def test_blocks_that_are_longer_than_all_buffers_go_through(server: RedisServer) -> None:
    with opened(server.url, block_bytes=3 * 2**20) as tier:
        blocks = blocks_of(5, block_bytes=3 * 2**20)
        assert tier.store(blocks) == 5
        assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]


def test_a_block_that_is_held_is_not_sent_again(tier: RedisTier) -> None:
    blocks = blocks_of(3)
    assert tier.store(blocks[:2]) == 2
    assert tier.store(blocks) == 3
    assert tier.usage().counters["stored"] == 3


def test_what_is_discarded_is_gone_and_not_charged(server: RedisServer, tier: RedisTier) -> None:
    blocks = blocks_of(5)
    tier.store(blocks)
    assert tier.discard([*keys_of(blocks[:2]), bytes(32)]) == 2
    assert tier.find(keys_of(blocks)) == 0
    assert tier.find(keys_of(blocks[2:])) == 3
    assert server.client().zcard(tier.names.charged("ann")) == 3
    assert tier.usage().by_tenant == {"ann": 3 * BLOCK_BYTES}


def test_nothing_asked_is_nothing_done(tier: RedisTier) -> None:
    assert (tier.find([]), tier.load([], []), tier.store([]), tier.discard([])) == (0, 0, 0, 0)


def test_two_nodes_share_blocks_and_figures(server: RedisServer) -> None:
    with opened(server.url, "shared") as one, opened(server.url, "shared") as other:
        ann, bob = blocks_of(3, "ann"), blocks_of(2, "bob")
        one.store(ann)
        other.store(bob)
        assert loaded(other, keys_of(ann)) == [bytes(block.data) for block in ann]
        assert one.usage().by_tenant == other.usage().by_tenant == {"ann": 3 * BLOCK_BYTES, "bob": 2 * BLOCK_BYTES}
        assert one.usage().blocks == 5


def test_a_block_is_charged_to_who_stored_it_first(server: RedisServer) -> None:
    with opened(server.url, "first") as one, opened(server.url, "first") as other:
        key, data = bytes(range(32)), bytes(BLOCK_BYTES)
        one.store([block_of(key, data, "ann")])
        other.store([block_of(key, data, "bob")])
        assert loaded(other, [key]) == [data]
        assert other.usage().by_tenant == {"ann": BLOCK_BYTES}


def test_models_and_prefixes_do_not_mix(server: RedisServer) -> None:
    blocks = blocks_of(1)
    with opened(server.url, "one") as one, opened(server.url, "two") as two:
        one.store(blocks)
        assert two.find(keys_of(blocks)) == 0
        assert two.usage().by_tenant == {}
    with opened(server.url, "one", prefix="elsewhere") as elsewhere:
        assert elsewhere.find(keys_of(blocks)) == 0


def test_after_an_upgrade_old_bytes_are_never_read(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(1)
    with opened(server.url, "upgraded") as tier:
        tier.store(blocks)
        name, value = tier.names.block(blocks[0].key), value_of(blocks[0])
        monkeypatch.setattr(redis_block, "LAYOUT", redis_block.LAYOUT + 1)
        monkeypatch.setattr(redis_block, "_MAGIC", b"kvblock" + bytes([redis_block.LAYOUT]))
        assert tier.find(keys_of(blocks)) == 0
        assert loaded(tier, keys_of(blocks)) == []
        assert tier.usage().counters["corrupt"] == 0
        assert tier.names.block(blocks[0].key) != name
        server.client().set(tier.names.block(blocks[0].key), value)  # even if they came under the new name
        assert loaded(tier, keys_of(blocks)) == []


# -- damage ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at", [0, 7, 8, 16, 24, HEADER_BYTES, HEADER_BYTES + BLOCK_BYTES - 1])
def test_a_flipped_bit_anywhere_is_seen_and_the_block_deleted(server: RedisServer, tier: RedisTier, at: int) -> None:
    blocks = blocks_of(3)
    tier.store(blocks)
    name = tier.names.block(blocks[1].key)
    client = server.client()
    value = bytearray(client.get(name))
    value[at] ^= 1
    client.set(name, bytes(value))
    assert loaded(tier, keys_of(blocks)) == [bytes(blocks[0].data)]
    assert tier.usage().counters["corrupt"] == 1
    assert not client.exists(name)
    assert tier.find(keys_of(blocks)) == 1
    assert tier.store(blocks) == 3
    assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]


@pytest.mark.parametrize("value", [b"", b"kv", b"x" * (HEADER_BYTES + BLOCK_BYTES)])
def test_what_is_no_block_is_taken_for_none(server: RedisServer, tier: RedisTier, value: bytes) -> None:
    block = blocks_of(1)[0]
    server.client().set(tier.names.block(block.key), value)
    assert loaded(tier, [block.key]) == []
    assert tier.store([block]) == 1
    assert loaded(tier, [block.key]) == [bytes(block.data)]


def test_a_truncated_block_and_one_under_the_wrong_key_are_corrupt(server: RedisServer, tier: RedisTier) -> None:
    blocks = blocks_of(2)
    tier.store(blocks)
    client = server.client()
    first, second = (tier.names.block(block.key) for block in blocks)
    client.set(second, client.get(first))
    client.set(first, client.get(first)[:-1])
    assert loaded(tier, keys_of(blocks)) == []
    assert loaded(tier, keys_of(blocks[1:])) == []
    assert tier.usage().counters["corrupt"] == 2


def test_what_is_no_string_is_deleted_or_overwritten(server: RedisServer, tier: RedisTier) -> None:
    blocks = blocks_of(2)
    for block in blocks:
        server.client().lpush(tier.names.block(block.key), "not a block")
    assert loaded(tier, keys_of(blocks)) == []
    assert tier.usage().counters["corrupt"] == 1
    assert not server.client().exists(tier.names.block(blocks[0].key))
    assert tier.store(blocks) == 2
    assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]
    assert tier.usage().counters["failures"] == 0


# -- time --------------------------------------------------------------------------------------------------
def test_a_block_expires_and_with_it_its_charge(server: RedisServer) -> None:
    with opened(server.url, ttl_s=0.2) as tier:
        blocks = blocks_of(2)
        tier.store(blocks)
        assert tier.usage().by_tenant == {"ann": 2 * BLOCK_BYTES}
        wait_for(lambda: tier.find(keys_of(blocks)) == 0)
        wait_for(lambda: tier.usage().by_tenant == {})
        client = server.client()
        wait_for(lambda: not client.keys(f"*{tier.names.namespace}*"))  # nothing of it is left behind


def test_a_block_that_is_read_or_stored_again_lives_longer(server: RedisServer, tier: RedisTier) -> None:
    blocks = blocks_of(2)
    tier.store(blocks)
    client = server.client()
    names = [tier.names.block(block.key) for block in blocks]
    for name in names:
        client.expire(name, 60)
    loaded(tier, keys_of(blocks[:1]))
    tier.store(blocks[1:])
    wait_for(lambda: all(client.ttl(name) > 3_000 for name in names))


# -- counting ----------------------------------------------------------------------------------------------
def test_charges_follow_when_redis_evicts(server: RedisServer, tier: RedisTier) -> None:
    blocks = blocks_of(10, "ann") + blocks_of(10, "bob")
    tier.store(blocks)
    server.client().delete(*(tier.names.block(block.key) for block in blocks[4:15]))
    assert tier.usage().by_tenant == {"ann": 4 * BLOCK_BYTES, "bob": 5 * BLOCK_BYTES}
    assert server.client().zcard(tier.names.charged("ann")) == 4


def test_what_is_past_its_time_is_not_charged(server: RedisServer, tier: RedisTier) -> None:
    """Whatever became of the block: nobody has stored or read it since."""
    now = 1_000_000.0
    charges = Charges(tier.link, tier.names, BLOCK_BYTES, ttl_s=100.0, now=lambda: now)
    blocks = blocks_of(3)
    tier.store(blocks)
    server.client().delete(tier.names.charged("ann"), tier.names.tenants)
    tier.link.run(charges.charge({"ann": keys_of(blocks[:1])}))
    now += 50.0
    tier.link.run(charges.charge({"ann": keys_of(blocks[1:])}))
    assert charges.by_tenant() == {"ann": 3 * BLOCK_BYTES}
    now += 51.0
    assert charges.by_tenant() == {"ann": 2 * BLOCK_BYTES}
    now += 50.0
    assert charges.by_tenant() == {}
    assert not server.client().exists(tier.names.tenants)


def test_charges_that_were_evicted_come_back_with_use(server: RedisServer, tier: RedisTier) -> None:
    blocks = blocks_of(4)
    tier.store(blocks)
    server.client().delete(tier.names.charged("ann"), tier.names.tenants)
    assert tier.usage().by_tenant == {}
    loaded(tier, keys_of(blocks))
    wait_for(lambda: tier.usage().by_tenant == {"ann": 4 * BLOCK_BYTES})


def test_of_very_many_blocks_the_bytes_are_estimated(
    server: RedisServer, tier: RedisTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvprefetch.tiers.redis_charges.SAMPLE", 64)
    blocks = blocks_of(400)
    tier.store(blocks)
    server.client().delete(*(tier.names.block(block.key) for block in blocks[::2]))
    assert 0.2 < tier.usage().blocks / 400 < 0.8
    for _ in range(60):
        tier.usage()  # each finds some more that are gone
    assert 0.4 < tier.usage().blocks / 400 < 0.6


@pytest.mark.parametrize("tenant", ["a:b {c}*", "grün", "x" * 63])
def test_a_tenant_may_have_any_name(tier: RedisTier, tenant: str) -> None:
    blocks = blocks_of(1, tenant)
    tier.store(blocks)
    assert tier.usage().by_tenant == {tenant: BLOCK_BYTES}
    tier.discard(keys_of(blocks))
    assert tier.usage().by_tenant == {}


# -- many at once ------------------------------------------------------------------------------------------
def test_many_threads_use_one_tier(tier: RedisTier) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                blocks = blocks_of(20)
                assert tier.store(blocks) == 20
                assert tier.find(keys_of(blocks)) == 20
                assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]
                assert tier.discard(keys_of(blocks)) == 20
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    tier.check()


# -- ways in -----------------------------------------------------------------------------------------------
def test_by_tls_with_a_certificate_of_our_own(tmp_path: Path) -> None:
    ca = trustme.CA()
    certificate = ca.issue_cert("127.0.0.1", "localhost")
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    files = ("--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "ca.pem")
    blocks = blocks_of(20, block_bytes=2**20)
    with RedisServer(tmp_path, *files, "--tls-auth-clients", "no", tls=True) as server:
        with opened(server.url, block_bytes=2**20, ca=str(tmp_path / "ca.pem")) as tier:
            assert tier.store(blocks) == 20
            assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]
        with opened(server.url) as stranger, pytest.raises(TierUnavailable, match="certificate"):
            stranger.find(keys_of(blocks))


def test_as_a_user_with_no_more_rights_than_needed(server: RedisServer) -> None:
    rights = ("~kvprefetch:*", "+@read", "+@write", "+@connection", "-@dangerous")
    server.client().execute_command("ACL", "SETUSER", "kv", "reset", "on", ">secret", *rights)
    blocks = blocks_of(3)
    with opened(server.url.replace("//", "//kv:secret@")) as tier:
        assert tier.store(blocks) == 3
        assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]
        assert tier.usage().by_tenant == {"ann": 3 * BLOCK_BYTES}
        assert tier.discard(keys_of(blocks)) == 3
    with opened(server.url.replace("//", "//kv:wrong@")) as stranger, pytest.raises(TierUnavailable) as raised:
        stranger.find(keys_of(blocks))
    assert "wrong@" not in str(raised.value)
    with opened(server.url.replace("//", "//kv:secret@"), prefix="other") as astray, pytest.raises(TierUnavailable):
        astray.find(keys_of(blocks))


def test_by_a_unix_socket(tmp_path: Path) -> None:
    blocks = blocks_of(3)
    with RedisServer(tmp_path, "--unixsocket", "socket"), opened(f"unix://{tmp_path}/socket") as tier:
        assert tier.store(blocks) == 3
        assert loaded(tier, keys_of(blocks)) == [bytes(block.data) for block in blocks]


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://localhost:port"])
def test_a_url_that_is_none_is_a_mistake_in_the_settings(url: str) -> None:
    with pytest.raises(SettingsError, match=r"redis\.url"):
        RedisTier(RedisSettings(url=url), "namespace", BLOCK_BYTES)


def test_closing_twice_is_closing_once(server: RedisServer) -> None:
    tier = RedisTier(RedisSettings(url=server.url), "closed", BLOCK_BYTES)
    tier.close()
    tier.close()
    with pytest.raises(TierUnavailable, match="closed"):
        tier.find([bytes(32)])
