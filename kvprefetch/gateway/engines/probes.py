"""The nearest next turn of a conversation, made up: it shows where what is shared with any next request ends. Pure.

A chat template treats a turn by what follows it: thinking is dropped from turns that are no longer the last, results of
tools are put together. So a beginning is rendered as it will be only if something follows. Two requests that go on
from it with different words share the draft's tokens, and no others.
"""

from collections.abc import Callable
from itertools import takewhile

from kvprefetch.gateway.contract import Dialect, Json
from kvprefetch.gateway.wire.conversation import CONVERSATIONS
from kvprefetch.gateway.wire.fields import an_object, objects

WORDS = ("0", "a")  # tokens of different kinds, which white space before them is not merged with


def next_turn(dialect: Dialect, said: list[Json], words: str) -> list[Json]:
    """What comes after the last of the messages or items: results of its calls, an answer to it, or a question."""
    last = said[-1] if said else {}
    results = _RESULTS[dialect](said, words)
    if results:
        return results
    is_asked = last.get("role") in ("user", "tool", "function") or last.get("type") == "function_call_output"
    return [{"role": "assistant" if is_asked else "user", "content": words}]


def two_ways(messages: list[Json]) -> tuple[list[Json], list[Json]]:
    """A chat's messages, going on in two ways whose shared prefix is the messages'.

    After a question, the answer is once the last turn and once not, as templates may begin the two differently.
    """
    one, other = ([*messages, *next_turn(Dialect.CHAT, messages, words)] for words in WORDS)
    if messages and messages[-1].get("role") == "user":
        other.append({"role": "user", "content": WORDS[0]})
    return one, other


def followed(dialect: Dialect, body: Json, words: str = WORDS[0]) -> Json:
    """`body` with its nearest next turn, if that is not the model's own: then a request for an answer has none."""
    form = CONVERSATIONS[dialect]
    said = form.items(body)
    after = next_turn(dialect, said, words)
    return body if after[-1].get("role") == "assistant" else {**body, form.KEY: [*said, *after]}


def _chat_results(said: list[Json], words: str) -> list[Json]:
    calls = objects(said[-1].get("tool_calls")) if said else []
    return [{"role": "tool", "tool_call_id": call.get("id", ""), "content": words} for call in calls]


def _responses_results(said: list[Json], words: str) -> list[Json]:
    calls = list(takewhile(lambda item: item.get("type") == "function_call", reversed(said)))[::-1]
    return [{"type": "function_call_output", "call_id": call.get("call_id", ""), "output": words} for call in calls]


def _messages_results(said: list[Json], words: str) -> list[Json]:
    last = said[-1] if said else {}
    calls = [block for block in objects(last.get("content")) if an_object(block).get("type") == "tool_use"]
    if last.get("role") != "assistant" or not calls:
        return []
    results = [{"type": "tool_result", "tool_use_id": call.get("id", ""), "content": words} for call in calls]
    return [{"role": "user", "content": results}]


def _no_results(said: list[Json], words: str) -> list[Json]:
    return []


_RESULTS: dict[Dialect, Callable[[list[Json], str], list[Json]]] = {
    Dialect.CHAT: _chat_results,
    Dialect.RESPONSES: _responses_results,
    Dialect.MESSAGES: _messages_results,
    Dialect.COMPLETIONS: _no_results,
}
