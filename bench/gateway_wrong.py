"""Live traffic while all hints are wrong: each request's session names a context that is never used.

Prompts of 64 to 512 tokens come at random moments, whether earlier ones are answered or not, through the gateway. The
very same schedule of moments and lengths is played without hints and with one wrong hint beside each request; both
take turns in which is first.
"""

import asyncio
import random
import time
from dataclasses import dataclass

from gateway_bench import Bench, percentile, spread
from gateway_client import COMPLETIONS, Client

SHORTEST, LONGEST = 64, 512
HINTED = 1_024  # tokens of a wrong context
MEAN_GAP_S = 1.5
SESSIONS = 8


@dataclass(frozen=True)
class Arrival:
    """A request to come."""

    at_s: float
    tokens: int
    session: str


def arrivals(requests: int, seed: int) -> list[Arrival]:
    """At random, on the average one each `MEAN_GAP_S`."""
    draw, at, found = random.Random(seed), 0.0, []
    for number in range(requests):
        at += draw.expovariate(1 / MEAN_GAP_S)
        found.append(Arrival(at, draw.randint(SHORTEST, LONGEST), f"session {number % SESSIONS}"))
    return found


async def wrong_hints(bench: Bench, pairs: int, requests: int) -> None:
    """`pairs` times both arms with so many requests; the rows and figures."""
    times: dict[bool, list[float]] = {False: [], True: []}
    async with bench.through() as gateway:
        await bench.exercise(gateway)
        for pair in range(pairs):
            plan = arrivals(requests, bench.results.seed + pair)
            for hinting in (False, True) if pair % 2 else (True, False):
                times[hinting] += await _play(bench, gateway, plan, hinting)
        stats = await gateway.stats()
    row = {**spread(times[False], "plain_s"), **spread(times[True], "hints_s")}
    ratios = {f"ratio_p{p}": percentile(times[True], p) / percentile(times[False], p) for p in (50, 95)}
    more = {"hints": stats["prefetch"]["outcomes"], "warmed_tokens": stats["warmed_tokens"], "pieces": stats["pieces"]}
    bench.row("wrong hints", n=pairs * requests, mean_gap_s=MEAN_GAP_S, hinted=HINTED, **row, **ratios, **more)
    for name, ratio in ratios.items():
        bench.results.figures[f"wrong_hints_{name}"] = ratio


async def _play(bench: Bench, gateway: Client, plan: list[Arrival], hinting: bool) -> list[float]:
    """The times to the first tokens. What is still to be warmed at the end is withdrawn."""
    began, hints, asked = time.monotonic(), [], []
    for arrival in plan:
        prompt, wrong = bench.texts.ids(arrival.tokens), bench.texts.ids(HINTED)
        await asyncio.sleep(max(began + arrival.at_s - time.monotonic(), 0.0))
        asked.append(asyncio.create_task(gateway.complete(prompt)))
        if hinting:
            context = {"endpoint": COMPLETIONS, "prompt": wrong}
            hints.append(asyncio.create_task(gateway.prefetch(context, session=arrival.session)))
    answers = await asyncio.gather(*asked)
    for hint in await asyncio.gather(*hints):
        await gateway.cancel(hint["id"])
    await bench.engine.settle()
    if any(answer.cached for answer in answers):
        raise RuntimeError("a new prompt found tokens ready; no times reported")
    return [answer.ttft_s for answer in answers]
