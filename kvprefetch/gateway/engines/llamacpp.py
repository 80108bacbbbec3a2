"""llama.cpp's server: prompts rendered by its own `/apply-template` and `/tokenize`, warmed as token ids.

Measured on the server of October 2026, and relied on:
- A slot keeps the last prompt that it served and the answer, to the token. A request goes to the slot whose prompt
  has the most in common with its own (--slot-prompt-similarity), else to the one that was idle longest, and computes
  what it has not. So pieces add up, and the real request computes what lies behind the last piece; of a prompt that is
  all there, the last token alone.
- A slot that is taken by another prompt is saved first, in host memory (--cache-ram, 8 GiB by default), and comes back
  from there. With `--cache-ram 0` what was warmed lasts until as many other prompts have come as there are slots.
- A prompt that shares more than half of what a slot holds is put there without saving it: what the older one had
  behind the shared part is lost. Of two contexts with a long opening in common, so, only the later one is warm.
- A request whose client leaves goes on to the end of its prompt, and what it has computed is kept. So a live request
  may wait for the whole of the piece before it, in another slot too: there is nothing to gain from aborting, and
  only small pieces are harmless.
- `/slots` and `/metrics` answer between two batches, and so late while a prompt is being computed. `/metrics`
  (--metrics) counts waiting requests too.
- There is no salt: what is cached is shared by all who ask. A lower bound of its capacity is said, as the host's
  memory comes on top; with --kv-unified, though, the slots share what each of them is said to have.

A prompt of another dialect, or with more than text in it, or with an adapter of its own, is warmed through its own
endpoint, cut by its text.
"""

from kvprefetch.errors import InvalidRequest, UpstreamError
from kvprefetch.gateway.contract import Dialect, Draft, Json, Link, Rendered, Traits
from kvprefetch.gateway.engines.answers import decoded, decoded_list, encode, samples
from kvprefetch.gateway.engines.probes import WORDS, next_turn
from kvprefetch.gateway.engines.text import TextRenderer
from kvprefetch.gateway.engines.tokens import RenderedIds, shared_prefix
from kvprefetch.gateway.wire.completions import prompt
from kvprefetch.gateway.wire.fields import objects
from kvprefetch.settings import UpstreamSettings

_RENDER_S = 30.0
_REFUSED = (400, 401, 403, 413, 422)
_RUNNING, _WAITING = "llamacpp:requests_processing", "llamacpp:requests_deferred"


class LlamaCpp:
    """One llama.cpp server; `slot_tokens`: the longest prompt and answer together, 0 where it is not known."""

    def __init__(self, link: Link, traits: Traits, slot_tokens: int = 0) -> None:
        self.traits = traits
        self._link, self._slot_tokens = link, slot_tokens
        self._text = TextRenderer()
        self._has_metrics = self._has_template = True  # until it says that it has not

    async def render(self, draft: Draft) -> Rendered:
        """Its token ids, where they can be had."""
        ids = await self._token_ids(draft) if draft.is_text and not draft.body.get("lora") else None
        if ids is None:
            return self._text.render(draft)
        if 0 < self._slot_tokens <= len(ids):
            raise InvalidRequest(f"a prompt of {len(ids)} tokens leaves no room in {self._slot_tokens}")
        return RenderedIds(ids, str(draft.body.get("model", "")))

    async def load(self) -> int | None:
        """By its metrics, or else its slots."""
        status, text = await self._link.get("/metrics") if self._has_metrics else (501, b"")
        counted = samples(text, _RUNNING, _WAITING) if status == 200 else []
        if counted:
            return int(sum(sample.value for sample in counted))
        self._has_metrics = self._has_metrics and status == 503  # it is loading
        status, body = await self._link.get("/slots")
        return sum(bool(slot.get("is_processing")) for slot in objects(decoded_list(body))) if status == 200 else None

    def cached(self, rendered: Rendered, salt: str) -> int | None:
        """It does not say."""
        return None

    def learn(self, rendered: Rendered, end: int, prompt_tokens: int) -> None:
        """Estimates become better by it."""
        self._text.learn(rendered, end, prompt_tokens)

    async def close(self) -> None:
        """Nothing is held."""

    async def _token_ids(self, draft: Draft) -> tuple[int, ...] | None:
        if draft.dialect is Dialect.COMPLETIONS:
            said = prompt(draft.body)
            return tuple(said) if isinstance(said, list) else await self._of_texts(draft, said)
        if draft.dialect is not Dialect.CHAT:
            return None
        texts = [await self._templated(draft, messages) for messages in _chats(draft)]
        return await self._of_texts(draft, *texts) if None not in texts else None

    async def _of_texts(self, draft: Draft, *texts: str | None) -> tuple[int, ...] | None:
        """What the tokens of these have in common; of one that is not exact, with anything that may follow it."""
        if draft.dialect is Dialect.COMPLETIONS and not draft.exact:
            texts = tuple(f"{texts[0]}{words}" for words in WORDS)
        shared: tuple[int, ...] | None = None
        for text in texts:
            said = await self._post(draft, "/tokenize", {"content": text, "add_special": True, "parse_special": True})
            tokens = (said or {}).get("tokens")
            if not isinstance(tokens, list):
                return None
            shared = tuple(tokens) if shared is None else shared_prefix(shared, tokens)
        return shared

    async def _templated(self, draft: Draft, messages: list[Json]) -> str | None:
        said = await self._post(draft, "/apply-template", {**draft.body, "messages": messages})
        return said.get("prompt") if said is not None else None

    async def _post(self, draft: Draft, path: str, body: Json) -> Json | None:
        """The answer; None where there is no such path. Errors name statuses alone, as the engine's hold prompts."""
        if not self._has_template:
            return None
        status, raw = await self._link.post(path, encode(body), headers=draft.headers, timeout_s=_RENDER_S)
        if status == 200:
            return decoded(raw)
        if status in (404, 405, 501):
            self._has_template = False
            return None
        if status in _REFUSED:
            raise InvalidRequest(f"the engine refuses this prompt with status {status}")
        raise UpstreamError(f"{self._link.url}{path} answers with status {status}")


async def llamacpp(link: Link, settings: UpstreamSettings) -> LlamaCpp:
    """The server there, by what it says of itself. Raises UpstreamError where it cannot be reached."""
    status, body = await link.get("/props")
    said = decoded(body) if status == 200 else {}
    defaults = said.get("default_generation_settings")
    slot_tokens, slots = _count(defaults, "n_ctx"), _count(said, "total_slots")
    capacity = settings.capacity_tokens or slot_tokens * slots or None
    return LlamaCpp(link, Traits("llama.cpp", capacity_tokens=capacity), slot_tokens)


def _chats(draft: Draft) -> list[list[Json]]:
    """The messages themselves, or two conversations that go on from them differently.

    An answer at the end would be taken for one to be continued, so that something comes after it.
    """
    messages = draft.body.get("messages") or []
    if draft.exact:
        return [messages]
    probes = [[*messages, *next_turn(Dialect.CHAT, messages, words)] for words in WORDS]
    more: list[Json] = [{"role": "user", "content": WORDS[0]}] if probes[0][-1]["role"] == "assistant" else []
    return [[*probe, *more] for probe in probes]


def _count(said: object, name: str) -> int:
    value = said.get(name) if isinstance(said, dict) else None
    return value if isinstance(value, int) else 0
