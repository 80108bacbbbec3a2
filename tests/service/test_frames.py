import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.errors import InvalidRequest
from kvprefetch.service.frames import FRAME_BYTES, Sealed, most_blocks, pack, unpack
from kvprefetch.service.packed import TAKEN, count_keys, pack_slots, split, unpack_checksums, unpack_slots

BLOCK = 100


@given(st.lists(st.tuples(st.binary(min_size=BLOCK, max_size=BLOCK), st.integers(0, 2**64 - 1)), max_size=5))
def test_what_is_packed_comes_out_again(blocks: list[tuple[bytes, int]]) -> None:
    frame = pack([Sealed(memoryview(data), checksum) for data, checksum in blocks])
    assert [(bytes(block.data), block.checksum) for block in unpack(frame, BLOCK)] == blocks


@given(st.binary(max_size=3 * BLOCK))
def test_what_is_no_frame_is_refused_and_nothing_else_happens(raw: bytes) -> None:
    try:
        blocks = list(unpack(raw, BLOCK))
    except ValueError:
        return
    assert all(block.data.nbytes == BLOCK for block in blocks)


def test_a_frame_that_is_cut_or_too_long_is_refused() -> None:
    frame = pack([Sealed(memoryview(bytes(BLOCK)), 7)] * 2)
    for wrong in (frame[:-1], frame + b"x", frame[:3], b"", frame.replace(b"\x64\0\0\0", b"\x63\0\0\0", 1)):
        with pytest.raises(ValueError, match=r"frame|block"):
            list(unpack(wrong, BLOCK))


def test_a_frame_holds_as_many_blocks_as_fit_and_at_least_one() -> None:
    for size in (1, 4_096, 2**20, FRAME_BYTES, 2 * FRAME_BYTES):
        count = most_blocks(size)
        assert count == 1 or 4 + count * (12 + size) <= FRAME_BYTES
        assert 4 + (count + 1) * (12 + size) > FRAME_BYTES


def test_packed_fields_are_little_endian() -> None:
    assert pack_slots([1, None]) == b"\1\0\0\0\xff\xff\xff\xff"
    assert unpack_slots(b"\1\0\0\0\xff\xff\xff\xff") == (1, TAKEN)
    assert unpack_checksums(b"\2" + bytes(7)) == (2,)
    assert split(b"a" * 32 + b"b" * 32) == (b"a" * 32, b"b" * 32)


def test_what_is_not_whole_or_too_much_is_refused_by_name() -> None:
    assert count_keys(bytes(64), most=2) == 2
    with pytest.raises(InvalidRequest, match="keys: 63 bytes"):
        count_keys(bytes(63), most=2)
    with pytest.raises(InvalidRequest, match=r"3 in one call; send at most 2"):
        count_keys(bytes(96), most=2)
    with pytest.raises(InvalidRequest, match="slots: 3 bytes"):
        unpack_slots(bytes(3))
