"""`kvprefetch.connect`: contexts, hints and signals for a service, with the same calls as `kvprefetch.local`.

Promises
- Thread-safe, and no torch. One daemon thread does all the talking; a process that forks connects after it has forked.
- `prefetch`, `signal` and `cancel` return at once, whether or not a service is there. `stats` and `check` wait for at
  most `CALL_S`; what operators ask of tenants, for longer.
- A service that is restarted is found again by itself. `close` ends what is open here; hints live on in the service.
"""

import asyncio
import json
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from kvprefetch.client.channel import default_address, endpoint, open_async_channel
from kvprefetch.client.context import RemoteContext, json_bytes, to_wire
from kvprefetch.client.following import Following
from kvprefetch.client.handle import Prefetch
from kvprefetch.client.problems import error_of
from kvprefetch.client.signals import Signals
from kvprefetch.client.tenants import Wanted, rows_of, to_change
from kvprefetch.client.thread import LoopThread
from kvprefetch.contexts import Context, Message
from kvprefetch.errors import AccountingError, Closed, InvalidRequest
from kvprefetch.outcomes import Outcome, Result
from kvprefetch.settings import client_token
from kvprefetch.v1 import admin_pb2, admin_pb2_grpc, hints_pb2_grpc
from kvprefetch.v1 import hints_pb2 as pb

log = logging.getLogger(__name__)

CALL_S = 5.0
"""How long a call that waits may take."""
_OPERATE_S = 30.0  # that tells of all tenants, or changes many
_FLUSH_S = 1.0  # for signals that wait when the connection is closed
_NAMED = 1_024  # contexts remembered here by their names
_HOLD_S = 300.0  # how long a hint is worth repeating, where the service's workers decide how long it is held


class Connection:
    """A service, seen from here. See the module's promises; close it, or use it in `with`."""

    def __init__(
        self, address: str | None = None, token: str = "", *, ca: str = "", certificate: str = "", key: str = ""
    ) -> None:
        end = endpoint(address, token, ca=ca, certificate=certificate, key=key)
        self.address = address or default_address()
        self._metadata = end.metadata
        self._named: OrderedDict[str, RemoteContext] = OrderedDict()
        self._lock = threading.Lock()
        self._followed: dict[asyncio.Task[None], Prefetch] = {}  # the loop's own
        self._cancels: set[asyncio.Task[None]] = set()  # on their way
        self._thread = LoopThread("kvprefetch-client")

        async def open_it() -> None:
            self._channel = open_async_channel(end)
            self._hints = hints_pb2_grpc.HintsStub(self._channel)
            self._admin = admin_pb2_grpc.AdminStub(self._channel)
            self._signals = Signals(self._send_signal, self._thread.post)
            self._sender = asyncio.create_task(self._signals.run())

        self._thread.call(open_it)

    # -- contexts, hints, signals ----------------------------------------------------------------------
    def context(
        self,
        messages: Iterable[Message] = (),
        *,
        tools: Iterable[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        token_ids: Iterable[int] = (),
        name: str = "",
        model: str = "",
        adapter: str = "",
        namespace: str = "",
    ) -> Context:
        """Describe a context of `model` (needed where the service has several).

        With a `name`, the service remembers it from its first use on, for this tenant; the name alone finds it again,
        here or in another process. `namespace`: who shares its blocks, see `Context`. Raises InvalidRequest.
        """
        messages, token_ids = tuple(messages), tuple(token_ids)
        with self._lock:
            if name in self._named and not messages and not token_ids and not namespace:
                self._named.move_to_end(name)
                return self._named[name]
        kwargs = dict(chat_template_kwargs or {})
        context = RemoteContext(
            messages, tuple(tools), kwargs, token_ids, name, namespace, model=model, adapter=adapter
        )
        if name and (messages or token_ids):
            with self._lock:
                self._named[name] = context
                self._named.move_to_end(name)
                if len(self._named) > _NAMED:
                    self._named.popitem(last=False)
        return context

    def prefetch(
        self,
        context: Context,
        *,
        session: str = "",
        probability: float = 1.0,
        expected_in_s: float = 0.0,
        hold_s: float | None = None,
    ) -> Prefetch:
        """Ask for `context` to be warm. Returns at once. Raises Closed, and InvalidRequest for odd numbers.

        `probability` that it will be used, in about `expected_in_s` seconds; unused, it keeps its place for
        `hold_s` (default: the worker's setting). It expires if not done `hold_s` after it was expected.
        """
        if not 0 <= probability <= 1:
            raise InvalidRequest(f"a probability is from 0 to 1, not {probability}")
        hold = _HOLD_S if hold_s is None else hold_s
        if not (0 <= hold < math.inf and 0 <= expected_in_s < math.inf):
            raise InvalidRequest("hold_s and expected_in_s are finite seconds, 0 or more")
        request = pb.PrefetchRequest(
            context=to_wire(context), session=session, probability=probability, expected_in_s=expected_in_s
        )
        if hold_s is not None:
            request.hold_s = hold_s
        handle = Prefetch(self._withdraw)
        self._thread.post(lambda: self._follow(handle, request, expected_in_s, hold))
        return handle

    def signal(
        self,
        kind: str,
        *,
        session: str,
        contexts: Sequence[Context] = (),
        attributes: Mapping[str, Any] | None = None,
        at: float | None = None,
    ) -> None:
        """Say what was observed in a session, at `at` (seconds since the epoch; None: now). Never blocks.

        The contexts it names may be preloaded. "session_ended" withdraws the session's preloads. When too many
        signals wait to be sent, this one is dropped and counted (`stats()["client"]`). Raises Closed, InvalidRequest.
        """
        if not kind:
            raise InvalidRequest("a signal has a kind, a word of your own such as 'document_opened'")
        request = pb.SignalRequest(
            kind=kind,
            session=session,
            contexts=[to_wire(context) for context in contexts],
            attributes=json_bytes(attributes, "attributes") if attributes else b"",
            at=time.time() if at is None else at,
        )
        self._signals.put(request)

    # -- figures ---------------------------------------------------------------------------------------
    def stats(self) -> dict[str, Any]:
        """Counts of the service (of this tenant, for a tenant), and under "client" those of this connection's signals.

        Raises ServiceUnavailable after `CALL_S`, Unauthenticated, Closed.
        """
        found: dict[str, Any] = self._stats(check=False)
        found["client"] = {"signals": dict(self._signals.counts)}
        return found

    def check(self) -> None:
        """Have the service prove that every slot is accounted for (law 5), or raise AccountingError. For operators."""
        self._stats(check=True)

    def tenants(self) -> list[dict[str, Any]]:
        """Everybody, by name: what each may count on and has. For operators.

        Each has "name", "weight", "guarantee" (fraction of every pool), "changed" (by `set_tenants`, and not reset),
        "host_bytes", "disk_bytes", "redis_bytes", and "host_part" (fraction of all blocks that the arenas hold).
        """
        return self._tenants(lambda: self._admin.Tenants(admin_pb2.TenantsRequest(), **self._how))

    def set_tenants(self, shares: Mapping[str, Wanted], reset: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Give each tenant (weight, guarantee), None: as it is, and those in `reset` what the settings say.

        All or nothing. Returns these tenants, as `tenants` does. Raises InvalidRequest where it is no share, or more
        would be guaranteed than there is. For operators.
        """
        request = to_change(shares, reset)
        return self._tenants(lambda: self._admin.SetTenants(request, **self._how))

    def close(self) -> None:
        """Send what waits to be sent, for at most a second, and hang up. Calling it again does nothing."""
        self._thread.close(self._hang_up)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- on the connection's thread --------------------------------------------------------------------
    def _follow(self, handle: Prefetch, request: pb.PrefetchRequest, expected_in_s: float, hold_s: float) -> None:
        now = self._thread.loop.time()
        expected_at = now + expected_in_s
        following = Following(
            handle,
            request,
            lambda wanted: self._hints.Prefetch(wanted, metadata=self._metadata),
            self._send_cancel,
            self.address,
            expected_at,
            expected_at + hold_s,
        )
        task = self._thread.loop.create_task(self._outermost(following))
        self._followed[task] = handle
        task.add_done_callback(self._followed.pop)

    async def _outermost(self, following: Following) -> None:
        try:
            await following.run()
        except Exception as error:
            log.exception("following a hint broke")
            following.handle.resolve(Result(Outcome.FAILED, 0, f"the client broke: {error}"))

    def _withdraw(self, handle: Prefetch) -> None:
        def withdraw() -> None:
            if handle.outcome is None and not handle.is_withdrawn:
                handle.is_withdrawn = True
                if handle.number:
                    self._send_cancel(handle.number)

        try:
            self._thread.post(withdraw)
        except Closed:
            return  # closing gave it its outcome

    def _send_cancel(self, number: int) -> None:
        task = self._thread.loop.create_task(self._cancel(number))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancel(self, number: int) -> None:
        try:
            await self._hints.Cancel(pb.CancelRequest(hint=number), metadata=self._metadata, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            log.debug("a hint was not withdrawn: %s: %s", error.code().name, error.details())

    async def _send_signal(self, request: pb.SignalRequest) -> None:
        await self._hints.Signal(request, metadata=self._metadata, timeout=CALL_S)

    def _stats(self, *, check: bool) -> Any:
        async def ask() -> bytes:
            request = admin_pb2.StatsRequest(check=check)
            reply = await self._admin.Stats(request, metadata=self._metadata, timeout=CALL_S)
            stats: bytes = reply.stats
            return stats

        try:
            return json.loads(self._thread.call(ask))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise AccountingError(error.details()) from error
            raise error_of(error.code(), error.details(), self.address) from error

    @property
    def _how(self) -> dict[str, Any]:
        return {"metadata": self._metadata, "timeout": _OPERATE_S}

    def _tenants(self, call: Callable[[], Awaitable[admin_pb2.TenantsReply]]) -> list[dict[str, Any]]:
        async def ask() -> admin_pb2.TenantsReply:
            return await call()

        try:
            return rows_of(self._thread.call(ask))
        except grpc.aio.AioRpcError as error:
            raise error_of(error.code(), error.details(), self.address) from error

    async def _hang_up(self) -> None:
        await asyncio.gather(self._signals.flush(_FLUSH_S), self._settle(_FLUSH_S))
        for handle in self._followed.values():
            reason = "the connection was closed; the hint lives on in the service"
            handle.resolve(Result(Outcome.FAILED, 0, reason))
        tasks = [self._sender, *self._followed, *self._cancels]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close()

    async def _settle(self, timeout_s: float) -> None:
        """Until every hint and every withdrawal has reached the service, or the time is over."""
        deadline = self._thread.loop.time() + timeout_s
        while any(not handle.number for handle in self._followed.values()) or self._cancels:
            if self._thread.loop.time() >= deadline:
                return
            await asyncio.sleep(0.005)


def connect(
    address: str | None = None,
    token: str | None = None,
    *,
    ca: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
) -> Connection:
    """Connect to a service at `unix:///path`, `host:port` or `tls://host:port`; None: where `kvprefetch serve` listens.

    `token`: a bearer token; None: $KVPREFETCH_TOKEN. `ca`: PEM file that signs the service's certificate;
    `certificate` and `key`: PEM files of this client's own. Returns at once, whether or not a service is there.
    Raises SettingsError for what is no address, and for a token that would be sent in the clear.
    """
    given = client_token() if token is None else token
    return Connection(address, given, ca=ca or "", certificate=certificate or "", key=key or "")
