"""Warms one engine's cache in its idle time, a piece at a time (law 2).

A piece is a request for one token whose prompt ends a little behind what is warm already. Pieces are sent while nobody
is being served; when a live request comes, the piece under way is given up at once, by closing its connection: the
engine ends its step, keeps the blocks that are finished, and the next piece goes on from there. Between pieces the
engine is asked whether others are at it. An engine that refuses or is not there is left alone for a while, longer each
time.
"""

import asyncio
import logging
from collections.abc import Callable
from math import inf, nextafter

from kvprefetch.errors import InvalidRequest, UpstreamError, UpstreamGone
from kvprefetch.gateway.contract import Asked, Engine, Link, Rendered
from kvprefetch.gateway.desk import Desk
from kvprefetch.gateway.engines.answers import decoded
from kvprefetch.gateway.job import WarmJob
from kvprefetch.gateway.lmcache import prefetch
from kvprefetch.gateway.pace import Pace, piece_end
from kvprefetch.gateway.replica import BLOCK_UNITS
from kvprefetch.gateway.wire import dialect_of, read_answer
from kvprefetch.gateway.wire.fields import an_object, count, text
from kvprefetch.outcomes import Outcome

log = logging.getLogger(__name__)
_BUSY_LOOK_S = 0.05  # how soon to look again whether others have left the engine
_LOOK_S, _CALM_LOOK_S, _CALM_S = 0.2, 0.5, 1.0  # whether they have come; where nobody has for a while; what that is
_LINGERS_S = 0.01  # an engine still counts the piece that it has just answered, for a moment
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_PIECE_S, _WHOLE_S = 120.0, 600.0  # after which a piece, or a context that the engine warms by itself, is given up
_REFUSALS = 5  # in a row, after which a job has failed
_REFUSED = (429, 503)
_INEXACT = 8  # an eighth of an estimated length may be off


class Warmer:
    """See the module's promises. `live` is how many requests the gateway has at this engine."""

    def __init__(self, link: Link, desk: Desk, pace: Pace, clock: Callable[[], float], beside_live: int) -> None:
        self.link, self.desk, self.pace, self.clock, self.beside_live = link, desk, pace, clock, beside_live
        self.engine: Engine | None = None
        self.lower: Link | None = None  # to LMCache's server, where there is one
        self.live = 0
        self._served_at = self._looked_at = -inf
        self.pieces = self.given_up = self.refused = 0
        self.broke: Callable[[], None] = lambda: None  # called where the engine is gone
        self._piece: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._resume_at, self._pause_s = -inf, _FIRST_PAUSE_S

    # -- live traffic ----------------------------------------------------------------------------------
    def live_began(self) -> bool:
        """A request is about to be passed on; whether a piece was before it, which is given up now."""
        self.live += 1
        piece = self._piece
        if piece is None or piece.done() or self.live <= self.beside_live or self._warms_itself:
            return False
        piece.cancel()
        return True

    def live_ended(self) -> None:
        """It is over."""
        self.live -= 1
        self._served_at = self.clock()
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    # -- the loop --------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._round()
            except Exception:  # the task's outermost line: warming must not end for one bad job
                log.exception("warming broke; it goes on in %g s", _LONGEST_PAUSE_S)
                self._resume_at = self.clock() + _LONGEST_PAUSE_S

    @property
    def _warms_itself(self) -> bool:
        return self.engine is not None and self.engine.traits.warms_itself

    async def _round(self) -> None:
        now = self.clock()
        self._wake.clear()
        self.desk.expire(now)
        if self.engine is None or now < self._resume_at:
            await self._sleep(self._resume_at if self.engine is not None else inf)
            return
        if self.live > self.beside_live and not self._warms_itself:
            await self._sleep(inf)
            return
        chosen = self.desk.next(now)
        if chosen is None:
            await self._sleep(self.desk.wakes_at())
            return
        job, decision = chosen
        job.why = decision.because
        await self._interruptible(job)

    async def _sleep(self, until: float) -> None:
        seconds = min(until, nextafter(self.desk.preloads.next_expiry, inf)) - self.clock()
        if seconds <= 0:
            await asyncio.sleep(0)  # others may work, whatever is due again and again
            return
        try:
            await asyncio.wait_for(self._wake.wait(), None if seconds == inf else seconds)
        except TimeoutError:
            return

    async def _interruptible(self, job: WarmJob) -> None:
        self._piece = piece = asyncio.create_task(self._work(job))
        try:
            await asyncio.wait([piece])
        except asyncio.CancelledError:
            piece.cancel()
            await asyncio.wait([piece])
            raise
        finally:
            self._piece = None
        if piece.cancelled():
            self.given_up += 1
        elif (error := piece.exception()) is not None:
            self.desk.failed(job, "warming it broke", self.clock())  # else it would be the next one again
            raise error

    # -- one piece -------------------------------------------------------------------------------------
    async def _work(self, job: WarmJob) -> None:
        """The next piece of the job, or its end."""
        engine = self.engine
        assert engine is not None
        try:
            if not engine.traits.warms_itself and await self._others(engine):
                await asyncio.sleep(_BUSY_LOOK_S)
                return
            if job.rendered is None:
                job.rendered = await engine.render(job.context)
            if self.lower is not None and not job.is_raised:
                await self._raise(self.lower, job, job.rendered)
            await self._warm(engine, job, job.rendered)
        except InvalidRequest as error:
            self.desk.failed(job, str(error), self.clock())
        except UpstreamError as error:
            log.warning("%s: warming stops for now: the engine %s", self.link.url, error)
            self._pause()
            job.refusals += 1
            if isinstance(error, UpstreamGone):
                self.broke()
            elif job.refusals >= _REFUSALS:
                self.desk.failed(job, f"the engine {error}", self.clock())

    async def _others(self, engine: Engine) -> bool:
        """Whether the engine is serving more than what went through here."""
        now = self.clock()
        if now - self._looked_at < (_CALM_LOOK_S if now - self._served_at > _CALM_S else _LOOK_S):
            return False
        if await self._serves_others(engine):
            await asyncio.sleep(_LINGERS_S)
            if await self._serves_others(engine):
                self._served_at = self.clock()
                return True
        self._looked_at = self.clock()
        return False

    async def _serves_others(self, engine: Engine) -> bool:
        serving = await engine.load()
        return serving is not None and serving > self.live + self.beside_live

    async def _raise(self, lower: Link, job: WarmJob, rendered: Rendered) -> None:
        """Have LMCache bring what its lower tiers hold up to where the engine loads from; then warming is loading."""
        if rendered.token_ids:
            model = str(job.context.body.get("model", ""))
            raised = await prefetch(lower, rendered.token_ids, job.context.salt, model=model)
            log.debug("LMCache has %s tokens ready of %d: %s", raised.tokens, rendered.tokens, raised.reason)
        job.is_raised = True

    async def _warm(self, engine: Engine, job: WarmJob, rendered: Rendered) -> None:
        block, total = engine.traits.block_tokens, _whole(rendered, engine.traits.block_tokens)
        start = believed = min(self._ready(engine, job, rendered, total), total)
        if start >= total:
            reason = "" if total else f"it is shorter than a block of {block} tokens"
            self.desk.warmed(job, 1.0, 0, 0.0, self.clock())
            self.desk.finished(job, self.clock(), reason)
            return
        whole, piece = engine.traits.warms_itself, self.pace.piece(block, self.clock() - self._served_at)
        if not job.is_sure and start > piece and not whole:
            # what is believed is asked for first: were it wrong, the next piece would be a long one; a single block
            # would not tell, as answers are believed but for a block
            start, piece = 0, max(piece, 2 * block)
        end = total if whole else piece_end(start, total, piece, block)
        # one token more: no engine answers from its cache alone, and of a prompt that it has whole it computes a block
        request, began = rendered.request(min(end + rendered.is_exact, rendered.tokens)), self.clock()
        self.pieces += 1
        status, raw = await self.link.post(
            request.path, request.body, headers=job.context.headers, timeout_s=_WHOLE_S if whole else _PIECE_S
        )
        seconds = self.clock() - began
        if status == 200 and whole:
            self._has_warmed(job, seconds, raw)
        elif status == 200:
            end = end if rendered.is_exact else request.end
            self._done(engine, job, start, end, min(believed, end), seconds, (request.path, raw))
        elif status in _REFUSED:
            self._was_refused(job, status)
        else:
            raise InvalidRequest(f"the engine refuses it with status {status}")

    def _ready(self, engine: Engine, job: WarmJob, rendered: Rendered, total: int) -> int:
        """Leading tokens that are warm: as the engine has said, else as is believed."""
        resident = self.desk.preloads.resident_tokens(job)
        if resident < job.blocks * BLOCK_UNITS:  # others have displaced it since its latest piece
            job.warm, job.is_sure = 0, False
        said = engine.cached(rendered, job.context.salt)
        if said is not None:
            return max(said, job.warm)
        believed = resident / max(job.size, 1) * total
        block = engine.traits.block_tokens
        return max(job.warm, int(believed) // block * block)

    def _done(
        self,
        engine: Engine,
        job: WarmJob,
        start: int,
        end: int,
        believed: int,
        seconds: float,
        answer: tuple[str, bytes],
    ) -> None:
        """The engine has answered: what it says counts more than what was believed when it was asked."""
        assert job.rendered is not None
        self._pause_s = _FIRST_PAUSE_S
        now, total = self.clock(), _whole(job.rendered, engine.traits.block_tokens)
        dialect = dialect_of(answer[0])
        assert dialect is not None
        said = read_answer(Asked(dialect, {}, "", b"", ()), 200, "application/json", answer[1])
        if said.prompt_tokens:
            engine.learn(job.rendered, end, said.prompt_tokens)
        cached = said.cached_tokens
        slack = engine.traits.block_tokens if job.rendered.is_exact else total // _INEXACT
        if cached is not None and cached + slack < max(start, believed):
            self.desk.had(job, cached / max(total, 1))
            job.lost += 1
            if job.lost >= _REFUSALS:
                self.desk.failed(job, "the engine does not keep what is warmed", now)
                return
        computed = max(end - cached, 0) if cached is not None else max(end - max(start, believed), 0)
        if believed >= end and computed <= engine.traits.block_tokens:
            computed = 0  # it was all there: of a prompt that ends with a block, that one is computed anew
        if cached is not None or believed <= start:  # else nobody knows what it had to do
            self.pace.warmed(computed, seconds)
        job.warm, job.computed, job.refusals, job.is_sure = max(job.warm, end), job.computed + computed, 0, True
        self.desk.warmed(job, end / max(total, 1), computed, seconds, now)
        if end >= total:
            if not job.rendered.is_exact:
                job.prompt_tokens = said.prompt_tokens or 0
            self.desk.finished(job, now)

    def _has_warmed(self, job: WarmJob, seconds: float, raw: bytes) -> None:
        """An engine that warms by itself says what became of it; where it is still busy, it is asked again."""
        said = an_object(decoded(raw).get("kvprefetch"))
        outcome, now = said.get("outcome"), self.clock()
        job.prompt_tokens = count(said.get("tokens")) or 0
        if outcome in (Outcome.WARM.value, Outcome.ALREADY_WARM.value):
            job.computed = job.prompt_tokens if outcome == Outcome.WARM.value else 0
            self.desk.warmed(job, 1.0, job.computed, seconds, now)
            self.desk.finished(job, now)
        elif outcome != "pending":
            self.desk.failed(job, f"the engine says {outcome}: {text(said.get('reason'))}", now)

    def _was_refused(self, job: WarmJob, status: int) -> None:
        self.refused += 1
        job.refusals += 1
        self._pause()
        if job.refusals >= _REFUSALS:
            self.desk.failed(job, f"the engine refuses warming with status {status}", self.clock())

    def _pause(self) -> None:
        self._resume_at = self.clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _whole(rendered: Rendered, block_tokens: int) -> int:
    """What of it the engine can keep: whole blocks, where tokens are counted."""
    return rendered.tokens // block_tokens * block_tokens if rendered.is_exact else rendered.tokens
