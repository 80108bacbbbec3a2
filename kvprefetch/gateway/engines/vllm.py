"""vLLM: prompts rendered by its own `/tokenize`, and warmed as token ids through `/v1/completions`.

Measured on vLLM 0.32, and relied on:
- A request leaves every full block of its prompt in the cache, the last one too if it ends with the prompt. A piece
  that ends at a multiple of `block_tokens` is found whole by the next piece and by every longer prompt.
- A prompt is never served from the cache alone: where all its blocks are there, the last one is computed again. What
  lies behind the last full block is computed by the real request, so there is no use in warming it.
- `cache_salt` is taken by all four dialects: 1 to 128 characters, none of them "@", "/", a backslash or NUL.
- `/load` stays 0 without --enable-server-load-tracking, but knows of a request at once; the gauges in /metrics learn
  of it after its first step. But it counts down twice for some clients that leave, and says -2 when nobody is there.
  So both are asked, the higher is believed, and what the gauges deny for long is no request.

A prompt of another dialect, or with more than text in it, or of a model whose chat is not rendered as `/tokenize` does
it (one tiny request finds that out), is warmed through its own endpoint, cut by its text.
"""

from collections.abc import Container, Sequence
from typing import Protocol

from kvprefetch.errors import InvalidRequest, UpstreamError
from kvprefetch.gateway.contract import Dialect, Draft, Json, Link, Rendered, Traits
from kvprefetch.gateway.engines.answers import decoded, encode, samples
from kvprefetch.gateway.engines.probes import WORDS, two_ways
from kvprefetch.gateway.engines.text import TextRenderer
from kvprefetch.gateway.engines.tokens import RenderedIds, shared_prefix
from kvprefetch.gateway.wire.completions import prompt
from kvprefetch.gateway.wire.fields import an_object, objects
from kvprefetch.settings import UpstreamSettings

_TOKENIZE_S = 30.0
_RUNNING, _WAITING, _CONFIG = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:cache_config_info"
_TEMPLATE_FIELDS = (  # of a chat request, which `/tokenize` takes as well
    "model",
    "tools",
    "chat_template",
    "chat_template_kwargs",
    "add_special_tokens",
    "mm_processor_kwargs",
    "media_io_kwargs",
)
_ENDING_FIELDS = ("add_generation_prompt", "continue_final_message")
_HELLO = [{"role": "user", "content": "Hello"}]
_NO_MODEL = "NotFoundError"
_REFUSED = (400, 401, 403, 413, 422)
_DENIALS = 40  # looks
_MOST_DIGITS = 15  # of a size


class Residency(Protocol):
    """What KV events have said."""

    def cached(self, token_ids: Sequence[int], salt: str = "", adapter: str = "") -> int | None:
        """Leading tokens that are in the cache; None where nothing is known."""


class Vllm:
    """One vLLM server, or a router's worth of them behind one URL."""

    def __init__(
        self, link: Link, traits: Traits, residency: Residency | None = None, adapters: Container[str] = ()
    ) -> None:
        self.traits = traits
        self._link, self._residency, self._adapters = link, residency, adapters
        self._text = TextRenderer()
        self._zero = self._denied = 0  # what /load says of nobody, and how often in a row the gauges said nobody
        self._has_tokenize = True  # until it says that it has not
        self._is_templated: dict[str, bool] = {}  # by model: its chat is rendered as `/tokenize` renders it

    async def render(self, draft: Draft) -> Rendered:
        """Its token ids, where they can be had."""
        ids = await self._token_ids(draft) if draft.is_text else None
        if ids is None:
            return self._text.render(draft)
        return RenderedIds(ids, str(draft.body.get("model", "")), draft.salt)

    async def load(self) -> int | None:
        """By /load, or the gauges."""
        status, body = await self._link.get("/load")
        said = decoded(body).get("server_load") if status == 200 else None
        status, text = await self._link.get("/metrics")
        counted = samples(text, _RUNNING, _WAITING) if status == 200 else []
        gauged = int(sum(sample.value for sample in counted)) if counted else None
        if not isinstance(said, int):
            return gauged
        self._denied = self._denied + 1 if gauged == 0 and said > self._zero else 0
        if said < self._zero or self._denied > _DENIALS:
            self._zero = said
        tracked = said - self._zero
        return max(tracked, gauged or 0)

    def cached(self, rendered: Rendered, salt: str) -> int | None:
        """By its KV events."""
        if self._residency is None or not isinstance(rendered, RenderedIds):
            return None
        adapter = rendered.model if rendered.model in self._adapters else ""
        return self._residency.cached(rendered.token_ids, salt, adapter)

    async def close(self) -> None:
        """Nothing is held: link and residency have owners of their own."""

    def learn(self, rendered: Rendered, end: int, prompt_tokens: int) -> None:
        """Estimates become better by it."""
        self._text.learn(rendered, end, prompt_tokens)

    async def _token_ids(self, draft: Draft) -> tuple[int, ...] | None:
        if draft.body.get("truncate_prompt_tokens"):  # what is cut away depends on the length of the whole
            return None
        if draft.dialect is Dialect.COMPLETIONS:
            said = prompt(draft.body)
            return await self._of_text(draft, said) if isinstance(said, str) else tuple(said)
        if draft.dialect is Dialect.CHAT and await self._renders_chat(draft):
            return await self._of_chat(draft)
        return None

    async def _of_text(self, draft: Draft, text: str) -> tuple[int, ...] | None:
        plain = _chosen(draft.body, ("model", "add_special_tokens"))
        if draft.exact:
            return await self._tokenize(draft, {**plain, "prompt": text})
        one, other = ({**plain, "prompt": text + words} for words in WORDS)
        return await self._shared(draft, one, other)

    async def _of_chat(self, draft: Draft) -> tuple[int, ...] | None:
        plain, messages = template_fields(draft.body), objects(draft.body.get("messages"))
        if draft.exact:
            return await self._tokenize(draft, {**plain, **_chosen(draft.body, _ENDING_FIELDS), "messages": messages})
        one, other = (
            {**plain, "messages": each, "add_generation_prompt": each[-1].get("role") != "assistant"}
            for each in two_ways(messages)
        )
        return await self._shared(draft, one, other)

    async def _shared(self, draft: Draft, one: Json, other: Json) -> tuple[int, ...] | None:
        first = await self._tokenize(draft, one)
        second = await self._tokenize(draft, other) if first is not None else None
        return None if first is None or second is None else shared_prefix(first, second)

    async def _renders_chat(self, draft: Draft) -> bool:
        """Whether a chat request of this model has the prompt that `/tokenize` says: asked once, with one token."""
        model = str(draft.body.get("model", ""))
        if model not in self._is_templated:
            hello: Json = {"messages": _HELLO, **_chosen(draft.body, ("model",))}
            ids = await self._tokenize(draft, hello)
            asked = {**hello, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
            said = None if ids is None else await self._post(draft, Dialect.CHAT.value, asked)
            self._is_templated[model] = said is not None and said.get("prompt_token_ids") == list(ids or ())
        return self._is_templated[model]

    async def _tokenize(self, draft: Draft, body: Json) -> tuple[int, ...] | None:
        """None where there is no `/tokenize`."""
        said = await self._post(draft, "/tokenize", body) if self._has_tokenize else None
        if said is None:
            self._has_tokenize = False
            return None
        tokens, limit = said.get("tokens"), said.get("max_model_len")
        if not isinstance(tokens, list):
            raise UpstreamError(f"{self._link.url}/tokenize answers no tokens")
        if isinstance(limit, int) and len(tokens) >= limit:
            raise InvalidRequest(f"a prompt of {len(tokens)} tokens leaves no room in {limit}")
        return tuple(tokens)

    async def _post(self, draft: Draft, path: str, body: Json) -> Json | None:
        """The answer; None where there is no such path. Errors name statuses alone, as the engine's hold prompts."""
        status, raw = await self._link.post(path, encode(body), headers=draft.headers, timeout_s=_TOKENIZE_S)
        said = decoded(raw)
        if status == 200:
            return said
        if status in (404, 405, 501) and an_object(said.get("error", said)).get("type") != _NO_MODEL:
            return None
        if status in (*_REFUSED, 404):
            raise InvalidRequest(f"the engine refuses this prompt with status {status}")
        raise UpstreamError(f"{self._link.url}{path} answers with status {status}")


async def vllm_traits(link: Link, settings: UpstreamSettings) -> Traits:
    """By its metrics. Capacity 0: prefix caching is off, and nothing can be warmed."""
    status, text = await link.get("/metrics")
    said = [sample.labels for sample in samples(text, _CONFIG)] if status == 200 else []
    labels = said[0] if said else {}
    block = max(_number(labels, "block_size"), _number(labels, "cache_hit_alignment_tokens"), 1)
    capacity: int | None = _number(labels, "kv_cache_size_tokens") or _number(labels, "num_gpu_blocks") * block or None
    if labels.get("enable_prefix_caching") == "False":
        capacity = 0
    return Traits("vllm", block, settings.capacity_tokens or capacity, takes_salt=True)


def template_fields(body: Json) -> Json:
    """What shapes the prompt of a chat request besides its messages, as `/tokenize` takes it."""
    fields = _chosen(body, _TEMPLATE_FIELDS)
    effort, given = body.get("reasoning_effort"), body.get("chat_template_kwargs") or {}
    extra = {"documents": body.get("documents"), "reasoning_effort": effort}
    if effort is not None and "enable_thinking" not in given:
        extra["enable_thinking"] = effort != "none"
    said = {name: value for name, value in extra.items() if value is not None}
    return {**fields, "chat_template_kwargs": {**given, **said}} if said else fields


def _chosen(body: Json, names: tuple[str, ...]) -> Json:
    return {name: body[name] for name in names if body.get(name) is not None}


def _number(labels: dict[str, str], name: str) -> int:
    said = labels.get(name, "")
    return int(said) if said.isdecimal() and len(said) <= _MOST_DIGITS else 0
