"""Following an answer without a thread for it: no event is lost, none comes twice, whoever is first."""

import sys
import threading
from collections.abc import Iterator

import pytest

from kvprefetch.worker.request import Event, Generation


def test_a_listener_hears_what_was_and_what_will_be_in_order() -> None:
    stream, heard = Generation(lambda: None), list[Event]()
    stream.put_text("a")
    stream.put_text("")  # a token without text counts as well
    stream.subscribe(heard.append)
    stream.put_text("b")
    stream.put_end()
    assert heard == ["a", "", "b", None]
    assert stream.text == "ab"


def test_a_listener_hears_of_the_error_that_ended_the_answer() -> None:
    stream, heard, error = Generation(lambda: None), list[Event](), RuntimeError("broken")
    stream.put_end(error)
    stream.subscribe(heard.append)
    assert heard == [error]


@pytest.fixture
def _in_turns() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_in_turns")
def test_subscribing_while_the_worker_writes_loses_nothing() -> None:
    pieces = [str(number) for number in range(1_000)]

    def write(stream: Generation) -> None:
        for piece in pieces:
            stream.put_text(piece)
        stream.put_end()

    for _ in range(100):
        stream, heard = Generation(lambda: None), list[Event]()
        writer = threading.Thread(target=write, args=(stream,))
        writer.start()
        while not stream.text:
            pass
        stream.subscribe(heard.append)
        writer.join()
        assert heard == [*pieces, None]


def test_an_iterating_reader_sees_text_alone() -> None:
    stream = Generation(lambda: None)
    for event in ("a", "", "b"):
        stream.put_text(event)
    stream.put_end()
    assert list(stream) == ["a", "b"]
