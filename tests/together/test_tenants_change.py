"""Guarantees that change while two tenants ask for more than the pools hold: real processes, and no failed request."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from processes import Process, until
from tiny_models import tiny_llama, tiny_tokenizer

ROLES = {"ann": "tenant", "bob": "tenant", "olga": "operator", "w1": "worker"}
BLOCK, ENOUGH = 16, 8
PROVED = "every page is accounted for"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_llama(eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Node:
    """A node whose pools are too small for what is asked. Every name is its own token."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.model, self.address = model, f"unix://{folder}/s.sock"
        known = "".join(
            f'[[credentials]]\nname = "{name}"\nrole = "{role}"\ntoken_sha256 = "{sha256(name.encode()).hexdigest()}"\n'
            for name, role in ROLES.items()
        )
        self.settings = folder / "kvprefetch.toml"
        self.settings.write_text(
            f"""
            secret = "of the tests"
            [service]
            listen = ["{self.address}"]
            state_dir = "{folder}/state"
            [arena]
            dir = "{folder}/arena"
            size = "1MiB"
            [engine]
            dtype = "float32"
            chunk_tokens = 64
            [pool]
            block_tokens = {BLOCK}
            size = "512KiB"
            [fairness]
            guarantee = 0.0
            [[tenants]]
            name = "ann"
            guarantee = 0.125
            {known}
            """
        )

    def serve(self) -> Process:
        process = Process("serve", "--settings", str(self.settings))
        process.says("listening")
        return process

    def start_worker(self) -> Process:
        where = ("--service", self.address, "--settings", str(self.settings), "--port", "0")
        return Process("worker", "--model", str(self.model), *where, env={"KVPREFETCH_TOKEN": "w1"})

    def operate(self, *command: str) -> str:
        """`kvprefetch COMMAND` of the operator; it must end well."""
        code = "from kvprefetch.cli.main import main; main()"
        arguments = [sys.executable, "-c", code, *command, "--service", self.address]
        environment = {**os.environ, "KVPREFETCH_TOKEN": "olga"}
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60, env=environment)
        assert done.returncode == 0, done
        return done.stdout

    def tenants(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in json.loads(self.operate("tenants", "--json"))["tenants"]}


def url_of(worker: Process) -> str:
    return worker.says("serving").split(" at ")[1]


def pages(url: str, kind: str, tenant: str) -> float:
    """What a tenant has of a worker's pool, as the operator reads it."""
    answer = httpx.get(url.removesuffix("/v1") + "/metrics", headers={"authorization": "Bearer olga"}, timeout=60)
    found = re.findall(rf'^kvprefetch_tenant_{kind}_pages{{tenant="{tenant}"}} (\S+)$', answer.text, re.MULTILINE)
    return float(found[0]) if found else 0.0


class Load:
    """Both tenants ask about texts that nobody has seen, one after the other, until it is enough."""

    def __init__(self, url: str) -> None:
        self.answers = {"ann": 0, "bob": 0}
        self.failed: list[str] = []
        self._url, self._numbers, self._stop = url, count(), threading.Event()

    def ask(self, tenant: str) -> None:
        with OpenAI(base_url=self._url, api_key=tenant, max_retries=0, timeout=60) as api:
            model = api.models.list().data[0].id
            while not self._stop.is_set():
                text = f"Case {next(self._numbers)} of {tenant}. " * 12
                try:
                    done = api.completions.create(
                        model=model, prompt=text, max_tokens=4, extra_body={"ignore_eos": True}
                    )
                    assert done.usage is not None
                    assert done.usage.completion_tokens == 4
                    self.answers[tenant] += 1
                except Exception as error:  # noqa: BLE001 - the thread's outermost line
                    self.failed.append(f"{tenant}: {error!r}")

    def wait_for_more(self) -> None:
        """Until each has had some more answers."""
        before = dict(self.answers)
        until(
            lambda: bool(self.failed) or all(self.answers[who] >= before[who] + ENOUGH for who in before),
            "there are no answers",
        )

    @contextmanager
    def going_on(self) -> Iterator[None]:
        threads = [threading.Thread(target=self.ask, args=(tenant,)) for tenant in self.answers]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(120)
        assert self.failed == []


def test_guarantees_change_under_load_and_no_request_fails(model: Path, tmp_path: Path) -> None:
    node = Node(tmp_path, model)
    with node.serve() as service, node.start_worker() as worker:
        url = url_of(worker)
        load = Load(url)
        with load.going_on():
            load.wait_for_more()
            all_pages = 8 * pages(url, "guaranteed", "ann")  # its 12.5 %, of the settings
            node.operate("tenants", "set", "ann", "--guarantee", "75%")
            until(lambda: pages(url, "guaranteed", "ann") == 0.75 * all_pages, "the worker does not take it over")
            until(lambda: pages(url, "used", "ann") > 0.6 * all_pages, "ann does not get what it is guaranteed")
            node.operate("tenants", "set", "ann", "--guarantee", "0.05")
            node.operate("tenants", "set", "bob", "--guarantee", "0.75", "--weight", "3")
            until(lambda: pages(url, "used", "bob") > 0.6 * all_pages, "what ann has beyond its guarantee does not go")
            load.wait_for_more()
            node.operate("tenants", "reset", "ann")
            load.wait_for_more()
        assert node.tenants()["bob"]["host_part"] > 0.5
        node.operate("stats", "--check")
        assert worker.stop() == 0, worker.lines
        worker.says(PROVED)
        assert service.stop() == 0


def test_who_comes_later_gets_it_too_and_so_does_who_was_there_before_a_restart(model: Path, tmp_path: Path) -> None:
    node = Node(tmp_path, model)
    with node.serve() as service, node.start_worker() as early:
        url = url_of(early)
        until(lambda: pages(url, "guaranteed", "ann") > 0, "the worker has no shares")
        all_pages = 8 * pages(url, "guaranteed", "ann")
        node.operate("tenants", "set", "bob", "--guarantee", "50%")
        with node.start_worker() as late:
            later = url_of(late)
            until(lambda: pages(later, "guaranteed", "bob") == 0.5 * all_pages, "the later worker is not told")
            service.kill()
            with node.serve() as again:
                node.operate("tenants", "set", "bob", "--guarantee", "25%")
                for each in (url, later):
                    until(
                        lambda each=each: pages(each, "guaranteed", "bob") == 0.25 * all_pages, "a worker is not told"
                    )
                assert node.tenants()["bob"]["changed"]
                node.operate("stats", "--check")
                assert [late.stop(), early.stop(), again.stop()] == [0, 0, 0]
