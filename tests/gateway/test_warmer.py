"""Warming in an engine's idle time: it gives way at once, goes on where it was, and leaves a sick engine alone."""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import wraps

import msgspec
import pytest

from kvprefetch.errors import InvalidRequest, UpstreamGone
from kvprefetch.gateway.contract import Dialect, Draft, Link, Rendered, Traits
from kvprefetch.gateway.desk import Desk
from kvprefetch.gateway.engines.tokens import RenderedIds
from kvprefetch.gateway.job import WarmJob
from kvprefetch.gateway.link import open_links
from kvprefetch.gateway.pace import Pace
from kvprefetch.gateway.replica import prompt_keys
from kvprefetch.gateway.warmer import Warmer
from kvprefetch.outcomes import Outcome, Result, Use
from kvprefetch.settings import GatewaySettings, SpeculationSettings, UpstreamSettings

BLOCK = 16


def story(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Run it on a loop of its own."""

    @wraps(test)
    def run() -> None:
        async def within() -> None:
            async with asyncio.timeout(60):
                await test()

        asyncio.run(within())

    return run


@dataclass
class Server:
    """An engine: it keeps the whole blocks of each prompt that it has computed."""

    status: int = 200
    keeps: bool = True
    load: int = 0
    held: set[tuple[int, ...]] = field(default_factory=set)
    asked: list[tuple[int, int]] = field(default_factory=list)  # tokens of each prompt, and those found
    left: int = 0  # requests that were given up
    serves: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next((int(v) for n, _, v in map(_field, head.split(b"\r\n")) if n == b"content-length"), 0)
                body = await reader.readexactly(length)
                status, said = await self.answer(body, reader) if body else (200, {"server_load": self.load})
                raw = msgspec.json.encode(said)
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(raw), raw))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, body: bytes, reader: asyncio.StreamReader) -> tuple[int, object]:
        ids = tuple(msgspec.json.decode(body)["prompt"])
        cached = self.found(ids)
        self.asked.append((len(ids), cached))
        if self.status != 200:
            return self.status, {"error": "no"}
        gone, ready = asyncio.ensure_future(reader.read(1)), asyncio.ensure_future(self.serves.wait())
        await asyncio.wait([gone, ready], return_when=asyncio.FIRST_COMPLETED)
        is_left = gone.done()
        gone.cancel()
        ready.cancel()
        await asyncio.wait([gone, ready])
        if is_left:
            self.left += 1
            raise ConnectionError
        if self.keeps:
            self.held.update(ids[:end] for end in range(BLOCK, len(ids) + 1, BLOCK))
        usage = {"prompt_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": cached}}
        return 200, {"choices": [{"text": "x", "finish_reason": "length"}], "usage": usage}

    def found(self, ids: tuple[int, ...]) -> int:
        ends = [end for end in range(BLOCK, len(ids), BLOCK) if ids[:end] in self.held]  # never all of it
        return max(ends, default=0)


def _field(line: bytes) -> tuple[bytes, bytes, bytes]:
    name, colon, value = line.partition(b":")
    return name.lower(), colon, value


class Engine:
    """What the gateway knows of such an engine."""

    def __init__(self, link: Link) -> None:
        self.traits, self.link = Traits("test", BLOCK), link
        self.refuses: BaseException | None = None

    async def render(self, draft: Draft) -> Rendered:
        if self.refuses is not None:
            raise self.refuses
        return RenderedIds(tuple(draft.body["prompt"]), "m")

    async def load(self) -> int | None:
        _, raw = await self.link.get("/load")
        return int(msgspec.json.decode(raw)["server_load"])

    def cached(self, rendered: Rendered, salt: str) -> int | None:
        return None

    def learn(self, rendered: Rendered, end: int, prompt_tokens: int) -> None:
        pass

    async def close(self) -> None:
        pass


@dataclass
class Bench:
    """A warmer at work, and what it tells. Its clock stands still but where it is moved."""

    server: Server
    desk: Desk
    engine: Engine = field(init=False)
    warmer: Warmer = field(init=False)
    task: "asyncio.Task[None]" = field(init=False)
    now: float = 1000.0
    broken: int = 0
    results: dict[int, Result] = field(default_factory=dict)

    def propose(self, tokens: int, first: int = 0) -> WarmJob:
        ids = list(range(first, first + tokens))
        draft = Draft(Dialect.COMPLETIONS, {"prompt": ids}, (b"",))
        keys = prompt_keys(b"root", [struct.pack(f"<{tokens}I", *ids)])
        job = self.desk.propose(
            draft, keys, "s", "ann", "hint", self.now, resolved=lambda result: self.results.update({first: result})
        )
        self.warmer.wake()
        return job

    def broke(self) -> None:
        self.broken += 1

    async def pass_time(self, seconds: float) -> None:
        """And give everybody time to notice."""
        self.now += seconds
        self.warmer.wake()
        await asyncio.sleep(0.02)

    async def until_resolved(self, jobs: int = 1) -> list[Result]:
        while len(self.results) < jobs:
            await self.pass_time(0.01)
        return list(self.results.values())


@asynccontextmanager
async def warming(*, beside_live: int = 0, serves: bool = True, is_there: bool = True) -> AsyncIterator[Bench]:
    """An engine, and a warmer before it; in the end nothing may be left of it."""
    server = Server()
    if serves:
        server.serves.set()
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    if not is_there:
        listener.close()
        await listener.wait_closed()
    others = asyncio.all_tasks()
    async with open_links(GatewaySettings(upstreams=(UpstreamSettings(server.url),))) as (link,):
        bench = Bench(server, Desk(SpeculationSettings(), None, lambda session: None))
        bench.engine = Engine(link)
        bench.warmer = Warmer(link, bench.desk, Pace(), lambda: bench.now, beside_live)
        bench.warmer.engine, bench.warmer.broke = bench.engine, bench.broke
        bench.task = asyncio.create_task(bench.warmer.run())
        try:
            yield bench
        finally:
            bench.task.cancel()
            await asyncio.wait([bench.task])
            ours = [task for task in asyncio.all_tasks() - others if "handle" not in repr(task.get_coro())]
            assert not [task for task in ours if "Warmer" in repr(task.get_coro())]
    listener.close()


async def _until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.002)


@story
async def test_a_context_is_warmed_piece_by_piece() -> None:
    async with warming() as bench:
        bench.propose(272)
        assert await bench.until_resolved() == [Result(Outcome.WARM, 256)]
        assert bench.server.found(tuple(range(272))) == 256
        ends = [tokens for tokens, _ in bench.server.asked]
        assert len(ends) > 3
        assert ends == sorted(ends)
        assert all(tokens - found <= 4 * BLOCK + 1 for tokens, found in bench.server.asked)


@story
async def test_a_piece_gives_way_at_once_and_the_next_goes_on_from_where_it_was() -> None:
    async with warming() as bench:
        job = bench.propose(272)
        await _until(lambda: job.warm >= 64)
        bench.server.serves.clear()
        before = len(bench.server.asked)
        await _until(lambda: len(bench.server.asked) > before)
        started_at = job.warm
        assert bench.warmer.live_began()
        await _until(lambda: bench.server.left == 1)
        bench.server.serves.set()
        bench.warmer.live_ended()
        assert await bench.until_resolved() == [Result(Outcome.WARM, 256)]
        assert bench.server.asked[before + 1][1] == started_at
        assert bench.warmer.given_up == 1


@story
async def test_nothing_is_warmed_while_somebody_is_served() -> None:
    async with warming() as bench:
        assert not bench.warmer.live_began()  # there was no piece before it
        bench.warmer.live_began()
        bench.propose(272)
        for _ in range(5):
            await bench.pass_time(1.0)
        bench.warmer.live_ended()
        await bench.pass_time(1.0)
        assert bench.server.asked == []
        bench.warmer.live_ended()
        assert (await bench.until_resolved())[0].outcome is Outcome.WARM


@story
async def test_beside_a_few_live_requests_warming_may_go_on() -> None:
    async with warming(beside_live=1, serves=False) as bench:
        bench.propose(272)
        await _until(lambda: bench.server.asked)
        assert not bench.warmer.live_began()
        assert bench.warmer.live_began()
        await _until(lambda: bench.server.left == 1)
        bench.server.serves.set()
        bench.warmer.live_ended()
        assert (await bench.until_resolved())[0].outcome is Outcome.WARM


@story
async def test_while_others_are_at_the_engine_nothing_is_warmed() -> None:
    async with warming() as bench:
        bench.server.load = 1
        bench.propose(272)
        for _ in range(10):
            await bench.pass_time(1.0)
        assert bench.server.asked == []
        bench.server.load = 0
        assert (await bench.until_resolved())[0].outcome is Outcome.WARM


def _refusing(status: int) -> Callable[[], None]:
    @story
    async def run() -> None:
        async with warming() as bench:
            bench.server.status = status
            bench.propose(272)
            for refusals, pause_s in enumerate((0.5, 1.0, 2.0, 4.0), start=1):
                while bench.warmer.refused < refusals:
                    await asyncio.sleep(0.002)
                await bench.pass_time(0.9 * pause_s)
                assert len(bench.server.asked) == refusals
                await bench.pass_time(0.2 * pause_s)
            await _until(lambda: bench.results)
            result = bench.results[0]
            assert result.outcome is Outcome.FAILED
            assert str(status) in result.reason
            assert len(bench.server.asked) == bench.warmer.refused == 5
            assert bench.broken == 0

    return run


@pytest.mark.parametrize("status", [429, 503])
def test_an_engine_that_refuses_is_left_alone_longer_each_time(status: int) -> None:
    _refusing(status)()


@story
async def test_refusals_that_end_are_no_failure() -> None:
    async with warming() as bench:
        bench.server.status = 503
        bench.propose(272)
        await _until(lambda: bench.warmer.refused == 1)
        bench.server.status = 200
        assert (await bench.until_resolved())[0].outcome is Outcome.WARM


@story
async def test_a_request_that_the_engine_calls_bad_fails_and_others_go_on() -> None:
    async with warming() as bench:
        bench.server.status = 400
        bench.propose(272)
        results = await bench.until_resolved()
        assert results == [Result(Outcome.FAILED, 0, "the engine refuses it with status 400")]
        assert len(bench.server.asked) == 1
        bench.server.status = 200
        bench.propose(272, first=10_000)
        assert (await bench.until_resolved(2))[1].outcome is Outcome.WARM


@pytest.mark.parametrize("error", [InvalidRequest("it is too long"), RuntimeError("a defect")])
def test_a_context_that_cannot_be_rendered_fails_and_others_go_on(error: BaseException) -> None:
    @story
    async def run() -> None:
        async with warming() as bench:
            bench.engine.refuses = error
            bench.propose(272)
            assert (await bench.until_resolved())[0].outcome is Outcome.FAILED
            bench.engine.refuses = None
            bench.propose(272, first=10_000)
            while len(bench.results) < 2:
                await bench.pass_time(1.0)
            assert bench.results[10_000].outcome is Outcome.WARM

    run()


@story
async def test_an_engine_that_is_not_there_is_said_to_be_and_left_alone() -> None:
    async with warming(is_there=False) as bench:
        job = bench.propose(272)
        await _until(lambda: bench.broken == 1)
        await bench.pass_time(0.2)
        assert bench.broken == 1
        await bench.pass_time(0.4)
        await _until(lambda: bench.broken == 2)
        await bench.pass_time(0.6)
        assert bench.broken == 2
        assert job.ticket.result is None


@story
async def test_an_engine_that_keeps_nothing_is_not_warmed_for_ever() -> None:
    async with warming() as bench:
        bench.server.keeps = False
        bench.propose(4000)
        results = await bench.until_resolved()
        assert results == [Result(Outcome.FAILED, results[0].tokens, "the engine does not keep what is warmed")]
        assert len(bench.server.asked) < 12


@story
async def test_a_moment_that_has_come_does_not_keep_others_from_working() -> None:
    async with warming() as bench:
        bench.warmer.live_began()
        bench.propose(272)
        bench.now = bench.desk.preloads.next_expiry  # it is over just after this
        bench.desk.foresight.planner._known.clear()
        bench.warmer.live_ended()
        await asyncio.sleep(0.02)
        assert not bench.results
        assert (await bench.until_resolved())[0].outcome is Outcome.EXPIRED


@story
async def test_what_the_engine_has_already_is_asked_for_and_not_computed() -> None:
    async with warming() as bench:
        bench.server.held.update(tuple(range(end)) for end in range(BLOCK, 273, BLOCK))
        bench.propose(280)  # a block that ends with its prompt is computed again
        assert await bench.until_resolved() == [Result(Outcome.ALREADY_WARM, 256)]
        assert bench.desk.computed_tokens == 0


@story
async def test_an_engine_that_has_lost_what_was_believed_is_warmed_from_the_beginning() -> None:
    async with warming() as bench:
        bench.propose(272)
        await bench.until_resolved()
        bench.server.held.clear()
        before = len(bench.server.asked)
        job = bench.propose(656)
        bench.results.clear()
        await bench.until_resolved()
        assert bench.server.found(tuple(range(656))) == 640
        longest = max(tokens - found for tokens, found in bench.server.asked[before:])
        assert longest <= 4 * BLOCK + 1  # what was believed was asked for first
        assert job.lost >= 1


@story
async def test_what_live_requests_have_displaced_meanwhile_is_no_reason_for_a_long_piece() -> None:
    async with warming() as bench:
        bench.desk.replica.set_capacity(1024)
        job = bench.propose(912)
        await _until(lambda: job.warm >= 512)
        bench.warmer.live_began()
        await asyncio.sleep(0.05)  # the piece that was under way may still reach the engine
        bench.server.held.clear()
        others = [bytes([number]) for number in range(8)]
        bench.desk.ended("t", "bob", "stop", others, bench.now + 1.0)
        before = len(bench.server.asked)
        bench.warmer.live_ended()
        while not bench.results:
            await bench.pass_time(1.0)
        assert all(tokens - found <= 4 * BLOCK + 1 for tokens, found in bench.server.asked[before:])


@story
async def test_a_warmed_context_is_found_by_the_request_that_comes() -> None:
    async with warming() as bench:
        job = bench.propose(272)
        await bench.until_resolved()
        keys = [*job.keys, b"more"]
        found = bench.desk.find(keys)
        bench.desk.requested("s", "ann", keys, bench.now)
        bench.desk.served("s", "ann", keys, found, None, bench.now)
        assert (found.how, job.ticket.use) == ("preloaded", Use.USED)


@story
async def test_without_an_engine_nothing_is_done_until_there_is_one() -> None:
    async with warming() as bench:
        bench.warmer.engine = None
        job = bench.propose(272)
        await bench.pass_time(1.0)
        assert bench.server.asked == []
        assert job.ticket.result is None
        bench.warmer.engine = bench.engine
        assert (await bench.until_resolved())[0].outcome is Outcome.WARM


@story
async def test_a_warmer_that_is_stopped_leaves_no_piece_behind() -> None:
    async with warming(serves=False) as bench:
        bench.propose(272)
        await _until(lambda: bench.server.asked)
        piece = bench.warmer._piece
        assert piece is not None
        bench.task.cancel()
        await asyncio.wait([bench.task])
        assert bench.task.cancelled()
        assert piece.done()
        await _until(lambda: bench.server.left == 1)


@story
async def test_a_tokenizer_that_cannot_be_reached_stops_warming_for_a_while() -> None:
    async with warming() as bench:
        bench.engine.refuses = UpstreamGone("cannot be reached")
        bench.propose(272)
        await _until(lambda: bench.broken == 1)
        bench.engine.refuses = None
        assert (await bench.until_resolved())[0].outcome is Outcome.WARM
