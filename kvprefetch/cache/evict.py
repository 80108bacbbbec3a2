"""Whom to evict: one pure function gives the order, one walks it leaves first."""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from math import inf, nextafter
from typing import NamedTuple, Protocol, TypeVar

from kvprefetch.cache.block import Block


@dataclass(frozen=True)
class Demand:
    """Who needs pages, and for what."""

    tenant: str
    speculative: bool
    now: float
    worth: float = inf  # a preload's index: it displaces only what has a lower one
    patient: bool = False  # it can wait: it takes nothing of a tenant that is less over its guarantee than its own is
    shared: bool = False  # for blocks of a group's namespace: whoever uses them pays a part


class Rank(NamedTuple):
    """A victim's place in line: the lowest goes first. `rule` names the reason in miss reports."""

    group: int
    age: float
    rule: str


Policy = Callable[[Block, Demand], Rank | None]


class Evictable(Protocol):
    """What a policy reads of a block, or of a run of them."""

    @property
    def tenant(self) -> str: ...
    @property
    def last_used(self) -> float: ...
    @property
    def speculative(self) -> bool: ...
    @property
    def hold_until(self) -> float: ...


def lru(block: Evictable, demand: Demand) -> Rank | None:
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


E_contra = TypeVar("E_contra", bound=Evictable, contravariant=True)


def by_index(index: Callable[[E_contra, float], float]) -> Callable[[E_contra, Demand], Rank | None]:
    """Lowest index first, within law 3. `index(block, now)` says how well it pays to hold it, per second.

    Other tenants' unused speculation goes first, for live requests alone. Within a tenant, used and speculative
    blocks compete by the index, speculation first where its hold has expired or indices are equal.
    """

    def policy(block: E_contra, demand: Demand) -> Rank | None:
        is_own = block.tenant == demand.tenant
        if demand.speculative and not is_own:
            return None
        if block.speculative and not is_own:
            return Rank(0, block.last_used, "speculative_of_other_tenant")
        if block.speculative and block.hold_until <= demand.now:
            return Rank(0, block.last_used, "hold_expired")
        value = index(block, demand.now)
        if demand.speculative and value >= demand.worth:
            return None
        return Rank(1, nextafter(value, -inf) if block.speculative else value, "index")

    return policy


def choose_victims(leaves: Iterable[Block], wanted: int, policy: Policy, demand: Demand) -> list[tuple[Block, str]]:
    """The `wanted` blocks to evict with the rule that chose each, children before parents; fewer if too few may go.

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
    while heap and len(victims) < wanted:
        *_, rule, block = heapq.heappop(heap)
        victims.append((block, rule))
        parent = block.parent
        if parent is None:
            continue
        left = remaining.get(parent.page, parent.fanout) - 1
        remaining[parent.page] = left
        if left == 0 and parent.refs == 0:
            offer(parent)
    return victims
