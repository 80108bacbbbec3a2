"""Connections to whichever servers there are, and which of them holds what.

Promises
- Thread-safe. Connections that nobody uses lie idle, and are given to whoever needs one next, if still good.
- Connecting, and learning the map of a Cluster, is done by helper threads. Who waits for it waits no longer than its
  limit, and gets NotYet; what comes later is there for the next one.
- Raises what redis-py raises, OSError, or NotYet.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

from kvprefetch.tiers.redis_connection import Address, Dialer, Limit, SlotMap, Wire

T = TypeVar("T")

DIALLING = 4  # connections being opened at the same time


class NotYet(Exception):
    """The helper is still at it, or was told to stop."""


class Lines:
    """See the module's promises."""

    def __init__(self, dialer: Dialer) -> None:
        self.lent = 0  # connections in use
        self._dialer = dialer
        self._helper = ThreadPoolExecutor(DIALLING, "kvprefetch-redis")
        self._lock = threading.Lock()
        self._idle: defaultdict[Address, deque[Wire]] = defaultdict(deque)
        self._waiting = 0  # calls to the helper that are not done
        self._map: SlotMap | None = None
        self._mapping: Future[SlotMap] | None = None
        self._known: deque[Address] = deque()  # a Cluster's nodes, when the map was last read
        self._is_closed = False
        self._get_ready()

    def address_of(self, key: str | bytes, limit: Limit) -> Address:
        """Which server holds it."""
        if not self._dialer.is_cluster:
            return self._dialer.address
        return (self._map or self._wait_for_map(limit)).address_of(key)

    def take(self, address: Address, limit: Limit) -> Wire:
        """A connection to it: an idle one, else one that the helper opens."""
        connection = self._take_idle(address)
        if connection is None:
            dialled = self._aside(lambda: self._dialer.dial(address))
            try:
                connection = dialled.result(limit.left())
            except (TimeoutError, CancelledError) as error:
                dialled.add_done_callback(lambda future: self._keep(address, future))
                raise NotYet("still connecting") from error
        connection.limit = limit
        with self._lock:
            self.lent += 1
        return connection

    def give_back(self, address: Address, connection: Wire, *, is_clean: bool) -> None:
        """It is not used any more; a connection on which something is still due is closed."""
        with self._lock:
            self.lent -= 1
        if is_clean and not self._is_closed:
            self._idle[address].append(connection)
        else:
            connection.disconnect()

    def close_idle(self) -> None:
        """They are no good any more."""
        for idle in list(self._idle.values()):
            while idle:
                try:
                    idle.pop().disconnect()
                except IndexError:  # another thread was faster
                    break

    def forget_map(self) -> None:
        """It is no good any more."""
        with self._lock:
            self._map = self._mapping = None

    def close(self) -> None:
        """Close idle connections; those in use are closed as they are given back. Calling it again does nothing."""
        with self._lock:
            self._is_closed = True
        self._helper.shutdown(wait=False, cancel_futures=True)
        self.close_idle()
        self.forget_map()

    # -- connections ----------------------------------------------------------------------------------
    def _get_ready(self) -> None:
        """Connect, so that the first who asks need not wait."""
        if self._dialer.is_cluster:
            self._mapping = self._aside(self._read_map)
        else:
            address = self._dialer.address
            dialled = self._aside(lambda: self._dialer.dial(address))
            dialled.add_done_callback(lambda future: self._keep(address, future))

    def _take_idle(self, address: Address) -> Wire | None:
        idle = self._idle[address]
        while idle:
            try:
                connection = idle.pop()
            except IndexError:  # another thread was faster
                return None
            if connection.is_quiet():
                return connection
            connection.disconnect()
        return None

    def _aside(self, work: Callable[[], T]) -> "Future[T]":
        """Have the helper do it, unless it has more than enough to do."""

        def done(_: Future[T]) -> None:
            with self._lock:
                self._waiting -= 1

        with self._lock:
            if self._is_closed or self._waiting >= 2 * DIALLING:
                raise ConnectionError("too many connections are being opened")
            future = self._helper.submit(work)
            self._waiting += 1
        future.add_done_callback(done)
        return future

    def _keep(self, address: Address, dialled: "Future[Wire]") -> None:
        """A connection came too late for the one who wanted it: for the next one."""
        if dialled.cancelled() or dialled.exception() is not None:
            return
        if self._is_closed:
            dialled.result().disconnect()
        else:
            self._idle[address].append(dialled.result())

    # -- the map of a Cluster --------------------------------------------------------------------------
    def _wait_for_map(self, limit: Limit) -> SlotMap:
        with self._lock:
            mapping = self._mapping
        try:
            if mapping is None or (mapping.done() and mapping.exception() is not None):
                mapping = self._mapping = self._aside(self._read_map)
            return mapping.result(limit.left())
        except (TimeoutError, CancelledError) as error:
            raise NotYet("its map is still being read") from error

    def _read_map(self) -> SlotMap:
        """The map, and an idle connection to each node: who waits has no time for one after the other."""
        self._known.rotate()  # the first one may be the one that is dead
        slots = self._dialer.map_slots(list(self._known))
        self._known = deque(slots.nodes)
        for address in slots.nodes:
            if not self._idle[address]:
                self._idle[address].append(self._dialer.dial(address))
        self._map = slots
        return slots
