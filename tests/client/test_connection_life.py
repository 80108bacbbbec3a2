"""Connections that outlive their service, are cut, and end."""

import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from processes import until
from services import Service, TestWorker, calling, running, small

import kvprefetch
from kvprefetch import Closed, Connection, Outcome, ServiceUnavailable, Use
from kvprefetch.v1 import outcomes_pb2 as words
from kvprefetch.v1.workers_pb2 import PreloadReport

BOOK = [{"role": "system", "content": "Answer from this handbook: …"}]
WAIT_S = 30.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(small(tmp_path)) as it:
        yield it


def counts(kv: Connection) -> dict[str, Any]:
    found: dict[str, Any] = kv.stats()["tenants"]["default"]
    return found


# -- restarts ----------------------------------------------------------------------------------------------
def test_a_restarted_service_is_found_again_and_asked_again(tmp_path: Path) -> None:
    with kvprefetch.connect(f"unix://{tmp_path}/s.sock") as kv:
        early = kv.prefetch(kv.context(BOOK), session="early")  # nobody is there yet
        with running(small(tmp_path)):
            until(lambda: counts_or_none(kv) == 1, "it does not get there")
        kv.signal("reading", session="s")
        with running(small(tmp_path)) as service, calling(service.address) as channel:
            worker = TestWorker(channel)
            (preload,) = worker.wait_for("preload")
            assert preload.session == "early"
            worker.say(preload=PreloadReport(hint=preload.hint, outcome=words.OUTCOME_ALREADY_WARM, tokens=16))
            assert early.wait(WAIT_S).outcome is Outcome.ALREADY_WARM
            until(lambda: kv._signals.counts["sent"] == 1, "the signal does not get there")
            worker.leave()
        time.sleep(0.3)
        assert early.use is None  # nobody knows any more


class Wire:
    """A wire to a port that can be cut."""

    def __init__(self, port: int) -> None:
        self.port, self.pairs = port, list[socket.socket]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self.port))
                self.pairs += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65_536):
                other.sendall(data)

    def cut(self) -> None:
        for end in self.pairs:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for end in (self.listener, *self.pairs):
            end.close()


def test_a_hint_whose_stream_is_cut_is_followed_and_not_given_twice(tmp_path: Path) -> None:
    settings = small(tmp_path, f"unix://{tmp_path}/s.sock", "127.0.0.1:0", insecure_local=True)
    with running(settings) as service, calling(service.address) as channel:
        worker, wire = TestWorker(channel), Wire(int(service.addresses[1].rpartition(":")[2]))
        with kvprefetch.connect(wire.address) as kv:
            hint = kv.prefetch(kv.context(BOOK))
            (preload,) = worker.wait_for("preload")
            until(lambda: hint.number == preload.hint, "it is not accepted")
            wire.cut()
            worker.say(preload=PreloadReport(hint=preload.hint, outcome=words.OUTCOME_WARM))
            assert hint.wait(WAIT_S).outcome is Outcome.WARM
            wire.cut()
            worker.say(preload=PreloadReport(hint=preload.hint, use=words.USE_EVICTED))
            until(lambda: hint.use is Use.EVICTED, "its use is not told")
            assert counts(kv)["hints"]["issued"] == 1
        wire.close()
        worker.leave()


def counts_or_none(kv: Connection) -> int | None:
    """Hints issued, if the service is there."""
    try:
        return int(counts(kv)["hints"]["issued"])
    except (ServiceUnavailable, KeyError):
        return None


def test_a_hint_whose_service_stays_away_fails_when_its_time_is_over(tmp_path: Path) -> None:
    with kvprefetch.connect(f"unix://{tmp_path}/s.sock") as kv:
        hint = kv.prefetch(kv.context(BOOK), hold_s=0.2)
        result = hint.wait(WAIT_S)
        assert (result.outcome, "lost the service" in result.reason) == (Outcome.FAILED, True)
        withdrawn = kv.prefetch(kv.context(BOOK))
        withdrawn.cancel()
        assert withdrawn.wait(WAIT_S).outcome is Outcome.CANCELLED


# -- the end -----------------------------------------------------------------------------------------------
def test_closing_sends_what_waits_and_gives_every_handle_an_end(service: Service) -> None:
    kv = kvprefetch.connect(service.address)
    hint = kv.prefetch(kv.context(BOOK))
    kv.signal("reading", session="s")
    kv.close()
    kv.close()
    result = hint.wait(WAIT_S)
    assert (result.outcome, result.reason) == (
        Outcome.FAILED,
        "the connection was closed; the hint lives on in the service",
    )
    hint.cancel()
    for call in (kv.stats, lambda: kv.prefetch(kv.context(BOOK)), lambda: kv.signal("k", session="s")):
        with pytest.raises(Closed):
            call()
    with kvprefetch.connect(service.address) as again:
        assert counts(again)["hints"]["pending"] == 1
        assert counts(again)["signals"]["kinds"] == {"reading": 1}


def test_closing_leaves_nothing_behind(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    before = threading.active_count()
    for _ in range(3):
        with kvprefetch.connect(service.address) as kv:
            for number in range(20):
                kv.prefetch(kv.context(token_ids=[number]))
    gc.collect()
    assert threading.active_count() == before
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_closing_while_another_thread_waits_ends_its_call(tmp_path: Path) -> None:
    with running(small(tmp_path)) as service:
        service.do(lambda server: time.sleep(0.5))  # it is busy
        kv = kvprefetch.connect(service.address)
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                kv.stats()
            except kvprefetch.KVPrefetchError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.1)
        kv.close()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert all(isinstance(error, (Closed, ServiceUnavailable)) for error in errors)


def test_a_process_that_forgets_to_close_ends_all_the_same(service: Service) -> None:
    code = (
        f"import kvprefetch\nkv = kvprefetch.connect({service.address!r})\n"
        "kv.prefetch(kv.context(token_ids=[1]))\nkv.signal('k', session='s')\nkv.stats()\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
