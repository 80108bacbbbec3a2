"""What operators are told of tenants, and what they say of them: `Admin`'s messages as plain data. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from kvprefetch.errors import InvalidRequest
from kvprefetch.v1 import admin_pb2

Wanted = tuple[float | None, float | None]
"""Weight and guarantee. None: as it is."""


def to_change(shares: Mapping[str, Wanted], reset: Iterable[str]) -> admin_pb2.SetTenantsRequest:
    """The request for this change. Raises InvalidRequest for names that are no text."""
    reset = list(reset)
    for name in (*shares, *reset):
        if any("\ud800" <= sign <= "\udfff" for sign in name):  # as Python reads bytes that are no UTF-8
            raise InvalidRequest(f"a tenant's name is UTF-8, not {name[:64]!r}")
    asked = [admin_pb2.TenantShare(name=name, weight=w, guarantee=g) for name, (w, g) in shares.items()]
    return admin_pb2.SetTenantsRequest(set=asked, reset=reset)


def rows_of(reply: admin_pb2.TenantsReply) -> list[dict[str, Any]]:
    """Each tenant's share, bytes by tier and part of all arenas, as `Connection.tenants` says."""
    room = reply.host_bytes
    return [
        {
            "name": each.name,
            "weight": each.weight,
            "guarantee": each.guarantee,
            "changed": each.changed,
            "host_bytes": each.host_bytes,
            "disk_bytes": each.disk_bytes,
            "redis_bytes": each.redis_bytes,
            "host_part": each.host_bytes / room if room else 0.0,
        }
        for each in reply.tenants
    ]
