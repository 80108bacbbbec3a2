"""Messages to tokens, by the model's own chat template: whole prompts, and the prefix worth warming.

The warmed prefix must be exactly what the coming request will start with. Templates strip reasoning from
earlier turns, insert dates and tools, and text tokenises differently across a boundary; so the context is
rendered with two different continuations and only the common token prefix is kept.
"""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import jinja2

from kvprefetch.contexts import Context, Message
from kvprefetch.errors import InvalidRequest

_PROBES = ("What does it do?", "7 (in short)")  # differ from their first character on


class Renderer:
    """Renders with one tokenizer and its chat template. Thread-safe: it keeps no state."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def prompt(self, context: Context) -> list[int]:
        """Tokens of a request: the context's messages and the generation prompt, or its exact token ids."""
        if context.token_ids:
            return list(context.token_ids)
        return self._render(context.messages, context)

    def prefix(self, context: Context) -> list[int]:
        """Tokens that every request continuing `context` starts with."""
        if context.token_ids:
            return list(context.token_ids)
        try:
            first, second = (self._render((*context.messages, self._next(context, p)), context) for p in _PROBES)
        except InvalidRequest:  # the template wants roles to alternate: the last message itself goes on
            first, second = (self._render(_extended(context.messages, p), context) for p in _PROBES)
        common = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        return [token for token, _ in common]

    def _next(self, context: Context, text: str) -> Message:
        """A likely next message: a tool's result after a tool call, else the user's words."""
        role = "tool" if context.messages[-1].get("tool_calls") else "user"
        return {"role": role, "content": text}

    def _render(self, messages: tuple[Message, ...], context: Context) -> list[int]:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InvalidRequest("the model has no chat template: give token_ids instead of messages")
        options: Mapping[str, Any] = context.chat_template_kwargs
        try:
            # tokenised with the template's text alone: adding special tokens would double the first one
            tokens: list[int] = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in context.tools] or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **options,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}") from error
        return tokens


def _extended(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    last = messages[-1]
    content = last.get("content")
    if not isinstance(content, str):
        raise InvalidRequest("the chat template refuses a further message, and the last one holds no plain text")
    return (*messages[:-1], {**last, "content": f"{content}{text}"})
