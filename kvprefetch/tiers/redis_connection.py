"""Connections to Redis or Valkey, as the settings' URL says: plain, TLS, Unix socket; one server or a Cluster.

redis-py speaks the protocol and hiredis parses it. Added here are time and a short cut:
- A socket's every send and receive ends by a limit that the operation under way sets for all of them together, where
  redis-py would wait anew for every piece.
- A block goes from the socket to where it belongs, with the interpreter lock released; by way of hiredis it is copied
  three times more, which takes a third of the reader's time. Whatever else comes is left to hiredis.

Connecting (name look-up, TLS, log-in, a Cluster's map of slots) takes `CONNECT_S` at most, but for the name
look-up; who cannot wait that long has it done by another thread (`redis_lines`).
"""

import re
import select
import socket
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

from redis import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse
from redis.retry import Retry

from kvprefetch.errors import SettingsError
from kvprefetch.settings import RedisSettings

CONNECT_S = 2.0
READ_BYTES = 2**18  # taken from the socket at once; measured from 64 KiB to 2 MiB, it makes no difference to the rate

FILLED: Final = object()
"""What `read_into` returns for a string that it has put where it belongs."""

Address = tuple[str, int]


class Limit:
    """Until when the operation under way may take. One thread at a time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.renew()

    def renew(self) -> None:
        """There was progress: as long again from now."""
        self._at = time.monotonic() + self.seconds

    @property
    def is_short(self) -> bool:
        """Whether less than half of the time is left: too little to begin more."""
        return self._at - time.monotonic() < self.seconds / 2

    def left(self) -> float:
        """Seconds left. Raises TimeoutError where there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no progress for {1_000 * self.seconds:.0f} ms")
        return left


class TimedSocket:
    """The part of a socket that redis-py uses, each call within its connection's limit."""

    def __init__(self, inner: socket.socket, connection: "_Timed") -> None:
        self._inner, self._connection = inner, connection

    def sendall(self, data: bytes | memoryview) -> None:
        """Send all of it, or raise TimeoutError when the limit is reached."""
        rest = memoryview(data)
        while rest:
            self._inner.settimeout(self._connection.limit.left())
            rest = rest[self._inner.send(rest) :]

    def recv_into(self, buffer: bytearray) -> int:
        """Receive what there is; wait for it until the limit."""
        self._inner.settimeout(self._connection.limit.left())
        return self._inner.recv_into(buffer)

    def recvmsg_into(self, buffers: Sequence[memoryview]) -> int:
        """Receive what there is into these, one after the other; wait for it until the limit."""
        self._inner.settimeout(self._connection.limit.left())
        return self._inner.recvmsg_into(buffers)[0]

    def fileno(self) -> int:
        """For polling."""
        return self._inner.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Timed:
    """What every kind of connection has besides: a limit, and a way to see whether it may be used again."""

    limit: Limit
    is_direct = True  # its socket can fill several buffers at once

    def _connect(self) -> TimedSocket:
        return TimedSocket(super()._connect(), self)  # type: ignore[misc]

    def is_quiet(self) -> bool:
        """Whether it is connected and nothing came in: neither its end nor an answer that nobody read."""
        inner = self._sock  # type: ignore[attr-defined]
        if inner is None or (hasattr(inner, "pending") and inner.pending()):
            return False
        poll = select.poll()
        poll.register(inner.fileno(), select.POLLIN)
        return not poll.poll(0)

    def read_into(self, buffers: Sequence[memoryview]) -> Any:
        """The next answer: FILLED if it is a string of as many bytes as `buffers` have, which are in them then.

        Any other answer is returned, or raised, as `read_response` does; what is in `buffers` is garbage then.
        """
        reader = self._parser._reader  # type: ignore[attr-defined]
        if not self.is_direct or reader is None or reader.has_data():
            return self.read_response()  # type: ignore[attr-defined]
        wanted = b"$%d\r\n" % sum(map(len, buffers))
        start, end = memoryview(bytearray(len(wanted))), memoryview(bytearray(2))
        all_buffers = [start, *buffers, end]
        missing, received = list(all_buffers), 0
        while missing:
            received += self._receive_some(missing)
            if bytes(start[:received]) != wanted[:received]:
                reader.feed(b"".join(all_buffers)[:received])
                return self.read_response()  # type: ignore[attr-defined]
        if bytes(end) != b"\r\n":
            raise InvalidResponse("a string does not end where it should")
        return FILLED

    def _receive_some(self, missing: list[memoryview]) -> int:
        """Receive into the first of `missing`, and take out of it what is full; how many bytes came."""
        received: int = self._sock.recvmsg_into(missing)  # type: ignore[attr-defined]
        if not received:
            raise RedisConnectionError("the server closed the connection")
        rest = received
        while missing and rest >= len(missing[0]):
            rest -= len(missing.pop(0))
        if rest:
            missing[0] = missing[0][rest:]
        return received


class PlainConnection(_Timed, Connection):
    """TCP."""


class TlsConnection(_Timed, SSLConnection):
    """TCP with TLS."""

    is_direct = False


class UnixConnection(_Timed, UnixDomainSocketConnection):
    """A Unix socket."""


class Wire(Protocol):
    """What is used of a connection: redis-py's own methods, which have no types, and `_Timed`'s."""

    limit: Limit

    def is_quiet(self) -> bool: ...
    def connect(self) -> None: ...
    def disconnect(self) -> None: ...
    def pack_commands(self, commands: Sequence[Sequence[Any]]) -> list[bytes]: ...
    def send_packed_command(self, command: list[bytes]) -> None: ...
    def send_command(self, *command: Any) -> None: ...
    def read_response(self) -> Any: ...
    def read_into(self, buffers: Sequence[memoryview]) -> Any: ...


_KINDS: dict[type, Any] = {
    Connection: PlainConnection,
    SSLConnection: TlsConnection,
    UnixDomainSocketConnection: UnixConnection,
}


class Dialer:
    """Opens what the URL means; blocks for up to `CONNECT_S`. Raises what redis-py raises. Thread-safe."""

    def __init__(self, settings: RedisSettings) -> None:
        self.url = re.sub(r"^(rediss?)\+cluster://", r"\1://", settings.url)
        self.is_cluster = self.url != settings.url
        options: dict[str, Any] = {"socket_connect_timeout": CONNECT_S, "socket_timeout": CONNECT_S}
        if settings.ca and self.url.startswith("rediss:"):
            options["ssl_ca_certs"] = settings.ca
        try:
            pool = ConnectionPool.from_url(self.url, **options)
        except ValueError as error:
            raise SettingsError(f"redis.url: {error}") from error
        # the second version of the protocol: all servers speak it, and they send nothing that nobody asked for
        self.options = {**pool.connection_kwargs, "protocol": 2, "socket_read_size": READ_BYTES}
        self.address: Address = (self.options.get("host", "localhost"), self.options.get("port", 6379))
        self.name = self.options.get("path") or "{}:{}".format(*self.address)
        self._kind = _KINDS[pool.connection_class]

    def dial(self, address: Address) -> Wire:
        """A connection, logged in."""
        options = dict(self.options)
        if self._kind is not UnixConnection:
            options["host"], options["port"] = address
        connection: Wire = self._kind(**options)
        connection.limit = Limit(CONNECT_S)
        connection.connect()
        return connection

    def map_slots(self, known: Sequence[Address]) -> "SlotMap":
        """The Cluster's map, from the first of `known` or of the URL that gives one."""
        options = {name: self.options[name] for name in ("socket_connect_timeout", "socket_timeout", "protocol")}
        if "ssl_ca_certs" in self.options:
            options["ssl_ca_certs"] = self.options["ssl_ca_certs"]
        nodes = [ClusterNode(host, port) for host, port in known]
        never = Retry(NoBackoff(), 0)
        return SlotMap(
            RedisCluster(url=self.url, startup_nodes=nodes, retry=never, require_full_coverage=False, **options)
        )


class SlotMap:
    """Which node of a Cluster holds which key, when it was read."""

    def __init__(self, cluster: RedisCluster) -> None:
        self._cluster: Any = cluster
        self.nodes: list[Address] = [(node.host, node.port) for node in self._cluster.get_primaries()]
        cluster.close()  # the map alone is wanted

    def address_of(self, key: str | bytes) -> Address:
        """Raises SlotNotCoveredError."""
        node = self._cluster.get_node_from_key(key)
        return node.host, node.port
