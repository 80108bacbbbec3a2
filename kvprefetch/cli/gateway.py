"""`kvprefetch gateway`."""

import logging
import sys
from dataclasses import replace

import click

from kvprefetch.settings import Settings, UpstreamSettings, load_settings


@click.command()
@click.option(
    "--upstream",
    "urls",
    multiple=True,
    help="http://host:port of an engine; may be repeated.  [default: the settings']",
)
@click.option(
    "--service",
    help="'embedded', or a cache service's address, whose workers take the hints.  [default: settings', embedded]",
)
@click.option("--settings", "settings_file", help="TOML file.  [default: $KVPREFETCH_SETTINGS]")
@click.option("--host", help="Address for HTTP.  [default: the settings', 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port for HTTP, 0 for any.  [default: the settings', 8080]")
def gateway(
    urls: tuple[str, ...], service: str | None, settings_file: str | None, host: str | None, port: int | None
) -> None:
    """Stand before OpenAI-compatible engines, and have their own prefix caches warm before requests come.

    Change the base URL of your clients to what it prints; nothing else. SIGTERM lets what is in flight finish.
    """
    settings = _settings(load_settings(settings_file), urls, service, host, port)
    try:
        import asyncio

        import uvloop

        from kvprefetch.gateway.run import run
    except ImportError as error:
        raise click.ClickException(
            f"the gateway needs its extra: pip install 'kvprefetch[gateway]' ({error})"
        ) from error
    logging.getLogger("kvprefetch").setLevel(logging.INFO)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(settings, _say))


def _settings(
    settings: Settings, urls: tuple[str, ...], service: str | None, host: str | None, port: int | None
) -> Settings:
    """What the command line says goes before what the file says."""
    own = settings.gateway
    upstreams = tuple(UpstreamSettings(url) for url in urls) or own.upstreams
    own = replace(
        own,
        upstreams=upstreams,
        service=service or own.service,
        host=host or own.host,
        port=own.port if port is None else port,
    )
    return replace(settings, gateway=own)


def _say(url: str) -> None:
    click.echo(f"gateway at {url}")
    sys.stdout.flush()
