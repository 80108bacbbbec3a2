"""The one settings file (TOML) and the one place where the environment is read.

Every value has a default; an unknown key is an error. `KVPREFETCH_SETTINGS` names a file, `KVPREFETCH_CACHE` the
folder for downloads, `KVPREFETCH_TOKEN` the bearer token of a client or worker; `XDG_RUNTIME_DIR` and
`XDG_STATE_HOME` say where sockets and state go by default.
"""

import os
import re
import tempfile
import tomllib
from collections import Counter
from dataclasses import dataclass, field, fields
from math import isfinite
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
class ServiceSettings:
    """The cache service of a node: where it listens, what it allows. Times in seconds."""

    listen: tuple[str, ...] = ()  # "unix:///path" and "host:port"; empty: a socket in the user's runtime folder
    insecure_local: bool = False  # let a loopback port do without credentials
    tls_certificate: str = ""  # PEM files; with a client CA, clients must show a certificate of it
    tls_key: str = ""
    tls_client_ca: str = ""
    state_dir: str = ""  # the secret, if none is set; empty: in the user's state folder
    drain_s: float = 30.0  # what is in flight may take so long after SIGTERM
    max_message_bytes: int = 16 * 2**20
    max_blocks: int = 16_384  # keys in one call
    max_contexts: int = 1_024  # named contexts remembered for each tenant
    max_context_bytes: int = 256 * 2**20  # of those of one tenant together, and once more of its open hints' contexts
    max_hints: int = 1_024  # hints open for each tenant
    signals_per_s: float = 200.0  # of each tenant, averaged over 10 s
    confidence: float = 0.5  # that a session goes to one worker; below it, preloads go to the host arena


@dataclass(frozen=True)
class ArenaSettings:
    """The host arena: one shared-memory file for each model's namespace."""

    dir: str = ""  # empty: a folder of the user's in /dev/shm
    size: str = "1GiB"  # of each namespace's file
    prefault: bool = True  # touch every page at start, so that no first request pays for it
    huge_pages: bool = True  # where the system allows it
    lock: bool = False  # keep it out of swap (mlock), where the system allows it
    checksums: bool = True  # verify every block that is read


@dataclass(frozen=True)
class DiskSettings:
    """The disk tier: one file for each model's namespace. Off without a `dir`."""

    dir: str = ""
    size: str = "10GiB"  # of each namespace's file


@dataclass(frozen=True)
class RedisSettings:
    """The tier that nodes share: a Redis or Valkey, single or Cluster. Off without a `url`."""

    url: str = field(
        default="", repr=False
    )  # redis://, rediss://user:password@host:port/0, or redis+cluster://, rediss+cluster://
    ca: str = ""  # PEM file that signs the server's certificate, for rediss
    ttl_s: float = 3_600.0
    prefix: str = "kvprefetch"
    size: str = ""  # of each namespace's blocks in it, of all nodes; empty: as many as it keeps, by its own policy
    timeout_s: float = 0.05  # of one operation
    store_blocks: bool = True  # false: only the directory of who has what
    advertise: str = ""  # "host:port" at which other nodes can read from this one's service
    peer_token: str = field(default="", repr=False)  # a worker's, with which this node reads from others' services
    peer_ca: str = ""  # PEM file that signs the certificates of others' services; empty: they are reached without TLS


@dataclass(frozen=True)
class HttpSettings:
    """A worker's HTTP endpoint."""

    host: str = "127.0.0.1"
    port: int = 8_000
    max_body_bytes: int = 64 * 2**20


@dataclass(frozen=True)
class UpstreamSettings:
    """An engine behind the gateway."""

    url: str  # "http://host:port", with or without /v1
    api_key: str = field(default="", repr=False)  # sent instead of the caller's; empty: the caller's is passed on
    kv_events: str = ""  # where vLLM publishes its KV events: "tcp://host:port"
    lmcache: str = ""  # URL of the HTTP server of LMCache: its lower tiers are warmed first
    capacity_tokens: int = 0  # of its prefix cache; 0: asked of the engine, or learnt


@dataclass(frozen=True)
class GatewaySettings:
    """The gateway before engines. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8_080
    upstreams: tuple[UpstreamSettings, ...] = ()
    service: str = "embedded"  # or the address of a cache service, whose workers take the hints
    max_body_bytes: int = 64 * 2**20
    connect_s: float = 5.0  # to reach an upstream
    silence_s: float = 600.0  # an upstream may be silent so long in the midst of a request
    patience_s: float = 60.0  # a prewarm request waits so long for its outcome
    max_sessions: int = 10_000  # whose next request is prepared
    max_context_bytes: int = 512 * 2**20  # of all that is remembered to prepare them
    salt: bool = True  # a part of the engine's cache for each tenant, where there are credentials and the engine can
    beside_live: int = 0  # a piece is warmed only while at most so many requests are being answered
    drain_s: float = 30.0  # what is in flight may take so long after SIGTERM


@dataclass(frozen=True)
class Credential:
    """Who may come in, as what: by the SHA-256 of a bearer token, or by the name in a client certificate."""

    name: str  # of the tenant, worker or operator
    role: str = "tenant"  # tenant | worker | operator
    token_sha256: str = field(default="", repr=False)  # hex: `printf %s TOKEN | sha256sum`
    certificate: str = ""  # a DNS name or the common name of a certificate signed by service.tls_client_ca

    def __post_init__(self) -> None:
        if self.role not in ("tenant", "worker", "operator"):
            raise SettingsError(f"credentials: the role of {self.name!r} must be tenant, worker or operator")
        if not self.name or len(self.name.encode()) > 63:
            raise SettingsError("credentials: a name has 1 to 63 bytes")
        if not (self.token_sha256 or self.certificate):
            raise SettingsError(f"credentials: {self.name!r} needs a token_sha256 or a certificate")
        if self.token_sha256 and not re.fullmatch("[0-9a-f]{64}", self.token_sha256):
            raise SettingsError(f"credentials: token_sha256 of {self.name!r} must be 64 hex digits")


@dataclass(frozen=True)
class FairnessSettings:
    """How tenants share pools and the engine. Times in seconds."""

    guarantee: float = 0.1  # of an equal part of what is left, for each tenant with a credential that names none
    claim_s: float = 600.0  # what nobody has used for so long is nobody's claim: beyond guarantees it goes first
    lower_claim_s: float = 3_600.0  # the same in the tiers below the device's pool
    credit_s: float = 30.0  # of the engine, that a tenant who comes from idleness may have before others

    def __post_init__(self) -> None:
        if not 0 <= self.guarantee <= 1:
            raise SettingsError(f"fairness.guarantee ({self.guarantee}) is a fraction from 0 to 1")


@dataclass(frozen=True)
class TenantSettings:
    """What one tenant may count on, where it is not the default."""

    name: str
    weight: float = 1.0  # in what nobody is guaranteed, in idle time, and in the order of live requests
    guarantee: float = 0.0  # fraction of every pool

    def __post_init__(self) -> None:
        if not self.name or len(self.name.encode()) > 63:
            raise SettingsError("tenants: a name has 1 to 63 bytes")
        if not (isfinite(self.weight) and self.weight > 0):
            raise SettingsError(f"tenants: the weight of {self.name!r} must be a finite number above 0")
        if not 0 <= self.guarantee <= 1:
            raise SettingsError(f"tenants: the guarantee of {self.name!r} is a fraction from 0 to 1")


@dataclass(frozen=True)
class GroupSettings:
    """Tenants that share the blocks of what they ask under the group's name. Each can see how fast the others' are."""

    name: str
    tenants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or len(self.name.encode()) > 63:
            raise SettingsError("groups: a name has 1 to 63 bytes")


@dataclass(frozen=True)
class Settings:
    """All settings of a service or worker. `secret` keys the block roots.

    Empty, a service draws one and keeps it in its state folder; a worker without a service draws one per process.
    """

    pool: PoolSettings = field(default_factory=PoolSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    speculation: SpeculationSettings = field(default_factory=SpeculationSettings)
    service: ServiceSettings = field(default_factory=ServiceSettings)
    arena: ArenaSettings = field(default_factory=ArenaSettings)
    disk: DiskSettings = field(default_factory=DiskSettings)
    redis: RedisSettings = field(default_factory=RedisSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    credentials: tuple[Credential, ...] = ()
    fairness: FairnessSettings = field(default_factory=FairnessSettings)
    tenants: tuple[TenantSettings, ...] = ()
    groups: tuple[GroupSettings, ...] = ()
    tenant: str = "default"
    secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        block, chunk = self.pool.block_tokens, self.engine.chunk_tokens
        if block < 1 or chunk < block or chunk % block:
            raise SettingsError(
                f"engine.chunk_tokens ({chunk}) must be a positive multiple of pool.block_tokens ({block})"
            )
        if not self.tenant:
            raise SettingsError("tenant: it has a name; without one it would be the operator")
        if self.engine.max_rows < 1:
            raise SettingsError("engine.max_rows must be at least 1")
        for key, named in (("tenants", self.tenants), ("groups", self.groups)):
            names = Counter(each.name for each in named)
            twice = next((name for name, times in names.items() if times > 1), None)
            if twice is not None:
                raise SettingsError(f"{key}: {twice!r} is there twice")
        guaranteed = sum(tenant.guarantee for tenant in self.tenants)
        if guaranteed > 1 + 1e-9:
            raise SettingsError(f"tenants: guarantees add up to {guaranteed:.1%} of a pool; lower some")


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


def runtime_dir() -> Path:
    """The user's folder for sockets; it may not exist yet."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "kvprefetch" if base else Path(tempfile.gettempdir()) / f"kvprefetch-{os.getuid()}"


def state_dir() -> Path:
    """The user's folder for what is kept from run to run; it may not exist yet."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kvprefetch"


def shared_memory_dir() -> Path:
    """The user's folder for arenas; it may not exist yet."""
    base = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    return base / f"kvprefetch-{os.getuid()}"


def client_token() -> str:
    """The bearer token that the environment gives; "" for none."""
    return os.environ.get("KVPREFETCH_TOKEN", "")


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str, key: str) -> int:
    """The bytes that "512MiB", "2GiB" or a plain number mean. Raises SettingsError naming `key`."""
    exact = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])i?B?|B)?", text.strip(), re.IGNORECASE)
    if exact is None:
        raise SettingsError(f"{key} {text!r}: write bytes such as 512MiB or 2GiB")
    return int(float(exact[1]) * _UNITS[(exact[2] or "").upper()])


def _strict_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=True)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _exactly)
    return converter


def _in_words(error: BaseException, kind: type | None) -> str:
    """Our own errors already say it."""
    if isinstance(error, cattrs.errors.ForbiddenExtraKeysError):
        known = ", ".join(sorted(each.name for each in fields(error.cl)))
        return f"unknown key {', '.join(sorted(error.extra_fields))}; there are {known}"
    return str(error) if isinstance(error, SettingsError) else format_exception(error, kind)


def _exactly(value: object, kind: type) -> object:
    """No silent coercion: "512" is not a number; 1 is a float, but True is not an int."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r}")
    return value
