"""The `Admin` service: figures, tenants, an orderly end."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from kvprefetch.cache.shares import Share
from kvprefetch.errors import InvalidRequest, PermissionDenied
from kvprefetch.service.auth import caller
from kvprefetch.service.calls import Calls
from kvprefetch.service.calls import Context as Call
from kvprefetch.service.hints_rpc import HintsService
from kvprefetch.service.tenants import Said, Tenants
from kvprefetch.settings import Settings
from kvprefetch.v1 import admin_pb2 as pb
from kvprefetch.v1 import admin_pb2_grpc

TIERS = ("host", "disk", "redis")


class Figures(Protocol):
    """What the node tells of its tiers."""

    def stats(self) -> dict[str, Any]:
        """JSON, of everything."""

    async def check(self) -> None:
        """Prove that every slot is accounted for (law 5), or raise AccountingError."""

    @property
    def tenants(self) -> Tenants:
        """What each tenant may count on."""

    def host_bytes(self) -> int:
        """Of all blocks that the arenas have room for."""

    async def bytes_by_tenant(self) -> Mapping[str, Mapping[str, int]]:
        """Bytes charged, by tenant and then by the tier's name (`TIERS`)."""


class AdminService(admin_pb2_grpc.AdminServicer):
    """See the proto. `drain` begins to end the service, and returns at once."""

    def __init__(
        self,
        settings: Settings,
        figures: Figures,
        hints: HintsService,
        calls: Calls,
        about: Callable[[], dict[str, Any]],
        drain: Callable[[], None],
    ) -> None:
        self.settings, self.figures, self.hints, self.calls = settings, figures, hints, calls
        self.about, self.drain = about, drain

    async def Stats(self, request: pb.StatsRequest, context: Call) -> pb.StatsReply:
        """See the proto."""
        who = caller()
        if who.sees_all:
            if request.check:
                await self.figures.check()
            stats = {
                "service": {**self.about(), "in_flight": self.calls.in_flight, "refused": dict(self.calls.refused)},
                "tenants": self.hints.stats(),
                **self.figures.stats(),
            }
        elif request.check:
            raise PermissionDenied("a check is for operators and workers")
        else:
            charges = (await self.figures.bytes_by_tenant()).get(who.tenant, {})
            own = {**self.hints.stats(who.tenant)[who.tenant], "bytes": {tier: charges.get(tier, 0) for tier in TIERS}}
            stats = {"tenants": {who.tenant: own}}
        return pb.StatsReply(stats=json.dumps(stats).encode())

    async def Tenants(self, request: pb.TenantsRequest, context: Call) -> pb.TenantsReply:
        """See the proto."""
        charges = await self.figures.bytes_by_tenant()
        configured = {each.name for each in self.settings.credentials if each.role == "tenant"}
        names = {self.settings.tenant, *configured, *charges, *self.figures.tenants.shares.named}
        return self._told(names, charges)

    async def SetTenants(self, request: pb.SetTenantsRequest, context: Call) -> pb.TenantsReply:
        """See the proto."""
        said = {each.name: _said(each) for each in request.set}
        if len(said) < len(request.set):
            raise InvalidRequest("a change names each tenant once")
        await self.figures.tenants.change(said, request.reset)
        return self._told({*said, *request.reset}, await self.figures.bytes_by_tenant())

    async def Drain(self, request: pb.DrainRequest, context: Call) -> pb.DrainReply:
        """See the proto."""
        others = self.calls.in_flight - 1
        self.drain()
        return pb.DrainReply(in_flight=others)

    def _told(self, names: Iterable[str], charges: Mapping[str, Mapping[str, int]]) -> pb.TenantsReply:
        known = self.figures.tenants
        tenants = [
            _tenant(name, charges.get(name, {}), known.shares.of(name), known.is_changed(name))
            for name in sorted(names)
        ]
        return pb.TenantsReply(tenants=tenants, host_bytes=self.figures.host_bytes())


def _said(share: pb.TenantShare) -> Said:
    weight = share.weight if share.HasField("weight") else None
    return Said(weight, share.guarantee if share.HasField("guarantee") else None)


def _tenant(name: str, charges: Mapping[str, int], share: Share, is_changed: bool) -> pb.Tenant:
    host, disk, redis = (charges.get(tier, 0) for tier in TIERS)
    return pb.Tenant(
        name=name,
        host_bytes=host,
        disk_bytes=disk,
        redis_bytes=redis,
        weight=share.weight,
        guarantee=share.guarantee,
        changed=is_changed,
    )
