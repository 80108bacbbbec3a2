"""Whom to evict: one pure function gives the order, one walks it leaves first."""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

from kvprefetch.cache.block import Block


@dataclass(frozen=True)
class Demand:
    """Who needs pages, and for what."""

    tenant: str
    speculative: bool
    now: float


@dataclass(frozen=True)
class Rank:
    """A victim's place in line: the lowest goes first. `rule` names the reason in miss reports."""

    group: int
    age: float
    rule: str


Policy = Callable[[Block, Demand], Rank | None]


def lru(block: Block, demand: Demand) -> Rank | None:
    """Least recently used first, within law 3; None means: not for this demand.

    A live request takes expired speculation first, then other tenants' unused speculation, then anything.
    A preload takes nothing of another tenant: its own expired speculation first, then its own unused
    speculation (the newer preload counts more), then its own used blocks.
    """
    is_own = block.tenant == demand.tenant
    if demand.speculative and not is_own:
        return None
    if block.speculative and block.hold_until <= demand.now:
        return Rank(0, block.last_used, "hold_expired")
    if block.speculative and demand.speculative:
        return Rank(1, block.last_used, "newer_preload")
    if block.speculative and not is_own:
        return Rank(1, block.last_used, "speculative_of_other_tenant")
    return Rank(2, block.last_used, "lru")


def choose_victims(
    leaves: Iterable[Block], wanted: int, policy: Policy, demand: Demand
) -> list[tuple[Block, str]] | None:
    """The `wanted` blocks to evict with the rule that chose each, children before parents; None if too few.

    `leaves` are the unreferenced resident blocks without resident children. Changes nothing.
    O(leaves + wanted · log leaves).
    """
    tie = count()
    heap: list[tuple[int, float, int, str, Block]] = []

    def offer(block: Block) -> None:
        rank = policy(block, demand)
        if rank is not None:
            heapq.heappush(heap, (rank.group, rank.age, next(tie), rank.rule, block))

    for leaf in leaves:
        offer(leaf)
    victims: list[tuple[Block, str]] = []
    remaining: dict[int, int] = {}  # page of a parent → its children not chosen yet
    while len(victims) < wanted:
        if not heap:
            return None
        *_, rule, block = heapq.heappop(heap)
        victims.append((block, rule))
        parent = block.parent
        if parent is None:
            continue
        left = remaining.get(parent.page, len(parent.children)) - 1
        remaining[parent.page] = left
        if left == 0 and parent.refs == 0:
            offer(parent)
    return victims
