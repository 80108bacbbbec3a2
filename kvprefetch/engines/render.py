"""Messages to tokens, by the model's own chat template: whole prompts, and the prefix worth warming.

The warmed prefix must be exactly what the coming request will start with. Templates strip reasoning from
earlier turns, insert dates and tools, and text tokenises differently across a boundary; so the context is
rendered with every kind of continuation that may come and only the common token prefix is kept.
"""

import inspect
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

import jinja2

from kvprefetch.contexts import Context, Message
from kvprefetch.engines.messages import plain
from kvprefetch.errors import InvalidRequest

# How a text may begin, as tokenizers see it: letters, digits, punctuation, spaces, line breaks.
_PROBES = ("What does it do?", "7 (in short)", '{"in": "short"}', "  in short", "\n\nin short")
_ANSWERED = ("user", "tool")  # the model may speak right after these roles
_SHARED = {"documents"}  # an option of the call that is the template's variable as well
_LONGEST_WORD = 24  # characters; where there are no spaces, no more than this is taken for one word
_REFUSALS = (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError)
Messages = tuple[Message, ...]


class Renderer:
    """Renders with one tokenizer and its chat template. Thread-safe: it keeps no state."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # options of the library's own call are no caller's to set, a template least of all
        call = getattr(tokenizer, "apply_chat_template", None)
        self.reserved = set(inspect.signature(call).parameters) - _SHARED if call else set()

    def prompt(self, context: Context) -> list[int]:
        """Tokens of a request: the context's messages and the generation prompt, or its exact token ids."""
        if context.token_ids:
            return list(context.token_ids)
        return self._tokens([self._text(context.messages, context)])[0]

    def prefix(self, context: Context) -> list[int]:
        """Tokens that every request continuing `context` starts with."""
        if context.token_ids:
            return list(context.token_ids)
        rows = self._tokens(self._continuations(context))
        # what the first and the last in lexical order share, all share
        common = takewhile(lambda pair: pair[0] == pair[1], zip(min(rows), max(rows), strict=False))
        tokens = [token for token, _ in common]
        if tokens and tokens[-1] not in self.tokenizer.added_tokens_decoder:
            tokens.pop()  # it may still merge with what comes
        return tokens

    def _continuations(self, context: Context) -> list[str]:
        _check(context.messages)
        messages = plain(context.messages)
        further = [(*messages, _next(messages[-1], probe)) for probe in _PROBES]
        # a template that wants roles to alternate refuses these: there the last message itself may go on
        texts = self._accepted(further, context) or self._accepted(_extended(messages), context)
        if messages[-1]["role"] in _ANSWERED:
            texts += self._accepted([messages], context)
        return texts or [self._text(further[0], context)]  # which says why it is refused

    def _accepted(self, conversations: Iterable[Messages], context: Context) -> list[str]:
        """The texts of all of them, or none if the template refuses one."""
        try:
            return [self._text(messages, context) for messages in conversations]
        except InvalidRequest:
            return []

    def _text(self, messages: Messages, context: Context) -> str:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InvalidRequest("the model has no chat template: give token_ids instead of messages")
        _check(messages)
        options: Mapping[str, Any] = context.chat_template_kwargs
        reserved = sorted(self.reserved & options.keys())
        if reserved:
            raise InvalidRequest(f"chat_template_kwargs: {', '.join(reserved)}: no variable of a template")
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(plain(messages)),
                tools=[dict(tool) for tool in context.tools] or None,
                add_generation_prompt=True,
                tokenize=False,
                **options,
            )
        except _REFUSALS as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}") from error
        return text

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        # The template's text alone: adding special tokens would double the first one. One text at a time:
        # a batch would take every core of the machine from whoever is being served.
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _check(messages: Messages) -> None:
    if not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages):
        raise InvalidRequest("every message must be a mapping with a role")


def _next(last: Message, text: str) -> Message:
    """A likely next message: a tool's result after a tool call or another result, else the user's words."""
    calls = last.get("tool_calls")
    if last["role"] == "tool":
        return {**last, "content": text}
    if not calls:
        return {"role": "user", "content": text}
    call = calls[0] if isinstance(calls, list | tuple) and isinstance(calls[0], Mapping) else {}
    function = call.get("function", call)
    name = function.get("name", "") if isinstance(function, Mapping) else ""
    return {"role": "tool", "name": name, "tool_call_id": call.get("id", "000000000"), "content": text}


def _extended(messages: Messages) -> list[Messages]:
    """The same messages with other words at the end; none if the last one holds no plain text.

    The last word may be the beginning of a longer one, so it is left out.
    """
    content = messages[-1].get("content")
    if not isinstance(content, str):
        return []
    text = content.rstrip()
    words = text[-_LONGEST_WORD:].rsplit(None, 1)
    rest = text[: len(text) - len(words[-1])].rstrip() if words else ""
    return [(*messages[:-1], {**messages[-1], "content": rest + probe}) for probe in _PROBES]
