"""One service, two workers, the unmodified OpenAI client: what one computed, the other answers from."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from processes import Process, until
from redis_servers import RedisServer
from tiny_models import tiny_llama, tiny_tokenizer

import kvprefetch
from kvprefetch.settings import EngineSettings, PoolSettings, Settings

BLOCK, SHARED = 16, 5  # tokens of a block, and blocks that all questions share at least
HANDBOOK = {"role": "system", "content": "Please read the handbook first. " * 40}


OTHER = {"role": "system", "content": "The warehouse opens at seven. " * 40}


@dataclass(frozen=True)
class Answer:
    number: int
    text: str
    cached: int
    seconds: float


def question(number: int, about: dict[str, str]) -> list[dict[str, str]]:
    return [about, {"role": "user", "content": f"What does the policy say about case {number}?"}]


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

    def ask(self, number: int, about: dict[str, str] = HANDBOOK) -> "Answer":
        began = time.monotonic()
        done = self.api.chat.completions.create(
            model=self.api.models.list().data[0].id,
            messages=question(number, about),  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert done.usage is not None
        assert done.usage.prompt_tokens_details is not None
        cached = done.usage.prompt_tokens_details.cached_tokens or 0
        return Answer(number, done.choices[0].message.content or "", cached, time.monotonic() - began)


class Cold:
    """A worker that shares nothing, from an empty cache each time: what is right, and what is late."""

    def __init__(self, model: Path) -> None:
        settings = Settings(
            pool=PoolSettings(size="8MiB", block_tokens=BLOCK),
            engine=EngineSettings(device="cpu", dtype="float32", chunk_tokens=64),
        )
        began = time.monotonic()
        with kvprefetch.local(str(model), settings=settings) as kv:
            self.answers = {}
            for number, about in [(n, HANDBOOK) for n in (1, 2, 3, 6)] + [(n, OTHER) for n in (4, 5)]:
                self.answers[number] = kv.generate(question(number, about), max_tokens=8, ignore_eos=True).result().text
                kv.clear()
        self.seconds = time.monotonic() - began

    def agrees(self, answer: "Answer") -> int:
        """The answer is right, and did not hang (`bench/faults.py` measures who is late); its cached tokens."""
        assert answer.text == self.answers[answer.number]
        assert answer.seconds < 20 * self.seconds
        return answer.cached


@contextmanager
def two_workers(model: Path, first: Node, second: Node) -> Iterator[tuple[Client, Client]]:
    with ExitStack() as stack:
        workers = [stack.enter_context(node.start_worker(model)) for node in (first, second)]
        yield Client(workers[0]), Client(workers[1])
        for worker in workers:
            assert worker.stop() == 0, worker.lines


def metric(client: Client, name: str) -> float:
    """One of the worker's metrics."""
    text = httpx.get(client.url.removesuffix("/v1") + "/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def written(client: Client) -> float:
    """Blocks that the worker has written to the arena."""
    return metric(client, 'kvprefetch_arena_written_total{what="written"}')


def is_connected(client: Client) -> bool:
    return metric(client, "kvprefetch_service_connected") == 1


def test_the_second_worker_answers_from_what_the_first_computed_and_a_killed_service_harms_nobody(
    model: Path, tmp_path: Path
) -> None:
    cold = Cold(model)
    node = Node(tmp_path / "node")
    with ExitStack() as stack:
        service = stack.enter_context(node.serve())
        with two_workers(model, node, node) as (one, two):
            assert cold.agrees(one.ask(1)) == 0
            until(lambda: written(one) >= SHARED, "nothing is written to the arena")
            assert cold.agrees(two.ask(2)) >= SHARED * BLOCK
            service.kill()
            assert cold.agrees(one.ask(3)) >= SHARED * BLOCK  # from its own pool
            assert cold.agrees(one.ask(4, OTHER)) < SHARED * BLOCK
            before = written(one)
            service = stack.enter_context(node.serve())
            until(lambda: written(one) >= before + SHARED, "nothing is written to the arena of the restarted service")
            until(lambda: is_connected(two), "the second worker does not come back")
            assert cold.agrees(two.ask(5, OTHER)) >= SHARED * BLOCK
        with node.start_worker(model) as fresh:  # what both computed outlives them, and the service's first run
            assert cold.agrees(Client(fresh).ask(6)) >= SHARED * BLOCK
        assert service.stop() == 0


def test_between_two_services_redis_carries_it(model: Path, tmp_path: Path) -> None:
    cold = Cold(model)
    with RedisServer(tmp_path / "redis") as redis, ExitStack() as stack:
        tier = f'[redis]\nurl = "{redis.url}"'
        nodes = Node(tmp_path / "a", tier), Node(tmp_path / "b", tier)
        first, second = (stack.enter_context(node.serve()) for node in nodes)
        with two_workers(model, *nodes) as (one, two):
            assert cold.agrees(one.ask(1)) == 0
            until(lambda: redis.client().dbsize() > 2 * SHARED, "nothing is written to Redis")
            first.kill()
            assert cold.agrees(two.ask(2)) >= SHARED * BLOCK
            second.kill()
            assert cold.agrees(two.ask(3)) >= SHARED * BLOCK
            stack.enter_context(nodes[0].serve())
            stack.enter_context(nodes[1].serve())
            size = redis.client().dbsize()
            assert cold.agrees(one.ask(4, OTHER)) < SHARED * BLOCK
            until(lambda: redis.client().dbsize() > size + SHARED, "nothing is written to Redis after the restart")
            until(lambda: is_connected(two), "the second worker does not come back")
            assert cold.agrees(two.ask(5, OTHER)) >= SHARED * BLOCK


def test_a_hint_given_to_the_service_makes_the_context_warm(model: Path, tmp_path: Path) -> None:
    cold = Cold(model)
    node = Node(tmp_path / "node")
    with node.serve(), node.start_worker(model) as worker:
        client = Client(worker)
        with kvprefetch.connect(node.address) as kv:
            context = kv.context(messages=[HANDBOOK])
            hint = kv.prefetch(context, session="u-7", probability=0.9)
            warm = hint.wait(timeout_s=60)
            assert warm.outcome is kvprefetch.Outcome.WARM
            assert cold.agrees(client.ask(1)) == warm.tokens
            until(lambda: hint.use is kvprefetch.Use.USED, "its use is not told")
