"""`kvprefetch warm` against a real service and worker."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from processes import written as file_with
from service_thread import ServiceThread, attached

from kvprefetch.cache.shares import OPERATOR
from kvprefetch.cli.main import commands
from kvprefetch.engines.engine import TransformersEngine
from kvprefetch.inprocess import Local

Open = Callable[..., TransformersEngine]
HANDBOOK = {"role": "system", "content": "Please read the handbook first. " * 20}
BODY = json.dumps({"messages": [HANDBOOK], "temperature": 0.5, "max_tokens": 8})


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceThread]:
    service = ServiceThread(tmp_path)
    yield service
    service.end()


def warm(service: ServiceThread, *arguments: str, text: str = "") -> Result:
    return CliRunner().invoke(commands, ["warm", *arguments, "--service", service.address], input=text)


def cached(kv: Local, tenant: str) -> int:
    question = [HANDBOOK, {"role": "user", "content": f"I am {tenant}. How much leave?"}]
    return kv.as_tenant(tenant).generate(question, max_tokens=1).result().reused_tokens


def test_a_file_is_warm_for_every_tenant(open_tiny: Open, service: ServiceThread, tmp_path: Path) -> None:
    body = file_with(tmp_path / "handbook.json", BODY)
    with attached(open_tiny(), service) as kv:
        done = warm(service, "--public", str(body), "--name", "handbook", "--json")
        assert done.exit_code == 0, done.output
        said = json.loads(done.output)
        assert (said["outcome"], said["reason"]) == ("WARM", "")
        assert said["worker"].startswith("tiny-llama@")
        assert kv.stats()["pool"]["charges"][OPERATOR] == {"speculative": said["tokens"] // 16}
        assert [cached(kv, tenant) for tenant in ("ann", "bob")] == [said["tokens"]] * 2
        again = warm(service, "--public", "--name", "handbook")
        assert (again.exit_code, again.output[:12]) == (0, "ALREADY_WARM")


def test_the_standard_input_will_do_and_a_list_of_messages_or_exact_tokens(
    open_tiny: Open, service: ServiceThread
) -> None:
    with attached(open_tiny(), service) as kv:
        assert warm(service, "--public", "-", text=json.dumps([HANDBOOK])).exit_code == 0
        before = cached(kv, "ann")
        assert before
        tokens = json.dumps({"token_ids": list(range(5, 5 + 32))})
        assert warm(service, "--public", "-", text=tokens).output.startswith("WARM, 32 tokens")
        own = warm(service, "-", text=BODY)
        assert (own.exit_code, own.output[:12]) == (0, "ALREADY_WARM"), "one's own goes on behind the public one"


def test_where_no_worker_is_there_it_says_so_and_the_first_that_comes_is_given_it(
    open_tiny: Open, service: ServiceThread
) -> None:
    late = warm(service, "--public", "-", "--wait", "0.2", text=BODY)
    assert late.exit_code == 1
    assert "none is there" in late.output
    with attached(open_tiny(), service) as kv:
        assert warm(service, "--public", "-", text=BODY).exit_code == 0
        assert cached(kv, "ann")


@pytest.mark.parametrize(
    ("arguments", "text", "status", "says"),
    [
        (["--public"], "", 2, "give a FILE"),
        (["--public", "--group", "law", "-"], BODY, 2, "choose one"),
        (["--public", "-"], "no JSON", 1, "FILE is no JSON"),
        (["--public", "-"], "[" * 100_000, 1, "FILE is no JSON"),
        (["--public", "-"], "5", 1, "a JSON object"),
        (["--public", "-"], "{}", 1, "FILE has neither"),
        (["--public", "/nowhere/at-all.json"], "", 2, "No such file"),
        (["--hold", "-1", "-"], BODY, 2, "--hold"),
    ],
)
def test_what_cannot_be_is_one_line(
    service: ServiceThread, arguments: list[str], text: str, status: int, says: str
) -> None:
    done = warm(service, *arguments, text=text)
    assert (done.exit_code, says in done.output) == (status, True), done.output
