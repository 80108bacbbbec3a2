"""A port's certificate, and whose certificates it asks for. What is wrong with the files raises SettingsError."""

import ssl

import grpc

from kvprefetch.client.channel import read_pem
from kvprefetch.errors import SettingsError
from kvprefetch.settings import Settings


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """For the ports; None: they speak in the clear. Clients must show a certificate if there is a client CA."""
    service = settings.service
    certificate, key, client_ca = service.tls_certificate, service.tls_key, service.tls_client_ca
    if bool(certificate) != bool(key):
        raise SettingsError("service.tls_certificate and service.tls_key go together")
    if client_ca and not certificate:
        raise SettingsError("service.tls_client_ca needs a service.tls_certificate")
    named = next((each.name for each in settings.credentials if each.certificate), None)
    if named and not client_ca:
        raise SettingsError(f"credentials: {named!r} has a certificate: name its authority in service.tls_client_ca")
    if not certificate:
        return None
    _verify(certificate, key, client_ca)
    pair = (read_pem(key, "service.tls_key"), read_pem(certificate, "service.tls_certificate"))
    authority = read_pem(client_ca, "service.tls_client_ca") if client_ca else None
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


def _verify(certificate: str, key: str, client_ca: str) -> None:
    """gRPC would fail later, and say less."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise SettingsError(f"service.tls_certificate {certificate} with service.tls_key {key}: {error}") from error
    if client_ca:
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise SettingsError(f"service.tls_client_ca {client_ca}: {error}") from error
