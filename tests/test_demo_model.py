"""The demo's model: what was asked, else a genuine copy that is already here; never a damaged one."""

from hashlib import sha256
from pathlib import Path

import pytest

from kvprefetch.demo import model
from kvprefetch.demo.model import find_model

GENUINE = b"GGUF, and what follows it"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cached copy lies; the genuine one is GENUINE. Neither hub nor index can be asked."""
    monkeypatch.setenv("KVPREFETCH_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "GGUF_SHA256", sha256(GENUINE).hexdigest())

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(model, "ask_hub", asked)
    monkeypatch.setattr(model.subprocess, "run", asked)
    return tmp_path / model.GGUF


def test_the_model_that_was_asked_for_is_taken_as_it_is(cached: Path) -> None:
    cached.write_bytes(GENUINE)
    assert find_model("someone/some-model") == "someone/some-model"
    assert find_model("/models/mine.gguf") == "/models/mine.gguf"


def test_a_genuine_cached_copy_is_taken_without_the_network(cached: Path) -> None:
    cached.write_bytes(GENUINE)
    assert find_model() == str(cached)
    assert find_model("") == str(cached)


@pytest.mark.parametrize("content", [GENUINE[:-1], GENUINE + b"!", GENUINE.lower(), b""])
def test_a_damaged_cached_copy_is_not_taken(cached: Path, content: bytes) -> None:
    cached.write_bytes(content)
    assert not model._is_genuine(cached)
    with pytest.raises(AssertionError, match="the network was asked"):
        find_model()


def test_what_is_not_a_file_is_not_genuine(cached: Path) -> None:
    assert not model._is_genuine(cached)
    cached.mkdir()
    assert not model._is_genuine(cached)
    cached.rmdir()
    cached.write_bytes(GENUINE)
    assert model._is_genuine(cached)
