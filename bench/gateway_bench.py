"""What the parts of the gateway's bench share: one engine, gateways before it, texts, and where results go."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from gateway_client import Client
from gateway_engine import Served, start_gateway
from gateway_texts import Texts
from results_format import Results


@dataclass
class Bench:
    """One engine alone, and what is measured of it. A part opens a gateway of its own: it has learnt nothing yet."""

    served: Served
    engine: Client
    texts: Texts
    results: Results

    @asynccontextmanager
    async def through(self, *, speculation: bool = True) -> AsyncIterator[Client]:
        """A client of a new gateway before the engine."""
        with start_gateway(self.served.url, speculation=speculation) as served:
            async with Client(served.url) as client:
                yield client

    async def exercise(self, gateway: Client) -> None:
        """A few requests, so that no first forward, connection or import is measured, and the gateway knows what a
        first token takes here."""
        for tokens in (300, 64, 64, 64, 64):
            for client in (self.engine, gateway):
                await client.complete(self.texts.ids(tokens))
        await self.engine.settle()

    def row(self, section: str, **row: Any) -> None:
        """Say and keep it."""
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        print({"section": section, **rounded}, flush=True)
        self.results.rows.append({"section": section, **rounded})


def percentile(values: list[float], percent: int) -> float:
    """Of at least one value, in its own unit."""
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def spread(values: list[float], name: str) -> dict[str, float]:
    """Their median, 95th percentile and mean."""
    return {
        f"{name}_p50": percentile(values, 50),
        f"{name}_p95": percentile(values, 95),
        f"{name}_mean": sum(values) / len(values),
    }
