"""A node with a victim and an attacker: a real service and arena, a real worker over a tiny model, all in this process.

`broken` takes the isolation out: every tenant has the root and the names of every other. There the same attacks must
find what they look for, else they prove nothing.
"""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvprefetch.cache.commons import Owner
from kvprefetch.cache.shares import Share, Shares
from kvprefetch.client.channel import open_channel
from kvprefetch.client.connect import Connection, connect
from kvprefetch.engines.engine import open_engine
from kvprefetch.engines.load import prepare
from kvprefetch.engines.selftest import page_shape
from kvprefetch.inprocess import Local
from kvprefetch.service.run import build_server
from kvprefetch.service.server import Server
from kvprefetch.settings import (
    ArenaSettings,
    Credential,
    EngineSettings,
    GroupSettings,
    PoolSettings,
    ServiceSettings,
    Settings,
    SpeculationSettings,
)
from kvprefetch.worker.core import Core
from kvprefetch.worker.hints import Hints
from kvprefetch.worker.link import Link

BLOCK = 16
VOCABULARY = 512
PAGES = 128
VICTIM, ATTACKER = "victim", "attacker"
GROUP = "team"
_ROLES = {VICTIM: "tenant", ATTACKER: "tenant", "worker": "worker", "operator": "operator"}
_FLUSH_S = 10.0


class World:
    """See the module's docstring. `victim` and `attacker` are what the worker's HTTP edge calls for either."""

    def __init__(self, local: Local, address: str, seed: int) -> None:
        self.local, self.random = local, random.Random(seed)
        self.victim, self.attacker = local.as_tenant(VICTIM), local.as_tenant(ATTACKER)
        self.forwards = 0
        self._forward = local.engine.forward
        self._links = {name: connect(address, _token(name)) for name in _ROLES}
        vars(local.engine)["forward"] = self._count_forward

    def by_service(self, name: str) -> Connection:
        """The connection of a tenant, or of the operator."""
        return self._links[name]

    def text(self, blocks: int) -> list[int]:
        """Tokens that nobody has ever sent."""
        return [self.random.randrange(VOCABULARY) for _ in range(blocks * BLOCK)]

    def written(self) -> None:
        """Wait until the arena has what was computed, as an attacker would who has time."""
        link = self.local.core.link
        assert link is not None
        deadline = time.monotonic() + _FLUSH_S
        while not link.offloader.is_idle and time.monotonic() < deadline:
            time.sleep(0.001)

    def share(self, **guarantees: float) -> None:
        """Guarantee parts of the pool."""
        shares = Shares({name: Share(guarantee=part) for name, part in guarantees.items()})
        self.local.worker.call(lambda: setattr(self.local.worker.pool, "shares", shares))

    def close(self) -> None:
        """Let go of the connections."""
        for link in self._links.values():
            link.close()

    def _count_forward(self, *arguments: object, **more: object) -> object:
        self.forwards += 1
        return self._forward(*arguments, **more)  # type: ignore[arg-type]


@contextmanager
def world(folder: Path, seed: int, *, broken: bool = False, pages: int = PAGES) -> Iterator[World]:
    """A fresh one; its books must be right at the end."""
    torch.set_num_threads(1)  # tiny tensors gain nothing from more
    model = prepare(_tiny_llama(), None, "tiny")
    settings = _settings(folder, str(pages * page_shape(model, BLOCK).bytes))
    with ExitStack() as stack:
        if broken:
            stack.enter_context(_no_isolation())
        address = stack.enter_context(_service(settings))
        engine = open_engine(model, settings)
        channel = open_channel(address, _token("worker"))
        stack.callback(channel.close)
        local = stack.enter_context(Local(engine, settings, Link(channel, engine.pool, time.monotonic, verify=True)))
        assert local.core.station is not None
        if not local.core.station.registered.wait(60):
            raise RuntimeError("the worker is not registered with its service")
        there = World(local, address, seed)
        stack.callback(there.close)
        yield there
        local.check()


def _settings(folder: Path, pool: str) -> Settings:
    return Settings(
        secret="of the bench",
        service=ServiceSettings(
            listen=(f"unix://{folder}/s.sock",),
            state_dir=str(folder / "state"),
            drain_s=1.0,
            signals_per_s=1e6,
            max_contexts=1_000_000,  # names in use: limits would end a long run
            max_hints=1_000_000,
        ),
        arena=ArenaSettings(dir=str(folder / "arena"), size="4MiB", prefault=False, huge_pages=False),
        pool=PoolSettings(size=pool, block_tokens=BLOCK),
        engine=EngineSettings(device="cpu", dtype="float32", chunk_tokens=2 * BLOCK),
        # closed budgets would hide what an attacker sees
        speculation=SpeculationSettings(per_useful=1e9, budget_tokens=1e12, max_open=1_000_000),
        groups=(GroupSettings(GROUP, (VICTIM, ATTACKER)),),
        credentials=tuple(
            Credential(name, role, sha256(_token(name).encode()).hexdigest()) for name, role in _ROLES.items()
        ),
    )


def _token(name: str) -> str:
    return f"token of {name}"


def _tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2_048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).float().eval()


@contextmanager
def _service(settings: Settings) -> Iterator[str]:
    """A cache service on a thread's event loop; its address."""
    ready: Future[tuple[Server, asyncio.AbstractEventLoop, str]] = Future()

    async def serve() -> None:
        try:
            server = build_server(settings)
            (address,) = await server.start()
        except BaseException as error:
            ready.set_exception(error)
            raise
        ready.set_result((server, asyncio.get_running_loop(), address))
        await server.wait_closed()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    server, loop, address = ready.result(60)

    def end() -> None:
        server.hurry()
        server.hurry()

    try:
        yield address
    finally:
        loop.call_soon_threadsafe(end)
        thread.join(60)


@contextmanager
def _no_isolation() -> Iterator[None]:
    """Every tenant has the root and the names of the first."""
    owner, hints = Core.owner, Core.hints

    def one_owner(self: Core, tenant: str, namespace: str = "") -> Owner:
        mine = owner(self, tenant, namespace)
        return replace(mine, root=owner(self, VICTIM).root) if tenant and not namespace else mine

    def one_way_in(self: Core, tenant: str) -> Hints:
        return hints(self, VICTIM if tenant else tenant)

    Core.owner, Core.hints = one_owner, one_way_in  # type: ignore[method-assign]
    try:
        yield
    finally:
        Core.owner, Core.hints = owner, hints  # type: ignore[method-assign]
