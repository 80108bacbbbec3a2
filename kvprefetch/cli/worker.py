"""`kvprefetch worker`."""

import gc
import logging
import sys
from dataclasses import replace

import click

from kvprefetch.settings import Settings, client_token, load_settings, parse_bytes

log = logging.getLogger(__name__)
_FIRST_CONTACT_S = 3.0  # without a service the worker serves all the same


@click.command()
@click.option("--model", required=True, help="A folder, a GGUF file or a hub id.")
@click.option(
    "--service",
    "address",
    help="Address of the cache service: unix:///path or host:port, or 'none'.  [default: the user's]",
)
@click.option("--token", help="Bearer token of a worker, for the service.  [default: $KVPREFETCH_TOKEN]")
@click.option("--ca", default="", help="PEM file that signs the service's certificate.")
@click.option("--certificate", default="", help="PEM file: this worker's own certificate.")
@click.option("--key", default="", help="PEM file: the key of that certificate.")
@click.option("--settings", "settings_file", help="TOML file.  [default: $KVPREFETCH_SETTINGS]")
@click.option("--host", help="Address for HTTP.  [default: the settings', 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port for HTTP, 0 for any.  [default: the settings', 8000]")
@click.option("--pool", help="Size of the page pool: bytes, or a share of free memory.  [default: the settings', 25%]")
@click.option("--dtype", help="auto, float32, bfloat16 or float16.  [default: the settings', auto]")
def worker(
    model: str,
    address: str | None,
    token: str | None,
    ca: str,
    certificate: str,
    key: str,
    settings_file: str | None,
    host: str | None,
    port: int | None,
    pool: str | None,
    dtype: str | None,
) -> None:
    """Serve MODEL over HTTP, as OpenAI's API, and share its KV through the node's cache service.

    The service may be started later, killed and restarted: the worker serves on without it. SIGTERM lets what is in
    flight finish; then the worker proves that every page is accounted for, and fails if one is not.
    """
    try:
        import torch  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise click.ClickException(f"a worker needs its extra: pip install 'kvprefetch[worker]' ({error})") from error
    settings = _settings(load_settings(settings_file), host, port, pool, dtype)
    given = client_token() if token is None else token
    _serve(model, settings, address, {"token": given, "ca": ca, "certificate": certificate, "key": key})


def _settings(settings: Settings, host: str | None, port: int | None, pool: str | None, dtype: str | None) -> Settings:
    """What the command line says goes before what the file says."""
    http = replace(settings.http, host=host or settings.http.host, port=settings.http.port if port is None else port)
    pages = replace(settings.pool, size=pool or settings.pool.size)
    engine = replace(settings.engine, dtype=dtype or settings.engine.dtype)
    return replace(settings, http=http, pool=pages, engine=engine)


def _serve(model: str, settings: Settings, address: str | None, credential: dict[str, str]) -> None:
    """Imports are here so that `--help` needs no torch."""
    import time

    import transformers

    from kvprefetch.client.channel import open_channel
    from kvprefetch.engines.engine import open_engine
    from kvprefetch.http.app import make_app
    from kvprefetch.http.serving import listen, serve
    from kvprefetch.inprocess import Local
    from kvprefetch.worker.link import Link

    if settings.http.port:
        listen(settings.http.host, settings.http.port).close()  # better told now than when the model is loaded
    if not settings.pool.size.strip().endswith("%"):
        parse_bytes(settings.pool.size, "pool.size")
    if credential["token"] and not settings.credentials:
        log.warning(
            "a token for the service, but no [[credentials]] for HTTP: every request counts as tenant %r; give the "
            "service's --settings, too",
            settings.tenant,
        )
    click.echo(f"loading {model}, and proving that paged attention answers as the library does", err=True)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    channel = None if address == "none" else open_channel(address, **credential)
    try:
        engine = open_engine(model, settings)
        verify, drain_s = settings.arena.checksums, settings.service.drain_s
        link = Link(channel, engine.pool, time.monotonic, verify=verify) if channel is not None else None
        with Local(engine, settings, link) as local:
            station = local.core.station
            if station is not None and not station.registered.wait(_FIRST_CONTACT_S):
                click.echo("no cache service yet: serving without, and looking for it", err=True)
            gc.collect()
            gc.freeze()  # a full collection would look at all that torch brought along: 0.2 s in the midst of a request
            serve(
                make_app(local, settings),
                settings.http,
                ready=lambda url: _say(engine.loaded.name, url),
                drain_s=drain_s,
            )
            local.check()
            click.echo("ended: every page is accounted for", err=True)
    finally:
        if channel is not None:
            channel.close()


def _say(model: str, url: str) -> None:
    click.echo(f"serving {model} at {url}")
    sys.stdout.flush()
