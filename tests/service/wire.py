"""What workers and tests of the service agree on: tiny blocks, and keys of paths of letters. Imports nothing heavy."""

from hashlib import sha256

BLOCK = 4_096
FINGERPRINT = '{"block_tokens":16,"weights":"none"}'
TAKEN = 0xFFFFFFFF


def chain(path: str) -> list[bytes]:
    """Keys of a sequence, one for each letter: each key is of all letters so far."""
    return [sha256(path[: end + 1].encode()).digest() for end in range(len(path))]


def packed(path: str) -> bytes:
    """The same keys, as they go over the wire."""
    return b"".join(chain(path))


def content(key: bytes) -> bytes:
    """The bytes of the block under `key`."""
    return key * (BLOCK // 32)
