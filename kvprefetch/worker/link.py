"""A worker's link to its node's cache service: what it reads, what it writes, and its stream of work.

Promises
- The worker serves with or without the service (law 1): nothing here raises into a request, and nothing blocks one for
  longer than a look-up may.
- A lease is given back when the copies out of it are done; what could not be given back is, when the worker registers
  again. While it registers, it writes to no slot.
"""

import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from kvprefetch.cache.pool import BlockPool
from kvprefetch.client.remote import CacheClient
from kvprefetch.errors import Closed, ServiceUnavailable
from kvprefetch.tiers.arena import ArenaFile
from kvprefetch.tiers.device import DevicePool
from kvprefetch.worker.host import Found, Host
from kvprefetch.worker.offload import Offloader

log = logging.getLogger(__name__)
_BATCH, _RETRY_S = 64, 0.25


@dataclass(frozen=True, slots=True)
class _Returned:
    """What the service is to have back."""

    lease: int = 0
    reservation: int = 0
    bad_slot: int | None = None


class Link:
    """See the module's promises. `open` is called once, by the worker; then `start` by whoever registers it."""

    offloader: Offloader

    def __init__(self, channel: grpc.Channel, pool: DevicePool, clock: Callable[[], float], *, verify: bool) -> None:
        self.channel, self.clock = channel, clock
        self.instance = secrets.token_bytes(16)
        self.client = CacheClient(channel, self.instance, clock, self._give_back_unwanted)
        self.host = Host(self.client, pool, clock, self._give_back)
        self.host.verify = verify
        self._mapped: tuple[str, int, ArenaFile] | None = None  # path and inode of the arena
        self._returned: deque[_Returned] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._pause = threading.Event()  # never set
        self._thread = threading.Thread(target=self._run, name="kvprefetch-release", daemon=True)

    def open(self, pool: BlockPool, post: Callable[[Callable[[], None]], None], is_live: Callable[[], bool]) -> None:
        """Serve this pool; `post` runs something on its loop's thread, `is_live`: whether requests wait or run."""
        self.offloader = Offloader(pool, self.host, self.client, self.clock, post, is_live)
        self._thread.start()

    def detach(self) -> None:
        """Nothing is looked up or written until the service has this worker (again): its arena may be another one."""
        self.host.arena = None

    def registered(self, path: str, namespace: str, is_new_service: bool) -> None:
        """The service has this worker, and its arena lies there. Raises TierError where it cannot be mapped."""
        file = os.stat(path).st_ino if os.path.exists(path) else 0
        if self._mapped is None or self._mapped[:2] != (path, file):
            self._mapped = path, file, ArenaFile.attach(path, namespace)  # the old one goes when nobody copies from it
        self.host.attach(self._mapped[2])
        self.offloader.resume(refill=is_new_service)

    def stats(self) -> dict[str, Any]:
        """Blocks read from and written to the arena, and why not."""
        return {
            "connected": self.host.arena is not None,
            "breaker_open": self.client.breaker.is_open,
            "service_failures": self.client.breaker.failures,
            "leases": len(self.host.leases),
            "read": dict(self.host.counts),
            "written": dict(self.offloader.counts),
            "queued": self.offloader.queued,
        }

    def flush(self, patience_s: float) -> None:
        """Wait until what was computed is written, but no longer. The worker's loop must run."""
        deadline = self.clock() + patience_s
        while self.host.arena is not None and not self.offloader.is_idle and self.clock() < deadline:
            if self.client.breaker.is_open:
                return
            self._pause.wait(0.01)

    def close(self) -> None:
        """Let go of everything. The worker's loop has ended."""
        self.offloader.close()
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self.host.close()

    def leases(self) -> list[int]:
        """Leases that copies are made from, or that were not given back yet."""
        return list(self.host.leases)

    # -- leases ----------------------------------------------------------------------------------------
    def _give_back(self, found: Found) -> None:
        if found.lease:
            self._returned.append(_Returned(found.lease, bad_slot=found.bad_slot))
            self._wake.set()

    def _give_back_unwanted(self, *, lease: int = 0, reservation: int = 0) -> None:
        """Granted too late, or of no use: the service keeps it until it is told."""
        if lease or reservation:
            self._returned.append(_Returned(lease, reservation))
            self._wake.set()

    def _run(self) -> None:
        while not self._closing or self._returned:
            self._wake.wait()
            self._wake.clear()
            try:
                if not self._release_all() and self._closing:
                    return
            except Exception:  # the thread's outermost line
                log.exception("leases could not be given back")
                if self._closing:
                    return

    def _release_all(self) -> bool:
        """Whether the service took them; else it is asked again soon."""
        while self._returned:
            batch = [self._returned[at] for at in range(min(_BATCH, len(self._returned)))]
            corrupt = [given.bad_slot for given in batch if given.bad_slot is not None]
            leases = [given.lease for given in batch if given.lease]
            reservations = [given.reservation for given in batch if given.reservation]
            try:
                self.client.release(leases, reservations, corrupt)
            except Closed:
                return False
            except ServiceUnavailable:
                if self._closing:
                    return False
                self._pause.wait(_RETRY_S)
                self._wake.set()
                return False
            for given in batch:  # nobody else takes any away
                self.host.leases.discard(given.lease)
                self._returned.popleft()
        return True
