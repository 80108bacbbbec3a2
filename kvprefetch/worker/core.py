"""What all callers of one worker share: the engine, its loop, and for each tenant the root of its keys and its hints.

Promises
- A tenant's root comes from the secret and its name alone: nobody can name another's blocks, and a session or context
  of one tenant is never taken for another's of the same name.
- A group's blocks are filled by its tenants where they ask for it, public ones by the operator alone; who may read
  them finds them at the beginning of every prompt (law 4).
- `rekey` gives every tenant new roots from then on: what is cached under the old ones is found no more.
- Thread-safe.
"""

import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kvprefetch.cache.commons import Owner
from kvprefetch.cache.keys import BlockKey, Namespace, Scope, canonical, model_secret, root_key
from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.cache.shares import OPERATOR
from kvprefetch.contexts import PUBLIC, Sampling, group_of
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.engines.sampling import Sampler
from kvprefetch.engines.text import TextStream
from kvprefetch.errors import Closed, PermissionDenied, PoolTooSmall
from kvprefetch.settings import GroupSettings, Settings
from kvprefetch.worker.hints import Hints
from kvprefetch.worker.link import Link
from kvprefetch.worker.loop import Worker
from kvprefetch.worker.request import Generation, LiveRequest, Timing
from kvprefetch.worker.state_file import restore, save
from kvprefetch.worker.station import Station

_FLUSH_S = 5.0  # what was computed last may take so long to reach the arena when the worker ends


class Core:
    """See the module's promises. Close it."""

    def __init__(self, engine: TransformersEngine, settings: Settings, link: Link | None = None) -> None:
        self.engine, self.settings, self.link = engine, settings, link
        secret = settings.secret.encode() or secrets.token_bytes(32)
        self._secret = model_secret(secret, canonical(engine.fingerprint))  # as a service with this secret would
        self._tenants: dict[str, Hints] = {}
        self._groups = settings.groups
        self._owners: dict[tuple[str, str], Owner] = {}  # by tenant and namespace
        self._lock = threading.Lock()
        self.worker = Worker(engine, settings, time.monotonic, self._finished, link)
        self._state = Path(settings.speculation.state_file) if settings.speculation.state_file else None
        if self._state is not None:
            state = self._state
            self.worker.call(lambda: restore(self.worker.foresight, state))
        self.station = Station(self, link) if link is not None else None

    def owner(self, tenant: str, namespace: str = "") -> Owner:
        """Of what the tenant fills: its private namespace or another (see `Context`). Raises PermissionDenied."""
        with self._lock:
            owner = self._owners.get((tenant, namespace))
            if owner is None:
                owner = self._owners[tenant, namespace] = self._new_owner(tenant, namespace)
            return owner

    def regroup(self, groups: Iterable[GroupSettings]) -> None:
        """These are the groups from now on."""
        with self._lock:
            self._groups = tuple(groups)
            self._owners.clear()

    def hints(self, tenant: str) -> Hints:
        """The tenant's way in for hints and signals."""
        with self._lock:
            if tenant not in self._tenants:
                spec = self.settings.speculation
                self._tenants[tenant] = Hints(self.worker, spec, tenant, lambda name: self.owner(tenant, name))
            return self._tenants[tenant]

    def rekey(self, secret: bytes) -> None:
        """Derive all roots from this secret from now on; where it is another one, what is cached is forgotten."""
        with self._lock:
            if secret == self._secret:
                return
            self._secret = secret
            self._owners.clear()
        with suppress(Closed):
            self.worker.post(self.worker.forget_all)

    def request(
        self, prompt: list[int], sampling: Sampling, arrived: float, tenant: str, namespace: str = ""
    ) -> LiveRequest:
        """A live request of `tenant`, not submitted yet. Raises InvalidRequest, PermissionDenied and PoolTooSmall."""
        engine, owner = self.engine, self.owner(tenant, namespace)
        engine.validate(prompt)
        room = engine.max_tokens - len(prompt) if engine.max_tokens is not None else sampling.max_tokens
        max_new = min(sampling.max_tokens, room)
        pages = -(-(len(prompt) + max_new - 1) // engine.block_tokens)
        if pages > self.worker.pool.pages:
            raise PoolTooSmall(
                f"{len(prompt)} prompt tokens and up to {max_new} new ones need {pages} pages of "
                f"{engine.block_tokens} tokens; the pool has {self.worker.pool.pages}"
            )
        request = LiveRequest(
            prompt=prompt,
            sampling=sampling,
            sequence=PagedSequence(self.worker.pool, owner, prompt, engine.block_tokens),
            stream=Generation(lambda: setattr(request, "cancelled", True)),
            sampler=Sampler(sampling),
            text=TextStream(engine.loaded.tokenizer, sampling.stop),
            eos=engine.eos_tokens,
            max_new=max_new,
            timing=Timing(arrived),
            tenant=tenant,
        )
        request.stream.prompt_tokens = len(prompt)
        return request

    def submit(self, request: LiveRequest, session: str) -> None:
        """Look its blocks up in the node's arena, then hand it over. Blocks for as long as a look-up may.

        Raises Closed.
        """
        keys, pool = request.sequence.keys, self.worker.pool
        if self.link is not None and keys and keys[-1] not in pool.resident:  # a racy look: it is only to save the call
            request.found = self.link.host.look_up(request.tenant, session, keys, self._is_worth)
            self._note_gone(request)
        try:
            self.worker.submit(request)
        except Closed:
            if self.link is not None and request.found is not None:
                self.link.host.release(request.found)
            raise
        if self.station is not None:
            self.station.served(request.tenant, session)

    def _note_gone(self, request: LiveRequest) -> None:
        """Where the arena has shared blocks no more, nobody need look for them again."""
        found, sequence = request.found, request.sequence
        if found is None or found.failed is not None or found.coming:
            return
        gone = [key for key in sequence.keys[found.blocks : sequence.borrowed] if key not in self.worker.pool.resident]
        if gone:
            self.worker.post(lambda: self.worker.commons.forget(gone))

    def _is_worth(self, blocks: int, seconds: float) -> bool:
        """Whether so many blocks are there sooner than they could be computed."""
        compute = self.worker.foresight.rates.prefill_s(0, blocks * self.engine.block_tokens)
        return compute is None or seconds <= compute

    def close(self) -> None:
        """End all requests and prefetches and the threads. Calling it again does nothing."""
        if self.link is not None:
            self.link.flush(_FLUSH_S)
        if self.station is not None:
            self.station.close()
        self.worker.close()
        if self.link is not None:
            self.link.close()
        if self._state is not None:
            save(self.worker.foresight, self._state)
            self._state = None

    def _new_owner(self, tenant: str, namespace: str) -> Owner:
        group = group_of(namespace)
        if (tenant == OPERATOR) != (namespace == PUBLIC):
            raise PermissionDenied("the operator alone fills the public namespace; who asks reads it in any case")
        public, commons = self._root(Scope.PUBLIC, ""), self.worker.commons
        if namespace == PUBLIC:
            return Owner(public, OPERATOR, Scope.PUBLIC, (), commons)
        mine = [each.name for each in self._groups if tenant in each.tenants]
        if group and group not in mine:
            raise PermissionDenied(f"{tenant!r} is in no group of the name {group[:80]!r}")
        shared = (public, *(self._root(Scope.GROUP, name) for name in mine if name != group))
        if group:
            return Owner(self._root(Scope.GROUP, group), tenant, Scope.GROUP, shared, commons)
        return Owner(self._root(Scope.PRIVATE, tenant), tenant, Scope.PRIVATE, shared, commons)

    def _root(self, scope: Scope, name: str) -> BlockKey:
        return root_key(self._secret, Namespace(scope, name), self.engine.fingerprint)

    def _finished(self, request: LiveRequest) -> None:
        self.hints(request.tenant).foresee(request)
