"""Workers over the tiny model, live ones and single-stepped ones, for the stories of this folder."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace

from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import Owner, PagedSequence
from kvprefetch.contexts import Context, Sampling
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.engines.render import Renderer
from kvprefetch.engines.sampling import Sampler
from kvprefetch.engines.text import TextStream
from kvprefetch.errors import InvalidRequest
from kvprefetch.inprocess import Local
from kvprefetch.outcomes import Result
from kvprefetch.plan.foresight import Foresight
from kvprefetch.plan.ledger import Ledger
from kvprefetch.plan.preloads import Preloads
from kvprefetch.settings import Settings, SpeculationSettings
from kvprefetch.worker.job import Job
from kvprefetch.worker.live import LiveQueue
from kvprefetch.worker.request import Generation, LiveRequest, Timing
from kvprefetch.worker.speculation import Speculator

OWNER = Owner(b"root of the tests", "ann")


def owner_of(tenant: str) -> Owner:
    """The root of its keys."""
    return OWNER if tenant == OWNER.tenant else Owner(f"root of {tenant}".encode(), tenant)


@contextmanager
def local(engine: TransformersEngine, **speculation: object) -> Iterator[Local]:
    """A worker of its own thread; `check()` must hold at the end."""
    settings = replace(Settings(), speculation=SpeculationSettings(**speculation))  # type: ignore[arg-type]
    with Local(engine, settings) as kv:
        yield kv
        kv.check()
    kv.check()


def text(start: int, tokens: int) -> list[int]:
    """`tokens` token ids, another text for each `start`."""
    return [3 + (start * 131 + i * 37 + i * i) % 450 for i in range(tokens)]


def at_once(work: Callable[[], list[int]], done: Callable[[Future[list[int]]], None]) -> None:
    """What the worker does on its helper thread, done here and now."""
    future: Future[list[int]] = Future()
    try:
        future.set_result(work())
    except InvalidRequest as error:
        future.set_exception(error)
    done(future)


class Bench:
    """A live queue and a speculator on one pool, stepped by hand on a fake clock."""

    def __init__(self, engine: TransformersEngine, **speculation: object) -> None:
        self.engine, self.now = engine, 0.0
        self.pool, self.ledger = BlockPool(engine.pool.pages), Ledger()
        self.pool.on_evict = lambda block, rule: self.ledger.note_evicted(block.key)
        renderer = Renderer(engine.loaded.tokenizer)
        settings = SpeculationSettings(**{"max_pending": 8, **speculation})  # type: ignore[arg-type]
        self.foresight = Foresight(self.pool, engine.block_tokens, settings)
        self.live = LiveQueue(engine, self.pool, self.ledger, self.foresight, lambda request: None)
        self.preloads = Preloads(self.ledger, self.foresight, settings, engine.block_tokens)
        self.speculator = Speculator(engine, renderer, self.pool, self.preloads, settings, at_once)
        self.results: list[Result] = []

    def clock(self) -> float:
        return self.now

    def ask(
        self, prompt: list[int], max_tokens: int = 4, *, tenant: str = OWNER.tenant, **sampling: object
    ) -> LiveRequest:
        """Put a request into the queue."""
        chosen = Sampling(max_tokens=max_tokens, ignore_eos=True, **sampling)  # type: ignore[arg-type]
        request = LiveRequest(
            prompt=prompt,
            sampling=chosen,
            sequence=PagedSequence(self.pool, owner_of(tenant), prompt, self.engine.block_tokens),
            stream=Generation(lambda: None),
            sampler=Sampler(chosen),
            text=TextStream(None, ()),
            eos=frozenset(),
            max_new=max_tokens,
            timing=Timing(self.now),
            tenant=tenant,
        )
        self.live.add(request)
        return request

    def hint(
        self,
        tokens: list[int],
        probability: float = 0.5,
        expected_in_s: float = 0.0,
        hold_s: float = 60.0,
        is_signalled: bool = False,
        tenant: str = OWNER.tenant,
    ) -> Job:
        """Queue a preload of exact tokens."""
        ticket = self.ledger.issue(
            self.now,
            tenant=tenant,
            session="s",
            probability=probability,
            expected_in_s=expected_in_s,
            hold_s=hold_s,
            because="hint",
        )
        job = Job(
            ticket, Context(token_ids=tuple(tokens)), self.results.append, owner_of(tenant), is_signalled=is_signalled
        )
        self.preloads.add(job, self.now)
        return job

    def serve(self) -> None:
        """Run live steps until nobody waits, proving the books after each."""
        for _ in range(10_000):
            if not self.live:
                return
            self.live.step(self.clock, lambda: False)
            self.pool.check()
        raise AssertionError("live requests do not end")

    def speculate(self, abandon: Callable[[], bool] = lambda: False) -> bool:
        """One speculative step."""
        self.preloads.expire(self.now)
        worked = self.speculator.step(self.clock, abandon)
        self.pool.check()
        return worked

    def speculate_all(self) -> None:
        """All there is to speculate."""
        for _ in range(10_000):
            if not self.speculate():
                return
        raise AssertionError("speculation does not end")


def cold_answer(engine: TransformersEngine, prompt: list[int], max_tokens: int = 4, **sampling: object) -> list[int]:
    """What the prompt gives alone, with nothing cached."""
    bench = Bench(engine)
    request = bench.ask(prompt, max_tokens, **sampling)
    bench.serve()
    return request.stream.tokens
