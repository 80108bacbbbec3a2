import hmac
import json
from dataclasses import replace
from hashlib import sha256
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprefetch.cache.keys import KEY_VERSION, Fingerprint, Namespace, Scope, block_keys, extend_keys, root_key
from kvprefetch.errors import InvalidRequest

SECRET = b"a secret of the operator"
ANN = Namespace(Scope.PRIVATE, "ann")
MODEL = Fingerprint(
    weights="w1",
    config="c1",
    dtype="bfloat16",
    rope="default",
    quantisation="",
    adapter="",
    block_tokens=4,
    layout="v1",
    numerics="cpu",
)
ROOT = root_key(SECRET, ANN, MODEL)
TOKENS = [0, 1, 255, 256, 65_536, 151_643, 2**31, 2**32 - 1]


def test_version_2_is_fixed() -> None:
    """Other processes and stored pages rely on these bytes; a change of them raises KEY_VERSION."""
    assert KEY_VERSION == 2
    assert ROOT.hex() == "1994be131095081f40dfe2412b5fcf98eda663afaeb6a3c111798eebc2b9ccc4"
    assert [key.hex() for key in block_keys(ROOT, TOKENS, 4)] == [
        "819b096562636ef2af461485c4838990cf8fcc12974cd390cd3059e8b0f8cadb",
        "4a3cbfa758bc0f05e14e1fc416c69118bb7f537b0676546aa4f62b1899152846",
    ]


def test_keys_are_a_sha256_chain_hung_from_a_keyed_root() -> None:
    body = {
        "fingerprint": {
            "adapter": "",
            "block_tokens": 4,
            "config": "c1",
            "dtype": "bfloat16",
            "layout": "v1",
            "numerics": "cpu",
            "quantisation": "",
            "rope": "default",
            "tp_rank": 0,
            "weights": "w1",
        },
        "namespace": ["private", "ann"],
        "version": 2,
    }
    root = hmac.new(SECRET, json.dumps(body, separators=(",", ":")).encode("ascii"), sha256).digest()
    first = sha256(root + pack("<4I", *TOKENS[:4])).digest()
    second = sha256(first + pack("<4I", *TOKENS[4:])).digest()
    assert root == ROOT
    assert block_keys(root, TOKENS, 4) == [first, second]


@pytest.mark.parametrize("changed", range(12))
def test_a_key_depends_on_every_earlier_token_and_on_none_after(changed: int) -> None:
    tokens = list(range(12))
    other = [token + 100 * (at == changed) for at, token in enumerate(tokens)]
    same = [a == b for a, b in zip(block_keys(ROOT, tokens, 4), block_keys(ROOT, other, 4), strict=True)]
    assert same == [block < changed // 4 for block in range(3)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "w2"),
        ("config", "c2"),
        ("dtype", "float32"),
        ("rope", "yarn"),
        ("quantisation", "int8"),
        ("adapter", "lora"),
        ("block_tokens", 8),
        ("layout", "v2"),
        ("tp_rank", 1),
    ],
)
def test_models_that_differ_in_one_thing_share_no_key(field: str, value: object) -> None:
    other = root_key(SECRET, ANN, replace(MODEL, **{field: value}))
    assert set(block_keys(ROOT, TOKENS, 4)).isdisjoint(block_keys(other, TOKENS, 4))


@pytest.mark.parametrize(
    "other",
    [Namespace(Scope.PRIVATE, "bob"), Namespace(Scope.GROUP, "ann"), Namespace(Scope.PUBLIC, "")],
    ids=["other tenant", "a group of that name", "public"],
)
def test_namespaces_share_no_key(other: Namespace) -> None:
    keys = block_keys(root_key(SECRET, other, MODEL), TOKENS, 4)
    assert set(block_keys(ROOT, TOKENS, 4)).isdisjoint(keys)


def test_who_does_not_know_the_secret_cannot_name_a_root() -> None:
    assert root_key(b"another secret", ANN, MODEL) != ROOT


@pytest.mark.parametrize(("tokens", "full"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_a_partial_block_has_no_key(tokens: int, full: int) -> None:
    assert len(block_keys(ROOT, range(tokens), 4)) == full


@given(st.lists(st.integers(0, 2**32 - 1), max_size=30), st.integers(1, 5), st.data())
def test_extending_gives_the_keys_of_keying_at_once(tokens: list[int], block_tokens: int, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=4).map(sorted))
    keys: list[bytes] = []
    for cut in [*cuts, len(tokens)]:
        assert extend_keys(keys, ROOT, tokens[:cut], block_tokens) is keys
    assert keys == block_keys(ROOT, tokens, block_tokens)


@pytest.mark.parametrize("bad", [-1, 2**32, 1.5, "7", None])
def test_a_token_id_out_of_range_is_refused_and_nothing_appended(bad: object) -> None:
    keys = block_keys(ROOT, [1, 2, 3, 4], 4)
    before = list(keys)
    with pytest.raises(InvalidRequest, match="token ids"):
        extend_keys(keys, ROOT, [1, 2, 3, 4, 5, 6, 7, bad], 4)  # type: ignore[list-item]
    assert keys == before
