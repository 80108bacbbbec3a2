"""What all endpoints of the gateway share, and what it learns from each request: sessions, contexts, preloads.

One event loop. Reading long bodies and answers runs on threads; nothing else here takes long, and nothing blocks.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from kvprefetch.cache.keys import BlockKey
from kvprefetch.credentials import token_in
from kvprefetch.errors import ServiceUnavailable
from kvprefetch.gateway.contract import Answered, Asked, Draft, Headers
from kvprefetch.gateway.conversations import Conversations
from kvprefetch.gateway.desk import OPENING, RETURN
from kvprefetch.gateway.link import RawHeaders, UpstreamLink
from kvprefetch.gateway.metrics import Metrics
from kvprefetch.gateway.openings import Opening, Openings
from kvprefetch.gateway.placement import Kept, choose
from kvprefetch.gateway.replica import prompt_keys, prompt_root
from kvprefetch.gateway.turn import Turn
from kvprefetch.gateway.upstream import Upstream
from kvprefetch.gateway.wire import next_draft, opening_draft, read_answer
from kvprefetch.http.gate import Gate
from kvprefetch.plan.foresight import NEXT_TURN
from kvprefetch.plan.library import PREDICTED
from kvprefetch.settings import Settings

log = logging.getLogger(__name__)
_LONG = 64 * 2**10  # bytes whose reading is left to a thread
_OPENINGS = 256
_OF_ONE_REQUEST = frozenset(  # headers that say nothing of where a session's next request would go
    (
        *("accept", "accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect"),
        *("host", "idempotency-key", "range", "traceparent", "tracestate", "transfer-encoding", "x-request-id"),
        *("content-digest", "content-md5", "digest", "repr-digest", "signature", "signature-input"),
        *("x-amz-date", "x-amz-content-sha256", "if-match", "if-none-match", "if-modified-since"),
        *("if-unmodified-since", "if-range"),
    )
)


class Site:
    """See the module's promises."""

    def __init__(self, settings: Settings, links: Sequence[UpstreamLink]) -> None:
        self.settings, self.gate, self.clock = settings, Gate(settings), time.monotonic
        own = settings.gateway
        self.upstreams = [
            Upstream(link, settings, each, self.clock, self._lost)
            for link, each in zip(links, own.upstreams, strict=True)
        ]
        self.talks = Conversations(own.max_sessions, own.max_context_bytes)
        self.openings = Openings(_OPENINGS, own.max_context_bytes // 4)
        self.kept = Kept()
        self.mark = secrets.token_hex(4)  # tells its names of sessions from those of other gateways
        self.metrics = Metrics(self.upstreams, self.clock)
        self._secret = settings.secret.encode() or secrets.token_bytes(32)
        self._tasks: set[asyncio.Task[None]] = set()

    # -- before a request is passed on -----------------------------------------------------------------
    async def begin(self, tenant: str, asked: Asked, named: str, headers: RawHeaders) -> Turn:
        """Its session and place; from here on no piece of warming is before it. `ended` of the turn must follow."""
        talk = self.talks.of(tenant, asked, named)
        upstream = self.place(tenant, talk.upstream, asked.previous, asked.model)
        await self.until_known(upstream)
        is_new, arrived = not talk.upstream, self.clock()
        salt = self.salt(tenant, asked.salt, upstream)
        root = prompt_root(self._secret, tenant, "", salt)
        keys = await self.keys(root, (asked.opening, *asked.turns) if asked.opening else ())
        talk.upstream, talk.running = upstream.name, talk.running + 1
        was_alone = not upstream.live
        turn = Turn(
            asked,
            tenant,
            talk,
            upstream,
            root,
            keys,
            kept_headers(headers),
            salt,
            upstream.desk.find(keys),
            arrived,
            was_alone,
            upstream.warmer.live_began(),
            self.clock,
            self._over,
        )
        try:
            upstream.desk.requested(talk.session, tenant, keys, arrived)
            if is_new:
                self._new_session(turn)
        except BaseException:
            turn.ended("gateway stopped")  # else the engine would count as busy for ever
            raise
        return turn

    def place(self, tenant: str, wanted: str, kept: str = "", model: str = "") -> Upstream:
        """Which upstream: the one that keeps the response or conversation of that id, then the wanted one."""
        wanted = self.kept.find(tenant, kept) or wanted
        known = [each for each in self.upstreams if each.known.is_set()] if self.salts else []
        return choose(known or self.upstreams, wanted, model)

    async def until_known(self, upstream: Upstream) -> None:
        """Wait a little for it to say whether it takes salts, where that matters. Raises ServiceUnavailable."""
        if not self.salts or upstream.known.is_set():
            return
        if not await upstream.until_known(self.settings.gateway.connect_s):
            raise ServiceUnavailable("the engine has not said yet whether it can keep tenants apart; try again")

    @property
    def may_salt(self) -> bool:
        """Whether there is an engine, or may be, whose requests need a salt."""
        return self.salts and any(each.takes_salt or not each.known.is_set() for each in self.upstreams)

    def salt(self, tenant: str, own: str, upstream: Upstream) -> str:
        """What isolates a tenant's prompts in the engine's cache; the caller's own salt where tenants are all one."""
        if not self.salts or not upstream.takes_salt:
            return own
        return hmac.new(self._secret, f"{tenant}\0{own}".encode(), "sha256").hexdigest()[:32]

    async def keys(self, root: BlockKey, canonical: Sequence[bytes]) -> list[BlockKey]:
        """Of these canonical bytes."""
        if sum(map(len, canonical)) > _LONG:
            return await asyncio.to_thread(prompt_keys, root, canonical)
        return prompt_keys(root, canonical)

    def root(self, tenant: str, salt: str) -> BlockKey:
        """Of a tenant's prompts."""
        return prompt_root(self._secret, tenant, "", salt)

    # -- life ------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Find out what the engines are, and warm them, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for upstream in self.upstreams:
                tasks.create_task(upstream.run())

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it in a task that is kept from being collected."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- within ----------------------------------------------------------------------------------------
    @property
    def salts(self) -> bool:
        """Whether tenants are to be kept apart."""
        return self.settings.gateway.salt and bool(self.settings.credentials)

    def _new_session(self, turn: Turn) -> None:
        draft = opening_draft(turn.asked)
        if draft is None:
            return
        draft = self._sent_as(draft, turn)
        opening = self.openings.began(turn.tenant, draft, prompt_keys(turn.root, draft.canonical))
        opening.upstream = turn.upstream.name
        desk = turn.upstream.desk
        desk.requested(opening.session, turn.tenant, opening.keys, turn.arrived)
        desk.foresight.turn_ended(opening.session, turn.tenant, "", 0, opening.keys, turn.arrived)

    def _over(self, turn: Turn) -> None:
        """A request has ended; what it teaches is read off the way of others."""
        turn.upstream.warmer.live_ended()
        turn.talk.running -= 1
        if turn.error is not None and turn.error.startswith("upstream"):
            self.start(turn.upstream.look())
        self.metrics.ended(turn)
        if turn.is_stream and turn.first_byte is not None and turn.was_alone and not turn.behind_piece:
            turn.upstream.pace.answered(turn.first_byte - turn.arrived)
        self.start(self._outermost(turn))

    async def _outermost(self, turn: Turn) -> None:
        try:
            await self._learn(turn)
        except Exception:  # the task's outermost line: a request that teaches nothing must not end more than itself
            log.exception("nothing was learnt from a request of %d turns", len(turn.asked.turns))

    async def _learn(self, turn: Turn) -> None:
        raw = bytes(turn.raw) if turn.is_whole else b""
        turn.raw.clear()
        arguments = (turn.asked, turn.status, turn.content_type, raw)
        said = await asyncio.to_thread(read_answer, *arguments) if len(raw) > _LONG else read_answer(*arguments)
        draft = next_draft(turn.asked, said)
        if draft is not None:
            draft = self._sent_as(draft, turn)
        keys = await self.keys(turn.root, draft.canonical) if draft is not None else turn.keys
        now, desk = self.clock(), turn.upstream.desk
        session, tenant = turn.talk.session, turn.tenant
        if turn.status == 200:
            cached = (
                said.cached_tokens / said.prompt_tokens
                if said.cached_tokens is not None and said.prompt_tokens
                else None
            )
            desk.served(session, tenant, turn.keys, turn.found, cached, now)
        self.metrics.read(turn, said)
        self.kept.put(tenant, said.response_id, turn.upstream.name)
        if turn.status == 200:
            self.kept.put(tenant, turn.asked.previous, turn.upstream.name)
        is_kept = said.kind and desk.answers.believes()
        held = () if turn.status != 200 else keys if is_kept else turn.keys  # what was refused is in no cache
        desk.ended(session, tenant, said.kind or "cut off", held, now)
        if turn.status != 200:
            return
        self.talks.remember(turn.talk, turn.asked, said.turn, draft, keys)
        await self._foresee(turn, said, now)

    async def _foresee(self, turn: Turn, said: Answered, now: float) -> None:
        """A turn has ended: candidates for what comes next, which the planner weighs."""
        talk, desk = turn.talk, turn.upstream.desk
        if said.kind.startswith("tool "):
            desk.foresight.signalled(talk.session, turn.tenant, said.kind, "", now)
        if said.kind and talk.draft is not None and not talk.running:
            desk.propose(talk.draft, talk.keys, talk.session, turn.tenant, NEXT_TURN, now)
        for draft, probability in desk.predicted(talk.session, turn.tenant, now):
            keys = await self.keys(turn.root, draft.canonical)
            desk.propose(draft, keys, talk.session, turn.tenant, PREDICTED, now, probability=probability)
        turn.upstream.warmer.wake()

    def _sent_as(self, draft: Draft, turn: Turn) -> Draft:
        return prepared(draft, turn.headers, turn.salt)

    def _lost(self, upstream: Upstream, session: str) -> None:
        """The engine has evicted what the session would come back to."""
        talk = self.talks.find(session)
        if talk is None or talk.draft is None or talk.running or talk.upstream != upstream.name:
            return
        now = self.clock()
        if not any(job.ticket.session == session for job in upstream.desk.preloads.jobs):
            upstream.desk.propose(talk.draft, talk.keys, session, talk.tenant, RETURN, now)
        opening = self.openings.of(talk.tenant, talk.draft.canonical[0])
        if opening is not None and opening.is_shared:
            self._hold_opening(upstream, opening, now)
        upstream.warmer.wake()

    def _hold_opening(self, upstream: Upstream, opening: Opening, now: float) -> None:
        desk = upstream.desk
        waits = any(job.ticket.session == opening.session for job in desk.preloads.jobs)
        if not waits and desk.find(opening.keys).blocks < len(opening.keys):
            desk.propose(opening.draft, opening.keys, opening.session, opening.tenant, OPENING, now)


def _cached_share(said: Answered) -> float | None:
    """Of its prompt, where the engine says it."""
    return said.cached_tokens / said.prompt_tokens if said.prompt_tokens and said.cached_tokens is not None else None


def token_of(headers: Headers) -> str:
    """The bearer token in a request's headers; "" for none."""
    return token_in({name.lower(): value for name, value in headers})


def kept_headers(headers: RawHeaders) -> Headers:
    """Of a request's headers, those that its session's next one would have as well."""
    pairs = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
    return tuple(pair for pair in pairs if pair[0].lower() not in _OF_ONE_REQUEST)


def prepared(draft: Draft, headers: Headers, salt: str) -> Draft:
    """The draft as it will be sent."""
    return Draft(draft.dialect, draft.body, draft.canonical, draft.exact, headers, salt, draft.is_text)
