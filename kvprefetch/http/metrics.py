"""What Prometheus reads at /metrics: what this endpoint saw, and the worker's own books at the moment of reading.

No label holds a session or a prompt; tenants are in what operators read alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from kvprefetch.http.backend import Backend
from kvprefetch.http.tenant_metrics import tenant_families
from kvprefetch.outcomes import MissReason, Outcome, Use
from kvprefetch.worker.request import Generation

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_FOUND = ("cold", "device", "host")


class Metrics:
    """The numbers of one endpoint, in a registry of their own. Thread-safe."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kvprefetch_http_requests",
            "Requests, by endpoint and status.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.live = Gauge("kvprefetch_live_requests", "Requests being answered.", registry=self.registry)
        self._ttft = Histogram(
            "kvprefetch_ttft_seconds",
            "From a request's arrival to its first token, by where the beginning of its prompt was found.",
            ["found"],
            buckets=_TTFT_S,
            registry=self.registry,
        )
        self._prompt = Counter("kvprefetch_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self._cached = Counter(
            "kvprefetch_cached_tokens", "Tokens of prompts that were found.", ["found"], registry=self.registry
        )
        self.generated = Counter("kvprefetch_generated_tokens", "Tokens of answers.", registry=self.registry)
        for found in _FOUND:
            self._ttft.labels(found)
        for found in _FOUND[1:]:
            self._cached.labels(found)
        self.registry.register(_Books(backend.stats))
        self._tenants = CollectorRegistry()
        self._tenants.register(_ByTenant(backend))

    def first_token(self, generation: Generation, seconds: float) -> None:
        """A request's first token came `seconds` after the request."""
        loaded, reused = generation.loaded_tokens, generation.reused_tokens
        found = "host" if loaded else "device" if reused else "cold"
        self._ttft.labels(found).observe(seconds)
        self._prompt.inc(generation.prompt_tokens)
        self._cached.labels("device").inc(reused)
        self._cached.labels("host").inc(loaded)

    def text(self) -> bytes:
        """What is everybody's, in Prometheus's format. Waits for at most one step of the worker."""
        return generate_latest(self.registry)

    def text_for_operators(self) -> bytes:
        """All of it. Waits for at most two steps of the worker."""
        return self.text() + generate_latest(self._tenants)


class _Reading(Collector):
    """What is read when it is asked for."""

    def describe(self) -> Iterator[Metric]:
        """Nothing: it would take a reading to know."""
        return iter(())


class _ByTenant(_Reading):
    """What tenants have of the worker's pool."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        return tenant_families(self._backend.charges(), *self._backend.shares())


class _Books(_Reading):
    """The worker's stats."""

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        stats = self._stats()
        yield InfoMetricFamily(
            "kvprefetch_worker", "What serves.", {name: str(stats[name]) for name in ("model", "device", "backend")}
        )
        pool, prefetch, lookups = stats["pool"], stats["prefetch"], stats["lookups"]
        pages = {state: pool[state] for state in ("free", "resident", "in_flight", "quarantined")}
        yield _family(GaugeMetricFamily, "pool_pages", "Pages of the device pool.", "state", pages)
        yield CounterMetricFamily("kvprefetch_pool_evictions", "Blocks evicted.", value=pool["evictions"])
        yield CounterMetricFamily("kvprefetch_prefetches", "Preloads begun.", value=prefetch["issued"])
        outcomes = {outcome.value: prefetch["outcomes"][outcome.name] for outcome in Outcome}
        yield _family(CounterMetricFamily, "prefetch_outcomes", "How preloads ended.", "outcome", outcomes)
        uses = {use.value: prefetch["uses"][use.name] for use in Use}
        yield _family(CounterMetricFamily, "prefetch_uses", "What resident preloads were good for.", "use", uses)
        tokens = {kind: prefetch[f"tokens_{kind}"] for kind in ("computed", "used", "abandoned")}
        yield _family(CounterMetricFamily, "prefetch_tokens", "Tokens computed ahead.", "kind", tokens)
        blocks = {"hits": lookups["hits"], "loaded": lookups["loaded"]}
        yield _family(CounterMetricFamily, "lookup_found_blocks", "Blocks of prompts found.", "how", blocks)
        misses = {reason.value: lookups["misses"].get(reason.value, 0) for reason in MissReason}
        yield _family(CounterMetricFamily, "lookup_missed_blocks", "Blocks of prompts not found.", "reason", misses)
        node = stats["node"]
        if node is not None:
            yield GaugeMetricFamily(
                "kvprefetch_service_connected", "1: there is a cache service.", int(node["connected"])
            )
            yield GaugeMetricFamily("kvprefetch_arena_leases", "Leases on blocks of the arena.", node["leases"])
            yield _family(CounterMetricFamily, "arena_read", "Blocks read, look-ups failed.", "what", node["read"])
            yield _family(CounterMetricFamily, "arena_written", "Blocks of write-behind.", "what", node["written"])


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, text: str, label: str, values: dict[str, int]
) -> Metric:
    family = kind(f"kvprefetch_{name}", text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
