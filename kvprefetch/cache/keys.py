"""Block keys: a SHA-256 chain over a sequence's tokens, hung from a keyed root (law 4).

Encoding, version 2 (fixed: a change of it raises KEY_VERSION, and with it every root):

    root  = HMAC-SHA256(secret, canonical JSON of {version, namespace, fingerprint})
    key_0 = SHA-256(root  ‖ tokens of block 0 as little-endian uint32)
    key_i = SHA-256(key_{i-1} ‖ tokens of block i as little-endian uint32)

A caller cannot choose a root, so nobody can name a block of another namespace, and two models that
differ in anything that changes the bytes of a page never share one.
"""

import hmac
import json
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from hashlib import sha256

from kvprefetch.errors import InvalidRequest

KEY_VERSION = 2
BlockKey = bytes
_UINT32 = "I" if array("I").itemsize == 4 else "L"


class Scope(Enum):
    """Who may share the blocks under a root."""

    PRIVATE = "private"  # one tenant
    GROUP = "group"  # tenants that the operator lists
    PUBLIC = "public"  # filled by the operator


@dataclass(frozen=True)
class Namespace:
    """A scope and the name of its owner: a tenant, a group, or the empty string for public."""

    scope: Scope
    name: str


@dataclass(frozen=True)
class Fingerprint:
    """Everything that changes the bytes of a page. Equal fingerprints may share blocks; no others."""

    weights: str  # hex SHA-256 of all parameters and buffers
    config: str  # hex SHA-256 of the architecture's settings
    dtype: str
    rope: str
    quantisation: str
    adapter: str
    block_tokens: int
    layout: str  # name and version of the page layout
    numerics: str = ""  # what else the last bits depend on: device, attention backend, chunk grid
    tp_rank: int = 0


def canonical(fingerprint: Fingerprint) -> str:
    """The fingerprint as JSON, the same text for the same model on every machine."""
    return json.dumps(asdict(fingerprint), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def model_secret(secret: bytes, fingerprint: str) -> bytes:
    """The 32 bytes from which one model's roots are derived; a service gives them to its workers, not its own secret.

    `fingerprint` is canonical JSON.
    """
    return hmac.digest(secret, f"kvprefetch worker secret/1 {fingerprint}".encode(), "sha256")


def root_key(secret: bytes, namespace: Namespace, fingerprint: Fingerprint) -> BlockKey:
    """The 32-byte root of `namespace` for exactly this model."""
    body = {
        "version": KEY_VERSION,
        "namespace": [namespace.scope.value, namespace.name],
        "fingerprint": asdict(fingerprint),
    }
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hmac.digest(secret, text.encode(), "sha256")


def block_keys(root: BlockKey, tokens: Sequence[int], block_tokens: int) -> list[BlockKey]:
    """Keys of all full blocks of `tokens`, in order; a partial last block has none."""
    return extend_keys([], root, tokens, block_tokens)


def extend_keys(keys: list[BlockKey], root: BlockKey, tokens: Sequence[int], block_tokens: int) -> list[BlockKey]:
    """Append to `keys` (mutated and returned) the keys of the full blocks of `tokens` it lacks.

    `keys` must be the chain of the first `len(keys)` blocks of `tokens`. Raises InvalidRequest for a
    token id outside 0…2³²−1.
    """
    done, full = len(keys) * block_tokens, len(tokens) // block_tokens * block_tokens
    data = _encode(tokens[done:full])
    key = keys[-1] if keys else root
    step = 4 * block_tokens
    for at in range(0, len(data), step):
        key = next_key(key, data[at : at + step])
        keys.append(key)
    return keys


def next_key(key: BlockKey, data: bytes) -> BlockKey:
    """The key of the block with this data (see `spans_of`) behind the one of `key`, or first below the root `key`."""
    return sha256(key + data).digest()


def spans_of(tokens: Sequence[int], block_tokens: int) -> Iterator[bytes]:
    """What is hashed for each full block, one after the other. Raises InvalidRequest as `extend_keys`."""
    for at in range(0, len(tokens) // block_tokens * block_tokens, block_tokens):
        yield _encode(tokens[at : at + block_tokens])


def _encode(tokens: Sequence[int]) -> bytes:
    try:
        words = array(_UINT32, tokens)
    except (OverflowError, TypeError) as error:
        raise InvalidRequest(f"token ids must be whole numbers from 0 to 2**32-1: {error}") from error
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
