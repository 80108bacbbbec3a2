"""`kvprefetch serve` and `kvprefetch stats` as processes: what they print, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import Process, written

from kvprefetch.cli.config import HIDDEN, as_toml
from kvprefetch.cli.main import commands
from kvprefetch.settings import Credential, RedisSettings, ServiceSettings, Settings, settings_from

MAIN = [sys.executable, "-c", "from kvprefetch.cli.main import main; main()"]


def ran(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [*MAIN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **env})


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What it said when it failed: one line, no traceback, status 1."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvprefetch: ")
    return line


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folders."""
    for name in ("KVPREFETCH_SETTINGS", "KVPREFETCH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def test_it_starts_without_any_file_tells_its_figures_and_ends_with_0(home: Path) -> None:
    address = f"unix://{home}/run/kvprefetch/service.sock"
    with Process("serve") as service:
        assert service.says("listening") == f"listening on {address}"
        figures = json.loads(ran("stats", "--json").stdout)
        assert figures["service"]["addresses"] == [address]
        assert "client" not in figures
        lines = ran("stats", "--check", "--service", address).stdout.splitlines()
        assert f'service.addresses  ["{address}"]' in lines
        assert ran("serve").stderr.startswith("kvprefetch: another service listens on unix://")
        service.send(signal.SIGINT)
        assert service.process.wait(30) == 0
    assert "is `kvprefetch serve` running there?" in one_line(ran("stats"))
    assert (home / "state/kvprefetch/secret").stat().st_mode & 0o777 == 0o600


def test_a_killed_service_is_replaced_by_a_new_one(home: Path) -> None:
    with Process("serve") as service:
        service.says("listening")
        service.kill()
    with Process("serve") as service:
        service.says("listening")
        assert ran("stats").returncode == 0
        assert service.stop() == 0


def test_credentials_of_a_file_and_of_the_environment(home: Path) -> None:
    digest = "6f9f6e9a0a3d21f6c8f3d3a2f2d5d0a3b0e5e8d5b7a6c1d2e3f4a5b6c7d8e9f0"
    text = f'[[credentials]]\nname = "olga"\nrole = "operator"\ntoken_sha256 = "{digest}"\n'
    settings = str(written(home / "k.toml", text))
    with Process("serve", "--settings", settings, "--listen", "127.0.0.1:0") as service:
        address = service.says("listening").removeprefix("listening on ")
        assert "no credential: give a token (KVPREFETCH_TOKEN)" in one_line(ran("stats", "--service", address))
        refused = one_line(ran("stats", "--service", address, KVPREFETCH_TOKEN="hush"))
        assert "the token is in no credential" in refused
        assert "hush" not in refused
        assert service.stop() == 0
        assert not any("hush" in line for line in service.lines)


def test_any_number_of_signals_ends_it_with_0(home: Path) -> None:
    with Process("serve") as service:
        service.says("listening")
        while service.process.poll() is None:
            service.send(signal.SIGTERM)
            time.sleep(0.005)  # as a storm without a pause it would leave the process no time to end
        assert service.process.returncode == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[service]\nlissen = []", "lissen"),
        ("[service]\nlisten = 7", "service.listen"),
        ('[service]\nlisten = ["127.0.0.1:1"]', "add [[credentials]]"),
        ('[[credentials]]\nname = "ann"\nrole = "king"\ntoken_sha256 = ""', "role of 'ann' must be"),
        ('[[credentials]]\nname = "ann"', "'ann' needs a token_sha256 or a certificate"),
        ("[service", "k.toml"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(home: Path, text: str, named: str) -> None:
    assert named in one_line(ran("serve", "--settings", str(written(home / "k.toml", text))))


def test_what_cannot_be_listened_on_is_one_line(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        line = one_line(ran("serve", "--listen", address, "--insecure-local"))
        assert f"cannot listen on {address}: Address already in use" in line
    assert "--insecure-local" in one_line(ran("serve", "--listen", "127.0.0.1:0"))


@pytest.mark.parametrize("arguments", [["serve", "--no-such"], ["serve", "file"], ["stats", "--json", "file"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(commands, arguments).exit_code == 2


@pytest.mark.parametrize("command", ["serve", "stats"])
def test_help_needs_neither_grpc_nor_torch(command: str) -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom kvprefetch.cli.main import commands\n"
        f"print(CliRunner().invoke(commands, ['{command}', '--help']).output)\n"
        "print([m for m in ('torch', 'grpc', 'redis') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done
    assert "--help" in done.stdout


# -- printing the settings ---------------------------------------------------------------------------------
def test_the_printed_settings_are_those_that_would_be_used(home: Path) -> None:
    settings = str(written(home / "k.toml", '[service]\nlisten = ["127.0.0.1:1"]\ndrain_s = 3.5\n'))
    done = CliRunner().invoke(commands, ["serve", "--settings", settings, "--listen", "[::1]:2", "--print-config"])
    assert done.exit_code == 0
    printed = settings_from(tomllib.loads(done.output))
    assert (printed.service.listen, printed.service.drain_s) == (("[::1]:2",), 3.5)
    plain = CliRunner().invoke(commands, ["serve", "--print-config"])
    printed = settings_from(tomllib.loads(plain.output))
    assert printed.service.listen == (f"unix://{home}/run/kvprefetch/service.sock",)
    assert printed.service.state_dir == f"{home}/state/kvprefetch"
    assert printed.speculation == Settings().speculation


def test_settings_survive_being_printed_and_read_again() -> None:
    odd = 'a "quoted" \\ path\twith\nlines, ü and \x7f'
    settings = Settings(
        service=ServiceSettings(listen=("unix:///a", "b:1"), state_dir=odd, insecure_local=True),
        credentials=(Credential("ann", certificate=odd), Credential("w", "worker", certificate="w.example")),
        tenant=odd,
    )
    assert settings_from(tomllib.loads(as_toml(settings))) == settings


def test_secrets_are_not_printed() -> None:
    settings = Settings(
        secret="hush",
        redis=RedisSettings(url="rediss://ann:hush@h:1/0", peer_token="hush"),
        credentials=(Credential("ann", token_sha256="ab" * 32),),
    )
    text = as_toml(settings)
    assert "hush" not in text
    assert "abab" not in text
    assert f'url = "rediss://ann:{HIDDEN}@h:1/0"' in text
    assert text.count(HIDDEN) == 4
    tomllib.loads(text)
