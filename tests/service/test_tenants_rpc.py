"""Admin.Tenants and Admin.SetTenants of a running service, what its workers are told, and what becomes of blocks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from nodes import eventually, node_settings, run, served, settled
from processes import until
from services import Service, TestWorker, calling, credential, running, small, stats, with_credentials

import kvprefetch
from kvprefetch.cache.shares import Share
from kvprefetch.errors import InvalidRequest, PermissionDenied, ServiceError
from kvprefetch.service.tenants import Said
from kvprefetch.settings import Settings, TenantSettings
from kvprefetch.v1 import admin_pb2 as pb
from kvprefetch.v1 import admin_pb2_grpc

KNOWN = (
    credential("ann", "tenant", "ann's"),
    credential("w1", "worker", "w1's"),
    credential("olga", "operator", "o's"),
)


def settings(folder: Path) -> Settings:
    known = with_credentials(small(folder), *KNOWN)
    return replace(known, tenants=(TenantSettings("ann", 2.0, 0.25),))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(settings(tmp_path)) as it:
        yield it


def named(worker: TestWorker) -> dict[str, tuple[float, float]]:
    """What the worker was told last."""
    told = worker.of("shares")
    return {each.name: (each.weight, each.guarantee) for each in told[-1].tenants} if told else {}


def test_an_operator_changes_what_a_tenant_may_count_on_and_sees_it(service: Service) -> None:
    with kvprefetch.connect(service.address, "o's") as kv:
        (changed,) = kv.set_tenants({"bob": (3.0, 0.5)})
        assert (changed["name"], changed["weight"], changed["guarantee"], changed["changed"]) == ("bob", 3.0, 0.5, True)
        found = {each["name"]: each for each in kv.tenants()}
        assert list(found) == ["ann", "bob", "default"]
        assert (found["ann"]["weight"], found["ann"]["guarantee"], found["ann"]["changed"]) == (2.0, 0.25, False)
        assert (found["default"]["weight"], found["default"]["guarantee"]) == (1.0, 0.0)
        (reset,) = kv.set_tenants({}, ["bob"])
        assert (reset["weight"], reset["guarantee"], reset["changed"]) == (1.0, 0.0, False)
        assert [each["name"] for each in kv.tenants()] == ["ann", "default"]


def test_nobody_else_may(service: Service) -> None:
    for token in ("ann's", "w1's"):
        with kvprefetch.connect(service.address, token) as kv:
            with pytest.raises(PermissionDenied):
                kv.set_tenants({"ann": (None, 0.9)})
            with pytest.raises(PermissionDenied):
                kv.tenants()


def test_workers_are_told_when_they_register_and_when_it_changes(service: Service) -> None:
    with calling(service.address, "w1's") as channel, kvprefetch.connect(service.address, "o's") as kv:
        early = TestWorker(channel)
        early.wait_for("shares")
        assert named(early) == {"ann": (2.0, 0.25)}
        kv.set_tenants({"bob": (None, 0.5)})
        until(lambda: named(early) == {"ann": (2.0, 0.25), "bob": (1.0, 0.5)}, "the worker is not told", 20)
        late = TestWorker(channel)
        late.wait_for("shares")
        assert named(late) == named(early)
        for worker in (early, late):
            worker.leave()


BAD: list[tuple[dict[str, tuple[float | None, float | None]], str]] = [
    ({"bob": (0.0, None)}, "a weight is a finite number above 0"),
    ({"bob": (-1.0, None)}, "a weight is"),
    ({"bob": (float("nan"), None)}, "a weight is"),
    ({"bob": (float("inf"), None)}, "a weight is"),
    ({"bob": (None, -0.1)}, "a guarantee is a fraction"),
    ({"bob": (None, 1.01)}, "a guarantee is"),
    ({"bob": (None, 0.9)}, "add up to 115.0% of a pool"),
    ({"bob": (None, 0.0001)}, "less than one of"),
    ({"": (1.0, None)}, "a tenant's name"),
    ({"b" * 64: (1.0, None)}, "a tenant's name"),
    ({"b\tb": (1.0, None)}, "a tenant's name"),
    ({"b\udcff": (1.0, None)}, "is UTF-8"),
]


def test_what_is_refused_changes_nothing_for_anybody(service: Service) -> None:
    with calling(service.address, "w1's") as channel, kvprefetch.connect(service.address, "o's") as kv:
        worker = TestWorker(channel)  # its arena is open
        worker.wait_for("shares")
        before = kv.tenants()
        for bad, why in BAD:
            with pytest.raises(InvalidRequest, match=why):
                kv.set_tenants({"eve": (5.0, None), **bad})
        with pytest.raises(InvalidRequest, match="once"):
            kv.set_tenants({"eve": (5.0, None)}, ["eve"])
        assert kv.tenants() == before
        kv.set_tenants({"eve": (5.0, None)})
        until(lambda: "eve" in named(worker), "the worker is not told", 20)
        assert len(worker.of("shares")) == 2
        worker.leave()


def test_a_name_twice_and_a_message_that_is_too_long_are_refused(service: Service) -> None:
    with calling(service.address, "o's") as channel:
        admin = admin_pb2_grpc.AdminStub(channel)
        twice = [pb.TenantShare(name="bob", weight=weight) for weight in (1.0, 2.0)]
        endless = [pb.TenantShare(name=f"{n:063}") for n in range(300_000)]
        for wanted, code in ((twice, "INVALID_ARGUMENT"), (endless, "RESOURCE_EXHAUSTED")):
            with pytest.raises(grpc.RpcError) as told:
                admin.SetTenants(pb.SetTenantsRequest(set=wanted), timeout=30)
            assert told.value.code().name == code
        assert [each.name for each in admin.Tenants(pb.TenantsRequest(), timeout=20).tenants] == ["ann", "default"]


def test_a_restart_keeps_it(tmp_path: Path) -> None:
    with running(settings(tmp_path)) as service, kvprefetch.connect(service.address, "o's") as kv:
        kv.set_tenants({"ann": (None, 0.75), "bob": (4.0, None)})
        before = kv.tenants()
    with running(settings(tmp_path)) as service, kvprefetch.connect(service.address, "o's") as kv:
        assert kv.tenants() == before
        with calling(service.address, "w1's") as channel:
            worker = TestWorker(channel)
            worker.wait_for("shares")
            assert named(worker) == {"ann": (2.0, 0.75), "bob": (4.0, 0.0)}
            worker.leave()


def test_where_it_cannot_be_kept_the_operator_is_told_why(tmp_path: Path) -> None:
    with running(settings(tmp_path)) as service, kvprefetch.connect(service.address, "o's") as kv:
        (tmp_path / "tenants.json").mkdir()
        with pytest.raises(ServiceError, match=r"cannot be written .* nothing was changed"):
            kv.set_tenants({"bob": (4.0, None)})
        assert [each["name"] for each in kv.tenants()] == ["ann", "default"]


def test_a_hundred_thousand_tenants_are_named_told_and_forgotten(service: Service) -> None:
    names = [f"tenant {n:06}" for n in range(100_000)]
    with calling(service.address, "w1's") as channel, kvprefetch.connect(service.address, "o's") as kv:
        worker = TestWorker(channel)
        for at in range(0, len(names), 20_000):
            kv.set_tenants(dict.fromkeys(names[at : at + 20_000], (2.0, None)))
            assert stats(channel)
        assert len(kv.tenants()) == len(names) + 2
        until(lambda: len(named(worker)) == len(names) + 1, "the worker is not told of all", 30)
        kv.set_tenants({}, names)
        until(lambda: named(worker) == {"ann": (2.0, 0.25)}, "the worker is not told", 30)
        worker.leave()


# -- blocks ------------------------------------------------------------------------------------------------
def test_a_tenant_that_is_reset_while_it_has_blocks_pays_for_them_until_they_go(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            worker, tenants = await stage.worker(), stage.node.tenants
            await tenants.change({"ann": Said(guarantee=0.5)})
            assert await worker.keep("abcd") == 4
            await tenants.change({}, ["ann"])
            assert tenants.shares.of("ann") == Share()
            pool = stage.shelf.host.pool
            assert pool.charges()["ann"]["used"] == 4
            assert stage.node.stats()["namespaces"][stage.shelf.namespace]["charges"] == {"ann": {"used": 4}}
            await stage.node.check()
            pool.clear()
            assert pool.charges() == {}

    run(story())


def test_a_lower_guarantee_evicts_nothing_at_once_and_gives_way_to_who_needs_room(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path, slots=8, disk_slots=8), tmp_path / "s") as stage:
            worker, pool = await stage.worker(), stage.shelf.host.pool
            tenants, pages = stage.node.tenants, stage.shelf.host.pool.pages
            disk = stage.shelf.behind.lanes[0].tier.pool

            async def bob_keeps(path: str) -> int:
                reserved = await worker.reserve(path, tenant="bob")
                if not reserved.reservation:
                    return 0
                return await worker.commit(reserved.reservation, worker.write(path, reserved.slots))

            def has(tenant: str) -> float:
                return pool.charges().get(tenant, {}).get("used", 0)

            await tenants.change({"ann": Said(guarantee=1.0)})
            assert pool.shares is tenants.shares
            await eventually(lambda: disk.shares is tenants.shares)
            assert await worker.keep("abcdefgh"[:pages]) == pages
            await settled(stage)
            assert len(disk.resident) == pages
            assert await bob_keeps("xyz") == 0
            await tenants.change({"ann": Said(guarantee=0.5)})
            assert has("ann") == pages
            assert await bob_keeps("xyz") == 3
            assert (has("ann"), has("bob")) == (pages - 3, 3)

    run(story())


def test_an_arena_that_is_opened_later_goes_by_the_same_shares(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            await stage.node.tenants.change({"ann": Said(guarantee=0.01)})  # no arena is open: who knows its size
            await stage.worker()
            assert stage.shelf.host.pool.shares is stage.node.tenants.shares
            assert "less than one of" in caplog.text

    run(story())
