"""Answer the story's questions three ways in one run, and put the measurements side by side."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from kvprefetch.demo.play import Answer, Player
from kvprefetch.demo.story import Ask, Step
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.inprocess import Local
from kvprefetch.settings import Settings, SpeculationSettings

WAYS = ("cold", "reactive", "preloaded")
Tell = Callable[[str, str], None]


def steps_to_tell(story: tuple[Step, ...]) -> int:
    """How many times `compare` will call `tell`."""
    return len(story) * len(WAYS) + sum(isinstance(step, Ask) for step in story)


def compare(
    engine: TransformersEngine,
    settings: Settings,
    story: tuple[Step, ...],
    texts: dict[str, str],
    tell: Tell,
    max_tokens: int = 16,
) -> dict[str, Any]:
    """The report: see `kvprefetch demo --json`. `tell(way, what)` is called before each step."""
    answers: dict[str, list[Answer]] = {}
    resident: list[float] = []
    prefetch: dict[str, Any] = {}
    _warm_up(engine, settings)
    for way in WAYS:
        preload = way == "preloaded"
        speculation = settings.speculation if preload else SpeculationSettings(enabled=False)
        with Local(engine, replace(settings, speculation=speculation)) as kv:
            player = Player(kv, texts, preload, way == "cold", max_tokens, partial(tell, way))
            answers[way] = player.play(story)
            if preload:
                prefetch = kv.stats()["prefetch"]
                resident = player.resident(story)
            kv.check()
    return _report(engine, answers, resident, prefetch)


def _warm_up(engine: TransformersEngine, settings: Settings) -> None:
    """The first forwards of a process are slower; they belong to none of the three ways."""
    with Local(engine, settings) as kv:
        for length in (engine.chunk_tokens, 40):
            kv.generate(token_ids=[1] * length, max_tokens=4, ignore_eos=True).result()


def _report(
    engine: TransformersEngine, answers: dict[str, list[Answer]], resident: list[float], prefetch: dict[str, Any]
) -> dict[str, Any]:
    turns = []
    for cold, reactive, preloaded in zip(*(answers[way] for way in WAYS), strict=True):
        turns.append(
            {
                "kind": cold.kind,
                "file": cold.file,
                "context_tokens": cold.context_tokens,
                "ttft_cold_s": cold.ttft_s,
                "ttft_reactive_s": reactive.ttft_s,
                "ttft_preloaded_s": preloaded.ttft_s,
                "reused_tokens": preloaded.reused_tokens,
                "reused_tokens_reactive": reactive.reused_tokens,
                "identical": cold.tokens == reactive.tokens == preloaded.tokens,
                "answer": preloaded.text,
            }
        )
    times = {way: [answer.ttft_s for answer in answers[way]] for way in WAYS} | {"resident": resident}
    source = Path(engine.loaded.name)
    return {
        "model": source.name if source.exists() else engine.loaded.name,  # a report tells nothing of local folders
        "device": str(engine.pool.device),
        "dtype": str(engine.shape.dtype),
        "backend": engine.backend_name,
        "turns": turns,
        "median": {way: median(values) for way, values in times.items()},
        "prefetch": {key: prefetch[key] for key in _PREFETCH},
    }


_PREFETCH = (
    "issued",
    "pending",
    "outcomes",
    "uses",
    "use_pending",
    "tokens_computed",
    "tokens_used",
    "tokens_wasted",
    "seconds",
)
