"""`kvprefetch simulate`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click

from kvprefetch.errors import InvalidRequest, KVPrefetchError
from kvprefetch.sim.arrivals import Signals, place
from kvprefetch.sim.events import read_events
from kvprefetch.sim.formats import FORMATS, read_trace
from kvprefetch.sim.machine import Machine
from kvprefetch.sim.navigate import NAMES as NAVIGATORS
from kvprefetch.sim.navigate import NavigationReplay
from kvprefetch.sim.policies import NAMES
from kvprefetch.sim.replay import Experiment, Replay
from kvprefetch.sim.visits import place_visits

NAVIGATION = "navigation"
_M = Machine()
_POLICIES = "gpu-lru,reactive,ttl:300,pause,next-turn,kvprefetch,kvprefetch-inferred,oracle:5,belady"


def parse_signals(text: str) -> Signals:
    """`recall=.9,precision=.9,lead=5` as Signals. Raises InvalidRequest."""
    known = {field.name for field in fields(Signals)}
    values: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if name.strip() not in known:
            raise InvalidRequest(f"signals: {name!r} is none of {', '.join(sorted(known))}")
        try:
            values[name.strip()] = float(number)
        except ValueError as error:
            raise InvalidRequest(f"signals: {part!r} is not name=number") from error
    return Signals(**values)


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--format", "name", type=click.Choice([*sorted(FORMATS), NAVIGATION]), required=True, help="Format of TRACE."
)
@click.option(
    "--policies", help=f"Any of: {NAMES} (default {_POLICIES}); for {NAVIGATION}: {NAVIGATORS} (default: all)."
)
@click.option("--gpu-tokens", default=_M.gpu_tokens, type=click.IntRange(1), help="KV pool of each worker's GPU.")
@click.option("--host-tokens", default=_M.host_tokens, type=click.IntRange(0), help="KV kept in each host's memory.")
@click.option("--kv-bytes-per-token", default=_M.kv_bytes_per_token, type=float, help="Bytes of KV per token.")
@click.option("--reload-gbps", default=_M.reload_gbps, type=float, help="Host to GPU, 10⁹ bytes/s.")
@click.option("--prefill-tflops", default=_M.prefill_tflops, type=float, help="Achieved, 10¹² FLOP/s.")
@click.option("--params-b", default=_M.params / 1e9, type=float, help="Parameters of the model, 10⁹.")
@click.option(
    "--concurrency", default=16.0, type=float, help="Sessions alive on average, where the trace has no clock."
)
@click.option("--tenants", default=1, type=click.IntRange(1), help="K: tenant = rank of a session's tool set mod K.")
@click.option("--workers", default=1, type=click.IntRange(1), help="Workers; a session stays with one.")
@click.option("--signals", default="recall=.9,precision=.9,lead=5", help="How good signals are; lead in s.")
@click.option("--prefill-order", default="slices", type=click.Choice(["fifo", "slices"]), help="Slices take turns.")
@click.option("--seed", default=0, type=int, help="Of everything that is drawn.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many requests of the file.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here.")
def simulate(trace: Path, name: str, policies: str | None, json_file: Path | None, **options: Any) -> None:
    """Replay TRACE under several policies on a virtual clock, with the worker's own predictor, planner and eviction.

    The defaults are an 8B model in bf16 on one H200. TTFT in seconds; shares are of the reusable prefix tokens of
    follow-ups; `moved` is tokens preloaded per token that a request then used.
    """
    reports = []
    try:
        replay: Replay | NavigationReplay
        if name == NAVIGATION:
            replay, chosen = make_navigation(trace, options), policies or NAVIGATORS
        else:
            replay = make_replay(read_trace(trace, name, options["tenants"]), options)
            chosen = policies or _POLICIES
        click.echo(_HEADER)
        for policy in chosen.split(","):
            reports.append(replay.run(policy.strip()))
            click.echo(_row(reports[-1]))
    except InvalidRequest as error:
        raise click.UsageError(str(error)) from error
    if json_file:
        report = {"trace": trace.name, "format": name, "experiment": asdict(replay.experiment), "policies": reports}
        try:
            json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise KVPrefetchError(f"cannot write {json_file}: {error}") from error


def make_navigation(trace: Path, options: Mapping[str, Any]) -> NavigationReplay:
    """The same, for files opened and asked about. Raises InvalidRequest for what cannot be."""
    if options["workers"] != 1:
        raise InvalidRequest(f"--format {NAVIGATION} replays one worker")
    events = read_events(trace)[: options["limit"]]
    visits = place_visits(events, options["concurrency"], options["seed"])
    experiment = Experiment(_machine(options), 1, parse_signals(options["signals"]), options["seed"])
    return NavigationReplay(visits, experiment)


def make_replay(trace: Any, options: Mapping[str, Any]) -> Replay:
    """The experiment that the options describe. Raises InvalidRequest for what cannot be."""
    machine = _machine(options)
    signals, seed = parse_signals(options["signals"]), options["seed"]
    placed = place(trace.limited(options["limit"]), options["concurrency"], seed)
    return Replay(placed, Experiment(machine, options["workers"], signals, seed))


def _machine(options: Mapping[str, Any]) -> Machine:
    for positive in ("kv_bytes_per_token", "reload_gbps", "prefill_tflops", "params_b", "concurrency"):
        if not 0 < options[positive] < float("inf"):
            raise InvalidRequest(f"--{positive.replace('_', '-')} must be more than 0")
    return Machine(
        gpu_tokens=options["gpu_tokens"],
        host_tokens=options["host_tokens"],
        kv_bytes_per_token=options["kv_bytes_per_token"],
        reload_gbps=options["reload_gbps"],
        prefill_tflops=options["prefill_tflops"],
        params=options["params_b"] * 1e9,
        slice_s=_M.slice_s if options["prefill_order"] == "slices" else None,
    )


_HEADER = (
    f"{'policy':<20}{'all p50':>9}{'p95':>9}{'follow-up':>11}{'p99':>9}{'>5 min':>9}{'p99':>9}"
    f"{'gpu':>7}{'host':>7}{'redone':>8}{'moved':>7}"
)


def _row(report: dict[str, Any]) -> str:
    ttft, found, prefetch = report["ttft_s"], report["prefix_tokens"], report["prefetch"]
    total = max(sum(found.values()), 1)
    useful = prefetch["useful_tokens"]
    return (
        f"{report['policy']:<20}{ttft['all']['p50']:>9.3f}{ttft['all']['p95']:>9.3f}"
        f"{ttft['follow_up']['p50']:>11.3f}{ttft['follow_up']['p99']:>9.3f}"
        f"{ttft['return_5min']['p50']:>9.3f}{ttft['return_5min']['p99']:>9.3f}"
        f"{found['gpu'] / total:>7.1%}{found['host'] / total:>7.1%}{found['recomputed'] / total:>8.1%}"
        f"{prefetch['moved_tokens'] / useful if useful else 0:>7.2f}"
    )
