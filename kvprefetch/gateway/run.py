"""Run a gateway until SIGTERM or SIGINT; what is in flight then may finish."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from kvprefetch.errors import SettingsError
from kvprefetch.gateway.app import make_gateway
from kvprefetch.gateway.link import open_links
from kvprefetch.http.gate import check_host
from kvprefetch.http.serving import listen, make_server, outliving_signals, url_of
from kvprefetch.settings import Settings

log = logging.getLogger(__name__)
_PAUSE_S = 5.0


async def run(settings: Settings, ready: Callable[[str], None] = lambda url: None) -> None:
    """Listen where the settings say, call `ready` with the URL, and serve. To be called on the main thread.

    Raises SettingsError if there is no upstream, or the port cannot be had.
    """
    own = settings.gateway
    if not own.upstreams:
        raise SettingsError("gateway.upstreams: there is none; say --upstream http://host:port")
    check_host(own.host, settings, "gateway.host")
    async with open_links(own) as links:
        gateway = make_gateway(settings, links)
        listener = listen(own.host, own.port, "gateway")
        server = make_server(gateway.app, own.drain_s, dates=False)
        warming = asyncio.create_task(again_and_again(gateway.run))
        try:
            with outliving_signals():
                ready(url_of(listener))
                await server.serve(sockets=[listener])
        finally:
            warming.cancel()
            await asyncio.gather(warming, return_exceptions=True)
            await gateway.close()


async def again_and_again(work: Callable[[], Awaitable[None]], pause_s: float = _PAUSE_S) -> None:
    """Until it is cancelled, or ends by itself. What breaks it is logged at once, and it begins again after a pause."""
    while True:
        try:
            return await work()
        except Exception:  # the task's outermost line: requests are served without it
            log.exception("warming broke; it begins again in %g s", pause_s)
        await asyncio.sleep(pause_s)
