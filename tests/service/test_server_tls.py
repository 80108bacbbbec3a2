"""TLS on a service's port: what the files must be, and whose certificate counts for what."""

from pathlib import Path

import grpc
import pytest
import trustme
from services import calling, code_of, credential, running, small, stats, with_credentials

import kvprefetch
from kvprefetch.errors import SettingsError
from kvprefetch.settings import Credential, Settings
from kvprefetch.v1 import admin_pb2, admin_pb2_grpc, cache_pb2, cache_pb2_grpc, hints_pb2, hints_pb2_grpc

ANN, OLGA = credential("ann", "tenant", "ann's"), credential("olga", "operator", "olga's")


class Certificates:
    """An authority and what it signed, in files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority = folder, trustme.CA()
        self.ca = self._write("ca", self.authority.cert_pem)
        self.server = self.signed("server", "localhost", "127.0.0.1")

    def signed(self, name: str, *names: str) -> dict[str, str]:
        leaf = self.authority.issue_cert(*names, common_name=name)
        chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        key = self._write(f"{name}-key", leaf.private_key_pem)
        path = self.folder / f"{name}.pem"
        path.write_bytes(chain)
        return {"certificate": str(path), "key": key}

    def _write(self, name: str, blob: trustme.Blob) -> str:
        blob.write_to_path(self.folder / f"{name}.pem")
        return str(self.folder / f"{name}.pem")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def with_tls(folder: Path, certificates: Certificates, *credentials: Credential, client_ca: str = "") -> Settings:
    files = {"tls_certificate": certificates.server["certificate"], "tls_key": certificates.server["key"]}
    return with_credentials(small(folder, "127.0.0.1:0", tls_client_ca=client_ca, **files), *credentials)


def test_tls_keeps_a_token_from_strangers(tmp_path: Path, certificates: Certificates) -> None:
    with running(with_tls(tmp_path, certificates, ANN)) as service:
        with calling(service.address, "ann's", ca=certificates.ca) as channel:
            assert stats(channel)
        with kvprefetch.connect(service.address, "ann's", ca=certificates.ca) as kv:
            assert kv.stats()["tenants"].keys() == {"ann"}
        with calling(service.address, "ann's") as channel:  # in the clear
            ask = admin_pb2_grpc.AdminStub(channel).Stats
            assert code_of(ask, admin_pb2.StatsRequest()) is grpc.StatusCode.UNAVAILABLE


def test_a_client_certificate_is_a_credential(tmp_path: Path, certificates: Certificates) -> None:
    known = (OLGA, Credential("w2", "worker", certificate="w2.example"), Credential("bob", certificate="robert"))
    with running(with_tls(tmp_path, certificates, *known, client_ca=certificates.ca)) as service:

        def can(name: str, *names: str, token: str = "") -> tuple[grpc.StatusCode, grpc.StatusCode]:
            """What becomes of a worker's call and of a tenant's."""
            own = certificates.signed(name, *names)
            with calling(service.address, token, ca=certificates.ca, **own) as channel:
                look_up = cache_pb2_grpc.CacheStub(channel).Lookup
                signal = hints_pb2_grpc.HintsStub(channel).Signal
                return code_of(look_up, cache_pb2.LookupRequest()), code_of(signal, hints_pb2.SignalRequest(kind="k"))

        ok, unregistered = grpc.StatusCode.OK, grpc.StatusCode.FAILED_PRECONDITION
        denied, unknown = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED
        assert can("whatever", "x.example", "w2.example") == (unregistered, ok)  # by an alternative name
        assert can("robert", "r.example") == (denied, ok)  # by its common name
        assert can("mallory", "m.example") == (unknown, unknown)
        assert can("robert", "r.example", token="olga's") == (denied, ok)  # a token goes before the certificate
        assert can("robert", "r.example", token="forged") == (unknown, unknown)
        with calling(service.address, "olga's", ca=certificates.ca) as channel:  # no certificate at all
            ask = admin_pb2_grpc.AdminStub(channel).Stats
            assert code_of(ask, admin_pb2.StatsRequest()) is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_of_another_authority_gets_nobody_in(tmp_path: Path, certificates: Certificates) -> None:
    (tmp_path / "other").mkdir()
    forged = Certificates(tmp_path / "other").signed("w2", "w2.example")
    known = Credential("w2", "worker", certificate="w2.example")
    with (
        running(with_tls(tmp_path, certificates, known, client_ca=certificates.ca)) as service,
        calling(service.address, ca=certificates.ca, **forged) as channel,
    ):
        ask = admin_pb2_grpc.AdminStub(channel).Stats
        assert code_of(ask, admin_pb2.StatsRequest()) is grpc.StatusCode.UNAVAILABLE


def test_tls_files_that_do_not_fit_are_named(tmp_path: Path, certificates: Certificates) -> None:
    good = certificates.server
    other = certificates.signed("other", "other.example")
    missing = str(tmp_path / "no.pem")
    for wrong, named in (
        ({"tls_certificate": good["certificate"]}, "go together"),
        ({"tls_client_ca": certificates.ca}, "needs a service.tls_certificate"),
        ({"tls_certificate": good["certificate"], "tls_key": other["key"]}, "tls_certificate .* with service.tls_key"),
        ({"tls_certificate": missing, "tls_key": good["key"]}, r"no\.pem"),
        ({"tls_certificate": good["certificate"], "tls_key": good["key"], "tls_client_ca": missing}, "tls_client_ca"),
    ):
        with pytest.raises(SettingsError, match=named):
            running(with_credentials(small(tmp_path, "127.0.0.1:0", **wrong), ANN)).__enter__()
    unasked = with_tls(tmp_path, certificates, Credential("w2", certificate="w2.example"))
    with pytest.raises(SettingsError, match=r"'w2' has a certificate: name its authority"):
        running(unasked).__enter__()
