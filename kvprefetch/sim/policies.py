"""Policies by name."""

from collections.abc import Callable

from kvprefetch.errors import InvalidRequest
from kvprefetch.sim.baselines import Belady, GpuLru, NextTurn, Reactive, Trigger, Ttl
from kvprefetch.sim.future import Future
from kvprefetch.sim.ours import ByIndex, Planned
from kvprefetch.sim.worker import Strategy

NAMES = (
    "gpu-lru, reactive, ttl:S, pause, next-turn, trigger, oracle:L, belady, by-index, kvprefetch[:B], "
    "kvprefetch-inferred[:B]"
)
HOLD_S = 300.0
"""How long the policies without judgement hold a preload."""


def make_strategy(name: str, future: Callable[[], Future]) -> Callable[[], Strategy]:
    """A maker of strategies, one per worker. Raises InvalidRequest for an unknown name.

    `trigger` believes every signal; `oracle:L` is `trigger` with perfect signals L seconds ahead. `kvprefetch:B` moves
    at most B tokens per useful one in the long run.
    """
    word, _, argument = name.partition(":")
    try:
        number = float(argument) if argument else None
    except ValueError as error:
        raise InvalidRequest(f"policy {name!r}: {argument!r} is not a number of seconds") from error
    if word in _SIMPLE and number is None:
        return _SIMPLE[word]
    if word in _BUDGETS:
        budget = _BUDGETS[word] if number is None else number
        return lambda: Planned(budget, infers=word == "kvprefetch-inferred")
    if word == "ttl" and number is not None:
        return lambda: Ttl(number)
    if word == "oracle" and number is not None:
        return lambda: Trigger(HOLD_S)
    if word == "belady" and number is None:
        return lambda: Belady(future())
    raise InvalidRequest(f"no policy {name!r}; there are {NAMES}")


_SIMPLE: dict[str, Callable[[], Strategy]] = {
    "gpu-lru": GpuLru,
    "reactive": Reactive,
    "pause": lambda: NextTurn(HOLD_S),
    "next-turn": lambda: NextTurn(float("inf")),
    "trigger": lambda: Trigger(HOLD_S),
    "by-index": ByIndex,
}
_BUDGETS = {"kvprefetch": 2.3, "kvprefetch-inferred": 4.0}
"""Tokens moved per useful one, at most. Transfers are nearly free where nobody waits for the link."""
