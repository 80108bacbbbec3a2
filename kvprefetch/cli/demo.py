"""`kvprefetch demo`."""

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import click

from kvprefetch.settings import EngineSettings, PoolSettings, Settings


@click.command()
@click.option("--model", help="A folder, a GGUF file or a hub id.  [default: SmolLM2-135M-Instruct, 100 to 300 MB]")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), default="kvprefetch-demo.png", help="PNG.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here.")
@click.option("--pool", default="3GiB", help="Size of the page pool: bytes, or a share of free memory such as 25%.")
@click.option("--max-tokens", default=16, type=click.IntRange(1), help="Tokens of each answer.")
def demo(model: str | None, plot: Path, json_file: Path | None, pool: str, max_tokens: int) -> None:
    """The same questions answered three ways: cold, from a reactive prefix cache, and preloaded.

    A developer opens files of the Python standard library, reads, asks, asks again and moves on; some files
    are never asked about. Everything is measured in this run, in float32, with real pauses: about three
    minutes on two cores.
    """
    try:
        import rich  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise click.ClickException(f"the demo needs its extra: pip install 'kvprefetch[demo]' ({error})") from error
    report = _run(model, pool, max_tokens, plot)
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not all(turn["identical"] for turn in report["turns"]):
        raise click.ClickException("the three ways gave different answers")


def _run(model: str | None, pool: str, max_tokens: int, plot: Path) -> dict[str, Any]:
    """Load, play, show; imports are here so that `--help` needs no torch."""
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvprefetch.demo.compare import compare, steps_to_tell
    from kvprefetch.demo.model import find_model
    from kvprefetch.demo.show import plot_report, print_report
    from kvprefetch.demo.story import STORY, standard_library
    from kvprefetch.engines.engine import open_engine

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    console = Console()
    settings = Settings(pool=PoolSettings(size=pool), engine=EngineSettings(dtype="float32"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, redirect_stderr=False) as progress:
        task = progress.add_task("finding the model", total=steps_to_tell(STORY) + 2)

        def tell(way: str, what: str) -> None:
            progress.update(task, advance=1, description=f"[bold]{way:>9}[/bold]  {what}"[:70])

        source = find_model(model)
        tell("loading", source)
        with redirect_stderr(StringIO()):  # the loader's own progress bars
            engine = open_engine(source, settings)
        tell("loaded", f"{engine.shape.layers} layers, {engine.pool.pages} pages, {engine.backend_name}")
        report = compare(engine, settings, STORY, standard_library(), tell, max_tokens)
    print_report(report, console)
    plot_report(report, plot)
    console.print(f"Chart: {plot}")
    return report
