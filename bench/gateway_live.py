"""Live requests while a warm-up of 4,000 tokens is in progress: their first tokens, and tokens that are being decoded.

Prompts of 64 tokens come through the gateway one after the other, at random: the gaps between an answer and the next
request are exponential, 0.7 s on the average. Phases without any warm-up, and phases in which there is always one in
progress (as soon as it is done, the next is asked for), take turns. Beside them, the engine alone: idle, and while a
plain request for one token of a prompt of 4,000 is being answered, which is what a client without a gateway can do.
"""

import asyncio
from contextlib import suppress
from statistics import median

from gateway_bench import Bench, percentile, spread
from gateway_client import COMPLETIONS, Client

LIVE, WARM_UP = 64, 4_000  # tokens of a prompt
MEAN_GAP_S = 0.7
DECODED = 64
_NAIVE_LEAD_S = 0.7  # a live request comes so long after the plain one


class WarmUps:
    """Always one in progress, from `start` to `stop`."""

    def __init__(self, bench: Bench, gateway: Client) -> None:
        self.bench, self.gateway, self.asked, self.done = bench, gateway, 0, 0
        self._task: asyncio.Task[None] | None = None
        self._hint = ""

    async def start(self) -> None:
        """Ask for the first."""
        await self._ask()
        self._task = asyncio.create_task(self._go_on())

    async def stop(self) -> None:
        """Withdraw the last, and wait until the engine is idle."""
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self.gateway.cancel(self._hint)
        await self.bench.engine.settle()

    async def _ask(self) -> None:
        self.asked += 1
        context = {"endpoint": COMPLETIONS, "prompt": self.bench.texts.ids(WARM_UP)}
        self._hint = (await self.gateway.prefetch(context, session=f"warm-up {self.asked}"))["id"]

    async def _go_on(self) -> None:
        while True:
            if (await self.gateway.look(self._hint))["outcome"] is None:
                await asyncio.sleep(0.1)
                continue
            self.done += 1
            await self._ask()


async def live_while_warming(bench: Bench, live: int, decodes: int, naive: int) -> None:
    """All rows, and the figures. `live` requests of each kind."""
    async with bench.through() as gateway:
        await bench.exercise(gateway)
        await _first_tokens(bench, gateway, live)
        await _decodes(bench, gateway, decodes)
    await _naive(bench, naive)


async def _first_tokens(bench: Bench, gateway: Client, live: int, phases: int = 4) -> None:
    idle: list[float] = []
    alone: list[float] = []
    warming: list[float] = []
    warm_ups = WarmUps(bench, gateway)
    before = (await gateway.stats())["warmed_tokens"]
    for phase in range(phases):
        for arm in ("idle", "warming") if phase % 2 else ("warming", "idle"):
            if arm == "warming":
                await warm_ups.start()
                warming += await _ask_at_random(bench, gateway, live // phases)
                await warm_ups.stop()
            else:
                idle += await _ask_at_random(bench, gateway, live // phases)
                alone += await _ask_at_random(bench, bench.engine, live // phases // 2)
    stats = await gateway.stats()
    row = {**spread(idle, "idle_s"), **spread(warming, "warming_s"), **spread(alone, "engine_idle_s")}
    row |= {f"warming_over_idle_p50_at_{p}": percentile(warming, p) / row["idle_s_p50"] for p in (50, 95)}
    row["warming_p95_over_idle_p95"] = row["warming_s_p95"] / row["idle_s_p95"]
    bench.row(
        "live while warming",
        **{"prompt": LIVE, "warm_up": WARM_UP, "mean_gap_s": MEAN_GAP_S, "n": len(warming), **row},
        **{
            "warm_ups": warm_ups.asked,
            "warm_ups_done": warm_ups.done,
            "warmed_tokens": stats["warmed_tokens"] - before,
        },
        **{"pieces": stats["pieces"], "piece_bound_s": stats["piece_bound_s"], "usual_ttft_s": stats["usual_ttft_s"]},
        worst_warming_s=[round(value, 3) for value in sorted(warming)[-5:]],
    )
    bench.results.figures["live_ttft_warming_ratio_p50"] = row["warming_over_idle_p50_at_50"]
    bench.results.figures["live_ttft_warming_ratio_p95"] = row["warming_over_idle_p50_at_95"]


async def _ask_at_random(bench: Bench, client: Client, requests: int) -> list[float]:
    times = []
    for _ in range(requests):
        await asyncio.sleep(bench.texts.random.expovariate(1 / MEAN_GAP_S))
        asked = await client.complete(bench.texts.ids(LIVE))
        if asked.cached:
            raise RuntimeError(f"a new prompt found {asked.cached} tokens ready; no times reported")
        times.append(asked.ttft_s)
    return times


async def _decodes(bench: Bench, gateway: Client, decodes: int) -> None:
    """A warm-up is asked for when the first token has come; the answers must be the same as without."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(decodes):
        prompt, answers = bench.texts.ids(LIVE), {}
        await gateway.complete(prompt)  # both then find the same of it
        for warming in (False, True) if number % 2 else (True, False):
            first, warm_ups = asyncio.Event(), WarmUps(bench, gateway)
            decoding = asyncio.create_task(gateway.complete(prompt, DECODED, first))
            await first.wait()
            if warming:
                await warm_ups.start()
            asked = await decoding
            if warming:
                await warm_ups.stop()
            times[warming].append(asked.token_s)
            answers[warming] = asked.text
            await bench.engine.settle()
    row = {"plain_token_s": median(times[False]), "warming_token_s": median(times[True])}
    ratio = median(warm / plain for warm, plain in zip(times[True], times[False], strict=True))
    bench.row("decoding while warming", n=decodes, tokens=DECODED, **row, warming_over_plain_p50=ratio)
    bench.results.figures["tpot_warming_ratio"] = ratio


async def _naive(bench: Bench, requests: int) -> None:
    """Without a gateway: the context is sent in one piece."""
    times = []
    for _ in range(requests):
        plain = asyncio.create_task(bench.engine.complete(bench.texts.ids(WARM_UP), 1))
        await asyncio.sleep(_NAIVE_LEAD_S)
        times.append((await bench.engine.complete(bench.texts.ids(LIVE))).ttft_s)
        await plain
        await bench.engine.settle()
    bench.row("live beside a plain request of 4,000 tokens, no gateway", n=requests, **spread(times, "live_s"))
