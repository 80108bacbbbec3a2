"""One engine behind the gateway: whether it is up, what it is, its books, its warming.

`run` finds out what the engine is, again and again until it is there, and once more after it was lost; requests are
passed on meanwhile, only nothing is warmed.
"""

import asyncio
import logging
from collections.abc import Callable

from kvprefetch.errors import UpstreamError
from kvprefetch.gateway.contract import Engine
from kvprefetch.gateway.desk import Desk
from kvprefetch.gateway.engines.discover import discover
from kvprefetch.gateway.kv_events import Listener
from kvprefetch.gateway.link import UpstreamLink
from kvprefetch.gateway.pace import Pace
from kvprefetch.gateway.warmer import Warmer
from kvprefetch.settings import Settings, UpstreamSettings

log = logging.getLogger(__name__)
_FIRST_LOOK_S, _LAST_LOOK_S = 0.5, 10.0


class Upstream:
    """See the module's promises. Owned by the gateway; one event loop."""

    def __init__(
        self,
        link: UpstreamLink,
        settings: Settings,
        own: UpstreamSettings,
        clock: Callable[[], float],
        lost: Callable[["Upstream", str], None],
    ) -> None:
        self.link, self.own, self.clock, self._settings = link, own, clock, settings
        self.name = link.url
        self.engine: Engine | None = None
        self.is_up = True  # until it is seen not to be
        self.known = asyncio.Event()  # it has said what it is, once at least; while it is away that still holds
        self.takes_salt = False
        self.models: frozenset[str] = frozenset()
        self._lost, self._gone, self._wanted = lost, asyncio.Event(), asyncio.Event()
        self._listener = Listener(own.kv_events) if own.kv_events else None
        self.pace = Pace(settings.speculation.step_s)
        self.desk = self._new_desk(own.capacity_tokens or None)
        self.warmer = Warmer(link, self.desk, self.pace, clock, settings.gateway.beside_live)
        self.warmer.broke = self.broke
        self.warmer.lower = link.beside(own.lmcache) if own.lmcache else None

    @property
    def live(self) -> int:
        """Requests that it is answering for this gateway."""
        return self.warmer.live

    def broke(self) -> None:
        """It could not be reached: what it held is lost, most likely."""
        if self.is_up:
            self.is_up = False
            self._gone.set()

    async def until_known(self, limit_s: float) -> bool:
        """Look at once what it is; whether it has said so in time."""
        self._wanted.set()
        try:
            await asyncio.wait_for(self.known.wait(), limit_s)
        except TimeoutError:
            return False
        return True

    async def look(self) -> None:
        """Whether it is still there, after it has failed somebody."""
        try:
            await self.link.get("/v1/models")
        except UpstreamError:
            self.broke()

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.warmer.run())
            if self._listener is not None:
                tasks.create_task(self._listener.listen())
            while True:
                await self._find()
                self._gone.clear()
                await self._gone.wait()
                await self._forget()

    # -- within ----------------------------------------------------------------------------------------
    async def _find(self) -> None:
        pause_s = _FIRST_LOOK_S
        while True:
            try:
                engine = await discover(self.link, self.own, self._listener.residency if self._listener else None)
                break
            except UpstreamError as error:
                if self.is_up:
                    log.warning("the engine at %s is not there yet: it %s", self.name, error)
                self.is_up = False
            except Exception:  # the task's outermost line: what an engine says must not end the warming of others
                log.exception("it cannot be found out what the engine at %s is", self.name)
                self.is_up = False
            pause_s = _FIRST_LOOK_S if await self._is_wanted(pause_s) else min(2 * pause_s, _LAST_LOOK_S)
        traits = engine.traits
        log.info("%s is %s; its cache holds %s tokens", self.name, traits.kind, traits.capacity_tokens or "some")
        self.desk.replica.set_capacity(traits.capacity_tokens)
        self.engine = self.warmer.engine = engine
        self.takes_salt, self.models = traits.takes_salt, traits.models
        self.is_up = True
        self.known.set()
        self.warmer.wake()

    async def _is_wanted(self, limit_s: float) -> bool:
        """Wait; no longer than until a request needs to know it."""
        try:
            await asyncio.wait_for(self._wanted.wait(), limit_s)
        except TimeoutError:
            return False
        self._wanted.clear()
        return True

    async def _forget(self) -> None:
        engine, self.engine = self.engine, None
        self.warmer.engine = None
        self.desk.restarted()
        if engine is not None:
            await engine.close()

    def _new_desk(self, capacity_tokens: int | None) -> Desk:
        return Desk(self._settings.speculation, capacity_tokens, lambda session: self._lost(self, session))
