"""A shelf's figures, for `Admin.Stats`. Changes nothing."""

from typing import Any

from kvprefetch.service.lane import Lane, Source
from kvprefetch.service.shelf import Shelf


def figures(shelf: Shelf) -> dict[str, Any]:
    """JSON of one namespace: what its arena holds now, and what was counted since the service started."""
    pool, usage, counts = shelf.host.pool, shelf.host.usage(), shelf.counts
    return {
        "block_bytes": shelf.block_bytes,
        "block_tokens": shelf.block_tokens,
        "slots": pool.pages,
        "free": pool.free_pages,
        "resident": len(pool.resident),
        "in_flight": len(pool.in_flight),
        "quarantined": len(pool.quarantined),
        "dropped": len(pool.dropped),
        "pins": len(shelf.pins),
        "held": shelf.leases.counts(),
        "freed": dict(shelf.leases.freed),
        "by_tenant": usage.by_tenant,
        "charges": {tenant: dict(kinds) for tenant, kinds in pool.charges().items()},
        "guaranteed": _guaranteed(shelf),
        "host": usage.counters,
        "lookups": {
            "calls": counts.lookups,
            "hits": counts.hits,
            "misses": dict(counts.misses),
            "waited": counts.waited,
        },
        "reserved": {"slots": counts.reserved, **counts.not_reserved},
        "committed": counts.committed,
        "read_by_nodes": counts.read,
        "promoted": dict(shelf.promoter.counters),
        "announced": dict(shelf.behind.announcer.counters) if shelf.behind.announcer is not None else {},
        "tiers": {source.name: _of_source(shelf, source) for source in shelf.behind.sources},
    }


def _guaranteed(shelf: Shelf) -> dict[str, int]:
    """Blocks of the arena that are a tenant's own whenever it wants them; who has none is not named."""
    shares, pages = shelf.host.pool.shares, shelf.host.pool.pages
    own = {name: shares.guaranteed(name, pages) for name, share in shares.named.items() if share.guarantee}
    return {name: blocks for name, blocks in own.items() if blocks}


def _of_source(shelf: Shelf, source: Source) -> dict[str, Any]:
    writer = shelf.writers.get(source.name)
    return {
        "open": source.is_open,
        "bytes_per_s": source.pace.bytes_per_s,
        "counters": dict(source.counters),
        "tier": dict(source.tier.counters) if isinstance(source, Lane) else {},
        "written": {**writer.counters, "queued": len(writer)} if writer is not None else {},
    }
