"""What a worker says of its model, checked, and what follows from it: the namespace's id and the worker's secret.

Promises: pure, but for `service_secret`. Raises InvalidRequest, saying what to do.
"""

import json
import os
import secrets
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from kvprefetch.cache.keys import model_secret
from kvprefetch.errors import InvalidRequest, SettingsError
from kvprefetch.settings import Settings, state_dir
from kvprefetch.tiers.slots import Owner
from kvprefetch.v1.workers_pb2 import Register

INSTANCE_BYTES = 16
_MOST_FINGERPRINT = 64 * 2**10
_MOST_NAME = 512
_MOST_BLOCK = 2**30


@dataclass(frozen=True, slots=True)
class Model:
    """One model's namespace: equal ones share blocks, no others."""

    name: str
    fingerprint: str  # canonical JSON
    block_bytes: int
    block_tokens: int

    @property
    def namespace(self) -> str:
        """16 hex digits."""
        return sha256(f"{self.fingerprint}\n{self.block_bytes}".encode()).hexdigest()[:16]

    def secret(self, service: bytes) -> bytes:
        """The 32 bytes from which workers derive the roots of this model's keys."""
        return model_secret(service, self.fingerprint)


def model_of(register: Register) -> Model:
    """The model that a worker registers for."""
    if not register.model or len(register.model.encode()) > _MOST_NAME:
        raise InvalidRequest(f"model: a name of 1 to {_MOST_NAME} bytes")
    if not 1 <= register.block_bytes <= _MOST_BLOCK:
        raise InvalidRequest(f"block_bytes: {register.block_bytes}; a block has 1 byte to 1 GiB")
    if not 1 <= register.block_tokens <= 2**20:
        raise InvalidRequest(f"block_tokens: {register.block_tokens}; a block has 1 to {2**20} tokens")
    return Model(register.model, _canonical(register.fingerprint), register.block_bytes, register.block_tokens)


def owner_of(register: Register) -> Owner:
    """The process that registers."""
    if len(register.instance) != INSTANCE_BYTES:
        raise InvalidRequest(f"instance: {len(register.instance)} bytes; draw {INSTANCE_BYTES} random ones at start")
    if not 0 < register.pid < 2**31 or not 0 < register.started < 2**63:
        raise InvalidRequest("pid, started: of the worker's process, as /proc/PID/stat has them (field 22)")
    return Owner(register.instance, register.pid, register.started)


def service_secret(settings: Settings) -> bytes:
    """The settings' secret, or the one that is kept in the state folder; drawn and put there if there is none.

    Raises SettingsError where it cannot be kept, or others may read it.
    """
    if settings.secret:
        return settings.secret.encode()
    path = Path(settings.service.state_dir or state_dir()) / "secret"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _draw(path)
        if path.stat().st_mode & 0o077:
            raise SettingsError(f"{path} is open to others: chmod 600 it, or delete it to have a new one drawn")
        secret = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"secret: cannot keep one at {path} ({error.strerror}): set service.state_dir") from error
    if len(secret) < 32:
        raise SettingsError(f"{path} holds no secret: delete it to have a new one drawn")
    return secret


def _draw(path: Path) -> None:
    """Whole or not at all, and never over one that is there."""
    if path.exists():
        return
    draft = path.with_name(f".secret.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_hex(32).encode())
        file.flush()
        os.fsync(descriptor)
    try:
        os.link(draft, path)  # refuses where another service was first
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _canonical(fingerprint: str) -> str:
    if len(fingerprint.encode()) > _MOST_FINGERPRINT:
        raise InvalidRequest(f"fingerprint: more than {_MOST_FINGERPRINT} bytes")
    try:
        body = json.loads(fingerprint)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"fingerprint: no JSON ({error})") from error
    if not isinstance(body, dict) or not body:
        raise InvalidRequest("fingerprint: a JSON object of everything that changes the bytes of a page")
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
