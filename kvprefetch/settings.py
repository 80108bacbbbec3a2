"""The one settings file (TOML) and the one place where the environment is read.

Every value has a default; an unknown key is an error. `KVPREFETCH_SETTINGS` names a file,
`KVPREFETCH_CACHE` the folder for downloads.
"""

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import cattrs
import cattrs.errors
from cattrs.v import format_exception

from kvprefetch.errors import SettingsError


@dataclass(frozen=True)
class PoolSettings:
    """The paged pool. `size`: bytes ("2GiB") or a share of free device memory ("25%")."""

    size: str = "25%"
    block_tokens: int = 32
    evicted_memory: int = 65_536  # evicted keys remembered, to name the reason of a miss


@dataclass(frozen=True)
class EngineSettings:
    """The transformers engine. `dtype`: "auto" takes the model's own; `device`: "auto" takes CUDA if any."""

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"  # flash-attn | torch-varlen | sdpa | auto: the first of these that runs here
    chunk_tokens: int = 256  # prefill chunks end at absolute multiples of this (law 1)
    max_rows: int = 64  # live sequences packed into one forward
    record_steps: bool = True  # on CUDA: replay short forwards from CUDA graphs, recorded while loading


@dataclass(frozen=True)
class SpeculationSettings:
    """Speculation uses idle time alone (law 2). Times in seconds."""

    enabled: bool = True
    step_s: float = 0.02  # estimated work of a step that cannot be abandoned (on CUDA)
    hold_s: float = 300.0  # how long an unused preload keeps its place
    signal_probability: float = 0.5  # prior of a context that a signal names
    per_useful: float = 3.0  # tokens computed ahead per useful one, at most, for each kind of evidence
    budget_tokens: float = 400_000.0  # that a kind of evidence may waste before it has a record
    state_file: str = ""  # what was learnt is kept here from run to run; it names contexts, so keep it private
    max_pending: int = 1_024  # hints waiting; more are REJECTED
    max_open: int = 16_384  # hints waiting or on hold; more are REJECTED
    max_named: int = 1_024  # named contexts remembered


@dataclass(frozen=True)
class Settings:
    """All settings of a worker. `secret` keys the block roots; empty draws one per process."""

    pool: PoolSettings = field(default_factory=PoolSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    speculation: SpeculationSettings = field(default_factory=SpeculationSettings)
    tenant: str = "default"
    secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        block, chunk = self.pool.block_tokens, self.engine.chunk_tokens
        if block < 1 or chunk < block or chunk % block:
            raise SettingsError(
                f"engine.chunk_tokens ({chunk}) must be a positive multiple of pool.block_tokens ({block})"
            )
        if self.engine.max_rows < 1:
            raise SettingsError("engine.max_rows must be at least 1")


def load_settings(path: str | Path | None = None) -> Settings:
    """Read `path`, or the file that KVPREFETCH_SETTINGS names, or take the defaults.

    Raises SettingsError for a missing file, broken TOML, an unknown key or a value of the wrong type.
    """
    chosen = path or os.environ.get("KVPREFETCH_SETTINGS")
    if not chosen:
        return Settings()
    try:
        table = tomllib.loads(Path(chosen).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{chosen}: {error}") from error
    return settings_from(table, str(chosen))


def settings_from(table: dict[str, object], source: str = "settings") -> Settings:
    """Build Settings from a nested table; `source` is named in errors."""
    try:
        return _strict_converter().structure(table, Settings)
    except cattrs.errors.ClassValidationError as error:
        lines = "; ".join(cattrs.transform_error(error, path=source, format_exception=_in_words))
        raise SettingsError(lines) from error


def cache_dir() -> Path:
    """Where downloads are kept: $KVPREFETCH_CACHE, else ~/.cache/kvprefetch."""
    return Path(os.environ.get("KVPREFETCH_CACHE") or Path.home() / ".cache" / "kvprefetch")


def _strict_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=True)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _exactly)
    return converter


def _in_words(error: BaseException, kind: type | None) -> str:
    """Our own errors already say it."""
    return str(error) if isinstance(error, SettingsError) else format_exception(error, kind)


def _exactly(value: object, kind: type) -> object:
    """No silent coercion: "512" is not a number; 1 is a float, but True is not an int."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value
