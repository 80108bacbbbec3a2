"""`kvprefetch`: exit status 0 ok, 1 failed, 2 wrong usage."""

import logging
import sys

import click

from kvprefetch import __version__
from kvprefetch.cli.demo import demo
from kvprefetch.cli.gateway import gateway
from kvprefetch.cli.serve import serve
from kvprefetch.cli.simulate import simulate
from kvprefetch.cli.stats import stats
from kvprefetch.cli.tenants import tenants
from kvprefetch.cli.warm import warm
from kvprefetch.cli.worker import worker
from kvprefetch.errors import KVPrefetchError


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def commands() -> None:
    """Has the KV cache of the context a user will need in memory before the request comes."""


commands.add_command(demo)
commands.add_command(gateway)
commands.add_command(serve)
commands.add_command(simulate)
commands.add_command(stats)
commands.add_command(tenants)
commands.add_command(warm)
commands.add_command(worker)


def main() -> None:
    """The entry point; errors of our own become one line, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        commands()
    except KVPrefetchError as error:
        click.echo(f"kvprefetch: {error}", err=True)
        sys.exit(1)
