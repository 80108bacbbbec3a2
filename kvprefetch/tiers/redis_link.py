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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, repeat
from typing import Any

from redis.exceptions import AskError, RedisClusterException, RedisError, ResponseError, TryAgainError

from kvprefetch.errors import AccountingError, TierUnavailable
from kvprefetch.settings import RedisSettings
from kvprefetch.tiers.breaker import Breaker
from kvprefetch.tiers.redis_connection import Address, Dialer, Limit, Wire
from kvprefetch.tiers.redis_lines import Lines, NotYet

log = logging.getLogger(__name__)
Command = tuple[str | bytes | int | float, ...]  # name, key, arguments

BATCH = 1_024  # small commands sent together
FIRST_PAUSE_S = 0.25

MOVED = (AskError, TryAgainError)  # MovedError is an AskError


class RedisLink:
    """See the module's promises. `clock`: monotonic seconds, of the breaker."""

    def __init__(self, settings: RedisSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = settings.timeout_s
        self.clock = clock
        self.breaker = Breaker(first_s=FIRST_PAUSE_S)
        dialer = Dialer(settings)
        self._name = dialer.name
        self._lines = Lines(dialer)
        self._lock = threading.Lock()
        self._exchanges = 0  # under way
        self._is_closed = False

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
            raise TierUnavailable(f"Redis {self._name} is {state}")
        exchange = Exchange(self._lines, self.timeout_s)
        with self._lock:
            self._exchanges += 1
        try:
            yield exchange
            exchange.drain()
        except MOVED as error:
            exchange.drop()
            self._lines.forget_map()
            self._answered()
            raise TierUnavailable(f"Redis Cluster {self._name}: keys are being moved") from error
        except NotYet as error:  # what is there is good, and so is what comes later
            exchange.give_back()
            self._failed(error)
            raise TierUnavailable(f"Redis {self._name}: {error}") from error
        except (RedisError, RedisClusterException, OSError) as error:
            exchange.drop()
            self._failed(error)
            self._lines.close_idle()
            self._lines.forget_map()
            raise TierUnavailable(f"Redis {self._name}: {error}") from error
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
            if self._lines.lent and not self._exchanges:
                raise AccountingError(f"{self._lines.lent} connections to Redis are lent, and nobody uses them")

    def close(self) -> None:
        """Let go of all connections: those in use, as they are given back. Calling it again does nothing."""
        self._is_closed = True
        self._lines.close()

    def _failed(self, error: Exception) -> None:
        if not self.breaker.is_open:
            log.warning("Redis %s: %s", self._name, error)
        self.breaker.failed(self.clock())

    def _answered(self) -> None:
        if self.breaker.is_open:
            log.info("Redis %s answers again", self._name)
        self.breaker.succeeded()


class Exchange:
    """One conversation, of one thread."""

    def __init__(self, lines: Lines, timeout_s: float) -> None:
        self.limit = Limit(timeout_s)
        self._lines = lines
        self._open: dict[Address, Wire] = {}
        self._due: deque[Wire] = deque()  # who owes the next answers

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Send some small commands together; their answers, in order. An error is returned, not raised.

        All that is run within the same `limit` must be done by then.
        """
        owners = [self._connection(command) for command in commands]
        batches: dict[int, tuple[Wire, list[Command]]] = {}
        for connection, command in zip(owners, commands, strict=True):
            batches.setdefault(id(connection), (connection, []))[1].append(command)
        self._due.extend(owners)
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
            self._lines.give_back(address, connection, is_clean=is_clean)
        self._open.clear()
        self._due.clear()

    def _connection(self, command: Command) -> Wire:
        key = command[1]
        assert isinstance(key, str | bytes)
        address = self._lines.address_of(key, self.limit)
        if address not in self._open:
            self._open[address] = self._lines.take(address, self.limit)
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
