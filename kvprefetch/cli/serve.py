"""`kvprefetch serve`."""

import logging
import sys
from dataclasses import replace

import click

from kvprefetch.settings import Settings, load_settings, shared_memory_dir, state_dir


@click.command()
@click.option("--settings", "settings_file", help="TOML file.  [default: $KVPREFETCH_SETTINGS, or every default]")
@click.option(
    "--listen",
    multiple=True,
    help="unix:///path or host:port; may be given again.  [default: the settings', a socket in the user's run folder]",
)
@click.option("--insecure-local", is_flag=True, help="Let a loopback port do without credentials.")
@click.option("--print-config", is_flag=True, help="Print the settings that would be used, as TOML, and end.")
def serve(settings_file: str | None, listen: tuple[str, ...], insecure_local: bool, print_config: bool) -> None:
    """Run this node's cache service: workers share their KV through it, applications send it hints and signals.

    SIGTERM or SIGINT lets what is in flight finish (settings: service.drain_s, 30 s), then it exits with 0; a second
    one ends it at once.
    """
    settings = _settings(load_settings(settings_file), listen, insecure_local)
    if print_config:
        click.echo(_effective(settings), nl=False)
        return
    try:
        import asyncio

        from kvprefetch.service.run import run
    except ImportError as error:
        raise click.ClickException(
            f"the service needs its extra: pip install 'kvprefetch[service]' ({error})"
        ) from error
    logging.getLogger("kvprefetch").setLevel(logging.INFO)
    asyncio.run(run(settings, _say))


def _settings(settings: Settings, listen: tuple[str, ...], insecure_local: bool) -> Settings:
    """What the command line says goes before what the file says."""
    service = settings.service
    service = replace(service, listen=listen or service.listen, insecure_local=insecure_local or service.insecure_local)
    return replace(settings, service=service)


def _effective(settings: Settings) -> str:
    """As TOML, with the places that follow from this user and machine."""
    from kvprefetch.cli.config import as_toml
    from kvprefetch.client.channel import default_address

    service, arena = settings.service, settings.arena
    service = replace(
        service,
        listen=service.listen or (default_address(),),
        state_dir=service.state_dir or str(state_dir()),
    )
    arena = replace(arena, dir=arena.dir or str(shared_memory_dir()))
    return as_toml(replace(settings, service=service, arena=arena))


def _say(addresses: list[str]) -> None:
    for address in addresses:
        click.echo(f"listening on {address}")
    sys.stdout.flush()
