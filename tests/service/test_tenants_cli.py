"""`kvprefetch tenants`: what it prints, what it refuses, and how it ends."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from services import Service, credential, running, small, with_credentials

from kvprefetch.cli.main import commands
from kvprefetch.settings import TenantSettings

KNOWN = (
    credential("ann", "tenant", "ann's"),
    credential("w1", "worker", "w1's"),
    credential("olga", "operator", "o's"),
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    settings = with_credentials(small(tmp_path), *KNOWN)
    with running(replace(settings, tenants=(TenantSettings("ann", 2.0, 0.25),))) as it:
        yield it


def told(service: Service, *arguments: str) -> Result:
    environment = {"KVPREFETCH_TOKEN": "o's"}
    return CliRunner().invoke(commands, ["tenants", *arguments, "--service", service.address], env=environment)


def rows(result: Result) -> dict[str, list[str]]:
    """The table's lines by the tenant's name."""
    assert result.exit_code == 0, result.output
    head, *lines = result.output.splitlines()
    assert head.split()[:3] == ["tenant", "weight", "guarantee"]
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_it_lists_and_changes_and_resets(service: Service) -> None:
    assert rows(told(service)) == {
        "ann": ["2", "25.0%", "0.0%", "0.0", "0.0", "0.0", "no"],
        "default": ["1", "0.0%", "0.0%", "0.0", "0.0", "0.0", "no"],
    }
    assert rows(told(service, "set", "ann", "--guarantee", "40%"))["ann"][:2] == ["2", "40.0%"]
    assert rows(told(service, "set", "ann", "--guarantee", "0.5", "--weight", "3.5"))["ann"][:2] == ["3.5", "50.0%"]
    assert list(rows(told(service, "set", "größe/ü", "--weight", "3"))) == ["größe/ü"]
    assert [line[-1] for line in rows(told(service)).values()] == ["yes", "no", "yes"]
    assert rows(told(service, "reset", "ann", "größe/ü", "ann"))["ann"][:2] == ["2", "25.0%"]
    assert list(rows(told(service))) == ["ann", "default"]


def test_as_json_it_is_one_object(service: Service) -> None:
    found = json.loads(told(service, "--json").output)["tenants"]
    assert [each["name"] for each in found] == ["ann", "default"]
    assert found[0] == {
        "name": "ann",
        "weight": 2.0,
        "guarantee": 0.25,
        "changed": False,
        "host_bytes": 0,
        "disk_bytes": 0,
        "redis_bytes": 0,
        "host_part": 0.0,
    }


def test_options_may_stand_before_the_command_or_behind_it(service: Service) -> None:
    way = ["--service", service.address, "--token", "o's", "--json"]
    for arguments in (
        [*way, "set", "ann", "--weight", "3"],
        ["set", "ann", "--weight", "3", *way],
        ["--token", "wrong", "--json", "reset", "ann", *way[:4]],
    ):
        result = CliRunner().invoke(commands, ["tenants", *arguments])
        assert [each["name"] for each in json.loads(result.output)["tenants"]] == ["ann"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["set", "ann"],
        ["set", "--weight", "1"],
        ["set", "ann", "--weight", "much"],
        ["set", "ann", "--guarantee", "much"],
        ["set", "ann", "--guarantee", "110%"],
        ["set", "ann", "--guarantee", "-0.1"],
        ["set", "ann", "--guarantee", "nan"],
        ["set", "ann", "--guarantee", "%"],
        ["reset"],
        ["forget", "ann"],
        ["--no-such"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(commands, ["tenants", *arguments]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "token", "says"),
    [
        (["set", "bob", "--guarantee", "80%"], "o's", "guarantees add up to 105.0% of a pool: lower some"),
        (["set", "bob", "--weight", "0"], "o's", "a weight is a finite number above 0"),
        (["set", b"b\xff", "--weight", "1"], "o's", "a tenant's name is UTF-8"),
        (["reset", ""], "o's", "a tenant's name is"),
        ([], "ann's", "Admin/Tenants is for a operator"),
    ],
)
def test_what_is_refused_is_one_line_and_exits_with_1(
    service: Service, arguments: list[str | bytes], token: str, says: str
) -> None:
    code = "from kvprefetch.cli.main import main; main()"
    command = [sys.executable, "-c", code, "tenants", *arguments, "--service", service.address]
    environment = {**os.environ, "KVPREFETCH_TOKEN": token}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith("kvprefetch: ")
    assert says in line
    assert list(rows(told(service))) == ["ann", "default"]


@pytest.mark.parametrize("arguments", [[], ["set"], ["reset"]])
def test_help_says_units_and_defaults_and_needs_no_grpc(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom kvprefetch.cli.main import commands\n"
        f"print(CliRunner().invoke(commands, ['tenants', *{arguments}, '--help']).output)\n"
        "print([m for m in ('torch', 'grpc', 'redis') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done
    words = " ".join(done.stdout.split())
    assert "[default: $KVPREFETCH_TOKEN]" in words
    if arguments == ["set"]:
        assert "25% or 0.25. [default: as it is]" in words
