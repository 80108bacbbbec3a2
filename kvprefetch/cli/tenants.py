"""`kvprefetch tenants`."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvprefetch.client.connect import Connection

Command = Callable[..., None]
_OPTIONS = (
    click.option("--service", "address", help="unix:///path, host:port or tls://…  [default: the user's service]"),
    click.option("--token", help="An operator's bearer token.  [default: $KVPREFETCH_TOKEN]"),
    click.option("--ca", help="PEM file that signs the service's certificate."),
    click.option("--certificate", help="PEM file: one's own certificate."),
    click.option("--key", help="PEM file: the key of that certificate."),
    click.option("--json", "as_json", is_flag=True, help="As one JSON object."),
)


def _with_options(command: Command) -> Command:
    """They may stand before a command's name and behind it."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.group(invoke_without_command=True)
@_with_options
@click.pass_context
def tenants(context: click.Context, /, **given: Any) -> None:
    """What each tenant may count on and has; with a command, change it while everything runs.

    A change holds for every pool of the service and its workers, and after a restart. Nothing is evicted at once.
    """
    context.obj = given
    if context.invoked_subcommand is None:
        with _service(given) as kv:
            _show(kv.tenants(), as_json=given["as_json"])


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
@_with_options
@click.pass_obj
def set_share(
    before: dict[str, Any], /, name: str, weight: float | None, guarantee: float | None, **given: Any
) -> None:
    """Change what the tenant NAME may count on, until it is reset.

    Refused where guarantees would add up to more than a pool, or this one would be less than a block.
    """
    if weight is None and guarantee is None:
        raise click.UsageError("give a --weight, a --guarantee, or both")
    given = _merged(before, given)
    with _service(given) as kv:
        _show(kv.set_tenants({name: (weight, guarantee)}), as_json=given["as_json"])


@tenants.command()
@click.argument("names", nargs=-1, required=True)
@_with_options
@click.pass_obj
def reset(before: dict[str, Any], /, names: tuple[str, ...], **given: Any) -> None:
    """Give the tenants NAMES what the settings say again. What they have stays charged to them."""
    given = _merged(before, given)
    with _service(given) as kv:
        _show(kv.set_tenants({}, dict.fromkeys(names)), as_json=given["as_json"])


def _merged(before: dict[str, Any], behind: dict[str, Any]) -> dict[str, Any]:
    """Options before the command's name, and behind it: these go first."""
    return {name: before[name] if value in (None, False) else value for name, value in behind.items()}


@contextmanager
def _service(given: dict[str, Any]) -> "Iterator[Connection]":
    from kvprefetch.client.connect import connect

    way = {name: value for name, value in given.items() if name != "as_json"}
    with connect(**way) as kv:
        yield kv


def _show(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"tenants": found}, indent=2))
        return
    names = [_shown(each["name"]) for each in found]
    width = max([6, *map(len, names)])
    click.echo(f"{'tenant':<{width}}  weight  guarantee  of arenas  host MiB  disk MiB  Redis MiB  changed")
    for name, each in zip(names, found, strict=True):
        host, disk, redis = (each[f"{tier}_bytes"] / 2**20 for tier in ("host", "disk", "redis"))
        click.echo(
            f"{name:<{width}}  {each['weight']:>6g}  {each['guarantee']:>9.1%}  {each['host_part']:>9.1%}  {host:>8.1f}"
            f"  {disk:>8.1f}  {redis:>9.1f}  {'yes' if each['changed'] else 'no':>7}"
        )


def _shown(name: str) -> str:
    """As it is, unless a terminal would make something else of it."""
    if not name:
        return "(public)"
    return name if name.isprintable() else ascii(name)
