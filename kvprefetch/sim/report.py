"""What a replay measured, as plain numbers."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

LONG_IDLE_S = 300.0


@dataclass(frozen=True, slots=True)
class Served:
    """One request's end."""

    tenant: str
    ttft_s: float
    is_follow_up: bool
    is_long_return: bool  # idle for more than 5 minutes, and an endless cache would know its context
    gpu: int  # tokens of the reusable prefix, by where they were found
    host: int
    recomputed: int
    at: float


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `ordered` do not exceed; 0 of nothing."""
    if not ordered:
        return 0.0
    return ordered[min(max(int(-(-share * len(ordered) // 1)) - 1, 0), len(ordered) - 1)]


def summary(values: Iterable[float]) -> dict[str, float]:
    """p50, p95, p99, mean, and how many."""
    ordered = sorted(values)
    return {
        "p50": quantile(ordered, 0.5),
        "p95": quantile(ordered, 0.95),
        "p99": quantile(ordered, 0.99),
        "mean": fmean(ordered) if ordered else 0.0,
        "n": len(ordered),
    }


def ttft(served: Iterable[Served]) -> dict[str, dict[str, float]]:
    """TTFT of all requests, follow-ups, and returns after long idleness, in seconds."""
    found = list(served)
    return {
        "all": summary(s.ttft_s for s in found),
        "follow_up": summary(s.ttft_s for s in found if s.is_follow_up),
        "return_5min": summary(s.ttft_s for s in found if s.is_long_return),
    }


def prefix_tokens(served: Iterable[Served]) -> dict[str, int]:
    """Where the reusable prefix tokens of follow-ups were found."""
    found = [s for s in served if s.is_follow_up]
    return {
        "gpu": sum(s.gpu for s in found),
        "host": sum(s.host for s in found),
        "recomputed": sum(s.recomputed for s in found),
    }


def by_tenant(served: Iterable[Served], static_hits: dict[str, float]) -> list[dict[str, Any]]:
    """Each tenant's share of reusable tokens found on the GPU, beside what a private static share would give."""
    gpu: dict[str, int] = defaultdict(int)
    reusable: dict[str, int] = defaultdict(int)
    for s in served:
        gpu[s.tenant] += s.gpu
        reusable[s.tenant] += s.gpu + s.host + s.recomputed
    return [
        {"tenant": tenant, "hit": gpu[tenant] / max(reusable[tenant], 1), "static_hit": static_hits.get(tenant, 0.0)}
        for tenant in sorted(reusable)
    ]
