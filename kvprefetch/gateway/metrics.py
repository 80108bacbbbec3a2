"""What Prometheus reads at /metrics: what passed through, and each engine's books at the moment of reading.

Tenants are labels, `MOST_TENANTS` of them, the others together; sessions and prompts never are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvprefetch.gateway.contract import Answered
from kvprefetch.outcomes import Outcome, Use

if TYPE_CHECKING:
    from kvprefetch.gateway.turn import Turn
    from kvprefetch.gateway.upstream import Upstream

MOST_TENANTS = 256
_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The numbers of one gateway, in a registry of their own."""

    def __init__(self, upstreams: Sequence["Upstream"], clock: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self._tenants: set[str] = set()
        self.requests = Counter(
            "kvprefetch_gateway_requests",
            "Requests, by dialect, status and how they ended.",
            ["tenant", "dialect", "status", "ended"],
            registry=self.registry,
        )
        self.ttft = Histogram(
            "kvprefetch_gateway_ttft_seconds",
            "From a request's arrival to the first byte of its stream, by how the beginning of its prompt was found.",
            ["tenant", "found"],
            buckets=_TTFT_S,
            registry=self.registry,
        )
        self.behind = Histogram(
            "kvprefetch_gateway_live_behind_warming_ttft_seconds",
            "The same of requests that came while a piece of warming was under way: live harm, against the others.",
            buckets=_TTFT_S,
            registry=self.registry,
        )
        self.tokens = Counter(
            "kvprefetch_gateway_prompt_tokens",
            "Tokens of prompts, as engines count them: all, and those that they had cached.",
            ["tenant", "kind"],
            registry=self.registry,
        )
        self.registry.register(_Books(upstreams, clock))

    def ended(self, turn: "Turn") -> None:
        """A request is over."""
        ended = "complete" if turn.error is None else turn.error.partition(" ")[0].rstrip(":")
        tenant = self.label(turn.tenant)
        self.requests.labels(tenant, turn.asked.dialect.name.lower(), str(turn.status or 502), ended).inc()
        if turn.is_stream and turn.first_byte is not None:
            seconds = turn.first_byte - turn.arrived
            self.ttft.labels(tenant, turn.found.how).observe(seconds)
            if turn.behind_piece:
                self.behind.observe(seconds)

    def read(self, turn: "Turn", said: Answered) -> None:
        """Its answer was read."""
        tenant = self.label(turn.tenant)
        if said.prompt_tokens:
            self.tokens.labels(tenant, "all").inc(said.prompt_tokens)
        if said.cached_tokens:
            self.tokens.labels(tenant, "cached").inc(said.cached_tokens)

    def label(self, tenant: str) -> str:
        """The tenant's name, or "other" where there are too many."""
        if tenant in self._tenants or len(self._tenants) < MOST_TENANTS:
            self._tenants.add(tenant)
            return tenant
        return "other"

    def text(self) -> bytes:
        """All of it, in Prometheus's format."""
        return generate_latest(self.registry)


class _Books(Collector):
    """The engines' books, read when they are asked for."""

    def __init__(self, upstreams: Sequence["Upstream"], clock: Callable[[], float]) -> None:
        self._upstreams, self._clock = upstreams, clock

    def describe(self) -> Iterator[Metric]:
        """Nothing: it would take a reading to know."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One reading."""
        yield self._gauge("upstream_up", "1: the engine can be reached.", lambda each: int(each.is_up))
        yield self._gauge("upstream_live", "Requests that it is answering for this gateway.", lambda each: each.live)
        yield self._gauge(
            "believed_blocks", "Blocks of 512 bytes of prompts that its cache is believed to hold.", _resident
        )
        yield self._gauge("preloads_waiting", "Preloads that wait or are in work.", lambda u: len(u.desk.preloads.jobs))
        yield self._counter("pieces", "Pieces of warming that were sent.", lambda each: each.warmer.pieces)
        yield self._counter("pieces_given_up", "Of them, for a live request.", lambda each: each.warmer.given_up)
        yield self._counter("pieces_refused", "Of them, by the engine.", lambda each: each.warmer.refused)
        yield self._counter("warming_seconds", "Time that pieces took.", lambda each: each.desk.ledger.seconds)
        yield self._counter("warmed_tokens", "Tokens computed ahead, in the engine's count.", _computed)
        yield self._counter("preloads", "Preloads begun.", lambda each: each.desk.ledger.issued)
        yield self._counter(
            "preloads_beaten", "Times that the engine had lost what was warm when its request came.", _beaten
        )
        for kind in ("computed", "used", "wasted"):
            name, text = f"speculative_tokens_{kind}", f"Tokens ahead, by size of text: {kind}."
            stats = [each.desk.ledger.stats() for each in self._upstreams]
            family = GaugeMetricFamily(f"kvprefetch_gateway_{name}", text, labels=["upstream"])
            for each, books in zip(self._upstreams, stats, strict=True):
                family.add_metric([each.name], books[f"tokens_{kind}"])
            yield family
        yield self._by("preload_outcomes", "How preloads ended.", "outcome", Outcome)
        yield self._by("preload_uses", "What resident preloads were good for.", "use", Use)

    def _gauge(self, name: str, text: str, of: Callable[["Upstream"], float]) -> Metric:
        family = GaugeMetricFamily(f"kvprefetch_gateway_{name}", text, labels=["upstream"])
        for each in self._upstreams:
            family.add_metric([each.name], of(each))
        return family

    def _counter(self, name: str, text: str, of: Callable[["Upstream"], float]) -> Metric:
        family = CounterMetricFamily(f"kvprefetch_gateway_{name}", text, labels=["upstream"])
        for each in self._upstreams:
            family.add_metric([each.name], of(each))
        return family

    def _by(self, name: str, text: str, label: str, kinds: type[Outcome] | type[Use]) -> Metric:
        family = CounterMetricFamily(f"kvprefetch_gateway_{name}", text, labels=["upstream", label])
        for each in self._upstreams:
            ledger = each.desk.ledger
            counts = ledger.outcomes if kinds is Outcome else ledger.uses
            for kind in kinds:
                family.add_metric([each.name, kind.value], counts[kind])  # type: ignore[index]
        return family


def _resident(upstream: "Upstream") -> float:
    return len(upstream.desk.replica.resident)


def _computed(upstream: "Upstream") -> float:
    return upstream.desk.computed_tokens


def _beaten(upstream: "Upstream") -> float:
    return upstream.desk.beaten
