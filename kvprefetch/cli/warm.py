"""`kvprefetch warm`."""

import json
import sys
from typing import IO, Any

import click

from kvprefetch.outcomes import Outcome

_KNOWN = {"messages", "tools", "chat_template_kwargs", "token_ids", "prompt", "model"}


@click.command()
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--public", is_flag=True, help="For every tenant: fills the public namespace. For operators alone.")
@click.option("--group", default="", help="For the tenants of this group, of which the token's tenant is one.")
@click.option("--name", default="", help="Remember it by this name; without FILE, warm what has this name.")
@click.option("--model", default="", help="Whose KV it is.  [default: FILE's, or the one that there is]")
@click.option("--hold", "hold_s", type=click.FloatRange(0), default=86_400.0, help="Seconds that it is kept unused.")
@click.option("--wait", "wait_s", type=click.FloatRange(0), default=600.0, help="Seconds to wait until it is warm.")
@click.option("--service", "address", help="unix:///path, host:port or tls://host:port.  [default: the user's service]")
@click.option("--token", help="Bearer token.  [default: $KVPREFETCH_TOKEN]")
@click.option("--ca", default="", help="PEM file that signs the service's certificate.")
@click.option("--certificate", default="", help="PEM file: one's own certificate.")
@click.option("--key", default="", help="PEM file: the key of that certificate.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def warm(
    file: IO[bytes] | None,
    public: bool,
    group: str,
    name: str,
    model: str,
    hold_s: float,
    wait_s: float,
    address: str | None,
    token: str | None,
    ca: str,
    certificate: str,
    key: str,
    as_json: bool,
) -> None:
    """Have a context warm before anybody asks: with --public on every worker, also on those that start later.

    FILE, or - for the standard input, is the beginning of an OpenAI request in JSON: "messages" (and "tools",
    "chat_template_kwargs"), or exact "token_ids". Fails where it is not warm in time; the service goes on with it.
    """
    from kvprefetch.client.connect import connect

    if public and group:
        raise click.UsageError("--public and --group are two namespaces: choose one")
    if file is None and not name:
        raise click.UsageError("give a FILE, or - for the standard input, or the --name of a context given before")
    content = _read(file) if file is not None else {}
    namespace = "public" if public else f"group:{group}" if group else ""
    content["model"] = model or content.get("model", "")
    with connect(address, token, ca=ca, certificate=certificate, key=key) as kv:
        context = kv.context(**content, name=name, namespace=namespace)
        hint = kv.prefetch(context, hold_s=hold_s)
        try:
            result = hint.wait(wait_s)
        except TimeoutError:
            raise click.ClickException(
                f"it is not warm after {wait_s:g} s; the service goes on with it: workers are busy, or none is there"
            ) from None
    said = {"outcome": result.outcome.name, "tokens": result.tokens, "worker": hint.worker, "reason": result.reason}
    if as_json:
        click.echo(json.dumps(said, indent=2))
    else:
        reason = f": {result.reason}" if result.reason else ""
        click.echo(f"{result.outcome.name}, {result.tokens} tokens at {hint.worker or 'no worker'}{reason}")
    if result.outcome not in (Outcome.WARM, Outcome.ALREADY_WARM):
        sys.exit(1)


def _read(file: IO[bytes]) -> dict[str, Any]:
    """What of the request makes a context. Other fields of a chat request, such as its temperature, do not matter."""
    try:
        body = json.load(file)
    except (ValueError, RecursionError) as error:
        raise click.ClickException(f"FILE is no JSON: {error}") from None
    if isinstance(body, list):
        body = {"messages": body}
    if not isinstance(body, dict):
        raise click.ClickException("FILE is a JSON object with messages or token_ids, or a list of messages")
    content = {name: value for name, value in body.items() if name in _KNOWN and value is not None}
    prompt = content.pop("prompt", None)
    if isinstance(prompt, list):
        content["token_ids"] = prompt
    if not content.get("messages") and not content.get("token_ids"):
        raise click.ClickException("FILE has neither messages nor token_ids")
    return content
