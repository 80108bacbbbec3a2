"""Nodes of the fault campaign: a tiny random model, a service, workers, and what they say of themselves."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import torch
from faults_process import Process, command, free_port
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvprefetch.client.channel import open_channel
from kvprefetch.v1 import admin_pb2, admin_pb2_grpc

BLOCK = 16
VOCABULARY = 512
_SECRET = "of the fault campaign"


def write_model(folder: Path) -> Path:
    """A tiny Llama whose every token is a word of its own, so that texts are equal if and only if tokens are."""
    words = {f"t{number}": number for number in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0", eos_token="t1", pad_token="t1")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Worker:
    """A worker process and how to ask it. `url` waits until it serves; `orders`: where it is told to halt."""

    def __init__(self, name: str, process: Process, orders: Path) -> None:
        self.name, self.process, self.orders = name, process, orders
        self._http = httpx.Client(timeout=60)
        self._url = self._model = ""

    @property
    def url(self) -> str:
        """Of its root."""
        if not self._url:
            self._url = self.process.says(" at http").rsplit(" at ", 1)[1].removesuffix("/v1")
            self._model = self._http.get(f"{self._url}/v1/models").json()["data"][0]["id"]
        return self._url

    def ask(
        self, prompt: list[int], tokens: int = 6, http: httpx.Client | None = None, timeout_s: float = 60
    ) -> tuple[str, int]:
        """The greedy answer, and how many tokens of the prompt were found ready. Raises httpx.HTTPError."""
        url = self.url
        body = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        reply = (http or self._http).post(f"{url}/v1/completions", json=body, timeout=timeout_s)
        reply.raise_for_status()
        answer = reply.json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["text"], cached

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by name and labels."""
        text = self._http.get(f"{self.url}/metrics").text
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(sample.labels.values())
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found

    def close(self) -> None:
        self.process.close()
        self._http.close()


@dataclass
class Node:
    """A node's folder, settings file and service. `more`: lines of TOML behind the usual ones."""

    folder: Path
    model: Path
    name: str = "node"
    arena: str = "16MiB"
    more: str = ""
    service_more: str = ""
    service: Process | None = None
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self.port = free_port()
        self.address = f"unix://{self.folder}/service.sock"
        self.settings = self.folder / "kvprefetch.toml"
        self.orders = self.folder / "orders"
        self._channel: grpc.Channel | None = None
        self.write_settings()

    def write_settings(self) -> None:
        """As the fields say; read by what starts from now on."""
        self.settings.write_text(
            f"""
            secret = "{_SECRET}"
            [service]
            listen = ["{self.address}", "127.0.0.1:{self.port}"]
            insecure_local = true
            state_dir = "{self.folder}/state"
            drain_s = 10.0
            {self.service_more}
            [arena]
            dir = "{self.folder}/arena"
            size = "{self.arena}"
            [engine]
            device = "cpu"
            dtype = "float32"
            chunk_tokens = 64
            [pool]
            block_tokens = {BLOCK}
            size = "8MiB"
            evicted_memory = 4096
            {self.more}
            """,
            encoding="utf-8",
        )

    def serve(self, *, halting: bool = False) -> Process:
        """Start the service, and wait until it listens."""
        self.begin_serving(halting=halting).says("listening")
        assert self.service is not None
        return self.service

    def begin_serving(self, *, halting: bool = False) -> Process:
        """Start the service."""
        run = command("serve", "--settings", str(self.settings), orders=self.orders if halting else None)
        self.service = Process(run, self.folder / "service.log")
        return self.service

    def start_worker(self, name: str, *, address: str = "", halting: bool = False) -> Worker:
        """Start a worker; `url` waits for it. `address` none: it shares nothing."""
        orders = self.folder / f"{name}.orders"
        run = command(
            "worker",
            "--model",
            str(self.model),
            "--service",
            address or self.address,
            "--settings",
            str(self.settings),
            "--port",
            "0",
            orders=orders if halting else None,
        )
        worker = Worker(name, Process(run, self.folder / f"{name}.log"), orders)
        self.workers.append(worker)
        return worker

    def stats(self, *, check: bool = False, timeout_s: float = 10.0) -> dict[str, Any]:
        """Of the service, as its operator. Raises grpc.RpcError."""
        if self._channel is None:
            self._channel = open_channel(self.address)
        stub = admin_pb2_grpc.AdminStub(self._channel)
        reply = stub.Stats(admin_pb2.StatsRequest(check=check), timeout=timeout_s, wait_for_ready=True)
        stats: dict[str, Any] = json.loads(reply.stats)
        return stats

    def end_worker(self, worker: Worker) -> None:
        """Kill it, if it lives, and forget it."""
        worker.close()
        if worker in self.workers:
            self.workers.remove(worker)

    def close(self) -> None:
        """Kill whatever runs."""
        for worker in self.workers:
            worker.close()
        if self._channel is not None:
            self._channel.close()
        if self.service is not None:
            self.service.close()


def flat(stats: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers in nested figures, by their path; what is `refused` with a reason counts as 1."""
    found: dict[str, float] = {}
    for name, value in stats.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict):
            found |= flat(value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[path] = float(value)
        elif isinstance(value, str) and ".refused." in path:
            found[path] = 1.0
    return found
