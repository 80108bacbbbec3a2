"""What follows a prefix in the arena is brought into it from further away: from disk, Redis or another node.

Promises
- Each key is brought by one job at a time; who looks up the same meanwhile waits for that job, at most as long as it
  wants. A job runs to its end whether anybody waits or not. Jobs are bounded, in number and in keys.
- A place from which a block would take longer than computing it is not asked for blocks, save now and then to see
  whether that is still so.
- What is brought has its checksum verified by the place it comes from, and is sealed with it. What came whole stays.
- Lives on the event loop's thread. `close` waits for what is under way: its slots are written to until then.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from kvprefetch.cache.block import Block
from kvprefetch.cache.keys import BlockKey
from kvprefetch.errors import LimitExceeded
from kvprefetch.service.lane import Clock, Source
from kvprefetch.service.leases import Leases
from kvprefetch.tiers.host import HostTier
from kvprefetch.tiers.slots import Owner

log = logging.getLogger(__name__)

MOST_JOBS = 64
_BATCH = 32  # blocks at most
_REMEMBER_S = 1.0  # that nothing was found
_MOST_REMEMBERED = 4_096
_EXPLORE = 32  # of so many loads that would not pay, one is made


@dataclass(eq=False)
class Job:
    """Bringing blocks that follow each other."""

    keys: Sequence[BlockKey]
    parent: BlockKey
    tenant: str
    hold_s: float | None = None  # it is brought as speculation, to keep its place for so long; None: somebody waits
    done: int = 0  # leading keys that the arena has now
    coming: int = 0  # keys after those that are being brought; meaningful once `is_known`
    tier: str = ""  # where the next comes from
    is_known: bool = False  # whether a place has answered
    is_over: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        """Wake everybody who waits."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self, timeout_s: float) -> bool:
        """Wait until something has changed; False: it did not."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Coming:
    """For those who look up: keys that are on their way, or may be, and from where."""

    count: int = 0
    tier: str = ""


class Promoter:
    """See the module's promises. `brought(blocks, source)` is told of every batch that arrived.

    `compute_s` is what computing one block takes; None: nobody knows yet.
    """

    def __init__(
        self,
        host: HostTier,
        leases: Leases,
        owner: Owner,
        sources: Sequence[Source],
        clock: Clock,
        compute_s: Callable[[], float | None],
        brought: Callable[[list[Block], str], None],
    ) -> None:
        self.host, self.leases, self.owner, self.sources = host, leases, owner, sources
        self.clock, self.compute_s, self.brought = clock, compute_s, brought
        self.counters: Counter[str] = Counter()
        self._jobs: dict[BlockKey, Job] = {}  # by the key that comes next
        self._tasks: set[asyncio.Task[None]] = set()
        self._nothing: OrderedDict[BlockKey, float] = OrderedDict()  # where nobody had it, and when
        self._unpaid: Counter[str] = Counter()
        self._is_closed = False
        leases.returned(owner.instance, (), ())  # this process is there, too

    def want(self, keys: Sequence[BlockKey], parent: BlockKey, tenant: str, hold_s: float | None = None) -> Job | None:
        """The job that brings what begins with `keys[0]`, which the arena has not; None: there is nothing to bring.

        `hold_s`: as speculation, unless somebody who waits for it joins.
        """
        job = self._jobs.get(keys[0])
        if job is not None:
            job.hold_s = None if hold_s is None else job.hold_s
            return job
        now = self.clock()
        if self._is_closed or not self.sources or now - self._nothing.get(keys[0], -inf) < _REMEMBER_S:
            return None
        if len(self._tasks) >= MOST_JOBS:
            self.counters["refused_busy"] += 1
            return None
        job = self._jobs[keys[0]] = Job(keys, parent, tenant, hold_s)
        task = asyncio.get_running_loop().create_task(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def coming(self, job: Job | None, missing: int) -> Coming:
        """What to tell somebody who misses so many keys."""
        if job is None or job.is_over:
            return Coming()
        if not job.is_known:  # it is being asked for
            names = [source.name for source in self.sources if source.is_open]
            return Coming(missing, names[0]) if names else Coming()
        return Coming(min(job.coming, missing), job.tier) if job.coming else Coming()

    async def drain(self) -> None:
        """Until no job is running."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Begin nothing any more and wait for what is under way. Calling it again does nothing."""
        self._is_closed = True
        await self.drain()

    # -- within ----------------------------------------------------------------------------------------
    async def _run(self, job: Job) -> None:
        try:
            while job.done < len(job.keys) and not self._is_closed and await self._advance(job):
                pass
        except Exception:  # the task's outermost line
            log.exception("bringing blocks into the arena broke")
            self.counters["broken"] += 1
        finally:
            job.is_over, job.coming = True, 0
            if job.done < len(job.keys):
                self._leave(job)
                self._note_nothing(job.keys[job.done])
            job.tell()

    async def _advance(self, job: Job) -> bool:
        """Bring what the first place has that has the next key; False: no place has, or none is worth it."""
        for source in self.sources:
            rest = job.keys[job.done :]
            found = await source.find(rest)
            if not found:
                continue
            if not self._pays(source):
                self.counters[f"not_worth_{source.name}"] += found
                continue
            before = job.done
            job.is_known, job.coming, job.tier = True, found, source.name
            job.tell()
            await self._bring(job, source, found)
            if job.done > before:
                return True
        return False

    async def _bring(self, job: Job, source: Source, found: int) -> None:
        end = job.done + found
        while job.done < end and not self._is_closed:
            size = min(source.pace.batch(self.host.block_bytes, _BATCH), end - job.done)
            if not await self._bring_some(job, source, size):
                break
        job.coming = 0

    async def _bring_some(self, job: Job, source: Source, size: int) -> bool:
        """One batch; False: it ends here."""
        first = job.done
        batch = job.keys[first : first + size]
        parent = job.keys[first - 1] if first else job.parent
        try:
            now = self.clock()
            until = None if job.hold_s is None else now + job.hold_s
            number, blocks = self.leases.reserve(
                self.owner, parent, batch, job.tenant, now=now, speculative_until=until
            )
        except LimitExceeded:
            self.counters["refused_busy"] += 1
            return False
        if len(blocks) < len(batch):
            self.counters["refused_full"] += 1
        if number:
            held = [(key, block) for key, block in zip(batch, blocks, strict=False) if block is not None]
            views = [self.host.arena.slot(block.page) for _, block in held]
            try:
                sums = await source.load([key for key, _ in held], views)
            except BaseException:
                self.leases.release(self.owner.instance, (), (number,), set())
                raise
            sealed = self.leases.commit(self.owner.instance, number, sums)
            self.counters[source.name] += len(sealed)
            self.brought(sealed, source.name)
        arrived = len(self.host.pool.match(batch))
        self._move_on(job, arrived)
        return arrived == len(batch)

    def _move_on(self, job: Job, arrived: int) -> None:
        self._leave(job)
        job.done += arrived
        job.coming = max(job.coming - arrived, 0)
        if job.done < len(job.keys):
            self._jobs.setdefault(job.keys[job.done], job)
        job.tell()

    def _leave(self, job: Job) -> None:
        if self._jobs.get(job.keys[job.done]) is job:
            del self._jobs[job.keys[job.done]]

    def _pays(self, source: Source) -> bool:
        """Whether a block comes from there sooner than it is computed, as far as anybody knows."""
        compute_s, pace = self.compute_s(), source.pace.bytes_per_s
        if compute_s is None or pace is None or self.host.block_bytes <= pace * compute_s:
            return True
        self._unpaid[source.name] += 1
        return self._unpaid[source.name] % _EXPLORE == 0

    def _note_nothing(self, key: BlockKey) -> None:
        self._nothing[key] = self.clock()
        self._nothing.move_to_end(key)
        if len(self._nothing) > _MOST_REMEMBERED:
            self._nothing.popitem(last=False)
