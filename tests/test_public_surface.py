"""What users may rely on: names, lightness, exit codes, the settings' defaults."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

import kvprefetch
from kvprefetch.cli.main import commands

PUBLIC = {
    "AccountingError",
    "ArenaRefused",
    "Closed",
    "Connection",
    "Context",
    "InvalidRequest",
    "KVPrefetchError",
    "LimitExceeded",
    "Local",
    "MissReason",
    "ModelError",
    "Outcome",
    "PermissionDenied",
    "PoolError",
    "PoolFull",
    "PoolTooSmall",
    "Result",
    "Sampling",
    "ServiceError",
    "ServiceUnavailable",
    "Settings",
    "SettingsError",
    "TierError",
    "TierUnavailable",
    "Unauthenticated",
    "UnknownContext",
    "UnknownModel",
    "UnsupportedModel",
    "Use",
    "WorkerFailed",
    "connect",
    "load_settings",
    "local",
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_exports_are_pinned() -> None:
    assert set(kvprefetch.__all__) == PUBLIC
    assert all(hasattr(kvprefetch, name) for name in PUBLIC)


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "numpy", "triton", "httpx", "rich", "matplotlib", "grpc"]
    done = run(f"import sys, kvprefetch; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done


def test_connecting_loads_no_torch() -> None:
    done = run(
        "import sys, kvprefetch\nkvprefetch.connect('unix:///nobody/there.sock').close()\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'redis') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done


def test_the_command_line_loads_no_torch_for_its_help() -> None:
    done = run(
        "import sys\nfrom click.testing import CliRunner\nfrom kvprefetch.cli.main import commands\n"
        "print(CliRunner().invoke(commands, ['demo', '--help']).exit_code, 'torch' in sys.modules)"
    )
    assert done.stdout.strip() == "0 False", done


def test_every_public_error_is_in_the_one_tree() -> None:
    errors = [value for value in vars(kvprefetch).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert errors
    assert all(issubclass(error, kvprefetch.KVPrefetchError) for error in errors)


@pytest.mark.parametrize(("arguments", "code"), [(["demo", "--help"], 0), (["demo", "--no-such"], 2), (["nothing"], 2)])
def test_wrong_usage_exits_with_2(arguments: list[str], code: int) -> None:
    assert CliRunner().invoke(commands, arguments).exit_code == code


def test_an_unknown_model_is_one_line_and_exit_1(tmp_path: object) -> None:
    missing = f"{tmp_path}/no-model"
    command = [sys.executable, "-c", "from kvprefetch.cli.main import main; main()", "demo", "--model", missing]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=str(tmp_path))
    assert done.returncode == 1
    assert missing in done.stderr
    assert "Traceback" not in done.stderr
