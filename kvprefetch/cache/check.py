"""The proof of law 5: every page is accounted for."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvprefetch.cache.accounts import Accounts
from kvprefetch.cache.block import State
from kvprefetch.errors import AccountingError

if TYPE_CHECKING:
    from kvprefetch.cache.pool import BlockPool


def check_pool(pool: "BlockPool") -> None:
    """Raise AccountingError naming the first thing of `pool` that does not add up."""
    for proof in (_pages_add_up, _references_match_holders, _tree_is_sound, _charges_add_up, _leaves_stand_in_line):
        proof(pool, _require)


Require = Callable[[bool, str], None]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AccountingError(message)


def _pages_add_up(pool: "BlockPool", require: Require) -> None:
    occupied = [block.page for block in pool.blocks()]
    pages = Counter(pool.free) + Counter(occupied)
    require(
        pages == Counter(range(pool.pages)),
        f"free {len(pool.free)} + resident {len(pool.resident)} + in flight {len(pool.in_flight)} "
        f"+ quarantined {len(pool.quarantined)} + dropped {len(pool.dropped)} is not each of {pool.pages} pages once",
    )
    for state, blocks in (
        (State.RESIDENT, pool.resident.values()),
        (State.IN_FLIGHT, pool.in_flight.values()),
        (State.QUARANTINED, pool.quarantined.values()),
        (State.DROPPED, [gone.block for gone in pool.dropped.values()]),
    ):
        require(all(block.state is state for block in blocks), f"a block listed {state.value} says otherwise")


def _references_match_holders(pool: "BlockPool", require: Require) -> None:
    held = Counter(id(block) for holder in pool.holders for block in holder.blocks)
    for block in pool.blocks():
        require(
            held.pop(id(block), 0) == block.refs,
            f"page {block.page} counts {block.refs} references, its holders differ",
        )
    require(not held, "a holder refers to a block that occupies no page")
    orphans = [block.page for block in pool.in_flight.values() if not block.refs]
    require(not orphans, f"in-flight pages {orphans} have no holder")


def _tree_is_sound(pool: "BlockPool", require: Require) -> None:
    """Nothing is asked of a held block's parent: it has a child, so that it is no leaf, and only leaves are evicted."""
    for key, block in pool.resident.items():
        require(block.key == key, f"page {block.page} is listed under another key")
    for block in pool.resident.values():
        if block.parent is not None:
            require(pool.resident.get(block.parent.key) is block.parent, f"page {block.page} lost its parent")
            require(block in block.parent.children, f"page {block.page} is missing among its siblings")
        depth = block.parent.depth + 1 if block.parent else 0
        require(block.depth == depth, f"page {block.page} says it is at depth {block.depth}, it is at {depth}")
        require(
            all(pool.resident.get(child.key) is child for child in block.children),
            f"page {block.page} lists a child that is gone",
        )
        is_leaf = not block.refs and not block.fanout
        require((block.page in pool.leaves) == is_leaf, f"page {block.page} is wrongly (un)listed as a leaf")
    for page, leaf in pool.leaves.items():
        is_resident = page == leaf.page and pool.resident.get(leaf.key) is leaf
        require(is_resident, f"page {page} is listed as a leaf, but its block is not resident")


def _charges_add_up(pool: "BlockPool", require: Require) -> None:
    taken = Accounts()
    for block in pool.blocks():
        taken.charge(block)
        require(block.payers is None or block.tenant in block.payers, f"page {block.page}: its tenant does not pay")
    for tenant in {*taken.charged, *pool.accounts.charged}:
        paid, owed = pool.accounts.charged.get(tenant), taken.charged.get(tenant)
        if paid != owed:
            require(False, f"tenant {tenant!r} is charged {paid}, its pages are {owed}")
    total = sum(kinds.total() for kinds in pool.accounts.charged.values())
    require(total == len(pool.blocks()), f"{total} pages are charged, {len(pool.blocks())} are taken")


def _leaves_stand_in_line(pool: "BlockPool", require: Require) -> None:
    standing = pool.line.leaves()
    for page, leaf in pool.leaves.items():
        require(leaf in standing, f"page {page} is a leaf, but never its tenant's next to go")
