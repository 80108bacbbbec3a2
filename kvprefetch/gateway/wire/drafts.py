"""Drafts out of what was asked and answered: the prompt as it stands, the next one's beginning, its opening alone."""

from kvprefetch.gateway.contract import Answered, Asked, Dialect, Draft, Json
from kvprefetch.gateway.wire import completions
from kvprefetch.gateway.wire.conversation import CONVERSATIONS, Conversation, parted
from kvprefetch.gateway.wire.fields import is_said

_OPENINGS = ("system", "instructions", "tools", "functions", "documents")


def request_draft(asked: Asked) -> Draft | None:
    """The prompt as it stands; None where it cannot be prepared (a batch, or no messages)."""
    if not asked.opening:
        return None
    if asked.dialect is Dialect.COMPLETIONS:
        return _draft(asked, completions.unwrapped(asked.body), exact=True)
    form = CONVERSATIONS[asked.dialect]
    return _draft(asked, form.items(asked.body), exact=True, ending=form.ENDING)


def next_draft(asked: Asked, answered: Answered) -> Draft | None:
    """What the session's next request will begin with: prompt and answer, or the prompt alone if that was cut off.

    None where the next request is not known to bring them: the engine keeps the conversation, or none can be read.
    """
    if not asked.opening or asked.previous:
        return None
    if asked.dialect is Dialect.COMPLETIONS:
        return _continued(asked, answered)
    form = CONVERSATIONS[asked.dialect]
    said = form.items(asked.body)
    if form.is_answer(said[-1]):
        # The answer goes on from a beginning that the client wrote: how it joins the two is its own affair.
        before = _without_last_answer(form, said)
        made = len(form.turns(said[len(before) :]))
        return _draft(asked, before, turns=asked.turns[: len(asked.turns) - made]) if before else None
    if asked.prewarm or not answered.turn:
        return _draft(asked, said)
    after = answered.message if isinstance(answered.message, list) else [answered.message]
    return _draft(asked, [*said, *after], turns=(*asked.turns, answered.turn))


def opening_draft(asked: Asked) -> Draft | None:
    """System prompt and tools alone, with no messages but leading ones; None if there are none."""
    if not asked.opening or asked.previous or asked.dialect is Dialect.COMPLETIONS:
        return None
    form = CONVERSATIONS[asked.dialect]
    leading, _ = parted(form, form.items(asked.body))
    if not leading and not any(is_said(asked.body.get(name)) for name in _OPENINGS):
        return None
    is_text = all(map(form.is_text, leading))
    return Draft(asked.dialect, _shaping(asked, leading), (asked.opening,), salt=asked.salt, is_text=is_text)


def _continued(asked: Asked, answered: Answered) -> Draft:
    before, after = completions.unwrapped(asked.body), None if asked.prewarm else answered.message
    if isinstance(before, str) and isinstance(after, str):
        return _draft(asked, before + after, turns=(asked.turns[0] + answered.turn,))
    if isinstance(before, list) and isinstance(after, list):
        return _draft(asked, before + after, turns=(asked.turns[0] + answered.turn,))
    return _draft(asked, before)


def _without_last_answer(form: Conversation, said: list[Json]) -> list[Json]:
    end = len(said)
    while end and form.is_answer(said[end - 1]):
        end -= 1
    return said[:end]


def _draft(
    asked: Asked,
    prompt: list[Json] | completions.Prompt,
    *,
    turns: tuple[bytes, ...] | None = None,
    exact: bool = False,
    ending: tuple[str, ...] = (),
) -> Draft:
    body = _shaping(asked, prompt, ending)
    canonical = (asked.opening, *(asked.turns if turns is None else turns))
    return Draft(asked.dialect, body, canonical, exact=exact, salt=asked.salt, is_text=asked.is_text)


def _shaping(asked: Asked, prompt: list[Json] | completions.Prompt, ending: tuple[str, ...] = ()) -> Json:
    """The fields that shape the prompt, with `prompt` in its place."""
    form = completions if asked.dialect is Dialect.COMPLETIONS else CONVERSATIONS[asked.dialect]
    said = {name: asked.body[name] for name in (*form.FIELDS, *ending) if asked.body.get(name) is not None}
    return {**said, form.KEY: prompt}
