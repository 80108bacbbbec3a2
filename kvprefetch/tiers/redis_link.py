"""The way to Redis: commands sent in batches to whichever servers hold their keys, and never a wait without end.

Promises
- Thread-safe: each `exchange` has connections of its own, which lie idle between exchanges.
- An exchange raises TierUnavailable, and nothing else, where Redis does not do what was asked: out of reach, not done
  in `timeout_s`, an error that was not expected. A stream of blocks has `timeout_s` for each of them.
- What failed is not asked again for a while: a breaker makes a dead server cost `timeout_s` once. Connecting, and
  learning the map of a Cluster, may take longer than that; it goes on in the background.
- Every command has exactly one key, its first argument, so that batches work on a Cluster too.
"""

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, repeat
from typing import Any, TypeVar

from redis.exceptions import AskError, RedisClusterException, RedisError, ResponseError, TryAgainError

from kvprefetch.errors import AccountingError, TierUnavailable
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.breaker import Breaker
from kvprefetch.tiers.redis_connection import Address, Dialer, Limit, SlotMap, Wire

log = logging.getLogger(__name__)
Command = tuple[str | bytes | int | float, ...]  # name, key, arguments
T = TypeVar("T")

BATCH = 1_024  # small commands sent together
FIRST_PAUSE_S = 0.25
DIALLING = 4  # connections being opened at the same time

MOVED = (AskError, TryAgainError)  # MovedError is an AskError


class _NotYet(Exception):
    """The helper is still at it."""


class RedisLink:
    """See the module's promises. `clock`: monotonic seconds, of the breaker."""

    def __init__(self, settings: RedisSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = settings.timeout_s
        self.clock = clock
        self.breaker = Breaker(first_s=FIRST_PAUSE_S)
        self._dialer = Dialer(settings)
        self._helper = ThreadPoolExecutor(DIALLING, "kvprefetch-redis")
        self._lock = threading.Lock()
        self._idle: defaultdict[Address, deque[Wire]] = defaultdict(deque)
        self._waiting = 0  # calls to the helper that are not done
        self._map: SlotMap | None = None
        self._mapping: Future[SlotMap] | None = None
        self._known: deque[Address] = deque()  # a Cluster's nodes, when the map was last read
        self._exchanges = 0
        self._lent = 0
        self._is_closed = False
        self._get_ready()

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """One exchange of small commands: their answers, in order; an error is returned as one. TierUnavailable.

        Each `BATCH` of them has `timeout_s`.
        """
        answers: list[Any] = []
        with self.exchange() as exchange:
            for start in range(0, len(commands), BATCH):
                exchange.limit.renew()
                answers += exchange.run(commands[start : start + BATCH])
        return answers

    @contextmanager
    def exchange(self) -> Iterator["Exchange"]:
        """A conversation. Answers not read by its end are read and dropped. Raises TierUnavailable."""
        if self._is_closed or not self.breaker.allows(self.clock()):
            state = "closed" if self._is_closed else "out of reach, and is asked again soon"
            raise TierUnavailable(f"Redis {self._dialer.name} is {state}")
        exchange = Exchange(self)
        with self._lock:
            self._exchanges += 1
        try:
            yield exchange
            exchange.drain()
        except MOVED as error:
            exchange.drop()
            self._forget_map()
            self._answered()
            raise TierUnavailable(f"Redis Cluster {self._dialer.name}: keys are being moved") from error
        except (_NotYet, CancelledError) as error:  # what is there is good, and so is what comes later
            exchange.give_back()
            self._failed(error)
            raise TierUnavailable(f"Redis {self._dialer.name}: {error}") from error
        except (RedisError, RedisClusterException, OSError) as error:
            exchange.drop()
            self._failed(error)
            self._close_idle()
            self._forget_map()
            raise TierUnavailable(f"Redis {self._dialer.name}: {error}") from error
        except BaseException:
            exchange.drop()
            self.breaker.failed(self.clock())
            raise
        else:
            exchange.give_back()
            self._answered()
        finally:
            with self._lock:
                self._exchanges -= 1

    def check(self) -> None:
        """Raises AccountingError where a connection was not given back."""
        with self._lock:
            if self._lent and not self._exchanges:
                raise AccountingError(f"{self._lent} connections to Redis are lent, and nobody uses them")

    def close(self) -> None:
        """Close idle connections; those in use are closed as they are given back. Calling it again does nothing."""
        with self._lock:
            self._is_closed = True
        self._helper.shutdown(wait=False, cancel_futures=True)
        self._close_idle()
        self._forget_map()

    # -- for exchanges ---------------------------------------------------------------------------------
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
            except TimeoutError as error:
                dialled.add_done_callback(lambda future: self._keep(address, future))
                raise _NotYet("still connecting") from error
        connection.limit = limit
        with self._lock:
            self._lent += 1
        return connection

    def give_back(self, address: Address, connection: Wire, *, is_clean: bool) -> None:
        """It is not used any more; a connection on which something is still due is closed."""
        with self._lock:
            self._lent -= 1
        if is_clean and not self._is_closed:
            self._idle[address].append(connection)
        else:
            connection.disconnect()

    def _get_ready(self) -> None:
        """Connect, so that the first who asks need not wait."""
        if self._dialer.is_cluster:
            self._mapping = self._aside(self._read_map)
        else:
            address = self._dialer.address
            dialled = self._aside(lambda: self._dialer.dial(address))
            dialled.add_done_callback(lambda future: self._keep(address, future))

    # -- connections -----------------------------------------------------------------------------------
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

    def _close_idle(self) -> None:
        for idle in list(self._idle.values()):
            while idle:
                try:
                    idle.pop().disconnect()
                except IndexError:  # another thread was faster
                    break

    # -- the map of a Cluster --------------------------------------------------------------------------
    def _wait_for_map(self, limit: Limit) -> SlotMap:
        with self._lock:
            mapping = self._mapping
        if mapping is None or (mapping.done() and mapping.exception() is not None):
            mapping = self._mapping = self._aside(self._read_map)
        try:
            return mapping.result(limit.left())
        except TimeoutError as error:
            raise _NotYet("its map is still being read") from error

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

    def _forget_map(self) -> None:
        with self._lock:
            self._map = self._mapping = None

    # -- how it goes -----------------------------------------------------------------------------------
    def _failed(self, error: Exception) -> None:
        if not self.breaker.is_open:
            log.warning("Redis %s: %s", self._dialer.name, error)
        self.breaker.failed(self.clock())

    def _answered(self) -> None:
        if self.breaker.is_open:
            log.info("Redis %s answers again", self._dialer.name)
        self.breaker.succeeded()


class Exchange:
    """One conversation, of one thread."""

    def __init__(self, link: RedisLink) -> None:
        self.limit = Limit(link.timeout_s)
        self._link = link
        self._open: dict[Address, Wire] = {}
        self._due: deque[Wire] = deque()  # who owes the next answers

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Send some small commands together; their answers, in order. An error is returned, not raised.

        All that is run within the same `limit` must be done by then.
        """
        batches: dict[int, tuple[Wire, list[Command]]] = {}
        for command in commands:
            connection = self._connection(command)
            batches.setdefault(id(connection), (connection, []))[1].append(command)
            self._due.append(connection)
        for connection, batch in batches.values():
            connection.send_packed_command(connection.pack_commands(batch))
        return [self._receive() for _ in commands]

    def stream(
        self, commands: Iterable[Command], window: int, places: Iterable[Sequence[memoryview]] | None = None
    ) -> Iterator[Any]:
        """Send large commands, or such as have large answers, with `window` of them under way; answers, in order.

        Each is asked for once the one before it has been dealt with, so that who has seen enough stops. With `places`,
        of each command the buffers that its answer should fill, an answer that does is FILLED.
        """
        sending = iter(commands)
        into = iter(places) if places is not None else repeat(None)
        for command in islice(sending, window):
            self._send(command)
        while self._due:
            answer = self._receive(next(into))
            self.limit.renew()
            yield answer
            for command in islice(sending, 1):
                self._send(command)

    def drain(self) -> None:
        """Read and drop what is still due, within the same limit."""
        while self._due:
            self._receive()

    def give_back(self) -> None:
        """Nothing is broken; a connection on which an answer is due is closed all the same."""
        self._end(is_clean=not self._due)

    def drop(self) -> None:
        """Something is broken: use these connections no more."""
        self._end(is_clean=False)

    def _end(self, *, is_clean: bool) -> None:
        for address, connection in self._open.items():
            self._link.give_back(address, connection, is_clean=is_clean)
        self._open.clear()
        self._due.clear()

    def _connection(self, command: Command) -> Wire:
        key = command[1]
        assert isinstance(key, str | bytes)
        address = self._link.address_of(key, self.limit)
        if address not in self._open:
            self._open[address] = self._link.take(address, self.limit)
        return self._open[address]

    def _send(self, command: Command) -> None:
        connection = self._connection(command)
        connection.send_command(*command)
        self._due.append(connection)
        self.limit.renew()

    def _receive(self, buffers: Sequence[memoryview] | None = None) -> Any:
        connection = self._due.popleft()
        try:
            answer = connection.read_response() if buffers is None else connection.read_into(buffers)
        except ResponseError as error:
            answer = error
        return answer


def granted(answer: Any) -> Any:
    """The answer. Raises it if it is an error."""
    if isinstance(answer, ResponseError):
        raise answer
    return answer
