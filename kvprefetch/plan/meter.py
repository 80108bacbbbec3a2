"""What speculation for each tenant has taken: seconds of prefill and loading, bytes moved, memory over time.

Pure: told what happened, with the time. Of `max_tenants` at most each is told apart; who was heard of longest ago is
counted under "" from then on. A clock that goes backwards counts as one that stands still. Raises nothing.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(slots=True)
class SpeculationMeter:
    """One tenant's."""

    prefill_s: float = 0.0  # abandoned steps included
    load_s: float = 0.0
    bytes_moved: int = 0
    byte_seconds: float = 0.0  # of unused speculative residency

    def add(self, other: "SpeculationMeter") -> None:
        """Count this, too."""
        self.prefill_s += other.prefill_s
        self.load_s += other.load_s
        self.bytes_moved += other.bytes_moved
        self.byte_seconds += other.byte_seconds


class SpeculationMeters:
    """See the module's promises. `page_bytes`: bytes of a page, 0 where they are not known."""

    def __init__(self, page_bytes: int = 0, max_tenants: int = 65_536) -> None:
        self.page_bytes, self.max_tenants = page_bytes, max_tenants
        self.by_tenant: OrderedDict[str, SpeculationMeter] = OrderedDict()
        self._looked_at: float | None = None

    def computed(self, tenant: str, seconds: float) -> None:
        """A speculative forward, or what was done of it, took so long."""
        self._of(tenant).prefill_s += seconds

    def moved(self, tenant: str, pages: int, seconds: float) -> None:
        """So many pages were copied from another tier."""
        meter = self._of(tenant)
        meter.load_s += seconds
        meter.bytes_moved += pages * self.page_bytes

    def since_looked(self, now: float) -> float:
        """Seconds since `resident` was told last."""
        return max(now - self._looked_at, 0.0) if self._looked_at is not None else 0.0

    def resident(self, pages: Mapping[str, float], now: float) -> None:
        """Unused speculative pages by tenant, as they have been since this was told last."""
        seconds = self.since_looked(now)
        self._looked_at = now
        for tenant, count in pages.items():
            if count:
                self._of(tenant).byte_seconds += float(count) * self.page_bytes * seconds

    def stats(self) -> dict[str, dict[str, float]]:
        """By tenant."""
        return {tenant: asdict(meter) for tenant, meter in self.by_tenant.items()}

    def _of(self, tenant: str) -> SpeculationMeter:
        meter = self.by_tenant.setdefault(tenant, SpeculationMeter())
        self.by_tenant.move_to_end(tenant)
        if len(self.by_tenant) > self.max_tenants:
            oldest, gone = self.by_tenant.popitem(last=False)
            if oldest == "":  # the sum of those that are gone stays
                oldest, other = self.by_tenant.popitem(last=False)
                gone.add(other)
            rest = self.by_tenant.setdefault("", SpeculationMeter())
            rest.add(gone)
        return meter
