from pathlib import Path

import pytest

from kvprefetch.errors import SettingsError
from kvprefetch.settings import Settings, cache_dir, load_settings, settings_from


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVPREFETCH_SETTINGS", raising=False)
    monkeypatch.delenv("KVPREFETCH_CACHE", raising=False)


def written(folder: Path, text: str) -> Path:
    path = folder / "kvprefetch.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_everything_has_a_default() -> None:
    settings = load_settings()
    assert settings == Settings() == settings_from({})
    assert settings.pool.size == "25%"
    assert settings.pool.block_tokens == 32
    assert settings.engine.chunk_tokens == 256
    assert settings.speculation.enabled is True
    assert settings.speculation.step_s == 0.02
    assert settings.tenant == "default"
    assert settings.secret == ""


def test_a_file_sets_some_values_and_leaves_the_rest(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        tenant = "ann"
        secret = "s3cret"
        [pool]
        size = "2GiB"
        block_tokens = 16
        [engine]
        chunk_tokens = 64
        attention = "sdpa"
        [speculation]
        hold_s = 60
        """,
    )
    settings = load_settings(path)
    assert (settings.tenant, settings.secret) == ("ann", "s3cret")
    assert (settings.pool.size, settings.pool.block_tokens) == ("2GiB", 16)
    assert (settings.engine.chunk_tokens, settings.engine.attention) == (64, "sdpa")
    assert settings.speculation.hold_s == 60.0
    assert settings.engine.max_rows == Settings().engine.max_rows
    assert load_settings(str(path)) == settings


def test_the_environment_names_the_file_and_an_argument_goes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVPREFETCH_SETTINGS", str(written(tmp_path, 'tenant = "from-environment"')))
    assert load_settings().tenant == "from-environment"
    argument = tmp_path / "argument.toml"
    argument.write_text('tenant = "from-argument"', encoding="utf-8")
    assert load_settings(argument).tenant == "from-argument"


def test_an_empty_variable_names_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPREFETCH_SETTINGS", "")
    assert load_settings() == Settings()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sise = 1", r"unknown key sise; there are .*, tenants @ .*kvprefetch\.toml$"),
        ("[pool]\nblock_token = 32", r"unknown key block_token; there are block_tokens, .* @ .*\.pool$"),
        ("[speculate]\nenabled = true", "unknown key speculate;"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_it(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load_settings(written(tmp_path, text))


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"pool": {"block_tokens": "32"}}, "expected int @ settings.pool.block_tokens"),
        ({"pool": {"block_tokens": 32.0}}, "expected int @ settings.pool.block_tokens"),
        ({"pool": {"block_tokens": True}}, "expected int @ settings.pool.block_tokens"),
        ({"pool": {"size": 2}}, "expected str @ settings.pool.size"),
        ({"speculation": {"enabled": 1}}, "expected bool @ settings.speculation.enabled"),
        ({"speculation": {"step_s": "20ms"}}, "expected float @ settings.speculation.step_s"),
        ({"speculation": {"hold_s": True}}, "expected float @ settings.speculation.hold_s"),
        ({"tenant": ["ann"]}, "expected str @ settings.tenant"),
        ({"pool": 3}, "settings.pool"),
        ({"pool": "2GiB"}, "settings.pool"),
        ({"pool": [1]}, "settings.pool"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_names_its_key(table: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        settings_from(table)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as told:
        settings_from({"pool": {"size": 2}, "engine": {"devise": "cpu"}})
    assert "settings.pool.size" in str(told.value)
    assert "devise" in str(told.value)


@pytest.mark.parametrize(("block", "chunk"), [(32, 100), (32, 16), (32, 0), (0, 256), (-32, 256)])
def test_a_chunk_is_whole_blocks(block: int, chunk: int) -> None:
    """Slices end at multiples of the chunk and only full blocks are shared, so the two must meet."""
    table: dict[str, object] = {"pool": {"block_tokens": block}, "engine": {"chunk_tokens": chunk}}
    with pytest.raises(SettingsError, match=rf"^engine\.chunk_tokens \({chunk}\) must be a positive multiple"):
        settings_from(table)


def test_there_is_room_for_at_least_one_request() -> None:
    with pytest.raises(SettingsError, match=r"^engine\.max_rows must be at least 1"):
        settings_from({"engine": {"max_rows": 0}})


@pytest.mark.parametrize("content", [b"tenant = ", b"[pool", b'tenant = "\xff"'], ids=["half", "unclosed", "not UTF-8"])
def test_a_file_that_is_no_toml_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"broken\.toml: "):
        load_settings(path)


def test_a_file_that_is_missing_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml: "):
        load_settings(tmp_path / "absent.toml")
    monkeypatch.setenv("KVPREFETCH_SETTINGS", str(tmp_path / "absent.toml"))
    with pytest.raises(SettingsError, match=r"absent\.toml: "):
        load_settings()


def test_the_secret_is_never_printed() -> None:
    assert "hush" not in repr(Settings(secret="hush"))


def test_downloads_go_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == Path.home() / ".cache" / "kvprefetch"
    monkeypatch.setenv("KVPREFETCH_CACHE", "/data/models")
    assert cache_dir() == Path("/data/models")
