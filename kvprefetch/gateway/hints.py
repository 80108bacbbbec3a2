"""Hints and signals: what callers say may come, turned into preloads at the engine where it will be wanted.

Handles are kept until they have a use, `max_open` of them for all tenants together; the oldest are forgotten first
(their preloads live on). Everything here returns at once.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

import msgspec

from kvprefetch.cache.keys import BlockKey
from kvprefetch.client.handle import Prefetch
from kvprefetch.contexts import qualified
from kvprefetch.errors import InvalidRequest, UnknownContext
from kvprefetch.gateway.contract import Draft
from kvprefetch.gateway.job import WarmJob
from kvprefetch.gateway.placement import choose
from kvprefetch.gateway.replica import BLOCK_BYTES
from kvprefetch.gateway.service import ServiceHints, followed
from kvprefetch.gateway.site import Site, prepared, token_of
from kvprefetch.gateway.upstream import Upstream
from kvprefetch.gateway.wire.fields import text
from kvprefetch.outcomes import Outcome, Result, Use
from kvprefetch.plan.ledger import Ticket

SIGNAL = "signal "
"""And its kind: evidence that no caller can confuse with other evidence."""
_KINDS = 64  # of signals, counted apart; callers choose the words, so there must be an end


@dataclass(frozen=True)
class Claim:
    """What a hint's giver says of it."""

    probability: float
    expected_in_s: float
    hold_s: float | None


@dataclass(eq=False)
class Hint:
    """A hint that was given. Once it has its outcome, its context is let go of: `job` is None from then on."""

    id: str
    tenant: str
    job: WarmJob | None = None
    ticket: Ticket | None = None
    handle: Prefetch | None = None  # where a cache service has it
    upstream: Upstream | None = None
    result: Result | None = None
    tokens: int = 0  # of the engine's, that are warm
    done: asyncio.Event = field(default_factory=asyncio.Event)
    _kept: tuple[int, int, str] = (0, 0, "")

    def resolve(self, result: Result) -> None:
        """Called once, with its outcome."""
        self._kept = self.prompt_tokens, self.computed, self.because
        if result.outcome.is_resident:
            self.tokens = result.tokens if result.outcome is Outcome.CLIPPED else self._whole_blocks(result)
        self.result, self.job = result, None
        self.done.set()

    @property
    def prompt_tokens(self) -> int:
        """Of the whole context: as the engine has counted them, else an estimate."""
        job = self.job
        if job is None:
            return self._kept[0]
        return job.prompt_tokens or (job.rendered.tokens if job.rendered is not None else job.size)

    @property
    def computed(self) -> int:
        """Tokens that it cost."""
        return self.job.computed if self.job is not None else self._kept[1]

    @property
    def because(self) -> str:
        """Why it was worked on."""
        if self.handle is not None:
            return self.handle.because
        return self.job.why if self.job is not None else self._kept[2]

    @property
    def hold_s(self) -> float:
        """How long it is held."""
        return self.ticket.hold_s if self.ticket is not None else 0.0

    @property
    def use(self) -> Use | None:
        """What it was good for; None while open."""
        if self.handle is not None:
            return self.handle.use
        return self.ticket.use if self.ticket is not None else None

    @property
    def used_tokens(self) -> int:
        """Tokens that the request which used it found."""
        if self.handle is not None:
            return self.handle.used_tokens
        return self.ticket.used_tokens if self.ticket is not None else 0

    def _whole_blocks(self, result: Result) -> int:
        if self.job is None:
            return result.tokens
        engine = self.upstream.engine if self.upstream is not None else None
        block = engine.traits.block_tokens if engine is not None else 1
        return self.prompt_tokens // block * block


class Hints:
    """See the module's promises."""

    def __init__(self, site: Site) -> None:
        self.site = site
        address = site.settings.gateway.service
        self.service = None if address == "embedded" else ServiceHints(address)
        self.known: OrderedDict[str, Hint] = OrderedDict()
        self.signals: Counter[str] = Counter()
        self._named: OrderedDict[str, tuple[Draft, int]] = OrderedDict()  # with their bytes
        self._named_bytes = 0
        self._numbers = count(1)

    async def prefetch(
        self,
        tenant: str,
        draft: Draft,
        session: str = "",
        *,
        because: str = "hint",
        probability: float = 1.0,
        expected_in_s: float = 0.0,
        hold_s: float | None = None,
        named: str = "",
    ) -> Hint:
        """Ask for a draft to be warm. Raises InvalidRequest for odd numbers."""
        _check(probability, expected_in_s, hold_s)
        talk = self.site.talks.find(qualified(tenant, session)) if session else None
        wanted = talk.upstream if talk else self._place(tenant, draft)
        upstream = self.site.place(tenant, wanted, model=text(draft.body.get("model")))
        await self.site.until_known(upstream)
        engine = upstream.engine
        if self.service is not None and engine is not None and engine.traits.kind == "kvprefetch":
            handle = self.service.prefetch(token_of(draft.headers), draft, session, probability, expected_in_s, hold_s)
            hint = self._new(tenant)
            hint.handle = handle
            lasts_s = expected_in_s + (self.site.settings.speculation.hold_s if hold_s is None else hold_s)
            self.site.start(followed(handle, hint.resolve, lasts_s, lambda: hint.id in self.known))
            return hint
        salt = self.site.salt(tenant, draft.salt, upstream)
        draft = prepared(draft, draft.headers, salt)
        keys = await self.site.keys(self.site.root(tenant, salt), draft.canonical)
        if session:
            self.site.talks.of_named(tenant, session).upstream = upstream.name
        claim = Claim(probability, expected_in_s, hold_s)
        return self._give(upstream, tenant, draft, keys, session, because, claim, named)

    def _give(
        self,
        upstream: Upstream,
        tenant: str,
        draft: Draft,
        keys: Sequence[BlockKey],
        session: str,
        because: str,
        claim: Claim,
        named: str = "",
    ) -> Hint:
        """A draft as it will be sent, with its keys, to this engine."""
        hint, now = self._new(tenant), self.site.clock()
        hint.upstream = upstream
        reason = self._refusal(upstream, keys)
        if reason:
            hint.resolve(Result(Outcome.REJECTED, 0, reason))
            return hint
        hint.job = job = upstream.desk.propose(
            draft,
            keys,
            qualified(tenant, session),
            tenant,
            because,
            now,
            probability=claim.probability,
            expected_in_s=claim.expected_in_s,
            hold_s=claim.hold_s,
            named=named,
            resolved=hint.resolve,
        )
        hint.ticket = job.ticket
        if hint.result is not None:  # it was resolved at once
            hint.job = None
        upstream.warmer.wake()
        return hint

    def _refusal(self, upstream: Upstream, keys: Sequence[BlockKey]) -> str:
        """Why nothing can be done for it; "" if something can."""
        engine = upstream.engine
        if engine is not None and engine.traits.capacity_tokens == 0:
            return "the engine keeps no prefixes: its caching is off"
        if not keys:
            return f"it is too short to gain by it: less than {BLOCK_BYTES} bytes"
        waiting = sum(len(job.keys) for job in upstream.desk.preloads.jobs) + len(keys)
        if waiting * BLOCK_BYTES > self.site.settings.gateway.max_context_bytes:
            return "the contexts that wait are too long already (gateway.max_context_bytes)"
        return ""

    def cancel(self, hint: Hint) -> None:
        """Withdraw it; CANCELLED unless it has an outcome."""
        if hint.handle is not None:
            hint.handle.cancel()
        if hint.job is not None and hint.upstream is not None:
            job = hint.job
            hint.upstream.desk.preloads.withdraw(
                lambda other: other is job, "withdrawn by its caller", self.site.clock()
            )

    def find(self, tenant: str, number: str) -> Hint:
        """Raises UnknownContext, for another tenant's as well."""
        hint = self.known.get(number)
        if hint is None or hint.tenant != tenant:
            raise UnknownContext("no hint is known by that id")
        return hint

    async def signal(
        self, tenant: str, kind: str, session: str, drafts: Sequence[tuple[str, Draft]], token: str = ""
    ) -> list[Hint]:
        """Something was observed in a session; the contexts it names may be preloaded, or else the session's own."""
        word = self._word(kind)
        self.signals[word] += 1
        name, now = qualified(tenant, session), self.site.clock()
        talk = self.site.talks.find(name) if session else None
        if session and kind == "session_ended":
            for upstream in self.site.upstreams:
                upstream.desk.end_session(name, now)
            self.site.talks.end(name)
            return []
        upstream = choose(self.site.upstreams, talk.upstream if talk else "")
        if self.service is not None and not drafts:
            self.service.signal(token, kind, session, [])
        if session:
            about = next((named for named, _ in drafts if named), "")
            upstream.desk.foresight.signalled(name, tenant, word, about, now)
        probability = self.site.settings.speculation.signal_probability
        because = SIGNAL + word
        if not drafts and talk is not None and talk.draft is not None and not talk.running:
            claim = Claim(probability, 0.0, None)
            return [self._give(upstream, tenant, talk.draft, talk.keys, session, because, claim)]
        return [
            await self.prefetch(tenant, draft, session, because=because, probability=probability, named=named)
            for named, draft in drafts
        ]

    def remember(self, tenant: str, name: str, draft: Draft) -> None:
        """Give a draft a name; the latest are kept."""
        known, limits = qualified(tenant, name), self.site.settings
        self._forget(known)
        self._named[known] = draft, size_of(draft)
        self._named_bytes += self._named[known][1]
        most = limits.gateway.max_context_bytes // 4
        while len(self._named) > limits.speculation.max_named or (self._named_bytes > most and len(self._named) > 1):
            self._forget(next(iter(self._named)))

    def recall(self, tenant: str, name: str) -> Draft:
        """Raises UnknownContext."""
        found = self._named.get(qualified(tenant, name))
        if found is None:
            raise UnknownContext(f"no context is known by the name {name[:100]!r}")
        return found[0]

    # -- within ----------------------------------------------------------------------------------------
    def _forget(self, name: str) -> None:
        found = self._named.pop(name, None)
        if found is not None:
            self._named_bytes -= found[1]

    def _new(self, tenant: str) -> Hint:
        hint = Hint(str(next(self._numbers)), tenant)
        self.known[hint.id] = hint
        if len(self.known) > self.site.settings.speculation.max_open:
            self.known.popitem(last=False)
        return hint

    def _place(self, tenant: str, draft: Draft) -> str:
        """Where sessions that begin like this one are."""
        opening = self.site.openings.of(tenant, draft.canonical[0])
        return opening.upstream if opening else ""

    def _word(self, kind: str) -> str:
        return kind if kind in self.signals or len(self.signals) < _KINDS else "other"


def _check(probability: float, expected_in_s: float, hold_s: float | None) -> None:
    if not 0 <= probability <= 1:
        raise InvalidRequest(f"a probability is from 0 to 1, not {probability}")
    if not (0 <= expected_in_s < inf and (hold_s is None or 0 <= hold_s < inf)):
        raise InvalidRequest("hold_s and expected_in_s are finite seconds, 0 or more")


def size_of(draft: Draft) -> int:
    """Bytes that a draft holds, nearly: images count in full."""
    return len(msgspec.json.encode(draft.body))
