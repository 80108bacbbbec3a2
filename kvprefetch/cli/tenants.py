"""`kvprefetch tenants`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvprefetch.client.connect import Connection


@dataclass(frozen=True)
class _Service:
    """How to reach it, and how to tell what it says."""

    connect: "Callable[[], Connection]"
    as_json: bool


@click.group(invoke_without_command=True)
@click.option("--service", "address", help="unix:///path, host:port or tls://host:port.  [default: the user's service]")
@click.option("--token", help="An operator's bearer token.  [default: $KVPREFETCH_TOKEN]")
@click.option("--ca", default="", help="PEM file that signs the service's certificate.")
@click.option("--certificate", default="", help="PEM file: one's own certificate.")
@click.option("--key", default="", help="PEM file: the key of that certificate.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
@click.pass_context
def tenants(
    context: click.Context,
    address: str | None,
    token: str | None,
    ca: str,
    certificate: str,
    key: str,
    as_json: bool,
) -> None:
    """What each tenant may count on and occupies; with a command, change it while the service runs.

    A change holds for all pools of the service and its workers, and after a restart. Nothing is evicted at once.
    """
    from kvprefetch.client.connect import connect

    context.obj = _Service(lambda: connect(address, token, ca=ca, certificate=certificate, key=key), as_json)
    if context.invoked_subcommand is None:
        with context.obj.connect() as kv:
            _show(kv.tenants(), as_json)


class Fraction(click.ParamType[float]):
    """ "25%" or 0.25."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The fraction that it means."""
        text = str(value).strip()
        try:
            found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"{value!r} is no fraction: write 25% or 0.25", param, ctx)
        if not 0 <= found <= 1:
            self.fail(f"{value!r} is not from 0 to 1", param, ctx)
        return found


@tenants.command("set")
@click.argument("name")
@click.option("--weight", type=float, help="In what nobody is guaranteed, above 0.  [default: as it is]")
@click.option("--guarantee", type=Fraction(), help="Fraction of every pool: 25% or 0.25.  [default: as it is]")
@click.pass_obj
def set_share(service: _Service, name: str, weight: float | None, guarantee: float | None) -> None:
    """Change what the tenant NAME may count on. Refused where guarantees would add up to more than a pool."""
    if weight is None and guarantee is None:
        raise click.UsageError("give a --weight, a --guarantee, or both")
    with service.connect() as kv:
        before = next((each for each in kv.tenants() if each["name"] == name), {"weight": 1.0, "guarantee": 0.0})
        share = (
            before["weight"] if weight is None else weight,
            before["guarantee"] if guarantee is None else guarantee,
        )
        _show(kv.set_tenants({name: share}), service.as_json)


@tenants.command()
@click.argument("names", nargs=-1, required=True)
@click.pass_obj
def reset(service: _Service, names: tuple[str, ...]) -> None:
    """Give the tenants NAMES what the settings say again."""
    with service.connect() as kv:
        _show(kv.set_tenants({}, names), service.as_json)


def _show(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"tenants": found}, indent=2))
        return
    width = max([6, *(len(each["name"]) for each in found)])
    click.echo(f"{'tenant':<{width}}{'weight':>8}{'guarantee':>11}{'host MiB':>10}{'disk MiB':>10}{'Redis MiB':>11}")
    for each in found:
        mib = [each[f"{tier}_bytes"] / 2**20 for tier in ("host", "disk", "redis")]
        click.echo(
            f"{each['name'] or '(public)':<{width}}{each['weight']:>8g}{each['guarantee']:>11.1%}"
            f"{mib[0]:>10.1f}{mib[1]:>10.1f}{mib[2]:>11.1f}"
        )
