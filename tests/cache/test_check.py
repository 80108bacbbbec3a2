"""Each thing that `check` proves, broken by hand: a proof that cannot fail proves nothing."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from tiny_pools import keep, opened

from kvprefetch.cache.block import Block, Charge, State, Unused
from kvprefetch.cache.line import Line
from kvprefetch.cache.pool import BlockPool
from kvprefetch.cache.sequence import PagedSequence
from kvprefetch.errors import AccountingError


@dataclass
class Scene:
    """Eight pages: "aaaabbbb" is nobody's; "ccccdddd.." is held, its tail in flight; one in quarantine, two free."""

    pool: BlockPool
    held: PagedSequence
    unheld: list[Block]

    @property
    def parent(self) -> Block:
        return self.unheld[0]

    @property
    def leaf(self) -> Block:
        return self.unheld[1]

    @property
    def in_flight(self) -> Block:
        return self.held.blocks[2]


def scene(pool: BlockPool | None = None) -> Scene:
    pool = pool or BlockPool(8)
    unheld = keep(pool, "aaaabbbb")
    held = opened(pool, "ccccdddd", "bob", room=2)
    held.complete(8)
    opened(pool, "xxxx").close(quarantine=True)
    return Scene(pool, held, unheld)


def stray(page: int = 0, key: bytes = b"stray") -> Block:
    """A block that no pool knows."""
    return Block(page, "mallory", State.RESIDENT, 0.0, key=key)


def test_the_scene_adds_up() -> None:
    pool = scene().pool
    pool.check()
    assert (len(pool.free), len(pool.resident), len(pool.in_flight), len(pool.quarantined)) == (2, 4, 1, 1)


def a_page_is_lost(s: Scene) -> None:
    s.pool.free.pop()


def a_page_is_free_twice(s: Scene) -> None:
    s.pool.free[0] = s.pool.free[1]


def a_taken_page_is_free(s: Scene) -> None:
    s.pool.free.append(s.leaf.page)


def two_blocks_sit_in_one_page(s: Scene) -> None:
    s.leaf.page = s.parent.page


def a_resident_block_calls_itself_in_flight(s: Scene) -> None:
    s.leaf.state = State.IN_FLIGHT


def an_in_flight_block_calls_itself_resident(s: Scene) -> None:
    s.in_flight.state = State.RESIDENT


def a_quarantined_block_calls_itself_resident(s: Scene) -> None:
    next(iter(s.pool.quarantined.values())).state = State.RESIDENT


def a_reference_too_many(s: Scene) -> None:
    s.held.blocks[0].refs += 1


def a_reference_too_few(s: Scene) -> None:
    s.held.blocks[1].refs -= 1


def a_holder_is_forgotten(s: Scene) -> None:
    s.pool.holders.discard(s.held)


def a_holder_is_forged(s: Scene) -> None:
    forged = PagedSequence(s.pool, s.held.owner, [], 4)
    forged.blocks = [s.leaf]
    s.pool.holders.add(forged)


def a_holder_holds_what_is_gone(s: Scene) -> None:
    s.held.blocks.append(stray())


def an_in_flight_page_is_abandoned(s: Scene) -> None:
    s.held.blocks.pop().refs = 0


def a_block_is_listed_under_another_key(s: Scene) -> None:
    s.leaf.key = b"another"


def a_parent_does_not_list_its_child(s: Scene) -> None:
    s.held.blocks[0].disown([s.held.blocks[1]])


def a_parent_is_not_resident(s: Scene) -> None:
    s.leaf.parent = stray(s.parent.page, s.parent.key)


def a_block_is_at_another_depth(s: Scene) -> None:
    s.leaf.depth = 7


def a_listed_child_is_gone(s: Scene) -> None:
    s.leaf.adopt(stray())
    s.pool.leaves.pop(s.leaf.page)


def a_leaf_is_not_listed(s: Scene) -> None:
    s.pool.leaves.pop(s.leaf.page)


def a_parent_is_listed_as_a_leaf(s: Scene) -> None:
    s.pool.leaves[s.parent.page] = s.parent


def a_held_block_is_listed_as_a_leaf(s: Scene) -> None:
    s.pool.leaves[s.held.blocks[1].page] = s.held.blocks[1]


def an_evicted_block_is_listed_as_a_leaf(s: Scene) -> None:
    s.pool.leaves[s.pool.free[-1]] = stray(s.pool.free[-1])


def a_leaf_is_listed_under_a_foreign_page(s: Scene) -> None:
    s.pool.leaves[s.in_flight.page] = s.leaf


def a_speculative_page_is_charged_as_used(s: Scene) -> None:
    s.leaf.unused = Unused(60.0)


def a_page_is_charged_to_somebody_else(s: Scene) -> None:
    s.leaf.tenant = "bob"


def nobody_is_charged(s: Scene) -> None:
    s.pool.accounts.charged.clear()


def a_tenant_without_pages_is_charged(s: Scene) -> None:
    s.pool.accounts.charged["mallory"][Charge.USED] += 1


def a_groups_block_is_answered_for_by_a_stranger(s: Scene) -> None:
    s.leaf.payers = {"bob": 0.0}


def a_leaf_stands_in_no_line(s: Scene) -> None:
    s.pool.line = Line(s.pool.order, s.pool.accounts, s.pool.pages)


STORIES: dict[Callable[[Scene], None], str] = {
    a_page_is_lost: "is not each of 8 pages once",
    a_page_is_free_twice: "is not each of 8 pages once",
    a_taken_page_is_free: "is not each of 8 pages once",
    two_blocks_sit_in_one_page: "is not each of 8 pages once",
    a_resident_block_calls_itself_in_flight: "listed resident says otherwise",
    an_in_flight_block_calls_itself_resident: "listed in_flight says otherwise",
    a_quarantined_block_calls_itself_resident: "listed quarantined says otherwise",
    a_reference_too_many: "counts 2 references",
    a_reference_too_few: "counts 0 references",
    a_holder_is_forgotten: "its holders differ",
    a_holder_is_forged: "its holders differ",
    a_holder_holds_what_is_gone: "refers to a block that occupies no page",
    an_in_flight_page_is_abandoned: "have no holder",
    a_block_is_listed_under_another_key: "listed under another key",
    a_parent_does_not_list_its_child: "missing among its siblings",
    a_parent_is_not_resident: "lost its parent",
    a_block_is_at_another_depth: "says it is at depth 7, it is at 1",
    a_listed_child_is_gone: "lists a child that is gone",
    a_leaf_is_not_listed: r"wrongly \(un\)listed as a leaf",
    a_parent_is_listed_as_a_leaf: r"wrongly \(un\)listed as a leaf",
    a_held_block_is_listed_as_a_leaf: r"wrongly \(un\)listed as a leaf",
    an_evicted_block_is_listed_as_a_leaf: "its block is not resident",
    a_leaf_is_listed_under_a_foreign_page: "its block is not resident",
    a_speculative_page_is_charged_as_used: "tenant 'ann' is charged",
    a_page_is_charged_to_somebody_else: "is charged",
    nobody_is_charged: "is charged None",
    a_tenant_without_pages_is_charged: "tenant 'mallory' is charged",
    a_groups_block_is_answered_for_by_a_stranger: "its tenant does not pay",
    a_leaf_stands_in_no_line: "never its tenant's next to go",
}


@pytest.mark.parametrize("corrupt", STORIES, ids=lambda corrupt: corrupt.__name__)
def test_check_notices_when(corrupt: Callable[[Scene], None]) -> None:
    broken = scene()
    broken.pool.check()
    corrupt(broken)
    with pytest.raises(AccountingError, match=STORIES[corrupt]):
        broken.pool.check()
