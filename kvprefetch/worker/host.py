"""What the node's arena holds of a prompt, and the copy of it into this worker's pool.

Promises
- `look_up` may be called by any thread and blocks for at most `LOOKUP_S` without a new complete block (law 1); it never
  raises: what went wrong is the reason that the blocks' misses get (law 6).
- `load` is for the loop's thread. It verifies every block that it copied; a block that changed or is damaged ends it.
- A lease is given back only when the copies out of it are done.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvprefetch.cache.keys import BlockKey
from kvprefetch.client.remote import LOOKUP_S, CacheClient, LookupTimedOut
from kvprefetch.errors import Closed, ServiceUnavailable, TierError
from kvprefetch.outcomes import MissReason
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.device import DevicePool

log = logging.getLogger(__name__)
_MOST_KEYS = 16_384  # of one look-up; half a million tokens
_STEP_S = 0.01  # what a speculative step may wait for a look-up


@dataclass(eq=False)
class Found:
    """Leading blocks of a prompt that lie in the arena, on lease until `Host.release`; or why there are none."""

    keys: Sequence[BlockKey]
    slots: Sequence[int] = ()
    lease: int = 0
    arena: ArenaFile | None = None
    failed: MissReason | None = None  # why the rest is missing, where the service could not say or a block was bad
    bad_slot: int | None = None
    coming: int = 0  # blocks behind those that are on their way into the arena

    @property
    def blocks(self) -> int:
        """Leading blocks that can be loaded."""
        return len(self.slots)


class Host:
    """See the module's promises."""

    def __init__(
        self, client: CacheClient, pool: DevicePool, clock: Callable[[], float], release: Callable[[Found], None]
    ) -> None:
        self.client, self.pool, self.clock = client, pool, clock
        self.arena: ArenaFile | None = None  # set when registered, exchanged when the service made a new one
        self.verify = True
        self.release = release  # gives a lease back, in the background
        self.counts = {"loaded": 0, "corrupt": 0, "unavailable": 0, "timed_out": 0, "replaced": 0}
        self.leases: set[int] = set()  # taken and not yet given back
        self._views: dict[int, memoryview] = {}
        self._registered: tuple[ArenaFile | None, torch.Tensor | None] = (None, None)  # pinned for the device
        self._retired: list[torch.Tensor] = []  # of earlier arenas, still pinned

    def attach(self, arena: ArenaFile) -> None:
        """Read from this arena from now on. For the station's thread."""
        if self.pool.device.type == "cuda" and arena is not self._registered[0]:
            old, self._registered = self._registered[1], (arena, register(arena))
            if old is not None:
                self._retired.append(old)
        self.arena = arena

    # -- for any thread --------------------------------------------------------------------------------
    def look_up(
        self, tenant: str, session: str, keys: Sequence[BlockKey], is_worth: Callable[[int, float], bool]
    ) -> Found:
        """Leading `keys` that the arena holds, on lease.

        What comes from further away is waited for while new blocks come and `is_worth(blocks, seconds)`: loading so
        many more, at the pace so far, is faster than computing them.
        """
        began, first = self.clock(), -1
        found = self._ask(tenant, session, keys, 0.0, LOOKUP_S)
        while found.coming and found.failed is None:
            seconds, before = self.clock() - began, found.blocks
            new = before - first
            if first < 0:
                first = before
            elif not new or not is_worth(found.coming, seconds / new * found.coming):
                break
            again = self._ask(tenant, session, keys, 0.8 * LOOKUP_S, LOOKUP_S)
            if again.blocks <= before:
                self.release(again)
                break
            self.release(found)
            found = again
        return found

    def _ask(
        self,
        tenant: str,
        session: str,
        keys: Sequence[BlockKey],
        wait_s: float,
        timeout_s: float,
        hold_s: float | None = None,
    ) -> Found:
        arena = self.arena
        if arena is None:
            return Found(keys, failed=MissReason.UNAVAILABLE)
        try:
            answer = self.client.look_up(
                tenant, session, keys[:_MOST_KEYS], wait_s=wait_s, timeout_s=timeout_s, hold_s=hold_s
            )
        except LookupTimedOut:
            self.counts["timed_out"] += 1
            return Found(keys, failed=MissReason.TIMED_OUT)
        except (ServiceUnavailable, Closed):
            self.counts["unavailable"] += 1
            return Found(keys, failed=MissReason.UNAVAILABLE)
        if answer.lease:
            self.leases.add(answer.lease)
        if self.arena is not arena:  # the answer may be of a service whose arena is another one
            self.counts["replaced"] += 1
            self.release(Found(keys, lease=answer.lease))
            return Found(keys, failed=MissReason.UNAVAILABLE)
        return Found(keys, answer.slots, answer.lease, arena, coming=answer.coming)

    def peek(self, tenant: str, session: str, keys: Sequence[BlockKey], hold_s: float) -> int:
        """How many leading keys the arena holds, as far as anybody knows. What is further away is sent for."""
        try:
            if self.arena is None:
                return 0
            return self.client.look_up(tenant, session, keys[:_MOST_KEYS], lease=False, hold_s=hold_s).found
        except (ServiceUnavailable, Closed):
            return 0

    def find(self, tenant: str, session: str, keys: Sequence[BlockKey], hold_s: float) -> Found:
        """As `look_up`, for a speculative step: it waits for nothing that is further away."""
        return self._ask(tenant, session, keys, 0.0, _STEP_S, hold_s)

    # -- for the loop's thread -------------------------------------------------------------------------
    def load(self, found: Found, first: int, pages: Sequence[int]) -> int:
        """Copy blocks `first`, `first` + 1, … of what was found into `pages`; how many were good.

        Fewer than pages: the next one was bad, and `found.failed` says so.
        """
        assert found.arena is not None
        while self._retired:  # only this thread copies
            unregister(self._retired.pop())
        copy = self._to_host if self.pool.device.type == "cpu" else self._to_device
        for done, page in enumerate(pages):
            slot = found.slots[first + done]
            try:
                is_good = copy(found.arena, slot, found.keys[first + done], page)
            except TierError as error:
                log.warning("the arena cannot be read: %s", error)
                found.failed = MissReason.UNAVAILABLE
                return done
            if not is_good:
                self.counts["corrupt"] += 1
                found.failed, found.bad_slot = MissReason.CORRUPT, slot
                log.warning("a block of the arena was damaged or replaced (slot %d); it is computed again", slot)
                return done
            self.counts["loaded"] += 1
        return len(pages)

    def page(self, page: int) -> memoryview:
        """The bytes of a page of a pool on a CPU."""
        view = self._views.get(page)
        if view is None:
            view = self._views[page] = page_bytes(self.pool.tensor[page])
        return view

    def close(self) -> None:
        """Nothing is read any more."""
        self.arena = None
        retired = [*self._retired, *([self._registered[1]] if self._registered[1] is not None else [])]
        self._retired, self._registered = [], (None, None)
        for whole in retired:
            unregister(whole)

    # -- within ----------------------------------------------------------------------------------------
    def _to_host(self, arena: ArenaFile, slot: int, key: BlockKey, page: int) -> bool:
        return arena.read(slot, key, self.page(page), verify=self.verify)

    def _to_device(self, arena: ArenaFile, slot: int, key: BlockKey, page: int) -> bool:
        """The copy is done when this returns, so the lease may go."""
        target = self.pool.tensor[page]
        if arena is self._registered[0] and self._registered[1] is not None:
            return self._from_registered(arena, slot, key, target)
        staged = torch.empty(arena.block_bytes, dtype=torch.uint8, pin_memory=self.pool.device.type == "cuda")
        if not arena.read(slot, key, page_bytes(staged), verify=self.verify):
            return False
        target.copy_(staged.view(target.dtype).view(target.shape))
        return True

    def _from_registered(self, arena: ArenaFile, slot: int, key: BlockKey, target: torch.Tensor) -> bool:
        """The device reads the arena itself: the slot is verified first, and its header must be the same afterwards."""
        before, whole = arena.raw_header(slot), self._registered[1]
        if whole is None or not arena.holds(slot, key, verify=self.verify):
            return False
        start = slot * arena.slot_bytes
        target.copy_(whole[start : start + arena.block_bytes].view(target.dtype).view(target.shape))
        return arena.raw_header(slot) == before


def page_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on a CPU, without a copy."""
    return tensor.view(torch.uint8).flatten().numpy().data


def register(arena: ArenaFile) -> torch.Tensor | None:
    """All slots as a tensor `[bytes]` that a GPU reads without staging, or None where the driver does not allow it."""
    whole = torch.frombuffer(arena.buffer, dtype=torch.uint8)
    error = torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)  # type: ignore[no-untyped-call]
    if error.value == 0:
        log.info("the arena is registered with CUDA: %d bytes", whole.nbytes)
        return whole
    log.warning("the arena cannot be registered with CUDA (%s); its blocks are staged", error)
    return None


def unregister(whole: torch.Tensor) -> None:
    """Let go of what `register` gave. No copy may be under way."""
    error = torch.cuda.cudart().cudaHostUnregister(whole.data_ptr())  # type: ignore[no-untyped-call]
    if error.value != 0:
        log.warning("an arena stays pinned (%s)", error)
