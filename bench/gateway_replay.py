"""Agents' sessions replayed with their real gaps, several at once, at an engine whose cache holds half of them.

Arms: the engine alone, the gateway without speculation, and the gateway. Each plays the same sessions in the same order
with the same gaps, `AT_ONCE` of them at any time; sessions are told apart by what they say, no header names them.
Groups of sessions are played by all arms in turn, each group beginning with another arm. The first words of a session
are the arm's own, so that no arm finds what another has computed. The pool of the engine is `PRESSURE` of what the
sessions of the same time have in the end. This engine is a small model on a processor: beside its speed a gap of a
second is short, and the sessions that it serves at once leave it little idle time; a row with gaps drawn out says what
more of it gives.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from gateway_bench import percentile, spread
from gateway_client import Asked, Client, Json
from gateway_engine import BLOCK, start_gateway
from gateway_sessions import AROUND, SCALE, Call, fitting, recorded, scaled
from gateway_texts import Texts
from results_format import Results

AT_ONCE = 4
PRESSURE = 0.5
LONGEST = 2_560  # tokens of a session at its end
ALONE, PASSIVE, GATEWAY = "engine alone", "gateway, no speculation", "gateway"
ARMS = (ALONE, PASSIVE, GATEWAY)


@dataclass(frozen=True)
class Turn:
    """One call, as it was answered."""

    session: int
    number: int
    asked: Asked


@dataclass(frozen=True)
class Extent:
    """How much is played: `groups` of so many sessions, the first `turns` calls of each, gaps times `drawn_out`."""

    groups: int
    sessions: int
    turns: int
    drawn_out: float = 1.0


class Replay:
    """All arms before one engine."""

    def __init__(self, engine: str, sessions: list[list[Call]]) -> None:
        self.engine, self.sessions = engine, sessions
        self.spent: list[Json] = []  # what the gateways' own figures were in the end

    async def run(self, extent: Extent) -> dict[str, list[Turn]]:
        """The turns of each arm, in the same order."""
        found: dict[str, list[Turn]] = {arm: [] for arm in ARMS}
        for group in range(extent.groups):
            numbers = range(group * extent.sessions, min((group + 1) * extent.sessions, len(self.sessions)))
            for place in range(len(ARMS)):
                arm = ARMS[(place + group) % len(ARMS)]
                async with self._before(arm) as client:
                    turns = await self._play(client, arm, list(numbers), extent)
                    if arm == GATEWAY:
                        self.spent.append(await client.stats())
                found[arm] += turns
                print(f"   {arm}: {len(turns)} turns, p50 {median(t.asked.ttft_s for t in turns):.2f} s", flush=True)
        return {arm: sorted(turns, key=lambda turn: (turn.session, turn.number)) for arm, turns in found.items()}

    @asynccontextmanager
    async def _before(self, arm: str) -> AsyncIterator[Client]:
        if arm == ALONE:
            async with Client(self.engine) as client:
                yield client
            return
        with start_gateway(self.engine, speculation=arm == GATEWAY) as served:
            async with Client(served.url) as client:
                yield client

    async def _play(self, client: Client, arm: str, numbers: list[int], extent: Extent) -> list[Turn]:
        """So many sessions at any time."""
        waiting, found = numbers[::-1], []

        async def play() -> None:
            while waiting:
                number = waiting.pop()
                calls = self.sessions[number][: extent.turns]
                words = f"{arm}, {extent.drawn_out}, {number}\n"
                found.extend(await _session(client, number, calls, words, extent.drawn_out))

        await asyncio.gather(*(play() for _ in range(AT_ONCE)))
        return found


async def _session(client: Client, number: int, calls: list[Call], words: str, drawn_out: float) -> list[Turn]:
    messages: list[Json] = []
    found = []
    for turn, call in enumerate(calls):
        messages.append({"role": "user", "content": ("" if turn else words) + call.text})
        asked = await client.chat(messages, call.answer_tokens)
        found.append(Turn(number, turn, asked))
        messages.append({"role": "assistant", "content": asked.text})
        if turn + 1 < len(calls):
            await asyncio.sleep(call.gap_s * drawn_out)
    return found


@dataclass(frozen=True)
class Prepared:
    """Sessions that fit, and the engine's pool in which only a share of them has room at once."""

    sessions: list[list[Call]]
    pool_tokens: int
    working_set_tokens: int

    @property
    def flags(self) -> tuple[str, ...]:
        """For vLLM, which keeps one block empty."""
        return ("--num-gpu-blocks-override", str(self.pool_tokens // BLOCK + 1))


def prepare(texts: Texts, file: Path, extents: Sequence[Extent]) -> Prepared:
    """What all extents need. vLLM's pool must hold the longest prompt that it allows: here that is the whole pool."""

    def tokens_of(text: str) -> int:
        return len(texts.encode(text))

    turns = max(extent.turns for extent in extents)
    played = max(extent.groups * extent.sessions for extent in extents)
    sessions = [fitting(scaled(calls), LONGEST, turns, tokens_of) for calls in recorded(file)[:played]]
    ends = [sum(tokens_of(call.text) + call.answer_tokens + AROUND for call in calls) for calls in sessions]
    working_set = AT_ONCE * mean(ends)
    pool = max(int(PRESSURE * working_set), LONGEST + 2 * BLOCK) // BLOCK * BLOCK
    return Prepared(sessions, pool, round(working_set))


async def replay(engine: str, prepared: Prepared, results: Results, extents: Sequence[Extent]) -> None:
    """A row for each extent, and the figures, which are those of the first."""
    pool = {"pool_tokens": prepared.pool_tokens, "working_set_tokens": prepared.working_set_tokens}
    for number, extent in enumerate(extents):
        run = Replay(engine, prepared.sessions)
        found = await run.run(extent)
        how = {"scale": SCALE, "at_once": AT_ONCE, "drawn_out": extent.drawn_out, **pool}
        row = row_of(found, run.spent)
        results.rows.append({"section": "replay", **how, **row})
        print(results.rows[-1], flush=True)
        if not number:
            names = ("replay_ttft_ratio_p50", "replay_ttft_ratio_mean", "replay_computed_per_useful")
            results.figures |= {name: row[name] for name in names if row[name] is not None}


def row_of(found: dict[str, list[Turn]], spent: list[Json]) -> dict[str, Any]:
    """All arms; ratios are the gateway's over another's. Raises RuntimeError where arms did not play the same."""
    calls = {arm: [(turn.session, turn.number) for turn in turns] for arm, turns in found.items()}
    if any(calls[arm] != calls[ALONE] for arm in ARMS):
        raise RuntimeError("the arms did not play the same calls; no times reported")
    times = {arm: [turn.asked.ttft_s for turn in turns] for arm, turns in found.items()}
    row: dict[str, Any] = {"turns": len(times[ALONE])}
    for arm, name in ((ALONE, "alone"), (PASSIVE, "passive"), (GATEWAY, "gateway")):
        row |= {key: round(value, 4) for key, value in spread(times[arm], f"{name}_s").items()}
        prompts = sum(turn.asked.prompt_tokens for turn in found[arm])
        row[f"{name}_cached_share"] = round(sum(turn.asked.cached for turn in found[arm]) / prompts, 4)
    for other, suffix in ((ALONE, ""), (PASSIVE, "_over_passive")):
        for percent in (50, 95):
            ratio = percentile(times[GATEWAY], percent) / percentile(times[other], percent)
            row[f"replay_ttft_ratio_p{percent}{suffix}"] = round(ratio, 4)
        row[f"replay_ttft_ratio_mean{suffix}"] = round(mean(times[GATEWAY]) / mean(times[other]), 4)
    computed = sum(stats["prefetch"]["tokens_computed"] for stats in spent)
    used = sum(stats["prefetch"]["tokens_used"] for stats in spent)
    row["replay_computed_per_useful"] = round(computed / used, 4) if used else None
    row |= {"units_computed": computed, "units_used": used}
    row["warmed_tokens"] = sum(stats["warmed_tokens"] for stats in spent)
    row["pieces"] = {name: sum(stats["pieces"][name] for stats in spent) for name in ("sent", "given_up", "refused")}
    return row
