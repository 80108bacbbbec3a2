"""Slot headers: what was written is read, and nothing else ever is."""

from dataclasses import replace
from hashlib import sha256

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvprefetch.tiers.scan import scan
from kvprefetch.tiers.slots import (
    HEADER_BYTES,
    Owner,
    SlotHeader,
    SlotState,
    decode,
    encode,
    sealed_checksum,
    who_may_write,
)

KEY = sha256(b"key").digest()
SEALED = SlotHeader(SlotState.SEALED, KEY, sha256(b"parent").digest(), "ann", 7, 2**64 - 1, 4096)

u64 = st.integers(0, 2**64 - 1)
hashes = st.binary(min_size=32, max_size=32)
headers = st.builds(
    SlotHeader,
    st.sampled_from(SlotState),
    hashes,
    st.one_of(st.just(b""), hashes),
    st.text(max_size=16),
    st.integers(0, 2**63 - 1),
    u64,
    u64,
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**32 - 1),
    u64,
    st.floats(allow_nan=False),
)


@given(headers)
def test_what_is_encoded_is_decoded(header: SlotHeader) -> None:
    assert decode(encode(header)) == header


def test_a_header_is_256_bytes_in_an_order_that_stays() -> None:
    """Another order needs another version of the layout."""
    owner = {"instance": b"i" * 16, "pid": 77, "started": 2**40, "speculative_until_unix": 1.5}
    raw = encode(replace(SEALED, **owner))
    assert len(raw) == HEADER_BYTES
    assert sha256(raw).hexdigest()[:16] == "98b4c0bfecf17c5e"


@given(headers, st.booleans(), st.booleans(), st.integers(0, 8 * HEADER_BYTES))
def test_readers_are_told_what_the_header_says(header: SlotHeader, ours: bool, fits: bool, flip: int) -> None:
    raw = bytearray(encode(header))
    if flip < 8 * HEADER_BYTES:
        raw[flip // 8] ^= 1 << flip % 8
    key, length = (header.key if ours else KEY), (header.length if fits else 4096)
    found = decode(bytes(raw))
    is_it = found is not None and (found.state, found.key, found.length) == (SlotState.SEALED, key, length)
    assert sealed_checksum(bytes(raw), key, length) == (header.checksum if is_it else None)


def test_a_slot_that_was_never_used_is_free() -> None:
    assert decode(bytes(HEADER_BYTES)) == SlotHeader(SlotState.FREE)


def test_every_flipped_bit_is_noticed() -> None:
    raw = encode(SEALED)
    for at in range(8 * HEADER_BYTES):
        flipped = bytearray(raw)
        flipped[at // 8] ^= 1 << at % 8
        assert decode(bytes(flipped)) is None, f"bit {at}"


@given(st.binary(max_size=HEADER_BYTES + 8))
def test_any_bytes_can_be_looked_at(raw: bytes) -> None:
    decode(raw)
    padded = raw.ljust(HEADER_BYTES, b"\0")[:HEADER_BYTES]
    decode(padded)
    who_may_write(padded)


def test_a_name_that_is_no_text_is_damage() -> None:
    raw = bytearray(encode(SEALED))
    raw[136] = 0xFF
    assert decode(with_own_checksum(raw)) is None


def with_own_checksum(raw: bytearray) -> bytes:
    from kvprefetch.tiers.checksum import checksum

    return bytes(raw[:248]) + checksum(bytes(raw[:248])).to_bytes(8, "little")


def test_a_damaged_header_still_tells_who_may_be_writing() -> None:
    raw = bytearray(encode(replace(SEALED, state=SlotState.RESERVED, instance=b"i" * 16, pid=77, started=5)))
    raw[40] ^= 1
    assert decode(bytes(raw)) is None
    assert who_may_write(bytes(raw)) == Owner(b"i" * 16, 77, 5)
    assert who_may_write(encode(SEALED)) is None


@pytest.mark.parametrize(
    "wrong", [{"key": b"k" * 31}, {"parent": b"p" * 31}, {"tenant": "t" * 65}, {"instance": b"i" * 17}]
)
def test_what_does_not_fit_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="keys have 32 bytes"):
        encode(replace(SEALED, **wrong))  # type: ignore[arg-type]


# -- a table of them -------------------------------------------------------------------------------------
def test_a_table_is_sorted_out() -> None:
    other = replace(SEALED, key=sha256(b"other").digest(), sequence=3)
    reserved = SlotHeader(SlotState.RESERVED, KEY, sequence=20, pid=1)
    torn = encode(SEALED)[:128] + encode(other)[128:]
    short = replace(SEALED, key=sha256(b"short").digest(), length=100)
    free = SlotHeader(SlotState.FREE, sequence=30)
    raws = [encode(SEALED), bytes(256), torn, encode(reserved), encode(other), encode(short), encode(free)]
    found = scan(raws, 4096)
    assert list(found.sealed.items()) == [(4, other), (0, SEALED)], "the oldest first"
    assert found.reserved == {3: reserved}
    assert set(found.damaged) == {2, 5}
    assert found.sequence == 30


@pytest.mark.parametrize("order", [[1, 2, 3], [3, 2, 1], [2, 3, 1]])
def test_of_blocks_with_one_key_the_newest_is_kept(order: list[int]) -> None:
    found = scan([encode(replace(SEALED, sequence=sequence)) for sequence in order], 4096)
    assert [header.sequence for header in found.sealed.values()] == [3]
    assert sorted([*found.sealed, *found.twins]) == [0, 1, 2]


@given(st.lists(st.one_of(headers.map(encode), st.binary(min_size=256, max_size=256)), max_size=8))
def test_any_table_can_be_sorted_out(raws: list[bytes]) -> None:
    found = scan(raws, 4096)
    named = [*found.sealed, *found.reserved, *found.damaged, *found.twins]
    assert len(set(named)) == len(named)
    assert len({header.key for header in found.sealed.values()}) == len(found.sealed)
