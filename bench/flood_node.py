"""A service and its workers with credentials for two tenants and an operator, and what a tenant's client sees.

All are real processes of the command line; workers prove at their end that every page is accounted for. Workers'
pools and the node's arena are so small that the two tenants cannot have all they want.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import httpx
from openai import OpenAI, OpenAIError
from service_node import Node, Process, url_of

ANN, FLOOD, OPERATOR, WORKER = "ann", "flood", "operator", "worker"
_ROLES = {ANN: "tenant", FLOOD: "tenant", OPERATOR: "operator", WORKER: "worker"}
_PROVED = "every page is accounted for"


@dataclass(frozen=True)
class Sizes:
    """Of the memory that tenants share, in tokens, and of its parts."""

    token_bytes: int
    pool: int = 2_048  # of each worker
    arena: int = 2_048
    block: int = 32
    chunk: int = 64
    threads: int = 1  # of each worker
    guarantee: float = 0.6  # ann's, at first


@dataclass(frozen=True)
class Asked:
    """One request as its client saw it. Times in seconds of `time.monotonic`, or from the request on."""

    at: float
    who: str  # ann, or the flood
    worker: int
    prompt: int  # tokens
    context: int  # of them the tenant's earlier ones
    ttft_s: float = 0.0
    ended: float = 0.0
    cached: int = 0  # tokens of the prompt that were found
    failed: str = ""


class Asker:
    """The `openai` client of one tenant at one worker. For one thread at a time. `credential`: if not its own."""

    def __init__(self, url: str, who: str, worker: int, credential: str = "") -> None:
        self.who, self.worker = who, worker
        self.api = OpenAI(base_url=url, api_key=token(credential or who), max_retries=0, timeout=300)
        self.model = self.api.models.list().data[0].id

    def ask(self, prompt: Sequence[int], context: int = 0, session: str = "", max_tokens: int = 4) -> Asked:
        """Stream an answer. What fails is said in `failed`, not raised."""
        at, first, cached, failed = time.monotonic(), 0.0, 0, ""
        try:
            stream = self.api.completions.create(
                model=self.model,
                prompt=list(prompt),
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
                extra_headers={"x-kvprefetch-session": session} if session else {},
            )
            for chunk in stream:
                if chunk.choices:
                    first = first or time.monotonic()
                if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
                    cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
        except (OpenAIError, httpx.HTTPError) as error:
            failed = f"{type(error).__name__}: {error}"
        if not first and not failed:
            failed = "an answer without a token"
        return Asked(at, self.who, self.worker, len(prompt), context, first - at, time.monotonic(), cached, failed)


class Cluster:
    """A service and `workers` workers of one model; use it in `with`."""

    def __init__(self, model: str, sizes: Sizes, workers: int = 2) -> None:
        self.node = Node(str(sizes.arena * sizes.token_bytes * 21 // 20), _settings(sizes))  # slots have headers
        self.model, self.sizes = model, sizes
        self._stack = ExitStack()
        self._count = workers

    def __enter__(self) -> "Cluster":
        with ExitStack() as stack:
            stack.enter_context(self.node)
            self.service = stack.enter_context(self.node.serve())
            self.workers = [stack.enter_context(self._start()) for _ in range(self._count)]
            self.urls = [url_of(worker) for worker in self.workers]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def operate(self, command: str, *more: str) -> str:
        """`kvprefetch COMMAND MORE` as the operator; what it printed. Raises RuntimeError where it fails."""
        program = "from kvprefetch.cli.main import main; main()"
        where = ("--service", self.node.address, "--token", token(OPERATOR))
        arguments = [sys.executable, "-c", program, command, *where, *more]
        process = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if process.returncode:
            raise RuntimeError(f"kvprefetch {' '.join((command, *more))}: {process.stdout}{process.stderr}")
        return process.stdout

    def metric(self, worker: int, name: str) -> float:
        """One figure of a worker's /metrics; 0 where it has none yet."""
        text = httpx.get(self.urls[worker].removesuffix("/v1") + "/metrics", timeout=60).text
        found = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[0]) if found else 0.0

    def evictions(self) -> float:
        """Blocks that all workers have evicted."""
        return sum(self.metric(worker, "kvprefetch_pool_evictions_total") for worker in range(len(self.urls)))

    def prove(self) -> None:
        """The node accounts for every slot; then all end, and each worker for every page. Raises RuntimeError."""
        self.operate("stats", "--check", "--json")
        for process in (*self.workers, self.service):
            if process.stop() != 0:
                raise RuntimeError(f"{process.arguments} ended badly: " + "\n".join(process.lines[-20:]))
        for worker in self.workers:
            worker.says(_PROVED)

    def _start(self) -> Process:
        return self.node.start_worker(self.model, self.sizes.threads, token(WORKER))


def token(name: str) -> str:
    """The bearer token of a tenant, worker or operator."""
    return f"token of {name}"


def _settings(sizes: Sizes) -> str:
    tables: list[tuple[str, dict[str, Any]]] = [
        ("[engine]", {"device": "cpu", "dtype": "float32", "chunk_tokens": sizes.chunk}),
        ("[pool]", {"block_tokens": sizes.block, "size": str(sizes.pool * sizes.token_bytes)}),
        ("[fairness]", {"guarantee": 0.0}),
        ("[[tenants]]", {"name": ANN, "guarantee": sizes.guarantee}),
    ]
    for name, role in _ROLES.items():
        digest = sha256(token(name).encode()).hexdigest()
        tables.append(("[[credentials]]", {"name": name, "role": role, "token_sha256": digest}))
    return "\n".join(
        line
        for head, keys in tables
        for line in (head, *(f"{key} = {json.dumps(value)}" for key, value in keys.items()))
    )
