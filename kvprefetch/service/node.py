"""The cache of one node: a shelf for each model, and what is known of the workers' processes.

Promises
- A namespace is opened when its first worker registers: its arena is made, or taken over with all that it holds, its
  disk file and its place in Redis too. Raises ArenaRefused where that cannot be; other namespaces go on.
- Without its disk tier, or Redis, a node serves from its arena; the log and `stats` say so.
- What a vanished worker held is freed when its process is proved dead, or when it says itself what it still holds.
- Lives on the event loop's thread; opening and closing files happens in others.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from kvprefetch.cache.shares import Shares
from kvprefetch.errors import ArenaRefused, InvalidRequest, KVPrefetchError, SettingsError, TierError
from kvprefetch.service.announcer import Announcer
from kvprefetch.service.figures import figures
from kvprefetch.service.lane import Clock, Lane
from kvprefetch.service.namespace import INSTANCE_BYTES, Model, service_secret
from kvprefetch.service.peers import NodeSource, Peers
from kvprefetch.service.shelf import Behind, Shelf
from kvprefetch.service.tenants import Tenants
from kvprefetch.service.watch import Watch, is_alive, start_time
from kvprefetch.settings import Settings, parse_bytes, shared_memory_dir
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.directory import Directory
from kvprefetch.tiers.disk import DiskTier
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.layout import Layout
from kvprefetch.tiers.redis import RedisTier
from kvprefetch.tiers.redis_link import RedisLink
from kvprefetch.tiers.slots import Owner

log = logging.getLogger(__name__)

_TICK_S = 1.0
_MOST_REFUSALS = 64


class Node:
    """See the module's promises. Made and used inside a running event loop; `start` it, and `close` it."""

    def __init__(self, settings: Settings, clock: Clock = time.monotonic) -> None:
        self.settings, self.clock = settings, clock
        self.run = secrets.token_hex(8)  # id of this run of the service
        self.me = Owner(secrets.token_bytes(16), os.getpid(), start_time(os.getpid()) or 0)
        self.shelves: dict[str, Shelf] = {}
        self.refusals: dict[str, str] = {}  # namespace and tier → why it does without
        self.deaths = 0  # of workers, proved
        self.on_death: list[Callable[[bytes], None]] = []
        self._models: dict[str, Model] = {}  # by fingerprint
        self._secret = service_secret(settings)
        self._numbers = count(secrets.randbits(62))  # unlike those of an earlier run
        self._owners: dict[bytes, Owner] = {}  # of whom it is not known that they are dead
        self.tenants = Tenants(settings, self._pools)
        self.tenants.on_change.append(self._rule)
        self._watch = Watch(self._died)
        self._opening: dict[str, asyncio.Lock] = {}
        self._link = RedisLink(settings.redis, clock) if settings.redis.url else None
        self._peers = Peers(settings.redis, clock)
        self._ticking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to do what is due every second."""
        self._ticking = asyncio.get_running_loop().create_task(self._tick())

    async def close(self) -> None:
        """Stop, and close all files; what is in them stays. Calling it again does nothing."""
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        self._watch.close()
        for shelf in self.shelves.values():
            await shelf.close()
        await self._peers.close()
        if self._link is not None:
            await asyncio.to_thread(self._link.close)

    # -- namespaces ------------------------------------------------------------------------------------
    async def open(self, model: Model) -> Shelf:
        """The shelf of this model. Raises ArenaRefused, TierUnavailable, SettingsError: the message says what to do."""
        known = self._models.get(model.fingerprint)
        if known is not None and (known.block_bytes, known.block_tokens) != (model.block_bytes, model.block_tokens):
            raise ArenaRefused(
                f"model {model.name!r}: its arena has blocks of {known.block_bytes} bytes for {known.block_tokens} "
                f"tokens, this worker's are {model.block_bytes} for {model.block_tokens}: run the same version"
            )
        async with self._opening.setdefault(model.namespace, asyncio.Lock()):
            shelf = self.shelves.get(model.namespace)
            if shelf is None:
                shelf = await self._open_or_say_why(model)
        return shelf

    def secret(self, model: Model) -> bytes:
        """From which workers derive the roots of this model's keys."""
        return model.secret(self._secret)

    # -- workers' processes ----------------------------------------------------------------------------
    def owner(self, instance: bytes) -> Owner | None:
        """The process that has this instance, unless it is known to be dead."""
        return self._owners.get(instance)

    def returned(self, owner: Owner, leases: Iterable[int], reservations: Iterable[int]) -> None:
        """A worker is there, and says what it holds from before."""
        self._owners[owner.instance] = owner
        held, writing = list(leases), list(reservations)
        for shelf in self.shelves.values():
            shelf.leases.returned(owner.instance, held, writing)
        self._watch.add(owner.instance, owner.pid, owner.started)

    def vanished(self, instance: bytes) -> None:
        """A worker's stream broke."""
        for shelf in self.shelves.values():
            shelf.leases.vanish(instance)

    # -- figures and proof -----------------------------------------------------------------------------
    def stats(self) -> dict[str, Any]:
        """Figures of all namespaces, by id."""
        return {
            "run": self.run,
            "namespaces": {
                model.namespace: {"model": model.name, **figures(self.shelves[model.namespace])}
                for model in self._models.values()
            },
            "refused": dict(self.refusals),
            "watched": len(self._watch),
            "died": self.deaths,
        }

    async def check(self) -> None:
        """Prove law 5 of every tier, or raise AccountingError."""
        for shelf in self.shelves.values():
            shelf.check()
        for shelf in self.shelves.values():
            await shelf.check_tiers()

    def host_bytes(self) -> int:
        """Of all blocks that the arenas have room for."""
        return sum(shelf.host.pool.pages * shelf.block_bytes for shelf in self.shelves.values())

    async def bytes_by_tenant(self) -> dict[str, dict[str, int]]:
        """Tenant → tier ("host", "disk", "redis") → bytes charged; of Redis, those of all nodes."""
        totals: dict[str, dict[str, int]] = {}
        for shelf in self.shelves.values():
            usages = {"host": shelf.host.usage()}
            for lane in shelf.behind.lanes:
                usages[lane.name] = await lane.run(lane.tier.usage)
            for tier, usage in usages.items():
                for tenant, size in usage.by_tenant.items():
                    tiers = totals.setdefault(tenant, {})
                    tiers[tier] = tiers.get(tier, 0) + size
        return totals

    # -- within ----------------------------------------------------------------------------------------
    async def _open_or_say_why(self, model: Model) -> Shelf:
        """Workers ask again and again: the log is told once."""
        name = f"{model.namespace} arena"
        try:
            shelf = await self._open(model)
        except KVPrefetchError as error:
            if self.refusals.get(name) != str(error) and len(self.refusals) < _MOST_REFUSALS:
                self.refusals[name] = str(error)
                log.warning("the model %r does without an arena: %s", model.name, error)
            raise
        self.refusals.pop(name, None)
        return shelf

    async def _open(self, model: Model) -> Shelf:
        host = await asyncio.to_thread(self._open_host, model)
        try:
            behind = await self._open_behind(model)
            shelf = Shelf(model.namespace, host, behind, self.me, self._numbers, self.clock, model.block_tokens)
        except BaseException:
            host.close()
            raise
        self._adopt_orphans(shelf)
        self._rule_new(shelf, model)
        self.shelves[model.namespace], self._models[model.fingerprint] = shelf, model
        return shelf

    def _pools(self) -> list[int]:
        return [shelf.host.pool.pages for shelf in self.shelves.values()]

    def _rule_new(self, shelf: Shelf, model: Model) -> None:
        shelf.rule(self.tenants.shares)
        try:
            self.tenants.shares.require_fit(shelf.host.pool.pages)
        except InvalidRequest as error:
            log.warning("the arena of the model %r is small: %s", model.name, error)

    def _rule(self, shares: Shares) -> None:
        for shelf in self.shelves.values():
            shelf.rule(shares)

    def _adopt_orphans(self, shelf: Shelf) -> None:
        """Slots that living processes had reserved from an earlier run of the service."""
        for block, header in shelf.host.orphans:
            owner = Owner(header.instance, header.pid, header.started)
            if self._owners.setdefault(owner.instance, owner) != owner:  # a damaged header names somebody else's
                owner = replace(owner, instance=sha256(repr(owner).encode()).digest()[:INSTANCE_BYTES])
                self._owners[owner.instance] = owner
            shelf.leases.adopt(owner.instance, [block])
            self._watch.add(owner.instance, owner.pid, owner.started)

    def _open_host(self, model: Model) -> HostTier:
        settings = self.settings.arena
        slots = slots_in(settings.size, "arena.size", model)
        arena = ArenaFile.create(
            Path(settings.dir or shared_memory_dir()) / f"{model.namespace}.arena",
            model.namespace,
            model.block_bytes,
            slots,
            prefault=settings.prefault,
            huge_pages=settings.huge_pages,
            lock=settings.lock,
        )
        try:
            memory = self.settings.pool.evicted_memory
            claim_s = self.settings.fairness.lower_claim_s
            return HostTier(
                arena,
                self.clock,
                is_alive=is_alive,
                verify=settings.checksums,
                evicted_memory=memory,
                claim_s=claim_s,
            )
        except BaseException:
            arena.close()
            raise

    async def _open_behind(self, model: Model) -> Behind:
        behind = Behind() if self._link is None else self._through_redis(model, self._link)
        if self.settings.disk.dir:  # the last to be opened: nothing after it can fail, and leave it open
            try:
                disk = Lane(await asyncio.to_thread(self._open_disk, model), self.clock)
                return replace(behind, lanes=[disk, *behind.lanes])
            except TierError as error:
                self.refusals[f"{model.namespace} disk"] = str(error)
                log.warning("the model %r does without a disk tier: %s", model.name, error)
        return behind

    def _through_redis(self, model: Model, link: RedisLink) -> Behind:
        """What other nodes share with this one."""
        redis, name, size = self.settings.redis, model.namespace, model.block_bytes
        lanes = [Lane(RedisTier(redis, name, size, link=link), self.clock)] if redis.store_blocks else []
        directory = Directory(redis, name, link=link)
        nodes = NodeSource(self._peers, directory, name, size, redis.advertise, self.clock)
        announcer = Announcer(directory, redis.advertise, redis.ttl_s, self.clock) if redis.advertise else None
        return Behind(lanes, nodes, announcer)

    def _open_disk(self, model: Model) -> DiskTier:
        settings = self.settings.disk
        slots = slots_in(settings.size, "disk.size", model)
        path = Path(settings.dir) / f"{model.namespace}.blocks"
        claim_s = self.settings.fairness.lower_claim_s
        return DiskTier(path, model.namespace, model.block_bytes, slots, self.clock, claim_s=claim_s)

    def _died(self, instance: bytes) -> None:
        self.deaths += 1
        self._owners.pop(instance, None)
        for shelf in self.shelves.values():
            shelf.leases.died(instance)
        for tell in self.on_death:
            tell(instance)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            for shelf in self.shelves.values():
                shelf.expire(self.clock())


async def open_node(settings: Settings) -> Node:
    """A node that has started. Raises SettingsError."""
    node = Node(settings)
    node.start()
    return node


def slots_in(size: str, key: str, model: Model) -> int:
    """How many slots make a file of at most `size`. Raises SettingsError, naming `key`, where not one does."""
    one = Layout("arena", model.namespace, model.block_bytes, 1)
    slots = (parse_bytes(size, key) - one.data) // (one.slot_bytes + one.header_at(1) - one.header_at(0)) + 1
    while slots > 0 and Layout("arena", model.namespace, model.block_bytes, slots).file_bytes > parse_bytes(size, key):
        slots -= 1
    if slots < 1:
        raise SettingsError(f"{key} {size!r} holds not one block of {model.block_bytes} bytes: set more")
    return slots
