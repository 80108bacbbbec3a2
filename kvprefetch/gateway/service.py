"""Hints and signals handed on to a cache service, which knows where its workers' sessions will land.

Each tenant speaks with its own token, over a connection of its own; the latest `_CONNECTIONS` of them are kept. Nothing
here blocks the event loop.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

from kvprefetch.client.connect import Connection, connect
from kvprefetch.client.handle import Prefetch
from kvprefetch.contexts import Context
from kvprefetch.errors import InvalidRequest, KVPrefetchError
from kvprefetch.gateway.contract import Dialect, Draft
from kvprefetch.outcomes import Outcome, Result
from kvprefetch.settings import client_token

_CONNECTIONS = 64
_FIRST_LOOK_S, _LAST_LOOK_S = 0.005, 0.25
_LATE_S = 60.0  # after a hint's time is over, within which the service says so


class ServiceHints:
    """See the module's promises. `address` as `kvprefetch.connect` takes it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._by_token: OrderedDict[str, Connection] = OrderedDict()

    def prefetch(
        self, token: str, draft: Draft, session: str, probability: float, expected_in_s: float, hold_s: float | None
    ) -> Prefetch:
        """Give the hint. Raises InvalidRequest for a draft that workers cannot have."""
        connection = self._connection(token)
        return connection.prefetch(
            context_of(draft, connection),
            session=session,
            probability=probability,
            expected_in_s=expected_in_s,
            hold_s=hold_s,
        )

    def signal(self, token: str, kind: str, session: str, drafts: Sequence[Draft]) -> None:
        """Say what was observed; dropped where too many wait to be sent."""
        connection = self._connection(token)
        connection.signal(kind, session=session, contexts=[context_of(draft, connection) for draft in drafts])

    def close(self) -> None:
        """Hang up. Blocks for at most some seconds: to be called when all else is over."""
        while self._by_token:
            self._by_token.popitem()[1].close()

    def _connection(self, token: str) -> Connection:
        found = self._by_token.get(token)
        if found is None:
            found = self._by_token[token] = connect(self.address, token or client_token())
            if len(self._by_token) > _CONNECTIONS:
                _, oldest = self._by_token.popitem(last=False)
                asyncio.get_running_loop().run_in_executor(None, oldest.close)
        self._by_token.move_to_end(token)
        return found


def context_of(draft: Draft, connection: Connection) -> Context:
    """The draft in the service's words. Raises InvalidRequest."""
    body, model = draft.body, str(draft.body.get("model", ""))
    if draft.dialect is Dialect.CHAT and draft.is_text:
        return connection.context(
            body["messages"],
            tools=body.get("tools") or (),
            chat_template_kwargs=body.get("chat_template_kwargs"),
            model=model,
        )
    prompt = body.get("prompt")
    if draft.dialect is Dialect.COMPLETIONS and isinstance(prompt, list):
        return connection.context(token_ids=prompt, model=model)
    raise InvalidRequest("the workers of a cache service take chat messages, or the token ids of a completion")


async def followed(
    handle: Prefetch, resolved: Callable[[Result], None], lasts_s: float, is_kept: Callable[[], bool]
) -> None:
    """Call `resolved` once the service's hint has an outcome: FAILED if it has none some time after `lasts_s`.

    Looks from time to time: no thread waits for it. Ends without a word once nobody keeps the hint any more.
    """
    loop, pause_s = asyncio.get_running_loop(), _FIRST_LOOK_S
    silent_at = loop.time() + lasts_s + _LATE_S
    while (result := _result_of(handle)) is None and is_kept():
        if loop.time() >= silent_at:
            result = Result(Outcome.FAILED, 0, "the service does not answer")
            break
        await asyncio.sleep(pause_s)
        pause_s = min(1.5 * pause_s, _LAST_LOOK_S)
    if result is not None:
        resolved(result)


def _result_of(handle: Prefetch) -> Result | None:
    """Its outcome; None while open."""
    try:
        return handle.wait(0)
    except TimeoutError:
        return None
    except KVPrefetchError as error:  # the service's refusal
        return Result(Outcome.REJECTED, 0, str(error))
