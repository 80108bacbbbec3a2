"""Who may call what: the table against the protos, and every RPC by every role against a running service."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from services import Service, calling, credential, running, small, with_credentials

from kvprefetch.errors import PermissionDenied, SettingsError, Unauthenticated
from kvprefetch.service.auth import ALL, NOBODY, OPEN, WHO, Gate, Role
from kvprefetch.settings import Credential
from kvprefetch.v1 import admin_pb2, cache_pb2, hints_pb2, workers_pb2

TOKENS = {Role.TENANT: "ann's token", Role.WORKER: "w1's token", Role.OPERATOR: "olga's token"}
KNOWN = (
    credential("ann", "tenant", TOKENS[Role.TENANT]),
    credential("w1", "worker", TOKENS[Role.WORKER]),
    credential("olga", "operator", TOKENS[Role.OPERATOR]),
)
FILES = (cache_pb2, hints_pb2, workers_pb2, admin_pb2, health_pb2, reflection_pb2)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


# -- the table ---------------------------------------------------------------------------------------------
def test_every_method_is_in_the_table_and_nothing_else_is() -> None:
    assert set(WHO) == set(METHODS)


def test_only_health_is_open_to_strangers() -> None:
    assert {method for method, roles in WHO.items() if roles is OPEN} == {
        method for method in METHODS if method.startswith("/grpc.health.v1.")
    }


def test_tenants_reach_no_blocks_and_only_operators_end_a_service() -> None:
    for method, roles in WHO.items():
        if method.startswith(("/kvprefetch.v1.Cache/", "/kvprefetch.v1.Workers/")):
            assert Role.TENANT not in roles
    for name in ("Drain", "Tenants", "SetTenants"):
        assert WHO[f"/kvprefetch.v1.Admin/{name}"] == {Role.OPERATOR}


# -- the gate ----------------------------------------------------------------------------------------------
def test_a_tenants_name_is_that_of_its_credential_and_others_speak_for_the_settings_tenant() -> None:
    gate = Gate(KNOWN, "house")
    told = {role: gate.admit("/kvprefetch.v1.Hints/Signal", f"Bearer {token}", ()) for role, token in TOKENS.items()}
    assert (told[Role.TENANT].name, told[Role.TENANT].tenant, told[Role.TENANT].sees_all) == ("ann", "ann", False)
    assert (told[Role.WORKER].name, told[Role.WORKER].tenant, told[Role.WORKER].sees_all) == ("w1", "house", True)
    assert (told[Role.OPERATOR].tenant, told[Role.OPERATOR].sees_all) == ("house", True)


def test_a_method_outside_the_table_is_for_nobody() -> None:
    for gate in (Gate(KNOWN, "house"), Gate((), "house")):
        with pytest.raises(PermissionDenied):
            gate.admit("/kvprefetch.v1.Cache/Format", f"Bearer {TOKENS[Role.OPERATOR]}", ())


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Basic YQ==", "Bearer wrong", f"Bearer {KNOWN[0].token_sha256}"]
)
def test_what_is_no_known_token_is_refused_without_saying_more(authorization: str | None) -> None:
    with pytest.raises(Unauthenticated) as told:
        Gate(KNOWN, "house").admit("/kvprefetch.v1.Hints/Signal", authorization, ())
    assert "wrong" not in str(told.value)
    assert KNOWN[0].token_sha256 not in str(told.value)


def test_a_certificate_counts_by_any_of_its_names_unless_a_token_is_shown() -> None:
    gate = Gate((*KNOWN, Credential("w2", "worker", certificate="w2.example")), "house")
    assert gate.admit("/kvprefetch.v1.Cache/Lookup", None, ["other", "w2.example"]).name == "w2"
    with pytest.raises(Unauthenticated, match="'other' is in no credential"):
        gate.admit("/kvprefetch.v1.Cache/Lookup", None, ["other"])
    for shown in ("Bearer wrong", ""):
        with pytest.raises(Unauthenticated):
            gate.admit("/kvprefetch.v1.Cache/Lookup", shown, ["w2.example"])


def test_credentials_that_cannot_be_told_apart_are_refused() -> None:
    same = sha256(b"same").hexdigest()
    with pytest.raises(SettingsError, match="'ann' and 'bob' have the same token_sha256"):
        Gate((Credential("ann", token_sha256=same), Credential("bob", token_sha256=same)), "house")
    with pytest.raises(SettingsError, match="the same certificate"):
        Gate((Credential("ann", certificate="a"), Credential("w", "worker", certificate="a")), "house")


def test_without_credentials_whoever_comes_is_everybody_but_health_asks_nobody() -> None:
    gate = Gate((), "house")
    everybody = gate.admit("/kvprefetch.v1.Cache/Lookup", None, ())
    assert (everybody.roles, everybody.tenant) == (ALL, "house")
    assert gate.admit("/grpc.health.v1.Health/Check", None, ()) is NOBODY


# -- every RPC by every role -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running(with_credentials(small(folder), *KNOWN)) as it:
        yield it


def status(channel: grpc.Channel, method: str) -> tuple[grpc.StatusCode, str]:
    """Of a call with nothing in it. A stream that goes on is fine, and hung up on."""
    about = METHODS[method]
    try:
        if about.client_streaming:
            stream = channel.stream_stream(method)(iter([b""]), timeout=20)
            next(stream, None)
            stream.cancel()
        elif about.server_streaming:
            stream = channel.unary_stream(method)(b"", timeout=20)
            next(stream, None)
            stream.cancel()
        else:
            channel.unary_unary(method)(b"", timeout=20)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


REFUSALS = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)
CALLERS = {**TOKENS, "stranger": "", "forger": "forged"}
ENDS_IT = "/kvprefetch.v1.Admin/Drain"


@pytest.mark.parametrize("who", CALLERS)
def test_each_rpc_is_for_its_roles_alone(service: Service, who: str) -> None:
    token = CALLERS[who]
    with calling(service.address, token) as channel:
        for method, roles in WHO.items():
            if method == ENDS_IT and who == Role.OPERATOR:
                continue  # see test_server
            code, details = status(channel, method)
            if roles is OPEN or who in roles:
                assert code not in (*REFUSALS, *FAULTS), (method, code, details)
            elif who in TOKENS:
                assert code is grpc.StatusCode.PERMISSION_DENIED, (method, code)
                assert method[1:] in details
            else:
                assert code is grpc.StatusCode.UNAUTHENTICATED, (method, code)
            assert "token" not in details or not token or token not in details


def test_a_method_that_does_not_exist_is_unimplemented(service: Service) -> None:
    with calling(service.address) as channel, pytest.raises(grpc.RpcError) as told:
        channel.unary_unary("/kvprefetch.v1.Cache/Format")(b"", timeout=20)
    assert told.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_tokens_are_in_no_log(service: Service, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("DEBUG", "kvprefetch")
    for token in (*TOKENS.values(), "forged"):
        with calling(service.address, token) as channel:
            status(channel, "/kvprefetch.v1.Hints/Signal")
            status(channel, "/kvprefetch.v1.Workers/Work")
    assert not any(token in caplog.text for token in (*TOKENS.values(), "forged"))
