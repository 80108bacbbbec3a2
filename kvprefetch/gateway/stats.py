"""Figures of a gateway since its start, as one JSON object."""

from typing import Any

from kvprefetch.gateway.hints import Hints
from kvprefetch.gateway.site import Site
from kvprefetch.gateway.upstream import Upstream


def stats_of(site: Site, hints: Hints, tenant: str | None) -> dict[str, Any]:
    """Of all tenants for None; for a tenant its own hints and sessions alone."""
    own = [hint for hint in hints.known.values() if tenant is None or hint.tenant == tenant]
    outcomes: dict[str, int] = {}
    uses: dict[str, int] = {}
    for hint in own:
        outcome = hint.result.outcome.value if hint.result else "pending"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if hint.use is not None:
            uses[hint.use.value] = uses.get(hint.use.value, 0) + 1
    said: dict[str, Any] = {
        "hints": {"known": len(own), "outcomes": outcomes, "uses": uses},
        "sessions": sum(tenant is None or talk.tenant == tenant for talk in site.talks.known.values()),
    }
    if tenant is None:
        said["signals"] = dict(hints.signals)
        said["upstreams"] = [_of(upstream, site.clock()) for upstream in site.upstreams]
    return said


def _of(upstream: Upstream, now: float) -> dict[str, Any]:
    engine, desk, warmer, pace = upstream.engine, upstream.desk, upstream.warmer, upstream.pace
    traits = engine.traits if engine else None
    return {
        "url": upstream.name,
        "up": upstream.is_up,
        "engine": traits.kind if traits else None,
        "capacity_tokens": traits.capacity_tokens if traits else None,
        "block_tokens": traits.block_tokens if traits else None,
        "live": upstream.live,
        "waiting": len(desk.preloads.jobs),
        "believed_blocks": len(desk.replica.resident),
        "pieces": {"sent": warmer.pieces, "given_up": warmer.given_up, "refused": warmer.refused},
        "piece_bound_s": pace.bound_s(0.0),
        "usual_ttft_s": pace.usual_s,
        "warmed_tokens": desk.computed_tokens,
        "prefetch": desk.ledger.stats(),
        "lookups": desk.ledger.lookup_stats(),
        "evidence": desk.foresight.stats(now),
    }
