"""`kvprefetch serve` or `kvprefetch worker` in a process that halts itself once, at a named step.

    python bench/faults_halting.py ORDERS serve --settings FILE

Whoever wants it halted writes a step's name into the file ORDERS. When the process next comes to that step it deletes
the file and sends itself SIGSTOP: all of its threads stand still there, until it is continued, or killed.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEADER_BYTES = 256
WORKER_STEPS = ("reserved", "writing", "written", "committed", "looked up", "loading", "releasing")
"""Of a worker: slots reserved, none written; half of one written; all written, none committed; committed, and not yet
known to be; leased, nothing loaded; copied, not yet verified; loaded, the lease not given back."""
SERVICE_STEPS = (
    "registering",
    "leasing",
    "reserving",
    "heading",
    "committing",
    "sealing",
    "sealed",
    "releasing",
)
"""Of a service: a stream joined, not told; leased, not told; reserved, not told; half of a header written; asked to
commit; one of several blocks sealed; all sealed, not told; asked to release."""
DISK_STEPS = ("storing", "promoting")
"""Of a service with a disk: half of a block written there; blocks of it on their way into the arena."""


class Orders:
    """The file that says where to halt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mean(self, step: str) -> bool:
        """Whether to halt at `step`; True once."""
        try:
            if self.path.read_text(encoding="utf-8") != step:
                return False
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True

    def come_to(self, step: str) -> None:
        """Halt here, if so ordered."""
        if self.mean(step):
            halt()


def halt() -> None:
    """All threads stand still, this one here: a signal to the process might let it go on for a moment."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def before(orders: Orders, step: str, owner: type, name: str) -> None:
    """The step is where `owner.name` is called."""
    original: Callable[..., Any] = getattr(owner, name)

    def halting(*args: Any, **kwargs: Any) -> Any:
        orders.come_to(step)
        return original(*args, **kwargs)

    setattr(owner, name, halting)


def after(orders: Orders, step: str, owner: type, name: str) -> None:
    """The step is where `owner.name` has done its work, before anybody hears of it."""
    original: Callable[..., Any] = getattr(owner, name)

    def halting(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        orders.come_to(step)
        return result

    setattr(owner, name, halting)


def prepare_worker(orders: Orders) -> None:
    """Steps of WORKER_STEPS."""
    from kvprefetch.client.remote import CacheClient
    from kvprefetch.tiers import arena

    after(orders, "reserved", CacheClient, "reserve")
    before(orders, "written", CacheClient, "commit")
    after(orders, "committed", CacheClient, "commit")
    after(orders, "looked up", CacheClient, "look_up")
    before(orders, "releasing", CacheClient, "release")
    write = arena.ArenaFile.write
    verify: Callable[[bytes | memoryview], int] = vars(arena)["checksum"]

    def half_write(self: arena.ArenaFile, slot: int, data: memoryview) -> int:
        if orders.mean("writing"):
            half = data.nbytes // 2
            self.slot(slot)[:half] = data.cast("B")[:half]
            halt()
        return write(self, slot, data)

    def late_verify(data: bytes | memoryview) -> int:
        if not (isinstance(data, memoryview) and data.readonly) and sys._getframe(1).f_code.co_name == "read":
            orders.come_to("loading")
        return verify(data)

    setattr(arena.ArenaFile, "write", half_write)  # noqa: B010 – mypy knows methods for constants
    setattr(arena, "checksum", late_verify)  # noqa: B010


def prepare_service(orders: Orders) -> None:
    """Steps of SERVICE_STEPS."""
    from kvprefetch.service.leases import Leases
    from kvprefetch.service.registry import Registry
    from kvprefetch.tiers.arena import ArenaFile
    from kvprefetch.tiers.host import HostTier
    from kvprefetch.tiers.slots import IN_TRANSIT, SlotHeader, encode

    after(orders, "registering", Registry, "join")
    after(orders, "leasing", Leases, "lease")
    after(orders, "reserving", Leases, "reserve")
    before(orders, "committing", Leases, "commit")
    after(orders, "sealing", HostTier, "seal")
    after(orders, "sealed", Leases, "commit")
    before(orders, "releasing", Leases, "release")
    write = ArenaFile.write_header

    def half_write(self: ArenaFile, slot: int, header: SlotHeader) -> None:
        if orders.mean("heading"):
            at, mapping = self.layout.header_at(slot), self._mapped
            mapping[at] = IN_TRANSIT
            mapping[at + 1 : at + 64] = encode(header)[1:64]
            halt()
        write(self, slot, header)

    setattr(ArenaFile, "write_header", half_write)  # noqa: B010
    _prepare_disk(orders)


def _prepare_disk(orders: Orders) -> None:
    """Steps of DISK_STEPS."""
    from kvprefetch.tiers import disk

    write: Callable[[int, memoryview, int], None] = vars(disk)["_write_all"]

    def half_write(descriptor: int, data: memoryview, at: int) -> None:
        if data.nbytes > HEADER_BYTES and orders.mean("storing"):
            os.pwrite(descriptor, data[: data.nbytes // 2], at)
            halt()
        write(descriptor, data, at)

    setattr(disk, "_write_all", half_write)  # noqa: B010
    after(orders, "promoting", disk.DiskTier, "load")


def main() -> None:
    """Run the command line with its steps prepared."""
    orders, arguments = Orders(Path(sys.argv[1])), sys.argv[2:]
    (prepare_service if arguments[0] == "serve" else prepare_worker)(orders)
    sys.argv = ["kvprefetch", *arguments]
    from kvprefetch.cli.main import main as kvprefetch

    kvprefetch()


if __name__ == "__main__":
    main()
