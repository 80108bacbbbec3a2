"""The server's shell: where it listens, who may find it there, what it refuses, how it ends."""

import asyncio
import json
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from processes import until
from services import BLOCK_BYTES, TestWorker, calling, code_of, credential, running, small, stats, with_credentials

from kvprefetch.errors import ServiceError, SettingsError
from kvprefetch.v1 import admin_pb2, admin_pb2_grpc, cache_pb2, cache_pb2_grpc, hints_pb2, hints_pb2_grpc

ANN, OLGA = credential("ann", "tenant", "ann's"), credential("olga", "operator", "olga's")
W1 = credential("w1", "worker", "w1's")


# -- sockets -----------------------------------------------------------------------------------------------
def test_a_socket_and_its_new_folder_are_their_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s.sock"
    with running(small(tmp_path, f"unix://{path}")) as service:
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with calling(service.address) as channel:
            assert stats(channel)
    assert not path.exists()


def test_two_services_on_one_socket_are_one_too_many(tmp_path: Path) -> None:
    with running(small(tmp_path)) as service, calling(service.address) as channel:
        with pytest.raises(ServiceError, match=r"another service listens on unix://.*give --listen another"):
            running(small(tmp_path)).__enter__()
        assert stats(channel)  # the first is unharmed


def test_a_dead_services_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s.sock"))
    assert (tmp_path / "s.sock").exists()
    with running(small(tmp_path)) as service, calling(service.address) as channel:
        assert stats(channel)


def test_somebody_elses_socket_or_file_is_left_alone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s.sock"))
        other.listen()
        with pytest.raises(ServiceError, match="another server listens"):
            running(small(tmp_path)).__enter__()
        assert (tmp_path / "s.sock").exists()
    (tmp_path / "s.sock").unlink()
    (tmp_path / "s.sock").write_text("a diary")
    with pytest.raises(ServiceError, match="no socket"):
        running(small(tmp_path)).__enter__()
    assert (tmp_path / "s.sock").read_text() == "a diary"


def test_a_path_that_the_system_does_not_take_is_refused(tmp_path: Path) -> None:
    for bad in (f"unix://{tmp_path}/{'x' * 108}", "unix://relative.sock", "unix:"):
        with pytest.raises(SettingsError, match="address"):
            running(small(tmp_path, bad)).__enter__()


# -- ports -------------------------------------------------------------------------------------------------
def test_a_port_in_use_is_one_line_and_nothing_stays_open(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = small(tmp_path, f"unix://{tmp_path}/s.sock", f"127.0.0.1:{port}", insecure_local=True)
        with pytest.raises(ServiceError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            running(settings).__enter__()
    with running(settings) as service:  # the socket too was given back
        assert service.addresses == [f"unix://{tmp_path}/s.sock", f"127.0.0.1:{port}"]


def test_two_services_never_share_a_port(tmp_path: Path) -> None:
    with (
        running(small(tmp_path, "127.0.0.1:0", insecure_local=True)) as service,
        pytest.raises(ServiceError, match="Address already in use"),
    ):
        running(small(tmp_path, service.address, insecure_local=True)).__enter__()


@pytest.mark.parametrize(
    ("listen", "insecure_local", "advice"),
    [
        ("0.0.0.0:0", False, r"add \[\[credentials\]\]"),
        ("0.0.0.0:0", True, r"add \[\[credentials\]\]"),
        ("[::]:0", True, r"add \[\[credentials\]\]"),
        ("127.0.0.1:0", False, "--insecure-local"),
        ("localhost:0", False, "--insecure-local"),
    ],
)
def test_a_port_without_credentials_is_for_loopback_and_on_request(
    tmp_path: Path, listen: str, insecure_local: bool, advice: str
) -> None:
    with pytest.raises(SettingsError, match=advice):
        running(small(tmp_path, listen, insecure_local=insecure_local)).__enter__()


@pytest.mark.parametrize("listen", ["127.0.0.1", "a:x", "127.0.0.1:70000", ":80", "::1:80", "tcp://a:1", "a b:1"])
def test_what_is_no_address_is_named(tmp_path: Path, listen: str) -> None:
    with pytest.raises(SettingsError, match=r"service\.listen: address"):
        running(small(tmp_path, listen)).__enter__()


def test_the_same_place_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="twice"):
        running(small(tmp_path, "unix:///a.sock", "unix:/a.sock")).__enter__()


def test_a_port_with_credentials_serves_who_has_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(with_credentials(small(tmp_path, "0.0.0.0:0"), ANN)) as service:
        assert "speaks in the clear" in caplog.text
        port = service.address.rpartition(":")[2]
        with calling(f"127.0.0.1:{port}", "ann's") as channel:
            assert stats(channel)
        with calling(f"127.0.0.1:{port}") as channel:
            ask = admin_pb2_grpc.AdminStub(channel).Stats
            assert code_of(ask, admin_pb2.StatsRequest()) is grpc.StatusCode.UNAUTHENTICATED


# -- what it tells and refuses -----------------------------------------------------------------------------
def test_health_and_reflection(tmp_path: Path) -> None:
    with running(with_credentials(small(tmp_path), ANN)) as service:
        with calling(service.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            for name in ("", "kvprefetch.v1.Cache", "kvprefetch.v1.Hints"):
                reply = check(health_pb2.HealthCheckRequest(service=name), timeout=20)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with calling(service.address, "ann's") as channel:
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            reply = next(iter(reflect(iter([request]), timeout=20)))
            names = {each.name for each in reply.list_services_response.service}
            assert {f"kvprefetch.v1.{each}" for each in ("Cache", "Hints", "Workers", "Admin")} < names


def test_a_message_that_is_too_long_is_refused_and_the_connection_goes_on(tmp_path: Path) -> None:
    with running(small(tmp_path, max_message_bytes=100_000)) as service, calling(service.address) as channel:
        signal = hints_pb2_grpc.HintsStub(channel).Signal
        long = hints_pb2.SignalRequest(kind="k", attributes=b"x" * 200_000)
        assert code_of(signal, long) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code_of(signal, hints_pb2.SignalRequest(kind="k")) is grpc.StatusCode.OK


def test_a_message_that_is_garbage_harms_nobody(tmp_path: Path) -> None:
    with running(small(tmp_path)) as service, calling(service.address) as channel:
        for method in ("/kvprefetch.v1.Hints/Signal", "/kvprefetch.v1.Cache/Lookup", "/kvprefetch.v1.Admin/Stats"):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(method)(b"\xff\xff\xff\x01garbage", timeout=20)
        assert stats(channel)


def test_what_a_caller_is_refused_is_counted(tmp_path: Path) -> None:
    with running(with_credentials(small(tmp_path), ANN, OLGA)) as service:
        with calling(service.address, "wrong") as channel:
            code_of(hints_pb2_grpc.HintsStub(channel).Signal, hints_pb2.SignalRequest(kind="k"))
        with calling(service.address, "ann's") as channel:
            code_of(admin_pb2_grpc.AdminStub(channel).Drain, admin_pb2.DrainRequest())
            code_of(hints_pb2_grpc.HintsStub(channel).Signal, hints_pb2.SignalRequest())
        with calling(service.address, "olga's") as channel:
            refused = json.loads(stats(channel))["service"]["refused"]
    assert refused == {"UNAUTHENTICATED": 1, "PERMISSION_DENIED": 1, "INVALID_ARGUMENT": 1}


# -- figures -----------------------------------------------------------------------------------------------
def test_a_tenant_sees_its_own_figures_and_an_operator_all(tmp_path: Path) -> None:
    bob = credential("bob", "tenant", "bob's")
    with running(with_credentials(small(tmp_path), ANN, bob, OLGA, W1)) as service:
        for token in ("ann's", "bob's", "bob's"):
            with calling(service.address, token) as channel:
                hints_pb2_grpc.HintsStub(channel).Signal(hints_pb2.SignalRequest(kind="read"), timeout=20)
        with calling(service.address, "w1's") as worker_channel, calling(service.address, "olga's") as channel:
            worker = TestWorker(worker_channel)
            stub = cache_pb2_grpc.CacheStub(worker_channel)
            reserved = stub.Reserve(
                cache_pb2.ReserveRequest(instance=worker.instance, tenant="ann", keys=b"k" * 32), timeout=20
            )
            stub.Commit(
                cache_pb2.CommitRequest(instance=worker.instance, reservation=reserved.reservation, checksums=bytes(8))
            )
            every = json.loads(stats(channel))
            assert set(every["tenants"]) == {"ann", "bob"}
            assert every["tenants"]["bob"]["signals"]["kinds"] == {"read": 2}
            assert every["service"]["workers"][0]["name"].startswith("m@")
            admin = admin_pb2_grpc.AdminStub(channel)
            admin.Stats(admin_pb2.StatsRequest(check=True), timeout=20)
            tenants = {each.name: each for each in admin.Tenants(admin_pb2.TenantsRequest(), timeout=20).tenants}
            assert set(tenants) == {"ann", "bob", "default"}
            assert (tenants["ann"].host_bytes, tenants["bob"].host_bytes) == (BLOCK_BYTES, 0)
            with calling(service.address, "ann's") as anns:
                own = json.loads(stats(anns))
                ask = admin_pb2_grpc.AdminStub(anns).Stats
                assert code_of(ask, admin_pb2.StatsRequest(check=True)) is grpc.StatusCode.PERMISSION_DENIED
            assert set(own) == {"tenants"}
            assert set(own["tenants"]) == {"ann"}
            assert own["tenants"]["ann"]["bytes"] == {"host": BLOCK_BYTES, "disk": 0, "redis": 0}
            worker.leave()


# -- the end -----------------------------------------------------------------------------------------------
def test_draining_lets_what_is_in_flight_finish_and_refuses_what_is_new(tmp_path: Path) -> None:
    with (
        running(with_credentials(small(tmp_path, drain_s=20.0), OLGA, W1)) as service,
        calling(service.address, "w1's") as channel,
        calling(service.address, "olga's") as operator,
    ):
        worker = TestWorker(channel)
        in_the_way = threading.Event()

        async def wait_for_it() -> dict[str, dict[str, int]]:
            while not in_the_way.is_set():
                await asyncio.sleep(0.01)
            return {}

        service.server.core.node.bytes_by_tenant = wait_for_it  # type: ignore[union-attr, method-assign]
        slow = admin_pb2_grpc.AdminStub(operator).Tenants.future(admin_pb2.TenantsRequest(), timeout=20)
        until(lambda: service.server.calls.in_flight == 1, "it does not begin", 20)  # type: ignore[union-attr]
        reply = admin_pb2_grpc.AdminStub(operator).Drain(admin_pb2.DrainRequest(), timeout=20)
        assert reply.in_flight == 1
        assert worker.wait_for("draining")
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        look_up = cache_pb2_grpc.CacheStub(channel).Lookup
        with pytest.raises(grpc.RpcError, match="draining"):
            look_up(cache_pb2.LookupRequest(instance=worker.instance, keys=b"k" * 32), timeout=20)
        assert json.loads(stats(operator))["service"]["draining"] is True
        assert not slow.done()
        in_the_way.set()
        assert [each.name for each in slow.result().tenants] == ["default"]
        service.stop()
    assert not (tmp_path / "s.sock").exists()


async def never() -> dict[str, dict[str, int]]:
    await asyncio.sleep(1_000)
    return {}


@pytest.mark.parametrize(("drain_s", "asked"), [(0.2, "once"), (1_000.0, "twice")])
def test_draining_does_not_wait_for_ever(tmp_path: Path, drain_s: float, asked: str) -> None:
    with running(small(tmp_path, drain_s=drain_s)) as service, calling(service.address) as channel:
        service.server.core.node.bytes_by_tenant = never  # type: ignore[union-attr, method-assign]
        slow = admin_pb2_grpc.AdminStub(channel).Tenants.future(admin_pb2.TenantsRequest(), timeout=60)
        until(lambda: service.server.calls.in_flight == 1, "it does not begin", 20)  # type: ignore[union-attr]
        began = time.monotonic()
        service.stop() if asked == "once" else service.stop_now()
        assert time.monotonic() - began < 20
        assert slow.exception().code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
