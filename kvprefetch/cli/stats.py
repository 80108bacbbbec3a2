"""`kvprefetch stats`."""

import json
from collections.abc import Iterator
from typing import Any

import click


@click.command()
@click.option("--service", "address", help="unix:///path, host:port or tls://host:port.  [default: the user's service]")
@click.option("--token", help="Bearer token.  [default: $KVPREFETCH_TOKEN]")
@click.option("--ca", default="", help="PEM file that signs the service's certificate.")
@click.option("--certificate", default="", help="PEM file: one's own certificate.")
@click.option("--key", default="", help="PEM file: the key of that certificate.")
@click.option("--check", is_flag=True, help="Prove first that every slot is accounted for; fails if one is not.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def stats(
    address: str | None, token: str | None, ca: str, certificate: str, key: str, check: bool, as_json: bool
) -> None:
    """Counts of a running service since its start: all for an operator or worker, a tenant's own for a tenant."""
    from kvprefetch.client.connect import connect

    with connect(address, token, ca=ca, certificate=certificate, key=key) as kv:
        if check:
            kv.check()
            click.echo("every slot is accounted for", err=True)
        found = kv.stats()
    del found["client"]  # of this command's own connection
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    rows = list(_rows(found, ""))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _rows(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every number with the path to it."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _rows(below, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, below in enumerate(value):
            yield from _rows(below, f"{name}[{number}]")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)
