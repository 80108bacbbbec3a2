"""POST /v1/chat/completions: what is read of its body, and how its answers are written.

Tools reach the model through its chat template; a call that the model makes is in the answer's text, as the model
wrote it: each family has a notation of its own, and a wrong guess would lose text.
"""

from typing import Any

from starlette.datastructures import Headers

from kvprefetch.engines.messages import plain
from kvprefetch.engines.render import Renderer
from kvprefetch.http.answer import Form
from kvprefetch.http.ask import Ask, common, most_tokens
from kvprefetch.http.fields import Fields
from kvprefetch.http.problems import InvalidField


def read_chat(fields: Fields, headers: Headers, model: str, renderer: Renderer) -> Ask:
    """Raises InvalidRequest, UnknownModel."""
    said = common(fields, headers, model)
    messages = fields.objects("messages")
    if not messages:
        raise InvalidField("messages", "must be a list of at least one message")
    fields.only("logprobs", False)
    fields.only("top_logprobs", 0)
    fields.only("modalities", ["text"])
    fields.only("add_generation_prompt", True)
    fields.only("continue_final_message", False)
    for name in ("functions", "function_call", "audio", "structured_outputs", "guided_json"):
        fields.only(name)
    fields.only("tool_choice", "auto", "none", why="only auto and none are supported here")
    most = most_tokens(fields, "max_completion_tokens")
    return Ask(
        messages=plain(messages),
        tools=fields.objects("tools"),
        chat_template_kwargs=_template_kwargs(fields, renderer),
        max_tokens=most_tokens(fields, "max_tokens") if most is None else most,
        **said,
    )


def _template_kwargs(fields: Fields, renderer: Renderer) -> dict[str, Any]:
    """Variables for the template. The options of the library's call are not the caller's, a template least of all."""
    said = fields.object("chat_template_kwargs")
    for name in said:
        if name in renderer.reserved:
            raise InvalidField("chat_template_kwargs", f"{name} is not a variable of a template")
    return said


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None}


def _delta(piece: str, is_first: bool) -> dict[str, Any]:
    role = {"role": "assistant"} if is_first else {}
    return {"delta": {**role, "content": piece}, "logprobs": None}


CHAT = Form("chatcmpl-", "chat.completion", "chat.completion.chunk", _message, _delta)
