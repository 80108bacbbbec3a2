"""A tenant that asks briefly, beside one that has a queue of 8,192-token prompts all the time, on a replayed worker.

Prefill takes turns by chunks of the worker's default size; under FIFO whole prompts go one after the other. Synthetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from fairness_policies import maker_of
from policies_runs import machine_of

from kvprefetch.settings import EngineSettings
from kvprefetch.sim.together import Together, ttft_p99
from kvprefetch.sim.trace import Request, Trace

SECONDS = 600.0
INTERACTIVE, BATCH = "interactive", "batch"
_SCOPE = 1 << 40


@dataclass(frozen=True)
class Beside:
    """What is asked, in tokens and per second. The batch is more than the engine can do, and begins with a queue."""

    tokens: int = 1_024
    per_s: float = 2.0
    batch_tokens: int = 8_192
    batch_per_s: float = 4.0
    queued: int = 32


def interactive(policies: Sequence[str], seed: int, beside: Beside = Beside()) -> dict[str, dict[str, float]]:
    """By policy: the interactive tenant's p99 TTFT alone and beside the batch, in seconds, and their ratio."""
    machine, random = machine_of(), Random(seed)
    machine = replace(machine, slice_s=machine.prefill_s(0, EngineSettings().chunk_tokens))
    asked = _poisson(INTERACTIVE, beside.tokens, beside.per_s, random, machine.block_tokens)
    batch = _poisson(BATCH, beside.batch_tokens, beside.batch_per_s, random, machine.block_tokens)
    batch[: beside.queued] = [replace(request, at=0.0) for request in batch[: beside.queued]]
    trace = Trace(machine.block_tokens, tuple((request,) for request in asked), is_placed=True)
    together, found = Together(trace, machine), dict[str, dict[str, float]]()
    for policy in policies:
        _, make = maker_of(policy, [INTERACTIVE, BATCH])
        alone, queued = ttft_p99(together.serve(make)), ttft_p99(together.serve(make, batch))
        found[policy] = {"alone_p99_s": alone, "queued_p99_s": queued, "ratio": queued / alone}
    return found


def _poisson(tenant: str, tokens: int, per_s: float, random: Random, block_tokens: int) -> list[Request]:
    """Unique prompts."""
    found, blocks = list[Request](), tokens // block_tokens
    first = _SCOPE * (INTERACTIVE, BATCH).index(tenant)
    at = random.expovariate(per_s)
    while at < SECONDS:
        number = len(found)
        path = ((first + number * (blocks + 1), blocks),)
        found.append(Request(f"{tenant}-{number}", tenant, at, tokens, 100, None, path))
        at += random.expovariate(per_s)
    return found
