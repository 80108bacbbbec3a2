"""What an operator reads in a service's figures of each tenant: blocks charged, and blocks guaranteed."""

from pathlib import Path
from typing import Any

from nodes import Served, node_settings, run, served

from kvprefetch.service.tenants import Said


def arena_of(stage: Served) -> dict[str, Any]:
    """The figures of the one arena."""
    figures: dict[str, Any] = stage.node.stats()["namespaces"][stage.shelf.namespace]
    return figures


def test_each_arena_tells_what_tenants_have_and_what_is_guaranteed_to_them(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            worker, tenants = await stage.worker(), stage.node.tenants
            pages = stage.shelf.host.pool.pages
            assert arena_of(stage)["guaranteed"] == {}
            await tenants.change({"ann": Said(guarantee=0.5), "bob": Said(weight=3.0)})
            assert await worker.keep("abc") == 3
            assert arena_of(stage)["guaranteed"] == {"ann": pages // 2}, "bob has a weight, and no guarantee"
            assert arena_of(stage)["charges"] == {"ann": {"used": 3}}
            await tenants.change({}, ["ann"])
            assert arena_of(stage)["guaranteed"] == {}
            assert arena_of(stage)["charges"] == {"ann": {"used": 3}}, "what it has stays charged to it"

    run(story())


def test_what_is_no_block_of_an_arena_is_not_told_as_guaranteed_in_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with served(node_settings(tmp_path), tmp_path / "s") as stage:
            await stage.node.tenants.change({"ann": Said(guarantee=0.01)})  # before the arena is open
            await stage.worker()
            assert stage.shelf.host.pool.shares.of("ann").guarantee == 0.01
            assert arena_of(stage)["guaranteed"] == {}

    run(story())
