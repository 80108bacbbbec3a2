"""Serve an application until SIGTERM or SIGINT; what is in flight then may finish."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from kvprefetch.errors import SettingsError
from kvprefetch.settings import HttpSettings

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_IDLE_CONNECTION_S = 60


def serve(
    app: Starlette, settings: HttpSettings, *, ready: Callable[[str], None] = lambda url: None, drain_s: float = 30.0
) -> None:
    """Listen where the settings say, call `ready` with the URL, and block; to be called on the main thread.

    After SIGTERM nobody new is let in, and requests under way have `drain_s` to finish; then it returns. A second
    SIGINT makes it return at once. Raises SettingsError if the port cannot be had.
    """
    listener = listen(settings.host, settings.port)
    server = make_server(app, drain_s)
    with outliving_signals():
        ready(url_of(listener))
        server.run(sockets=[listener])


def listen(host: str, port: int, what: str = "http") -> socket.socket:
    """A listening socket; port 0 takes any. Raises SettingsError, which says for what it was."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2_048)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise SettingsError(f"{what}: cannot listen on {host}:{port} ({why}); choose another port") from error


def url_of(listener: socket.socket) -> str:
    """Where OpenAI's client finds it: the base URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def make_server(app: Starlette, drain_s: float, *, dates: bool = True) -> uvicorn.Server:
    """The server, not yet running: `run(sockets=[…])`, and `should_exit = True` from any thread ends it.

    `dates` False: answers have the Date header of whoever they are from, and no second one.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=dates,
            timeout_keep_alive=_IDLE_CONNECTION_S,
            timeout_graceful_shutdown=ceil(drain_s),
        )
    )


@contextmanager
def outliving_signals() -> Iterator[None]:
    """The server raises its signal once more after it has drained; our caller has things to close by then."""

    def ignore(number: int, frame: FrameType | None) -> None:
        return

    before = {number: signal.signal(number, ignore) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
