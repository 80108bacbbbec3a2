"""One service, two workers, the unmodified OpenAI client: what one computed, the other answers from."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from conftest import tiny_llama, tiny_tokenizer
from openai import OpenAI
from processes import Process, until
from redis_servers import RedisServer

import kvprefetch
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

BLOCK, SHARED = 16, 5  # tokens of a block, and blocks that all questions share at least
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

    def ask(self, number: int) -> tuple[str, int]:
        """The answer, and how many tokens of the prompt were cached."""
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
        return done.choices[0].message.content or "", cached


def cold_answers(model: Path, numbers: list[int], folder: Path) -> dict[int, str]:
    """What a worker that shares nothing answers, each from an empty cache."""
    settings = Settings(
        pool=PoolSettings(size="8MiB", block_tokens=BLOCK),
        engine=EngineSettings(device="cpu", dtype="float32", chunk_tokens=64),
    )
    answers = {}
    with kvprefetch.local(str(model), settings=settings) as kv:
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


def written(client: Client) -> float:
    """Blocks that the worker has written to the arena, by its metrics."""
    text = httpx.get(client.url.removesuffix("/v1") + "/metrics").text
    lines = [line for line in text.splitlines() if line.startswith('kvprefetch_arena_written_total{what="written"}')]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_the_second_worker_answers_from_what_the_first_computed_and_a_killed_service_harms_nobody(
    model: Path, tmp_path: Path
) -> None:
    cold = cold_answers(model, [1, 2, 3, 4, 5], tmp_path)
    node = Node(tmp_path / "node")
    with ExitStack() as stack:
        service = stack.enter_context(node.serve())
        with two_workers(model, node, node) as (one, two):
            assert one.ask(1) == (cold[1], 0)
            until(lambda: written(one) >= SHARED, "nothing is written to the arena")
            text, cached = two.ask(2)
            assert (text, cached >= SHARED * BLOCK) == (cold[2], True)
            service.kill()
            text, cached = one.ask(3)
            assert (text, cached >= SHARED * BLOCK) == (cold[3], True)  # from its own pool
            service = stack.enter_context(node.serve())
            text, cached = two.ask(4)
            assert (text, cached >= SHARED * BLOCK) == (cold[4], True)
        with node.start_worker(model) as fresh:  # what both computed outlives them
            text, cached = Client(fresh).ask(5)
            assert (text, cached >= SHARED * BLOCK) == (cold[5], True)
        assert service.stop() == 0


def test_between_two_services_redis_carries_it(model: Path, tmp_path: Path) -> None:
    cold = cold_answers(model, [1, 2], tmp_path)
    with RedisServer(tmp_path / "redis") as redis:
        tier = f'[redis]\nurl = "{redis.url}"'
        nodes = Node(tmp_path / "a", tier), Node(tmp_path / "b", tier)
        with nodes[0].serve(), nodes[1].serve(), two_workers(model, *nodes) as (one, two):
            assert one.ask(1) == (cold[1], 0)
            until(lambda: redis.client().dbsize() > SHARED, "nothing is written to Redis")
            text, cached = two.ask(2)
            assert (text, cached >= SHARED * BLOCK) == (cold[2], True)


def test_a_hint_given_to_the_service_makes_the_context_warm(model: Path, tmp_path: Path) -> None:
    cold = cold_answers(model, [1], tmp_path)
    node = Node(tmp_path / "node")
    with node.serve(), node.start_worker(model) as worker:
        client = Client(worker)
        with kvprefetch.connect(node.address) as kv:
            context = kv.context(messages=[HANDBOOK])
            hint = kv.prefetch(context, session="u-7", probability=0.9)
            warm = hint.wait(timeout_s=60)
            assert warm.outcome is kvprefetch.Outcome.WARM
            text, cached = client.ask(1)
            assert (text, cached) == (cold[1], warm.tokens)
            until(lambda: hint.use is kvprefetch.Use.USED, "its use is not told")
