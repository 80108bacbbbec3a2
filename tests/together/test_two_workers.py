"""One service, two workers, the unmodified OpenAI client: what one computed, the other answers from."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import tiny_llama, tiny_tokenizer
from openai import OpenAI
from processes import Process, until

BLOCK = 16
HANDBOOK = {"role": "system", "content": "Please read the handbook first. " * 40}


def question(number: int) -> list[dict[str, str]]:
    return [HANDBOOK, {"role": "user", "content": f"What does the policy say about case {number}?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_llama(eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Node:
    """A node's folder, settings file and service."""

    def __init__(self, folder: Path, more: str = "") -> None:
        self.folder = folder
        folder.mkdir()
        self.address = f"unix://{folder}/service.sock"
        self.settings = folder / "kvprefetch.toml"
        self.settings.write_text(
            f"""
            secret = "of the tests"
            [service]
            listen = ["{self.address}"]
            state_dir = "{folder}/state"
            [arena]
            dir = "{folder}/arena"
            size = "16MiB"
            [engine]
            dtype = "float32"
            chunk_tokens = 64
            [pool]
            block_tokens = {BLOCK}
            size = "8MiB"
            {more}
            """
        )

    def serve(self) -> Process:
        process = Process("serve", "--settings", str(self.settings))
        process.says("listening")
        return process

    def start_worker(self, model: Path) -> Process:
        arguments = ("--model", str(model), "--service", self.address, "--settings", str(self.settings), "--port", "0")
        return Process("worker", *arguments)


class Client:
    """The OpenAI client of one worker."""

    def __init__(self, worker: Process) -> None:
        self.url = worker.says("serving").split(" at ")[1]
        self.api = OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def ask(self, number: int) -> tuple[str, int, float]:
        """The answer, cached tokens, and seconds."""
        began = time.monotonic()
        done = self.api.chat.completions.create(
            model=self.api.models.list().data[0].id,
            messages=question(number),  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert done.usage is not None
        assert done.usage.prompt_tokens_details is not None
        cached = done.usage.prompt_tokens_details.cached_tokens or 0
        return done.choices[0].message.content or "", cached, time.monotonic() - began


def cold_answers(model: Path, numbers: list[int], folder: Path) -> dict[int, str]:
    """What a worker that shares nothing answers, each from an empty cache."""
    from kvprefetch import Settings, local
    from kvprefetch.settings import EngineSettings, PoolSettings

    settings = Settings(
        pool=PoolSettings(size="8MiB", block_tokens=BLOCK),
        engine=EngineSettings(device="cpu", dtype="float32", chunk_tokens=64),
    )
    answers = {}
    with local(str(model), settings=settings) as kv:
        for number in numbers:
            answers[number] = kv.generate(question(number), max_tokens=8, ignore_eos=True).result().text
            kv.clear()
    return answers


@contextmanager
def two_workers(model: Path, first: Node, second: Node) -> Iterator[tuple[Client, Client]]:
    with ExitStack() as stack:
        workers = [stack.enter_context(node.start_worker(model)) for node in (first, second)]
        yield Client(workers[0]), Client(workers[1])
        for worker in workers:
            assert worker.stop() == 0, worker.lines


def shared(client: Client, number: int) -> tuple[str, int, float]:
    """Ask until the answer comes from what was computed elsewhere (it is written behind); each try is another question."""
    for attempt in range(100):
        answer = client.ask(number)
        if answer[1] > 0 or attempt == 99:
            return answer
        time.sleep(0.05)
    raise AssertionError


def test_the_second_worker_answers_from_what_the_first_computed_and_a_killed_service_harms_nobody(
    model: Path, tmp_path: Path
) -> None:
    cold = cold_answers(model, [1, 2, 3, 4], tmp_path)
    node = Node(tmp_path / "node")
    service = node.serve()
    try:
        with two_workers(model, node, node) as (one, two):
            text, cached, _ = one.ask(1)
            assert (text, cached) == (cold[1], 0)
            until(lambda: written(one) > 0, "nothing is written to the arena")
            text, cached, _ = two.ask(2)
            assert text == cold[2]
            assert cached >= 5 * BLOCK
            service.kill()
            text, cached, _ = one.ask(3)
            assert text == cold[3]
            assert cached >= 5 * BLOCK  # from its own pool
            service = node.serve()
            text, cached, _ = two.ask(4)
            assert text == cold[4]
            assert cached >= 5 * BLOCK
        assert service.stop() == 0
    finally:
        service.__exit__()


def written(client: Client) -> float:
    """Blocks that the worker has written to the arena, by its metrics."""
    import httpx

    text = httpx.get(client.url.removesuffix("/v1") + "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith('kvprefetch_arena_written_total{what="written"}')]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)
