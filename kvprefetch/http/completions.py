"""POST /v1/completions: what is read of its body, and how its answers are written."""

from typing import Any

from starlette.datastructures import Headers

from kvprefetch.engines.render import Renderer
from kvprefetch.http.answer import Form
from kvprefetch.http.ask import Ask, common, most_tokens
from kvprefetch.http.fields import Fields
from kvprefetch.http.problems import InvalidField

_DEFAULT_TOKENS = 16  # as OpenAI's


def read_completion(fields: Fields, headers: Headers, model: str, renderer: Renderer) -> Ask:
    """Raises InvalidRequest, UnknownModel."""
    said = common(fields, headers, model)
    fields.only("logprobs")
    fields.only("echo", False)
    fields.only("suffix", "")
    fields.only("prompt_logprobs", 0)
    most = most_tokens(fields, "max_tokens")
    return Ask(
        token_ids=_tokens(fields, renderer),
        max_tokens=_DEFAULT_TOKENS if most is None else most,
        **said,
    )


def _tokens(fields: Fields, renderer: Renderer) -> tuple[int, ...]:
    """The prompt: a string, token ids, or a list of one of these."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not _is_token(prompt[0]):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        if renderer.tokenizer is None:
            raise InvalidField("prompt", "the model has no tokenizer: give token ids")
        special = fields.flag("add_special_tokens", True)
        return tuple(renderer.tokenizer(prompt, add_special_tokens=special)["input_ids"])
    if isinstance(prompt, list) and prompt and all(map(_is_token, prompt)):
        return tuple(prompt)
    if isinstance(prompt, list) and len(prompt) > 1 and not any(map(_is_token, prompt)):
        raise InvalidField("prompt", "one prompt for each request, not a list of them")
    raise InvalidField("prompt", "must be a string or a list of token ids, and not empty")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _choice(text: str) -> dict[str, Any]:
    return {"text": text, "logprobs": None}


COMPLETION = Form("cmpl-", "text_completion", "text_completion", _choice, lambda piece, is_first: _choice(piece))
