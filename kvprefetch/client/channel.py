"""Where a service is, and a channel to it that brings its own credential.

Promises
- An address is `unix:///path`, `host:port`, `tls://host:port` (certificates of the system's authorities) or
  `insecure://host:port`. A `host:port` with a `ca` or a `certificate` is TLS.
- A token is never sent in the clear to another machine, unless the address says `insecure://`.
- Opening blocks on nothing and never fails for want of a service: channels connect, and connect again, by themselves.
  What cannot be an address, or a file that cannot be read, raises SettingsError.
"""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from kvprefetch.errors import SettingsError
from kvprefetch.settings import runtime_dir

UNIX_PATH_BYTES = 107
"""What the kernel allows for the path of a socket."""
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),  # a machine or process that stopped is found out
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # on streams where nothing happens, too
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),  # the service says what is too long
    ("grpc.max_receive_message_length", 64 * 2**20),
)


@dataclass(frozen=True)
class Endpoint:
    """Where to connect, and how."""

    target: str  # in gRPC's own words
    credentials: grpc.ChannelCredentials | None  # None: in the clear
    options: tuple[tuple[str, Any], ...]
    metadata: tuple[tuple[str, str], ...] = field(repr=False)  # goes with every call


def default_address() -> str:
    """Where a service listens and a client looks if nobody says otherwise."""
    return f"unix://{runtime_dir() / 'service.sock'}"


def open_channel(
    address: str | None = None, token: str = "", *, ca: str = "", certificate: str = "", key: str = ""
) -> grpc.Channel:
    """A channel for threads. `ca`, `certificate` and `key` are PEM files; the last two are the client's own.

    Every call made on it brings the token. Close it when done. Raises SettingsError.
    """
    end = endpoint(address, token, ca=ca, certificate=certificate, key=key)
    if end.credentials is None:
        channel = grpc.insecure_channel(end.target, options=end.options)
    else:
        channel = grpc.secure_channel(end.target, end.credentials, options=end.options)
    return grpc.intercept_channel(channel, _Bearer(end.metadata)) if end.metadata else channel


def open_async_channel(end: Endpoint) -> grpc.aio.Channel:
    """A channel for the running event loop. Each call brings `end.metadata` itself."""
    if end.credentials is None:
        return grpc.aio.insecure_channel(end.target, options=end.options)
    return grpc.aio.secure_channel(end.target, end.credentials, options=end.options)


def endpoint(
    address: str | None = None, token: str = "", *, ca: str = "", certificate: str = "", key: str = ""
) -> Endpoint:
    """What `open_channel` connects to. Raises SettingsError."""
    address = address or default_address()
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    if token and not (token.isascii() and token.isprintable()):
        raise SettingsError("a token is printable ASCII")
    if address.startswith("unix:"):
        return Endpoint(f"unix:{socket_path(address)}", None, _OPTIONS, metadata)
    scheme, _, rest = address.rpartition("://")
    host, port = host_and_port(rest, address)
    if scheme not in ("", "tls", "insecure"):
        raise SettingsError(f"address {address!r}: write unix:///path, host:port or tls://host:port")
    local = is_loopback(host)
    options = (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if local else _OPTIONS
    target = f"dns:///{rest}"
    if scheme == "tls" or (scheme == "" and (ca or certificate)):
        return Endpoint(target, _tls(ca, certificate, key), options, metadata)
    if token and not local and scheme != "insecure":
        raise SettingsError(
            f"address {address!r}: a token would be sent in the clear; give a ca (PEM file) or write tls://{host}:{port}"
        )
    return Endpoint(target, None, options, metadata)


def socket_path(address: str) -> Path:
    """The absolute path in `unix:///path`. Raises SettingsError."""
    path = address.removeprefix("unix:").removeprefix("//")
    if not path.startswith("/"):
        raise SettingsError(f"address {address!r}: a socket's path is absolute, as in unix:///run/kvprefetch.sock")
    if len(path.encode()) > UNIX_PATH_BYTES:
        raise SettingsError(f"address {address!r}: the system allows {UNIX_PATH_BYTES} bytes for a socket's path")
    return Path(path)


def host_and_port(text: str, address: str) -> tuple[str, int]:
    """The parts of `host:port` or `[v6]:port`; `address` is named in errors. Raises SettingsError."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    odd = not bare or any(sign in bare for sign in "/@ []") or (":" in bare and bare == host)
    if odd or not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise SettingsError(f"address {address!r}: write unix:///path or host:port, as in 127.0.0.1:7070")
    return bare, int(port)


def is_loopback(host: str) -> bool:
    """Whether what is sent to `host` stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tls(ca: str, certificate: str, key: str) -> grpc.ChannelCredentials:
    if bool(certificate) != bool(key):
        raise SettingsError("a client's certificate and its key go together")
    return grpc.ssl_channel_credentials(
        read_pem(ca, "ca") if ca else None,
        read_pem(key, "key") if key else None,
        read_pem(certificate, "certificate") if certificate else None,
    )


def read_pem(path: str, what: str) -> bytes:
    """The file's bytes. Raises SettingsError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{what}: cannot read {path}: {error.strerror}") from error


@dataclass(frozen=True)
class _Details(grpc.ClientCallDetails):
    """A call's particulars, with the credential among them."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


def _with(metadata: tuple[tuple[str, str], ...], details: Any) -> _Details:
    return _Details(
        details.method,
        details.timeout,
        (*(details.metadata or ()), *metadata),
        details.credentials,
        details.wait_for_ready,
        getattr(details, "compression", None),
    )


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Puts the credential into every call."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(_with(self._metadata, client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(_with(self._metadata, client_call_details), request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(_with(self._metadata, client_call_details), request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(_with(self._metadata, client_call_details), request_iterator)
