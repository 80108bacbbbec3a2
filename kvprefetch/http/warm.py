"""`max_tokens: 0`: warm this prompt, produce nothing.

The prompt's exact tokens become a hint that is sure to be used; the answer comes once it has an outcome, or when
the patience is at its end, and says what came of it. Speculation uses idle time alone, so on a busy worker it may
take long; the hint lives on.
"""

import anyio

from kvprefetch.http.answer import Json
from kvprefetch.outcomes import Result
from kvprefetch.worker.hints import Prefetch

PATIENCE_S = 60.0
_FIRST_LOOK_S, _LAST_LOOK_S = 0.002, 0.05


async def outcome_of(hint: Prefetch, patience_s: float = PATIENCE_S) -> Result | None:
    """Its outcome, or None if it has none in time. Looks from time to time, so that nobody waits on a thread."""
    pause = _FIRST_LOOK_S
    with anyio.move_on_after(patience_s):
        while True:
            try:
                return hint.wait(0)
            except TimeoutError:
                await anyio.sleep(pause)
            pause = min(pause * 1.5, _LAST_LOOK_S)
    return None


def said_of(result: Result | None) -> Json:
    """The field that says it beside OpenAI's own: `tokens` are resident, and `reason` says why not all are."""
    if result is None:
        said = {"outcome": "pending", "tokens": 0, "reason": "the worker was busy; it will be warmed when it is idle"}
    else:
        said = {"outcome": result.outcome.value, "tokens": result.tokens, "reason": result.reason}
    return {"kvprefetch": said}
